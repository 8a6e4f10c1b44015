// Pass bytes to the library's readers of JSON and of socket messages: fuzz (json | frames).
// stdin: the cases, each a u32 length and its bytes. stdout: for each case, a u32 length and the result.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport/descriptor.hpp"
#include "transport/socket.hpp"
#include "wire/json.hpp"

namespace {

using Bytes = std::vector<uint8_t>;  // of the exact size, so that the sanitizer detects reads beyond it

bool next(Bytes &out) {
    uint32_t size = 0;
    if (std::fread(&size, sizeof size, 1, stdin) != 1) return false;
    out = Bytes(size);
    return std::fread(out.data(), 1, size, stdin) == size;
}

void write_result(const std::string &text) {
    const auto size = static_cast<uint32_t>(text.size());
    std::fwrite(&size, sizeof size, 1, stdout);
    std::fwrite(text.data(), 1, size, stdout);
}

// Return "=" and the document, written again, or "!" and the error.
std::string json(const Bytes &bytes) {
    try {
        return "=" + sdr::Json::parse({reinterpret_cast<const char *>(bytes.data()), bytes.size()}).text();
    } catch (const sdr::JsonError &error) {
        return std::string("!") + error.what();
    }
}

int memory_file(size_t size, bool sealed) {
    const int file = memfd_create("fuzz", MFD_ALLOW_SEALING);
    Bytes content(size);
    for (size_t k = 0; k < size; ++k) content[k] = static_cast<uint8_t>(k % 251);
    if (write(file, content.data(), size) != static_cast<ssize_t>(size)) std::abort();
    if (sealed) fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK);
    return file;
}

std::vector<int> descriptors(char kind) {
    switch (kind) {
        case 's':
            return {memory_file(100000, true)};
        case 'u':
            return {memory_file(100000, false)};
        case '2':
            return {memory_file(100000, true), memory_file(100000, true)};
        case '-':
            return {memory_file(10, true)};
        case 'n':
            return {open("/dev/null", O_RDONLY)};
        case 'd':
            return {open("/", O_RDONLY | O_DIRECTORY)};
        default:
            return {};
    }
}

void put(int socket, const uint8_t *data, size_t size, const std::vector<int> &files) {
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
    iovec part = {const_cast<uint8_t *>(data), size};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (!files.empty()) {
        const size_t length = files.size() * sizeof(int);
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(length);
        cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(length);
        std::memcpy(CMSG_DATA(header), files.data(), length);
    }
    if (size && sendmsg(socket, &message, MSG_DONTWAIT) != static_cast<ssize_t>(size)) std::abort();
}

// Receive the messages of a stream. The first byte selects the descriptors that are sent along. Returns a line per message with
// the sizes and sums of its two parts, then "end" or "bad".
std::string frames(const Bytes &bytes) {
    int ends[2];
    if (bytes.empty() || socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) std::abort();
    const sdr::Descriptor reader(ends[0]);
    {
        const sdr::Descriptor writer(ends[1]);
        const std::vector<int> files = descriptors(static_cast<char>(bytes[0]));
        put(writer.get(), bytes.data() + 1, bytes.size() - 1, files);
        for (const int file : files) close(file);
    }
    std::string result;
    try {
        for (sdr::Message message; sdr::receive_message(reader.get(), -1, message); message = {}) {
            const auto *data = message.blob.data();
            const uint64_t text = std::accumulate(message.json.begin(), message.json.end(), uint64_t{0},
                                                  [](uint64_t sum, char letter) { return sum + static_cast<uint8_t>(letter); });
            result += std::to_string(message.json.size()) + ":" + std::to_string(text) + " " +
                      std::to_string(message.blob.size()) + ":" +
                      std::to_string(std::accumulate(data, data + message.blob.size(), uint64_t{0})) + "\n";
        }
        return result + "end";
    } catch (const sdr::BadFrame &) {
        return result + "bad";
    }
}

std::string open_files() {
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;
    while (readdir(folder)) ++count;
    closedir(folder);
    return std::to_string(count);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    const std::string before = open_files();
    Bytes bytes;
    while (next(bytes)) write_result(std::strcmp(argv[1], "json") == 0 ? json(bytes) : frames(bytes));
    write_result(before + " " + open_files());
    return 0;
}
