// Pictures over a loopback socket: a pool of threads, a line protocol, and an orderly end.
//
//     service BUNDLE [PORT [CLIENTS [QUEUE [PATIENCE]]]]
//
// listens on 127.0.0.1 (PORT 0, the default: a free port) and prints "listening on 127.0.0.1:PORT". A client sends
//
//     draw SEED STEPS PROMPT           the prompt goes to the end of the line
//
// and gets back, before its next line is read:
//
//     progress STEP STEPS              now and then, while it is drawn, and at last one of
//     done WIDTH HEIGHT SEED BYTES     followed by BYTES bytes, a PNG
//     busy MESSAGE                     QUEUE pictures wait already: try again later
//     error CODE MESSAGE               CODE is an exit code of the sdruntime command line
//
// and "bye MESSAGE" where the service closes the connection. A client that closes it, or the sending half of it, has gone: its
// picture is cancelled. CLIENTS clients are served at a time, further ones wait to be accepted. On SIGTERM and SIGINT the service
// drains: it takes no more clients and no more lines, finishes and sends what it draws, and ends with exit code 0.
//
// Nobody blocks it for longer than PATIENCE seconds (120 where it is not given): a client that sends no whole line is sent away, what
// is not done so long after the signal is cancelled, and a worker that gives no sign while it has work is left for a new one.
//
// Pictures of several clients share engine calls. The engines live in a process of their own, so that a driver that crashes costs
// the pictures under way, which get an "error" line, and not the service.

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

constexpr auto GLANCE = std::chrono::milliseconds(50);  // between two looks at what else may have happened
constexpr size_t LONGEST = 16 * 1024;                   // bytes of a line

using Clock = std::chrono::steady_clock;

std::atomic<bool> draining{false}, over{false};  // over: what is not done by now is cancelled
std::chrono::seconds patience{120};

// The runtime that clients share, and when its worker last gave a sign.
class Engines {
public:
    explicit Engines(const sdruntime::OpenParams &how) : how_(how), runtime_(std::make_shared<sdruntime::Runtime>(how)) {}
    Engines(const Engines &) = delete;
    Engines &operator=(const Engines &) = delete;
    ~Engines() {
        for (std::thread &each : leaving_) each.join();
    }

    std::shared_ptr<sdruntime::Runtime> current() {
        const std::lock_guard lock(mutex_);
        return runtime_;
    }

    void heard() { sign_ = Clock::now().time_since_epoch().count(); }
    bool silent() const { return Clock::now().time_since_epoch() - Clock::duration(sign_) > patience; }

    // In place of `hung`: opened by the first client that misses it. The old one is closed on a thread of its own once its last client
    // has left it: the library gives a worker a minute to end, and then kills it.
    void replace(const std::shared_ptr<sdruntime::Runtime> &hung) {
        const std::lock_guard lock(mutex_);
        if (runtime_ != hung) return;
        const auto fresh = std::make_shared<sdruntime::Runtime>(how_);
        leaving_.emplace_back([old = std::move(runtime_)] {
            while (old.use_count() > 1) std::this_thread::sleep_for(GLANCE);
        });
        runtime_ = fresh;
        heard();
    }

private:
    const sdruntime::OpenParams how_;
    std::mutex mutex_;
    std::shared_ptr<sdruntime::Runtime> runtime_;  // under mutex_, as what follows
    std::vector<std::thread> leaving_;
    std::atomic<Clock::rep> sign_{0};
};

