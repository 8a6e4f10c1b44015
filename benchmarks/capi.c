/* What benchmarks/capi.py runs: capi (in-process | process) BUNDLE. Prints one JSON object: the opening, calls that do nothing else,
 * and pictures of 512x512, with the copy of one beside them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <sdruntime/sdruntime.h>

enum { CALLS = 100000, PICTURES = 101, SIDE = 512, STEPS = 4 };

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void must(sdr_status *status) {
    if (!status) return;
    fprintf(stderr, "%s\n", sdr_status_message(status));
    exit(1);
}

static int by_size(const void *one, const void *other) {
    const double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static sdr_job *drawn(sdr_runtime *runtime) {
    sdr_job_params params;
    sdr_job *job;
    sdr_job_params_init(&params, sizeof params);
    params.prompt = "a red cat";
    params.sampler = "ddim";
    params.steps = STEPS;
    params.width = params.height = SIDE;
    must(sdr_job_submit(runtime, &params, &job));
    must(sdr_job_wait(job, -1));
    return job;
}

int main(int argc, char **argv) {
    static uint8_t rows[3 * SIDE * SIDE];
    static double pictures[PICTURES], copies[PICTURES];
    sdr_open_params open;
    sdr_runtime *runtime;
    sdr_job *job;
    const char *json;
    double begun, opened, poll, describe;
    int32_t state;
    int k;
    if (argc < 3) return 2;
    sdr_open_params_init(&open, sizeof open);
    open.isolation = strcmp(argv[1], "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    open.bundle = argv[2];
    open.backend = "fake";
    begun = now();
    must(sdr_runtime_open(&open, &runtime));
    opened = now() - begun;
    for (k = 0; k < PICTURES; ++k) {
        begun = now();
        job = drawn(runtime);
        pictures[k] = now() - begun;
        begun = now();
        must(sdr_job_copy_rgb(job, rows, sizeof rows, 0, NULL));
        copies[k] = now() - begun;
        sdr_job_free(job);
    }
    job = drawn(runtime);
    begun = now();
    for (k = 0; k < CALLS; ++k) must(sdr_job_poll(job, &state, NULL, NULL));
    poll = (now() - begun) / CALLS;
    begun = now();
    for (k = 0; k < CALLS; ++k) must(sdr_runtime_describe(runtime, &json));
    describe = (now() - begun) / CALLS;
    qsort(pictures, PICTURES, sizeof *pictures, by_size);
    qsort(copies, PICTURES, sizeof *copies, by_size);
    printf("{\"open_ms\": %.3f, \"poll_us\": %.4f, \"describe_us\": %.4f, \"picture_ms\": %.4f, \"copy_ms\": %.4f}\n",
           1e3 * opened, 1e6 * poll, 1e6 * describe, 1e3 * pictures[PICTURES / 2], 1e3 * copies[PICTURES / 2]);
    sdr_job_free(job);
    sdr_runtime_free(runtime);
    return 0;
}
