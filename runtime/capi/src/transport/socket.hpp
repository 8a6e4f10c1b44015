// Messages over a socket pair: u32 length of the JSON, u32 flags, u64 length of the blob (little-endian), the JSON, the blob's bytes.
// Flag 1: the blob is in a memory file that came along (SCM_RIGHTS), in place of the bytes. Keep equal to sdruntime/serving/service.py.
#pragma once

#include <stdexcept>

#include "wire/message.hpp"

namespace sdr {

constexpr size_t HEADER = 16, LARGEST_JSON = size_t{64} << 20, LARGEST_BLOB = size_t{1} << 32, SHARED_FROM = size_t{64} << 10;
constexpr uint32_t IN_MEMORY_FILE = 1;

// What came is no message.
class BadFrame : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// False where the other side is gone. SIGPIPE is not raised. Throws BadFrame where a memory file cannot be made.
bool send_message(int socket, const Message &message);

// False where the other side is gone: the socket has ended, or, with nothing left to read, `process` (a pidfd, or -1) has.
// Throws BadFrame.
bool receive_message(int socket, int process, Message &message);

}  // namespace sdr
