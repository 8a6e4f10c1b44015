// The messages between the library and the service: a JSON object and bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "wire/json.hpp"

namespace sdr {

// Bytes and their owner: a vector or a mapped file.
class Blob {
public:
    Blob() = default;
    explicit Blob(std::vector<uint8_t> bytes) : size_(bytes.size()) {
        auto owner = std::make_shared<std::vector<uint8_t>>(std::move(bytes));
        data_ = std::shared_ptr<const uint8_t>(owner, owner->data());
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

// Receives the events of a service, on threads of the transport.
class Sink {
public:
    // Return false if the event is invalid: the service can no longer be trusted.
    virtual bool on_event(Message &&message) noexcept = 0;
    // The service has ended, and no more events follow.
    virtual void on_end(const std::string &why) noexcept = 0;

protected:
    ~Sink() = default;
};

// The connection to one service. The destructor ends its threads; the sink is not called afterwards.
class Transport {
public:
    virtual ~Transport() = default;
    // Send a message. Never blocks: a thread of the transport sends the messages in order.
    virtual void send(Message message) = 0;
    // Close the connection, without waiting for "closed" from the service.
    virtual void hang_up() = 0;
    virtual bool in_process() const = 0;
};

}  // namespace sdr
