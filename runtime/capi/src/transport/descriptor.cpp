#include "transport/descriptor.hpp"

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "api/failure.hpp"

namespace sdr {

namespace {

constexpr size_t REQUIRED = 16;

struct Numbers {
    std::mutex mutex;
    std::vector<int> all;
};

Numbers &descriptors_to_close() {
    static Numbers &numbers = *new Numbers;  // never freed: a process may fork while it exits
    static const int registered = pthread_atfork([] { numbers.mutex.lock(); }, [] { numbers.mutex.unlock(); },
                                                 [] {
                                                     for (const int number : numbers.all) close(number);
                                                     numbers.all.clear();
                                                     numbers.mutex.unlock();
                                                 });
    static_cast<void>(registered);
    return numbers;
}

}  // namespace

CloseOnFork::CloseOnFork(int number) : number_(number) {
    Numbers &numbers = descriptors_to_close();
    const std::lock_guard lock(numbers.mutex);
    numbers.all.push_back(number);
}

CloseOnFork::~CloseOnFork() {
    Numbers &numbers = descriptors_to_close();
    const std::lock_guard lock(numbers.mutex);
    numbers.all.erase(std::remove(numbers.all.begin(), numbers.all.end(), number_), numbers.all.end());
}

Descriptor::~Descriptor() {
    if (number_ >= 0) close(number_);
}

Descriptor at_or_above(int first, Descriptor descriptor) {
    if (descriptor.get() >= first || !descriptor) return descriptor;
    return Descriptor(fcntl(descriptor.get(), F_DUPFD_CLOEXEC, first));
}

void require_descriptors() {
    std::vector<Descriptor> free;
    while (free.size() < REQUIRED) {
        Descriptor next(eventfd(0, EFD_CLOEXEC));
        if (!next) {
            rlimit limit = {};
            getrlimit(RLIMIT_NOFILE, &limit);
            throw Failure(SDR_ENVIRONMENT, SDR_REASON_NONE,
                          "sdr_runtime_open: " + std::to_string(free.size()) + " free file descriptors, but " +
                              std::to_string(REQUIRED) + " are required; this process may open " +
                              std::to_string(limit.rlim_cur) + ": raise the limit (ulimit -n) or close some");
        }
        free.push_back(std::move(next));
    }
}

}  // namespace sdr
