/* Freeing and closing at different times, and from several threads. */
#include "harness.h"

static void *close_it(void *runtime) {
    sdr_status_free(sdr_runtime_close(runtime));
    return NULL;
}

/* Wait until the runtime accepts no more jobs. Jobs that have not ended by then must end as cancelled. */
static void wait_until_it_closes(sdr_runtime *runtime) {
    const char *json;
    sdr_status *status = NULL;
    while (sdr_status_reason(status) != SDR_REASON_CLOSED) {
        sdr_status_free(status);
        status = sdr_runtime_describe(runtime, &json);
    }
    sdr_status_free(status);
}

static void closing_ends_jobs(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    struct gate gate;
    sdr_job *done = submit(runtime, &params), *runs, *waits, *none = NULL;
    pthread_t thread;
    const char *json;
    unsigned long sum;
    WORKS(sdr_job_wait(done, -1));
    sum = sum_of(done);
    runs = submit_gated(runtime, &gate, 200);
    gate_wait(&gate);
    waits = submit(runtime, &params);
    pthread_create(&thread, NULL, close_it, runtime);
    wait_until_it_closes(runtime);
    gate_open(&gate);
    pthread_join(thread, NULL);
    FAILS(sdr_job_wait(runs, 0), SDR_CANCELLED, SDR_REASON_CLOSED);
    FAILS(sdr_job_wait(waits, 0), SDR_CANCELLED, SDR_REASON_CLOSED);
    FAILS(sdr_job_submit(runtime, &params, &none), SDR_USAGE, SDR_REASON_CLOSED);
    FAILS(sdr_runtime_describe(runtime, &json), SDR_USAGE, SDR_REASON_CLOSED);
    WORKS(sdr_runtime_close(runtime));
    WORKS(sdr_job_cancel(runs));
    sdr_runtime_free(runtime);
    CHECK(sum_of(done) == sum);
    WORKS(sdr_job_cancel(done));
    sdr_job_free(done);
    sdr_job_free(runs);
    sdr_job_free(waits);
}

static void an_image_outlives_its_runtime(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    sdr_job *job;
    const uint8_t *rows = NULL;
    size_t stride = 0;
    unsigned char first;
    job = submit(runtime, &params);
    WORKS(sdr_job_wait(job, -1));
    WORKS(sdr_job_rgb(job, &rows, &stride));
    first = rows[0];
    sdr_runtime_free(runtime);
    CHECK(rows[0] == first && sum_of(job) != 0);
    sdr_job_free(job);
}

static void freeing_a_job_that_runs(void) {
    sdr_runtime *runtime = open_runtime();
    struct gate gate;
    sdr_job *job = submit_gated(runtime, &gate, 200);
    int calls;
    gate_wait(&gate);
    gate_open(&gate);
    sdr_job_free(job);
    calls = gate_calls(&gate);
    FAILS(sdr_job_wait(job, -1), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    sdr_runtime_free(runtime);
    CHECK(gate_calls(&gate) == calls);
}

static void *wait_for(void *job) { return sdr_job_wait(job, -1); }

static void *free_it(void *job) {
    sdr_job_free(job);
    return NULL;
}

static void wait_until_it_is_freed(sdr_job *job) {
    int32_t state, step, steps;
    sdr_status *status = NULL;
    while (sdr_status_reason(status) != SDR_REASON_BAD_HANDLE) {
        sdr_status_free(status);
        status = sdr_job_poll(job, &state, &step, &steps);
    }
    sdr_status_free(status);
}

/* The job blocks in its callback until it is freed. Freeing also cancels it, so the wait may end with either reason. */
static void freeing_a_job_that_is_waited_for(void) {
    sdr_runtime *runtime = open_runtime();
    struct gate gate;
    sdr_job *job = submit_gated(runtime, &gate, 200);
    pthread_t waiter, freer;
    void *status = NULL;
    gate_wait(&gate);
    pthread_create(&waiter, NULL, wait_for, job);
    pthread_create(&freer, NULL, free_it, job);
    wait_until_it_is_freed(job);
    gate_open(&gate);
    pthread_join(freer, NULL);
    pthread_join(waiter, &status);
    CHECK(sdr_status_reason(status) == SDR_REASON_BAD_HANDLE || sdr_status_reason(status) == SDR_REASON_CANCELLED);
    sdr_status_free(status);
    sdr_runtime_free(runtime);
}

struct client {
    sdr_runtime *runtime;
    uint64_t seed;
    unsigned long sums[4];
    int wrong;
};

static void *generate(void *user) {
    struct client *client = user;
    int k;
    for (k = 0; k < 4; ++k) {
        sdr_job_params params = job_params();
        sdr_job *job = NULL;
        params.seed = client->seed;
        params.steps = 2 + k;
        client->wrong += !works(sdr_job_submit(client->runtime, &params, &job)) || !works(sdr_job_wait(job, -1));
        client->sums[k] = sum_of(job);
        sdr_job_free(job);
    }
    return NULL;
}

static void threads(void) {
    sdr_runtime *runtime = open_runtime();
    struct client clients[8];
    pthread_t ids[8];
    int k, j;
    memset(clients, 0, sizeof clients);
    for (k = 0; k < 8; ++k) {
        clients[k].runtime = runtime;
        clients[k].seed = (uint64_t)k;
        pthread_create(&ids[k], NULL, generate, &clients[k]);
    }
    for (k = 0; k < 8; ++k) pthread_join(ids[k], NULL);
    for (k = 0; k < 8; ++k) {
        CHECK(clients[k].wrong == 0);
        for (j = 0; j < 4; ++j) CHECK(clients[k].sums[j] != 0);
        if (k) CHECK(clients[k].sums[0] != clients[0].sums[0]);
    }
    sdr_runtime_free(runtime);
}

static void closing_from_several_threads(void) {
    int round, k;
    for (round = 0; round < 3; ++round) {
        sdr_runtime *runtime = open_runtime();
        sdr_job_params params = job_params();
        struct gate gate;
        pthread_t ids[4];
        sdr_job *jobs[6];
        jobs[0] = submit_gated(runtime, &gate, 200);
        for (k = 1; k < 6; ++k) jobs[k] = submit(runtime, &params);
        gate_wait(&gate);
        for (k = 0; k < 4; ++k) pthread_create(&ids[k], NULL, close_it, runtime);
        wait_until_it_closes(runtime);
        gate_open(&gate);
        sdr_runtime_free(runtime);
        for (k = 0; k < 4; ++k) pthread_join(ids[k], NULL);
        for (k = 0; k < 6; ++k) {
            FAILS(sdr_job_wait(jobs[k], 0), SDR_CANCELLED, SDR_REASON_CLOSED);
            sdr_job_free(jobs[k]);
        }
    }
}

void lifetime_tests(void) {
    RUN(closing_ends_jobs);
    RUN(an_image_outlives_its_runtime);
    RUN(freeing_a_job_that_runs);
    RUN(freeing_a_job_that_is_waited_for);
    RUN(threads);
    RUN(closing_from_several_threads);
}
