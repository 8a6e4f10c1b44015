#include "harness.h"

#include <time.h>

struct settings settings;
int faults;
static int failed, ran;
static const char *only;

int works(sdr_status *status) {
    if (!status) return 1;
    printf("  status %d, reason %d: %s\n", (int)sdr_status_code(status), (int)sdr_status_reason(status),
           sdr_status_message(status));
    sdr_status_free(status);
    return 0;
}

void fails(sdr_status *status, int32_t code, int32_t reason, const char *file, int line) {
    if (sdr_status_code(status) != code || sdr_status_reason(status) != reason || (status && !*sdr_status_message(status))) {
        ++faults;
        printf("  %s:%d: expected code %d and reason %d, got %d and %d: %s\n", file, line, (int)code, (int)reason,
               (int)sdr_status_code(status), (int)sdr_status_reason(status), sdr_status_message(status));
    }
    sdr_status_free(status);
}

sdr_open_params open_params(void) {
    sdr_open_params params;
    sdr_open_params_init(&params, sizeof params);
    params.isolation = settings.isolation;
    params.bundle = settings.bundle;
    params.python = settings.python;
    params.backend = settings.backend;
    params.threads = 1;
    return params;
}

sdr_runtime *open_runtime(void) {
    sdr_open_params params = open_params();
    sdr_runtime *runtime = NULL;
    WORKS(sdr_runtime_open(&params, &runtime));
    CHECK(runtime != NULL);
    return runtime;
}

sdr_job_params job_params(void) {
    sdr_job_params params;
    sdr_job_params_init(&params, sizeof params);
    params.prompt = "a red cat";
    params.steps = 3;
    params.sampler = "ddim"; /* one model call per step */
    params.seed = 7;
    return params;
}

sdr_job *submit(sdr_runtime *runtime, const sdr_job_params *params) {
    sdr_job *job = NULL;
    WORKS(sdr_job_submit(runtime, params, &job));
    CHECK(job != NULL);
    return job;
}

unsigned long sum_of(sdr_job *job) {
    const uint8_t *rows = NULL;
    size_t stride = 0, k;
    unsigned long sum = 5381;
    sdr_result result;
    sdr_result_init(&result, sizeof result);
    if (!works(sdr_job_result(job, &result)) || !works(sdr_job_rgb(job, &rows, &stride))) return 0;
    for (k = 0; k < stride * (size_t)result.height; ++k) sum = sum * 33 + rows[k];
    return sum;
}

void gate_init(struct gate *gate) {
    memset(gate, 0, sizeof *gate);
    pthread_mutex_init(&gate->mutex, NULL);
    pthread_cond_init(&gate->changed, NULL);
}

int32_t gate_progress(void *user, sdr_job *job, const sdr_progress *progress) {
    struct gate *gate = user;
    int result;
    (void)progress;
    pthread_mutex_lock(&gate->mutex);
    (void)job;
    ++gate->calls;
    gate->reached = 1;
    pthread_cond_broadcast(&gate->changed);
    while (!gate->open) pthread_cond_wait(&gate->changed, &gate->mutex);
    result = gate->result;
    pthread_mutex_unlock(&gate->mutex);
    return result;
}

void gate_wait(struct gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    while (!gate->reached) {
        struct timespec soon;
        sdr_status *status;
        clock_gettime(CLOCK_REALTIME, &soon);
        soon.tv_sec += 1;
        pthread_cond_timedwait(&gate->changed, &gate->mutex, &soon);
        status = sdr_job_wait(gate->job, 0); /* a job that has ended never reaches the gate */
        if (!gate->reached && sdr_status_reason(status) != SDR_REASON_TIMEOUT) {
            CHECK(works(status));
            break;
        }
        sdr_status_free(status);
    }
    pthread_mutex_unlock(&gate->mutex);
}

void gate_open(struct gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    gate->open = 1;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->mutex);
}

int gate_calls(struct gate *gate) {
    int calls;
    pthread_mutex_lock(&gate->mutex);
    calls = gate->calls;
    pthread_mutex_unlock(&gate->mutex);
    return calls;
}

sdr_job *submit_gated(sdr_runtime *runtime, struct gate *gate, int32_t steps) {
    sdr_job_params params = job_params();
    gate_init(gate);
    params.steps = steps;
    params.progress = gate_progress;
    params.progress_user = gate;
    gate->job = submit(runtime, &params);
    return gate->job;
}

void run_test(const char *name, void (*test)(void)) {
    if (only && strcmp(only, name) != 0) return;
    faults = 0;
    test();
    ++ran;
    failed += faults != 0;
    printf("%s %s\n", faults ? "FAIL" : "ok", name);
    fflush(stdout);
}

/* conformance (in-process | process) BUNDLE [PYTHON [BACKEND [TEST]]]; "-" for an argument that is not set. */
int main(int argc, char **argv) {
    if (argc < 3) return 2;
    settings.isolation = strcmp(argv[1], "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    settings.bundle = argv[2];
    settings.python = argc > 3 && strcmp(argv[3], "-") != 0 ? argv[3] : NULL;
    settings.backend = argc > 4 && strcmp(argv[4], "-") != 0 ? argv[4] : NULL;
    only = argc > 5 ? argv[5] : NULL;
    sdr_runtime_free(open_runtime());
    if (faults) return 2; /* no test can run */
    arguments_tests();
    results_tests();
    callbacks_tests();
    lifetime_tests();
    printf("%d of %d failed\n", failed, ran);
    return failed || !ran;
}
