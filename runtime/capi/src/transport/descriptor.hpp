// File descriptors. A host may have few of them, and may close and reopen the first three at any time.
#pragma once

#include <utility>

namespace sdr {

// Owns a descriptor, and closes it.
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

// During its lifetime, a child of fork() closes its copy of a descriptor at once. Otherwise the other end would not see that this
// process has closed the descriptor until every child has ended.
class CloseOnFork {
public:
    explicit CloseOnFork(int number);
    ~CloseOnFork();
    CloseOnFork(const CloseOnFork &) = delete;
    CloseOnFork &operator=(const CloseOnFork &) = delete;

private:
    const int number_;
};

// Return the same open file with a number of at least `first`. Empty, with errno set, if there is none.
Descriptor at_or_above(int first, Descriptor descriptor);

// Throws Failure if too few descriptors are free for an interpreter, its engines or a worker: with too few, Python ends the
// process in which it is started.
void require_descriptors();

}  // namespace sdr
