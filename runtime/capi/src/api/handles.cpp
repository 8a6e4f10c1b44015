#include "api/handles.hpp"

#include <unistd.h>

namespace sdr {

namespace {
constexpr uint64_t FIRST = 4096;
std::atomic<Process *> latest{nullptr};
}  // namespace

// Never freed: threads of the library may outlive main().
Process &Process::current() {
    Process *process = latest.load();
    const pid_t pid = getpid();
    while (!process || process->pid != pid) {
        auto fresh = std::make_unique<Process>(pid, process ? process->next.load() : FIRST, process);
        if (latest.compare_exchange_strong(process, fresh.get())) return *fresh.release();
    }
    return *process;
}

}  // namespace sdr
