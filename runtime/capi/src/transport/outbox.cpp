#include "transport/outbox.hpp"

#include <csignal>
#include <utility>

namespace sdr {

std::thread quiet_thread(std::function<void()> body) {
    sigset_t all, before;
    sigfillset(&all);
    // Signals for a fault of the thread stay unblocked: if blocked, they would kill the process without calling the host's
    // handler.
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    struct Restore {
        sigset_t mask;
        ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
    } restore{before};
    return std::thread(std::move(body));
}

}  // namespace sdr
