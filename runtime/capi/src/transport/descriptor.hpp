// File descriptors, of which a host may have few, and whose first three it may close and open as it likes.
#pragma once

#include <utility>

namespace sdr {

// A descriptor that is closed when this goes.
class Descriptor {
public:
    Descriptor() = default;
    explicit Descriptor(int number) : number_(number) {}
    Descriptor(Descriptor &&other) noexcept : number_(std::exchange(other.number_, -1)) {}
    Descriptor &operator=(Descriptor &&other) noexcept {
        std::swap(number_, other.number_);
        return *this;
    }
    ~Descriptor();
    int get() const { return number_; }
    explicit operator bool() const { return number_ >= 0; }

private:
    int number_ = -1;
};

// As long as this lives, a child of fork() closes its copy of a descriptor as it begins: what the other end waits for must not hang on
// how long some child lives.
class NotInChildren {
public:
    explicit NotInChildren(int number);
    ~NotInChildren();
    NotInChildren(const NotInChildren &) = delete;
    NotInChildren &operator=(const NotInChildren &) = delete;

private:
    const int number_;
};

// The same open file under a number of at least `first`. Empty, with errno, where there is none.
Descriptor at_or_above(int first, Descriptor descriptor);

// Throws Failure where this process cannot open as many as an interpreter, its engines or a worker need: short of them, Python ends
// the process that it should start in.
void require_descriptors();

}  // namespace sdr
