// Callbacks that throw: throwing (in-process | process) BUNDLE [PYTHON]. An exception ends only the callback's own job.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "sdruntime/sdruntime.h"

namespace {

int faults = 0, lines = 0;

void expect(const char *what, sdr_status *status, int32_t code, int32_t reason) {
    if (sdr_status_code(status) != code || sdr_status_reason(status) != reason) {
        ++faults;
        std::printf("%s: %d %d %s\n", what, static_cast<int>(sdr_status_code(status)),
                    static_cast<int>(sdr_status_reason(status)), sdr_status_message(status));
    }
    sdr_status_free(status);
}

struct Thrown {
    int at, calls;
    bool plain;
};

int32_t progress(void *user, sdr_job *, const sdr_progress *) {
    auto &thrown = *static_cast<Thrown *>(user);
    if (++thrown.calls != thrown.at) return 0;
    if (thrown.plain) throw 7;
    throw std::runtime_error("from the callback");
}

void log(void *, int32_t, const char *) {
    ++lines;
    throw std::runtime_error("from the log");
}

sdr_job *submit(sdr_runtime *runtime, Thrown *thrown) {
    sdr_job_params params;
    sdr_job_params_init(&params, sizeof params);
    params.prompt = "a red cat";
    params.sampler = "ddim";
    params.steps = 3;
    params.progress = thrown ? progress : nullptr;
    params.progress_user = thrown;
    sdr_job *job = nullptr;
    expect("submit", sdr_job_submit(runtime, &params, &job), SDR_OK, SDR_REASON_NONE);
    return job;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    sdr_open_params open;
    sdr_open_params_init(&open, sizeof open);
    open.isolation = std::strcmp(argv[1], "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    open.bundle = argv[2];
    open.python = argc > 3 ? argv[3] : nullptr;
    open.threads = 1;
    open.log = log;
    open.log_level = SDR_LOG_DEBUG;
    sdr_runtime *runtime = nullptr;
    expect("open", sdr_runtime_open(&open, &runtime), SDR_OK, SDR_REASON_NONE);
    for (int at = 1; at <= 3; ++at) {
        Thrown thrown{at, 0, at == 2};
        sdr_job *job = submit(runtime, &thrown), *other = submit(runtime, nullptr);
        expect("the job whose callback threw", sdr_job_wait(job, -1), SDR_FAILED, SDR_REASON_CALLBACK);
        expect("the other job", sdr_job_wait(other, -1), SDR_OK, SDR_REASON_NONE);
        int32_t state = -1;
        expect("poll", sdr_job_poll(job, &state, nullptr, nullptr), SDR_OK, SDR_REASON_NONE);
        faults += state != SDR_JOB_FAILED || thrown.calls != at;
        sdr_job_free(job);
        sdr_job_free(other);
    }
    expect("close", sdr_runtime_close(runtime), SDR_OK, SDR_REASON_NONE);
    sdr_runtime_free(runtime);
    std::printf("%d faults, %d lines\n", faults, lines);
    return faults != 0;
}
