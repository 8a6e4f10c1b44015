#include "transport/worker.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "python/find_python.hpp"
#include "python/service_source.hpp"
#include "transport/descriptor.hpp"
#include "transport/outbox.hpp"
#include "transport/socket.hpp"

extern "C" char **environ;

namespace sdr {

namespace {

using namespace std::chrono_literals;

constexpr int WORKER_END = 3;           // the descriptor of the socket in the worker
constexpr auto EXIT_TIMEOUT = 10000ms;  // for a worker to exit after its socket is closed, before it is killed

std::string interpreter(const std::string &parameter) {
    Search search;
    Python python = explicit_python(parameter, search);
    if (python.empty()) python = installed_python(search);
    if (python.empty()) python = system_python(search);
    if (python.interpreter.empty()) throw search.failure("no interpreter found for the worker process");
    return python.interpreter;
}

[[noreturn]] void fail(const std::string &what, int error) {
    throw Failure(SDR_ENVIRONMENT, SDR_REASON_NONE, "sdr_runtime_open: " + what + ": " + std::strerror(error));
}

struct Actions {
    Actions() { posix_spawn_file_actions_init(&actions); }
    ~Actions() { posix_spawn_file_actions_destroy(&actions); }
    posix_spawn_file_actions_t actions;
};

struct Attributes {
    Attributes() { posix_spawnattr_init(&attributes); }
    ~Attributes() { posix_spawnattr_destroy(&attributes); }
    posix_spawnattr_t attributes;
};

// Start the worker in its own process group, so that Ctrl-C reaches only the host. It blocks and ignores no signal, and inherits
// no descriptor of the host except stderr.
pid_t spawn(const std::string &program, int socket) {
    Actions files;
    posix_spawn_file_actions_addopen(&files.actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files.actions, 1, "/dev/null", O_WRONLY, 0);
    if (fcntl(2, F_GETFD) < 0) posix_spawn_file_actions_addopen(&files.actions, 2, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&files.actions, socket, WORKER_END);
    using CloseFrom = int (*)(posix_spawn_file_actions_t *, int);
    if (const auto close_from = reinterpret_cast<CloseFrom>(dlsym(RTLD_DEFAULT, "posix_spawn_file_actions_addclosefrom_np")))
        close_from(&files.actions, WORKER_END + 1);
    Attributes options;
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&options.attributes, &none);
    posix_spawnattr_setsigdefault(&options.attributes, &all);
    posix_spawnattr_setpgroup(&options.attributes, 0);
    posix_spawnattr_setflags(&options.attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    std::string arguments[] = {program, "-c", WORKER_SOURCE, std::to_string(WORKER_END)};
    char *pointers[] = {arguments[0].data(), arguments[1].data(), arguments[2].data(), arguments[3].data(), nullptr};
    pid_t pid = 0;
    if (const int error = posix_spawn(&pid, program.c_str(), &files.actions, &options.attributes, pointers, environ))
        fail(program, error);
    return pid;
}

// Describe how the process ended, from the status of waitpid.
std::string describe_exit(int status) {
    if (WIFEXITED(status)) return "exited with code " + std::to_string(WEXITSTATUS(status));
    const int signal = WTERMSIG(status);
    const char *name = signal == SIGKILL   ? " (SIGKILL; the system sends it when memory runs out)"
                       : signal == SIGSEGV ? " (segmentation fault)"
                       : signal == SIGBUS  ? " (bus error)"
                       : signal == SIGABRT ? " (aborted)"
                                           : "";
    return "was killed by signal " + std::to_string(signal) + name;
}

class Worker : public Transport {
public:
    Worker(Sink &sink, const std::string &python) : sink_(sink) {
        const std::string program = interpreter(python);
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) fail("socketpair", errno);
        // above the three standard descriptors of the host, and above WORKER_END, which dup2 must not overwrite
        Descriptor ours(ends[0]), theirs = at_or_above(WORKER_END + 1, Descriptor(ends[1]));
        socket_ = at_or_above(WORKER_END + 1, std::move(ours));
        if (!socket_ || !theirs) fail("F_DUPFD_CLOEXEC", errno);
        close_on_fork_.emplace(socket_.get());
        pid_ = spawn(program, theirs.get());
#ifdef SYS_pidfd_open
        process_ = at_or_above(WORKER_END + 1, Descriptor(static_cast<int>(syscall(SYS_pidfd_open, pid_, 0))));
#endif
        name_ = "the worker process " + std::to_string(pid_) + " (" + program + ")";
        reader_ = quiet_thread([this] { read(); });
        sender_ = quiet_thread([this] { write(); });
    }

    ~Worker() override {
        hang_up();
        outbox_.close();
        sender_.join();
        reader_.join();
    }

    void send(Message message) override { outbox_.put(std::move(message)); }
    void hang_up() override { shutdown(socket_.get(), SHUT_RDWR); }
    bool in_process() const override { return false; }

private:
    void write() {
        try {
            for (Message message; outbox_.take(message); message = {})
                if (!send_message(socket_.get(), message)) return;  // the reader detects the end too
        } catch (const std::exception &error) {
            const std::lock_guard lock(mutex_);
            unsent_ = error.what();
            hang_up();
        }
    }

    void read() {
        std::string fault;
        try {
            for (Message message; receive_message(socket_.get(), process_.get(), message); message = {})
                if (!sink_.on_event(std::move(message))) throw BadFrame("an invalid event");
        } catch (const std::exception &error) {
            fault = std::string(" sent an invalid message (") + error.what() + ")";
        }
        shutdown(socket_.get(), SHUT_RDWR);
        {
            const std::lock_guard lock(mutex_);
            if (fault.empty() && !unsent_.empty()) fault = " could not be sent a message (" + unsent_ + ")";
        }
        const std::string end = reap(!fault.empty());
        sink_.on_end(name_ + (fault.empty() ? " " + end : fault));
    }

    // Wait until the worker has exited, and return how. Kills it at once, or after a timeout. If the host reaps or ignores its own
    // children, there is nothing to wait for.
    std::string reap(bool at_once) {
        const auto deadline = std::chrono::steady_clock::now() + EXIT_TIMEOUT;
        for (auto pause = 1ms;; pause = std::min(pause * 2, 20ms)) {
            int status = 0;
            const pid_t reaped = waitpid(pid_, &status, WNOHANG);
            if (reaped == pid_) return describe_exit(status);
            if (reaped < 0 && errno != EINTR) return "ended";
            if (reaped == 0 && (at_once || std::chrono::steady_clock::now() > deadline)) {
                kill(pid_, SIGKILL);
                at_once = false;
            }
            std::this_thread::sleep_for(pause);
        }
    }

    Sink &sink_;
    Descriptor socket_, process_;
    std::optional<CloseOnFork> close_on_fork_;  // the worker ends with this process
    pid_t pid_ = 0;
    std::string name_;
    std::mutex mutex_;
    std::string unsent_;  // why a message was not sent; guarded by mutex_
    Outbox outbox_;
    std::thread reader_, sender_;
};

}  // namespace

std::unique_ptr<Transport> worker_transport(Sink &sink, const std::string &python) {
    return std::make_unique<Worker>(sink, python);
}

}  // namespace sdr