// One connection: lines in, lines and bytes out. Nothing here raises SIGPIPE, and a client that takes nothing for 10 s has gone.
class Client {
public:
    explicit Client(int socket) : socket_(socket) {
        const timeval longest = {10, 0};
        setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &longest, sizeof longest);
    }
    Client(const Client &) = delete;
    Client &operator=(const Client &) = delete;
    ~Client() { close(socket_); }

    bool gone() const { return gone_; }
    bool too_long() const { return received_.size() > LONGEST; }

    // Take in what the client has sent, waiting for it a little, and notice when it has gone.
    void listen(std::chrono::milliseconds wait) {
        pollfd ready = {socket_, static_cast<short>(too_long() ? POLLRDHUP : POLLIN), 0};
        if (poll(&ready, 1, static_cast<int>(wait.count())) <= 0) return;
        char bytes[4096];
        const ssize_t size = too_long() ? 0 : recv(socket_, bytes, sizeof bytes, 0);
        if (size > 0) received_.append(bytes, static_cast<size_t>(size));
        else gone_ = true;
    }

    // The next line of what was taken in.
    std::optional<std::string> line() {
        const size_t end = received_.find('\n');
        if (end == std::string::npos) return std::nullopt;
        std::string found = received_.substr(0, end);
        received_.erase(0, end + 1);
        return found;
    }

    void say(std::string line) {
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

std::mutex working;
int jobs = 0;  // under way; under `working`

class Finally {
public:
    explicit Finally(void (*act)()) : act_(act) {}
    Finally(const Finally &) = delete;
    Finally &operator=(const Finally &) = delete;
    ~Finally() { act_(); }

private:
    void (*const act_)();
};

// The answer to one line.
void draw(Engines &engines, Client &client, const std::string &line) {
    std::istringstream words(line);
    std::string verb, prompt;
    uint64_t seed = 0;
    int steps = 0;
    if (!(words >> verb >> seed >> steps) || verb != "draw" || !std::getline(words >> std::ws, prompt))
        return client.say("error 2 the form is: draw SEED STEPS PROMPT");
    sdruntime::JobParams params;
    params.prompt = prompt.c_str();
    params.seed = seed;
    params.steps = steps;
    params.png = true;
    try {
        const auto runtime = engines.current();
        sdruntime::Job job = runtime->submit(params);
        if (const std::lock_guard lock(working); jobs++ == 0) engines.heard();  // who has no work is not heard of
        const Finally done([] {
            const std::lock_guard lock(working);
            --jobs;
        });
        for (int told = 0; !job.wait_for(GLANCE);) {
            client.listen(std::chrono::milliseconds(0));
            if (client.gone()) return;  // ~Job cancels
            if (over) return client.say("error 130 the service ends");
            if (engines.silent()) {
                engines.replace(runtime);
                return client.say("error 1 the worker gave no sign for " + std::to_string(patience.count()) +
                                  " s: a new one was started");
            }
            if (const auto now = job.poll(); now.step > told) {
                engines.heard();
                told = now.step;
                client.say("progress " + std::to_string(told) + " " + std::to_string(now.steps));
            }
        }
        engines.heard();
        const auto result = job.result();
        const auto png = job.png();
        std::ostringstream head;
        head << "done " << result.width << ' ' << result.height << ' ' << result.seed << ' ' << png.size();
        client.say(head.str());
        client.send(png.data(), png.size());
    } catch (const sdruntime::Error &error) {
        const bool full = error.reason() == SDR_REASON_QUEUE_FULL;
        client.say((full ? "busy " : "error " + std::to_string(error.code()) + " ") + error.what());
    }
}

void serve(Engines &engines, Client &client) {
    for (auto since = Clock::now(); !client.gone();) {
        if (draining) return client.say("bye the service ends");
        if (const auto line = client.line()) {
            draw(engines, client, *line);
            since = Clock::now();
        } else if (client.too_long()) {
            return client.say("bye a line has at most " + std::to_string(LONGEST) + " bytes");
        } else if (Clock::now() - since > patience) {
            return client.say("bye no line came for " + std::to_string(patience.count()) + " s");
        } else {
            client.listen(GLANCE);
        }
    }
}

void work(Engines &engines, int listener) {
    while (!draining) {
        const int socket = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (socket < 0) {
            std::this_thread::sleep_for(GLANCE);  // the end of the listener, or too many files for a while
            continue;
        }
        Client client(socket);
        serve(engines, client);
    }
}

int listen_on_loopback(uint16_t port) {
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    sockaddr_in place = {};
    place.sin_family = AF_INET;
    place.sin_port = htons(port);
    place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof place;
    const auto address = reinterpret_cast<sockaddr *>(&place);
    if (listener < 0 || bind(listener, address, size) || listen(listener, SOMAXCONN) || getsockname(listener, address, &size)) {
        std::perror("service: 127.0.0.1");
        std::exit(1);
    }
    std::printf("listening on 127.0.0.1:%d\n", ntohs(place.sin_port));
    std::fflush(stdout);
    return listener;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2 || argc > 6) {
        std::fprintf(stderr, "usage: service BUNDLE [PORT [CLIENTS [QUEUE [PATIENCE]]]]\n");
        return SDR_USAGE;
    }
    const auto number = [&](int at, int otherwise) { return argc > at ? std::atoi(argv[at]) : otherwise; };

    // Blocked before the first thread starts, thus in every thread: only sigwait gets them.
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ends, nullptr);

    try {
        sdruntime::OpenParams open;
        open.bundle = argv[1];
        open.isolation = SDR_ISOLATION_PROCESS;
        open.queue = static_cast<uint32_t>(number(4, 16));
        patience = std::chrono::seconds(number(5, 120));
        Engines engines(open);

        const int listener = listen_on_loopback(static_cast<uint16_t>(number(2, 0)));
        std::vector<std::thread> pool;
        for (int k = 0; k < number(3, 8); ++k) pool.emplace_back(work, std::ref(engines), listener);

        std::atomic<bool> drained{false};
        int signal = 0;
        sigwait(&ends, &signal);
        draining = true;
        shutdown(listener, SHUT_RDWR);  // wakes every accept4; connections are refused from now on
        std::thread limit([&] {
            const auto end = Clock::now() + patience;
            while (!drained && Clock::now() < end) std::this_thread::sleep_for(GLANCE);
            over = true;
        });
        for (std::thread &thread : pool) thread.join();
        drained = true;
        limit.join();
        close(listener);
        return SDR_OK;
    } catch (const sdruntime::Error &error) {
        std::fprintf(stderr, "service: %s\n", error.what());
        return error.code();
    }
}
