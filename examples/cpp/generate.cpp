// Generate one image and write it as PNG. Shows a progress bar on a terminal; Ctrl-C cancels.
//
//     generate BUNDLE PROMPT FILE.png [SEED [STEPS [GUIDANCE]]]
//
// The exit codes are those of the sdruntime command line: 0 success, 1 failed, 2 usage, 3 environment, 5 bundle or engine, 130
// cancelled.

#include <sdruntime/sdruntime.hpp>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include <unistd.h>

namespace {

volatile std::sig_atomic_t interrupted = 0;

void interrupt(int) { interrupted = 1; }

// Called after each step, on a thread of the library. Returns false to cancel.
bool show(const sdruntime::Progress &now) {
    constexpr int WIDTH = 40;
    if (isatty(STDERR_FILENO)) {
        std::string bar(static_cast<size_t>(WIDTH * now.step / now.steps), '#');
        bar.resize(WIDTH, '.');
        std::fprintf(stderr, "\r[%s] %d of %d", bar.c_str(), now.step, now.steps);
    }
    return !interrupted;
}

void clear_line() {
    if (isatty(STDERR_FILENO)) std::fputs("\r\x1b[2K", stderr);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 4 || argc > 7) {
        std::fprintf(stderr, "usage: generate BUNDLE PROMPT FILE.png [SEED [STEPS [GUIDANCE]]]\n");
        return SDR_USAGE;
    }
    struct sigaction action = {};
    action.sa_handler = interrupt;
    action.sa_flags = SA_RESETHAND;  // a second Ctrl-C ends the program at once
    sigaction(SIGINT, &action, nullptr);

    try {
        sdruntime::OpenParams open;
        open.bundle = argv[1];
        sdruntime::Runtime runtime(open);

        sdruntime::JobParams params;
        params.prompt = argv[2];
        params.png = true;
        if (argc > 4) params.seed = std::strtoull(argv[4], nullptr, 10);
        if (argc > 5) params.steps = std::atoi(argv[5]);
        if (argc > 6) params.guidance = std::atof(argv[6]);
        sdruntime::Job job = runtime.submit(params, show);
        job.wait();
        clear_line();

        const auto png = job.png();
        std::ofstream file(argv[3], std::ios::binary);
        file.write(reinterpret_cast<const char *>(png.data()), static_cast<std::streamsize>(png.size()));
        if (!file.flush()) {
            std::fprintf(stderr, "generate: cannot write %s\n", argv[3]);
            return SDR_FAILED;
        }
        std::printf("%s\n", argv[3]);
        return SDR_OK;
    } catch (const sdruntime::Error &error) {
        clear_line();
        std::fprintf(stderr, "generate: %s\n", error.what());
        return error.code();
    }
}
