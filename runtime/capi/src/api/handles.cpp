#include "api/handles.hpp"

#include <unistd.h>

namespace sdr {

namespace {
constexpr uint64_t FIRST = 4096;
std::atomic<Process *> current{nullptr};
}  // namespace

// Never freed: threads of the library may outlive main().
Process &Process::here() {
    Process *found = current.load();
    const pid_t pid = getpid();
    while (!found || found->pid != pid) {
        auto fresh = std::make_unique<Process>(pid, found ? found->next.load() : FIRST, found);
        if (current.compare_exchange_strong(found, fresh.get())) return *fresh.release();
    }
    return *found;
}

}  // namespace sdr
