/* Progress, previews, cancellation, the queue, and calls inside a callback. */
#include "harness.h"

struct seen {
    int calls, in_order, steps, same_job, previews;
    long floats;
    float last;
    sdr_job *job;
    int cancel_at;
};

static int32_t record(void *user, sdr_job *job, const sdr_progress *progress) {
    struct seen *seen = user;
    long floats = (long)progress->preview_channels * progress->preview_height * progress->preview_width;
    if (!seen->calls) seen->in_order = 1, seen->same_job = 1, seen->job = job;
    ++seen->calls;
    seen->in_order &= progress->step == seen->calls;
    seen->same_job &= job == seen->job && progress->struct_size == sizeof *progress;
    seen->steps = progress->steps;
    if (progress->preview) {
        ++seen->previews;
        seen->floats = floats;
        seen->last = progress->preview[floats - 1];
    }
    return seen->calls == seen->cancel_at;
}

static void progress(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    struct seen seen = {0};
    sdr_job *job;
    params.progress = record;
    params.progress_user = &seen;
    job = submit(runtime, &params);
    WORKS(sdr_job_wait(job, -1));
    CHECK(seen.calls == 3 && seen.in_order && seen.steps == 3 && seen.same_job && seen.job == job);
    CHECK(seen.previews == 0);
    sdr_job_free(job);
    memset(&seen, 0, sizeof seen);
    params.preview = 1;
    job = submit(runtime, &params);
    WORKS(sdr_job_wait(job, -1));
    CHECK(seen.previews == 3 && seen.floats > 0 && seen.last == seen.last);
    sdr_job_free(job);
    sdr_runtime_free(runtime);
}

static void the_callback_cancels(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    struct seen seen = {0};
    sdr_result result;
    sdr_job *job;
    const uint8_t *rows;
    size_t stride;
    int32_t state = -1;
    params.progress = record;
    params.progress_user = &seen;
    params.steps = 50;
    seen.cancel_at = 2;
    job = submit(runtime, &params);
    FAILS(sdr_job_wait(job, -1), SDR_CANCELLED, SDR_REASON_CANCELLED);
    CHECK(seen.calls == 2);
    WORKS(sdr_job_poll(job, &state, NULL, NULL));
    CHECK(state == SDR_JOB_CANCELLED);
    sdr_result_init(&result, sizeof result);
    FAILS(sdr_job_result(job, &result), SDR_CANCELLED, SDR_REASON_CANCELLED);
    FAILS(sdr_job_rgb(job, &rows, &stride), SDR_CANCELLED, SDR_REASON_CANCELLED);
    WORKS(sdr_job_cancel(job));
    sdr_job_free(job);
    /* also in the last step */
    memset(&seen, 0, sizeof seen);
    params.steps = seen.cancel_at = 3;
    job = submit(runtime, &params);
    FAILS(sdr_job_wait(job, -1), SDR_CANCELLED, SDR_REASON_CANCELLED);
    sdr_job_free(job);
    sdr_runtime_free(runtime);
}

static void cancel(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    struct gate gate;
    sdr_job *job = submit_gated(runtime, &gate, 100), *other;
    int32_t state = -1, step = -1;
    const uint8_t *rows;
    size_t stride;
    gate_wait(&gate);
    WORKS(sdr_job_poll(job, &state, &step, NULL));
    CHECK(state == SDR_JOB_RUNNING && step == 1);
    FAILS(sdr_job_wait(job, 0), SDR_FAILED, SDR_REASON_TIMEOUT);
    FAILS(sdr_job_wait(job, 20), SDR_FAILED, SDR_REASON_TIMEOUT);
    FAILS(sdr_job_rgb(job, &rows, &stride), SDR_USAGE, SDR_REASON_NOT_FINISHED);
    /* a waiting job is cancelled as well */
    other = submit(runtime, &params);
    WORKS(sdr_job_cancel(other));
    WORKS(sdr_job_cancel(job));
    WORKS(sdr_job_cancel(job));
    gate_open(&gate);
    FAILS(sdr_job_wait(job, -1), SDR_CANCELLED, SDR_REASON_CANCELLED);
    FAILS(sdr_job_wait(job, 0), SDR_CANCELLED, SDR_REASON_CANCELLED);
    FAILS(sdr_job_wait(other, -1), SDR_CANCELLED, SDR_REASON_CANCELLED);
    CHECK(gate_calls(&gate) == 1);
    WORKS(sdr_job_cancel(job));
    sdr_job_free(job);
    sdr_job_free(other);
    /* a finished job keeps its image */
    job = submit(runtime, &params);
    WORKS(sdr_job_wait(job, -1));
    WORKS(sdr_job_cancel(job));
    WORKS(sdr_job_wait(job, -1));
    CHECK(sum_of(job) != 0);
    sdr_job_free(job);
    sdr_runtime_free(runtime);
}

static void full_queue(void) {
    sdr_open_params open = open_params();
    sdr_job_params params = job_params();
    sdr_runtime *runtime = NULL;
    struct gate gate;
    sdr_job *first, *waits[2], *none = NULL;
    int32_t state = -1;
    open.queue = 2;
    WORKS(sdr_runtime_open(&open, &runtime));
    first = submit_gated(runtime, &gate, 3);
    gate_wait(&gate);
    waits[0] = submit(runtime, &params);
    waits[1] = submit(runtime, &params);
    FAILS(sdr_job_submit(runtime, &params, &none), SDR_FAILED, SDR_REASON_QUEUE_FULL);
    CHECK(none == NULL);
    WORKS(sdr_job_poll(waits[0], &state, NULL, NULL));
    CHECK(state == SDR_JOB_QUEUED);
    gate_open(&gate);
    WORKS(sdr_job_wait(first, -1));
    WORKS(sdr_job_wait(waits[0], -1));
    WORKS(sdr_job_wait(waits[1], -1));
    none = submit(runtime, &params);
    WORKS(sdr_job_wait(none, -1));
    sdr_job_free(none);
    sdr_job_free(waits[0]);
    sdr_job_free(waits[1]);
    sdr_job_free(first);
    sdr_runtime_free(runtime);
}

