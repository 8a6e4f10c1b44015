// Messages in order, handed to one thread that may block over them.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "wire/message.hpp"

namespace sdr {

// A thread of the library: every signal is blocked in it, so that the host's handlers run on the host's threads.
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

    // False once it is closed: what is still in it is dropped.
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
