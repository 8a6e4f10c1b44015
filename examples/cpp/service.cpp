// Serve images over a loopback socket, with a thread pool and a line protocol.
//
//     service BUNDLE [PORT [CLIENTS [QUEUE [TIMEOUT]]]]
//
// listens on 127.0.0.1 and prints "listening on 127.0.0.1:PORT". PORT 0, the default, chooses a free port. A client sends
//
//     generate SEED STEPS PROMPT       the prompt extends to the end of the line
//
// and receives, before its next line is read,
//
//     progress STEP STEPS              from time to time, and at the end one of
//     done WIDTH HEIGHT SEED BYTES     followed by BYTES bytes of PNG
//     busy MESSAGE                     QUEUE jobs are already waiting: try again later
//     error CODE MESSAGE               CODE is an exit code of the sdruntime command line
//
// and "bye MESSAGE" if the service closes the connection. If a client closes the connection, or its sending half, its job is
// cancelled. CLIENTS clients are served at a time; others wait to be accepted. On SIGTERM and SIGINT the service drains: it
// accepts no more clients and lines, finishes the running jobs, sends their images, and exits with code 0.
//
// Nothing blocks the service for longer than TIMEOUT seconds (default 120): a client that sends no complete line is disconnected,
// jobs that are not finished that long after the signal are cancelled, and a worker that stops responding while it has work is
// replaced.
//
// Jobs of several clients share engine calls. The engines run in a worker process: if a driver crashes, only the running jobs
// fail, with an "error" line, and the service continues.

#include <sdruntime/sdruntime.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

namespace {

constexpr auto POLL_INTERVAL = std::chrono::milliseconds(50);
constexpr size_t MAX_LINE = 16 * 1024;  // bytes

using Clock = std::chrono::steady_clock;

std::atomic<bool> draining{false}, drain_timed_out{false};
std::chrono::seconds timeout{120};

// The runtime that all clients share, and the time at which its worker last responded.
class Engines {
public:
    explicit Engines(const sdruntime::OpenParams &params)
        : params_(params), runtime_(std::make_shared<sdruntime::Runtime>(params)) {}
    Engines(const Engines &) = delete;
    Engines &operator=(const Engines &) = delete;
    ~Engines() {
        for (std::thread &closer : closers_) closer.join();
    }

    std::shared_ptr<sdruntime::Runtime> current() {
        const std::lock_guard lock(mutex_);
        return runtime_;
    }

    void mark_response() { last_response_ = Clock::now().time_since_epoch().count(); }
    bool unresponsive() const { return Clock::now().time_since_epoch() - Clock::duration(last_response_) > timeout; }

    // Replace the runtime `hung`, unless another client has already done so. A thread closes the old one when its last client has
    // released it: the library gives a worker one minute to end, then kills it.
    void replace(const std::shared_ptr<sdruntime::Runtime> &hung) {
        const std::lock_guard lock(mutex_);
        if (runtime_ != hung) return;
        const auto fresh = std::make_shared<sdruntime::Runtime>(params_);
        closers_.emplace_back([old = std::move(runtime_)] {
            while (old.use_count() > 1) std::this_thread::sleep_for(POLL_INTERVAL);
        });
        runtime_ = fresh;
        mark_response();
    }

private:
    const sdruntime::OpenParams params_;
    std::mutex mutex_;
    std::shared_ptr<sdruntime::Runtime> runtime_;  // guarded by mutex_, like closers_
    std::vector<std::thread> closers_;
    std::atomic<Clock::rep> last_response_{0};
};

// One connection, which receives lines and sends lines and bytes. It never raises SIGPIPE. A client that reads nothing for 10 s is
// treated as gone.
class Client {
public:
    explicit Client(int socket) : socket_(socket) {
        const timeval send_timeout = {10, 0};
        setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &send_timeout, sizeof send_timeout);
    }
    Client(const Client &) = delete;
    Client &operator=(const Client &) = delete;
    ~Client() { close(socket_); }

    bool gone() const { return gone_; }
    bool too_long() const { return received_.size() > MAX_LINE; }

    // Receive what the client has sent, waiting for at most `wait`, and detect that it is gone.
    void listen(std::chrono::milliseconds wait) {
        pollfd ready = {socket_, static_cast<short>(too_long() ? POLLRDHUP : POLLIN), 0};
        if (poll(&ready, 1, static_cast<int>(wait.count())) <= 0) return;
        char bytes[4096];
        const ssize_t size = too_long() ? 0 : recv(socket_, bytes, sizeof bytes, 0);
        if (size > 0) received_.append(bytes, static_cast<size_t>(size));
        else gone_ = true;
    }

    // Return the next received line, if it is complete.
    std::optional<std::string> line() {
        const size_t end = received_.find('\n');
        if (end == std::string::npos) return std::nullopt;
        std::string line = received_.substr(0, end);
        received_.erase(0, end + 1);
        return line;
    }

    void send_line(std::string line) {
        std::replace(line.begin(), line.end(), '\n', ' ');
        line += '\n';
        send(line.data(), line.size());
    }

    void send(const void *bytes, size_t size) {
        for (const char *next = static_cast<const char *>(bytes); size > 0 && !gone_;) {
            const ssize_t sent = ::send(socket_, next, size, MSG_NOSIGNAL);
            if (sent <= 0) gone_ = true;
            else next += sent, size -= static_cast<size_t>(sent);
        }
    }

private:
    const int socket_;
    std::string received_;
    bool gone_ = false;
};

