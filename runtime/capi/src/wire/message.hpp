// What goes to and fro between the library and the service: a JSON object, and bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "wire/json.hpp"

namespace sdr {

// Bytes with whatever keeps them: a vector, or a mapped file.
class Blob {
public:
    Blob() = default;
    explicit Blob(std::vector<uint8_t> bytes) : size_(bytes.size()) {
        auto kept = std::make_shared<std::vector<uint8_t>>(std::move(bytes));
        data_ = std::shared_ptr<const uint8_t>(kept, kept->data());
    }
    Blob(std::shared_ptr<const uint8_t> data, size_t size) : data_(std::move(data)), size_(size) {}

    const uint8_t *data() const { return data_.get(); }
    size_t size() const { return size_; }

private:
    std::shared_ptr<const uint8_t> data_;
    size_t size_ = 0;
};

struct Message {
    std::string json;
    Blob blob;
};

// Where the events of a service go. Both are called on threads of the transport.
class Sink {
public:
    // False where it is no event that the library knows: the service cannot be trusted any more.
    virtual bool on_event(Message &&message) noexcept = 0;
    // The service is gone, and sends no more.
    virtual void on_end(const std::string &why) noexcept = 0;

protected:
    ~Sink() = default;
};

// The way to one service. Destroying it ends its threads: afterwards the sink is not called.
class Transport {
public:
    virtual ~Transport() = default;
    // Never blocks: messages go out in order, on a thread of the transport.
    virtual void send(Message message) = 0;
    // After "closed", or in place of it: the service need not answer any more.
    virtual void hang_up() = 0;
    virtual bool in_process() const = 0;
};

}  // namespace sdr
