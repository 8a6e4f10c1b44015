#include "transport/socket.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "transport/descriptor.hpp"

namespace sdr {

namespace {

constexpr size_t FIRST_PIECE = size_t{1} << 20;

void put(uint8_t *at, uint64_t value, int bytes) {
    for (int k = 0; k < bytes; ++k) at[k] = static_cast<uint8_t>(value >> 8 * k);
}

uint64_t get(const uint8_t *at, int bytes) {
    uint64_t value = 0;
    for (int k = 0; k < bytes; ++k) value |= uint64_t{at[k]} << 8 * k;
    return value;
}

union Control {
    cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
};

// Send all bytes, and the descriptor, if any, with the first of them.
bool send_all(int socket, const void *data, size_t size, int descriptor = -1) {
    Control control = {};
    for (size_t sent = 0; sent < size;) {
        iovec part = {const_cast<char *>(static_cast<const char *>(data)) + sent, size - sent};
        msghdr message = {};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        if (descriptor >= 0 && sent == 0) {
            message.msg_control = control.bytes;
            message.msg_controllen = sizeof control.bytes;
            cmsghdr *header = CMSG_FIRSTHDR(&message);
            header->cmsg_level = SOL_SOCKET;
            header->cmsg_type = SCM_RIGHTS;
            header->cmsg_len = CMSG_LEN(sizeof descriptor);
            std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
        }
        const ssize_t done = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        sent += static_cast<size_t>(done);
    }
    return true;
}

// Wait until the socket is readable. Returns false if nothing can arrive any more.
bool wait_readable(int socket, int process) {
    pollfd both[2] = {{socket, POLLIN, 0}, {process, POLLIN, 0}};
    for (;;) {
        if (poll(both, 2, -1) < 0 && errno != EINTR) return false;
        if (both[0].revents) return true;
        if (both[1].revents) return poll(both, 1, 0) > 0;
    }
}

// Receive all bytes. Returns false if the other side is gone. A descriptor that arrives with them is stored in `descriptor`.
bool receive_all(int socket, int process, void *data, size_t size, Descriptor *descriptor = nullptr) {
    for (size_t received_size = 0; received_size < size;) {
        Control control = {};
        iovec part = {static_cast<char *>(data) + received_size, size - received_size};
        msghdr message = {};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        const ssize_t done = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            if (!wait_readable(socket, process)) return false;
            continue;
        }
        if (done <= 0) return false;
        for (cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
            if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
            // This process must close every descriptor that it receives.
            for (size_t at = 0; CMSG_LEN(at + sizeof(int)) <= header->cmsg_len; at += sizeof(int)) {
                int number = -1;
                std::memcpy(&number, CMSG_DATA(header) + at, sizeof number);
                Descriptor received(number);
                if (descriptor) *descriptor = std::move(received);
            }
        }
        received_size += static_cast<size_t>(done);
    }
    return true;
}

// Like receive_all, for a size that the other side announces: allocates at most twice the bytes received so far.
template <class Bytes>
bool receive_growing(int socket, int process, Bytes &bytes, size_t size) {
    for (size_t received_size = 0; received_size < size; received_size = bytes.size()) {
        bytes.resize(std::min(size, std::max(2 * received_size, FIRST_PIECE)));
        if (!receive_all(socket, process, &bytes[received_size], bytes.size() - received_size)) return false;
    }
    return true;
}

[[noreturn]] void fail(const std::string &what) { throw BadFrame(what + ": " + std::strerror(errno)); }

Descriptor memory_file(const Blob &blob) {
    Descriptor file(memfd_create("sdruntime", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!file) fail("memfd_create");
    for (size_t written = 0; written < blob.size();) {
        const ssize_t done = write(file.get(), blob.data() + written, blob.size() - written);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) fail("a memory file of " + std::to_string(blob.size()) + " bytes");
        written += static_cast<size_t>(done);
    }
    fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE);
    return file;
}

Blob from_memory_file(const Descriptor &file, size_t size) {
    struct stat about = {};
    if (!file)
        throw BadFrame("the message announces a memory file of " + std::to_string(size) +
                       " bytes, but none was received: it was not sent, or this process cannot open more files (ulimit -n)");
    if (fstat(file.get(), &about) != 0 || about.st_size < 0 || static_cast<size_t>(about.st_size) < size)
        throw BadFrame("the message announces a memory file of " + std::to_string(size) + " bytes, but it has " +
                       std::to_string(about.st_size));
    const int seals = fcntl(file.get(), F_GET_SEALS);
    if (seals >= 0 && seals & F_SEAL_SHRINK && size) {
        void *mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), 0);
        if (mapped == MAP_FAILED) fail("mmap of " + std::to_string(size) + " bytes");
        return Blob(std::shared_ptr<const uint8_t>(static_cast<const uint8_t *>(mapped),
                                                   [size](const uint8_t *at) { munmap(const_cast<uint8_t *>(at), size); }),
                    size);
    }
    // A file that can still shrink is copied: reading beyond its end would raise SIGBUS.
    std::vector<uint8_t> bytes(size);
    for (size_t received_size = 0; received_size < size;) {
        const ssize_t done =
            pread(file.get(), bytes.data() + received_size, size - received_size, static_cast<off_t>(received_size));
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) fail("a memory file of " + std::to_string(size) + " bytes");
        received_size += static_cast<size_t>(done);
    }
    return Blob(std::move(bytes));
}

}  // namespace

bool send_message(int socket, const Message &message) {
    const bool shared = message.blob.size() >= SHARED_FROM;
    const Descriptor file = shared ? memory_file(message.blob) : Descriptor();
    uint8_t header[HEADER];
    put(header, message.json.size(), 4);
    put(header + 4, shared ? IN_MEMORY_FILE : 0, 4);
    put(header + 8, message.blob.size(), 8);
    return send_all(socket, header, HEADER, file.get()) && send_all(socket, message.json.data(), message.json.size()) &&
           (shared || send_all(socket, message.blob.data(), message.blob.size()));
}

bool receive_message(int socket, int process, Message &message) {
    uint8_t header[HEADER];
    Descriptor file;
    if (!receive_all(socket, process, header, HEADER, &file)) return false;
    const size_t json = get(header, 4), blob = get(header + 8, 8);
    const auto flags = static_cast<uint32_t>(get(header + 4, 4));
    if (json > LARGEST_JSON || blob > LARGEST_BLOB || flags & ~IN_MEMORY_FILE)
        throw BadFrame("a header with " + std::to_string(json) + " bytes of JSON, a blob of " + std::to_string(blob) +
                       " bytes and flags " + std::to_string(flags));
    message.json.clear();
    if (!receive_growing(socket, process, message.json, json)) return false;
    if (flags & IN_MEMORY_FILE) {
        message.blob = from_memory_file(file, blob);
        return true;
    }
    std::vector<uint8_t> bytes;
    if (!receive_growing(socket, process, bytes, blob)) return false;
    message.blob = Blob(std::move(bytes));
    return true;
}

}  // namespace sdr