std::mutex jobs_mutex;
int jobs = 0;  // running jobs; guarded by jobs_mutex

// Calls a function at the end of a scope.
class Finally {
public:
    explicit Finally(void (*function)()) : function_(function) {}
    Finally(const Finally &) = delete;
    Finally &operator=(const Finally &) = delete;
    ~Finally() { function_(); }

private:
    void (*const function_)();
};

// Answer one line of a client.
void generate(Engines &engines, Client &client, const std::string &line) {
    std::istringstream words(line);
    std::string verb, prompt;
    uint64_t seed = 0;
    int steps = 0;
    if (!(words >> verb >> seed >> steps) || verb != "generate" || !std::getline(words >> std::ws, prompt))
        return client.send_line("error 2 expected: generate SEED STEPS PROMPT");
    sdruntime::JobParams params;
    params.prompt = prompt.c_str();
    params.seed = seed;
    params.steps = steps;
    params.png = true;
    try {
        const auto runtime = engines.current();
        sdruntime::Job job = runtime->submit(params);
        if (const std::lock_guard lock(jobs_mutex); jobs++ == 0) engines.mark_response();  // an idle worker sends nothing
        const Finally done([] {
            const std::lock_guard lock(jobs_mutex);
            --jobs;
        });
        for (int reported = 0; !job.wait_for(POLL_INTERVAL);) {
            client.listen(std::chrono::milliseconds(0));
            if (client.gone()) return;  // ~Job cancels
            if (drain_timed_out) return client.send_line("error 130 the service is shutting down");
            if (engines.unresponsive()) {
                engines.replace(runtime);
                return client.send_line("error 1 the worker did not respond for " + std::to_string(timeout.count()) +
                                        " s; a new one was started");
            }
            if (const auto now = job.poll(); now.step > reported) {
                engines.mark_response();
                reported = now.step;
                client.send_line("progress " + std::to_string(reported) + " " + std::to_string(now.steps));
            }
        }
        engines.mark_response();
        const auto result = job.result();
        const auto png = job.png();
        std::ostringstream head;
        head << "done " << result.width << ' ' << result.height << ' ' << result.seed << ' ' << png.size();
        client.send_line(head.str());
        client.send(png.data(), png.size());
    } catch (const sdruntime::Error &error) {
        const bool full = error.reason() == SDR_REASON_QUEUE_FULL;
        client.send_line((full ? "busy " : "error " + std::to_string(error.code()) + " ") + error.what());
    }
}

void serve(Engines &engines, Client &client) {
    for (auto since = Clock::now(); !client.gone();) {
        if (draining) return client.send_line("bye the service is shutting down");
        if (const auto line = client.line()) {
            generate(engines, client, *line);
            since = Clock::now();
        } else if (client.too_long()) {
            return client.send_line("bye the line is too long: at most " + std::to_string(MAX_LINE) + " bytes");
        } else if (Clock::now() - since > timeout) {
            return client.send_line("bye no line received for " + std::to_string(timeout.count()) + " s");
        } else {
            client.listen(POLL_INTERVAL);
        }
    }
}

void work(Engines &engines, int listener) {
    while (!draining) {
        const int socket = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (socket < 0) {
            std::this_thread::sleep_for(POLL_INTERVAL);  // the listener is shut down, or too many files are open
            continue;
        }
        Client client(socket);
        serve(engines, client);
    }
}

int listen_on_loopback(uint16_t port) {
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    const auto generic = reinterpret_cast<sockaddr *>(&address);
    if (listener < 0 || bind(listener, generic, size) || listen(listener, SOMAXCONN) || getsockname(listener, generic, &size)) {
        std::perror("service: 127.0.0.1");
        std::exit(1);
    }
    std::printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    std::fflush(stdout);
    return listener;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2 || argc > 6) {
        std::fprintf(stderr, "usage: service BUNDLE [PORT [CLIENTS [QUEUE [TIMEOUT]]]]\n");
        return SDR_USAGE;
    }
    const auto number = [&](int index, int fallback) { return argc > index ? std::atoi(argv[index]) : fallback; };

    // Blocked before the first thread starts, and so in every thread: only sigwait receives them.
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);

    try {
        sdruntime::OpenParams open;
        open.bundle = argv[1];
        open.isolation = SDR_ISOLATION_PROCESS;
        open.queue = static_cast<uint32_t>(number(4, 16));
        timeout = std::chrono::seconds(number(5, 120));
        Engines engines(open);

        const int listener = listen_on_loopback(static_cast<uint16_t>(number(2, 0)));
        std::vector<std::thread> pool;
        for (int k = 0; k < number(3, 8); ++k) pool.emplace_back(work, std::ref(engines), listener);

        std::atomic<bool> drained{false};
        int signal = 0;
        sigwait(&signals, &signal);
        draining = true;
        shutdown(listener, SHUT_RDWR);  // wakes every accept4; new connections are refused
        std::thread watchdog([&] {
            const auto end = Clock::now() + timeout;
            while (!drained && Clock::now() < end) std::this_thread::sleep_for(POLL_INTERVAL);
            drain_timed_out = true;
        });
        for (std::thread &thread : pool) thread.join();
        drained = true;
        watchdog.join();
        close(listener);
        return SDR_OK;
    } catch (const sdruntime::Error &error) {
        std::fprintf(stderr, "service: %s\n", error.what());
        return error.code();
    }
}