struct inside {
    sdr_runtime *runtime;
    sdr_job *other;
    int done;
};

static int32_t call_functions(void *user, sdr_job *job, const sdr_progress *progress) {
    struct inside *inside = user;
    sdr_open_params open = open_params();
    sdr_runtime *none = NULL;
    sdr_job_params params = job_params();
    const char *json;
    int32_t state = -1;
    if (inside->done++) return 0;
    (void)progress;
    FAILS(sdr_job_wait(job, -1), SDR_USAGE, SDR_REASON_REENTERED);
    FAILS(sdr_job_wait(job, 10), SDR_USAGE, SDR_REASON_REENTERED);
    FAILS(sdr_job_wait(job, 0), SDR_FAILED, SDR_REASON_TIMEOUT);
    FAILS(sdr_runtime_close(inside->runtime), SDR_USAGE, SDR_REASON_REENTERED);
    FAILS(sdr_runtime_open(&open, &none), SDR_USAGE, SDR_REASON_REENTERED);
    WORKS(sdr_runtime_describe(inside->runtime, &json));
    WORKS(sdr_job_poll(job, &state, NULL, NULL));
    CHECK(state == SDR_JOB_RUNNING);
    inside->other = submit(inside->runtime, &params);
    return 0;
}

static void calls_from_a_callback(void) {
    struct inside inside = {0};
    sdr_job_params params = job_params();
    sdr_job *job;
    inside.runtime = open_runtime();
    params.progress = call_functions;
    params.progress_user = &inside;
    job = submit(inside.runtime, &params);
    WORKS(sdr_job_wait(job, -1));
    WORKS(sdr_job_wait(inside.other, -1));
    sdr_job_free(inside.other);
    sdr_job_free(job);
    sdr_runtime_free(inside.runtime);
}

static int32_t free_myself(void *user, sdr_job *job, const sdr_progress *progress) {
    (void)progress;
    ++*(int *)user;
    sdr_job_free(job);
    return 0;
}

static void a_callback_frees_its_job(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    int calls = 0;
    params.progress = free_myself;
    params.progress_user = &calls;
    params.steps = 20;
    submit(runtime, &params);
    params = job_params();
    {
        sdr_job *other = submit(runtime, &params);
        WORKS(sdr_job_wait(other, -1));
        sdr_job_free(other);
    }
    sdr_runtime_free(runtime);
    CHECK(calls == 1);
}

struct lines {
    pthread_mutex_t mutex;
    int count, levels, empty;
};

static void count_line(void *user, int32_t level, const char *message) {
    struct lines *lines = user;
    pthread_mutex_lock(&lines->mutex);
    ++lines->count;
    lines->levels |= level < SDR_LOG_DEBUG || level > SDR_LOG_ERROR;
    lines->empty |= !*message;
    pthread_mutex_unlock(&lines->mutex);
}

static void log_lines(void) {
    sdr_open_params open = open_params();
    sdr_runtime *runtime = NULL;
    struct lines lines = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0};
    int before;
    open.log = count_line;
    open.log_user = &lines;
    open.log_level = SDR_LOG_DEBUG;
    WORKS(sdr_runtime_open(&open, &runtime));
    sdr_runtime_free(runtime);
    before = lines.count;
    CHECK(!lines.levels && !lines.empty);
    open.log_level = SDR_LOG_ERROR + 1;
    WORKS(sdr_runtime_open(&open, &runtime));
    sdr_runtime_free(runtime);
    CHECK(lines.count == before);
}

struct leaving {
    sdr_runtime *runtime;
    struct lines *lines;
    int before;
};

static int32_t free_the_runtime(void *user, sdr_job *job, const sdr_progress *progress) {
    struct leaving *leaving = user;
    (void)job;
    if (progress->step > 1) return 0;
    sdr_runtime_free(leaving->runtime);
    pthread_mutex_lock(&leaving->lines->mutex);
    leaving->before = leaving->lines->count;
    pthread_mutex_unlock(&leaving->lines->mutex);
    return 0;
}

static void a_callback_frees_the_runtime(void) {
    sdr_open_params open = open_params();
    sdr_job_params params = job_params();
    struct lines lines = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0};
    struct leaving leaving = {NULL, &lines, -1};
    sdr_job *job;
    open.log = count_line;
    open.log_user = &lines;
    open.log_level = SDR_LOG_DEBUG;
    WORKS(sdr_runtime_open(&open, &leaving.runtime));
    params.progress = free_the_runtime;
    params.progress_user = &leaving;
    params.steps = 500;
    job = submit(leaving.runtime, &params);
    FAILS(sdr_job_wait(job, -1), SDR_CANCELLED, SDR_REASON_CLOSED);
    CHECK(lines.count == leaving.before);
    sdr_job_free(job);
}

void callbacks_tests(void) {
    RUN(progress);
    RUN(the_callback_cancels);
    RUN(cancel);
    RUN(full_queue);
    RUN(calls_from_a_callback);
    RUN(a_callback_frees_its_job);
    RUN(log_lines);
    RUN(a_callback_frees_the_runtime);
}
