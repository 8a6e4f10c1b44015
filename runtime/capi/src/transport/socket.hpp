// Messages over a socket pair: u32 length of the JSON, u32 flags, u64 length of the blob (little-endian), the JSON, the blob's
// bytes. Flag 1: the blob is in a memory file that is sent along (SCM_RIGHTS) instead of the bytes. Keep equal to
// sdruntime/serving/channel.py.
#pragma once

#include <stdexcept>

#include "wire/message.hpp"

namespace sdr {

constexpr size_t HEADER = 16, LARGEST_JSON = size_t{64} << 20, LARGEST_BLOB = size_t{1} << 32, SHARED_FROM = size_t{64} << 10;
constexpr uint32_t IN_MEMORY_FILE = 1;

// The received bytes are not a valid message, or a memory file failed.
class BadFrame : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Send a message. Returns false if the other side is gone; never raises SIGPIPE. Throws BadFrame if a memory file cannot be
// created.
bool send_message(int socket, const Message &message);

// Receive a message. Returns false if the other side is gone: the socket is closed, or nothing is left to read and `process` (a
// pidfd, or -1) has ended. Throws BadFrame.
bool receive_message(int socket, int process, Message &message);

}  // namespace sdr
