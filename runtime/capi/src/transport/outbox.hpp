// A queue of messages for one thread, which may block while it sends them.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "wire/message.hpp"

namespace sdr {

// Start a thread of the library. It blocks signals, so that the host's handlers run on the host's threads.
std::thread quiet_thread(std::function<void()> body);

class Outbox {
public:
    void put(Message message) {
        {
            const std::lock_guard lock(mutex_);
            messages_.push_back(std::move(message));
        }
        filled_.notify_one();
    }

    // Wait for the next message. Returns false once the outbox is closed; remaining messages are discarded.
    bool take(Message &message) {
        std::unique_lock lock(mutex_);
        filled_.wait(lock, [this] { return closed_ || !messages_.empty(); });
        if (closed_) return false;
        message = std::move(messages_.front());
        messages_.pop_front();
        return true;
    }

    void close() {
        {
            const std::lock_guard lock(mutex_);
            closed_ = true;
        }
        filled_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable filled_;
    std::deque<Message> messages_;
    bool closed_ = false;
};

}  // namespace sdr
