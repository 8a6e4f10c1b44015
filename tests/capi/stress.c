/* Many jobs from several threads, with cancellations, invalid parameters, frees and closes at random. Each job must end in a known
 * way.
 *
 * stress (in-process | process) BUNDLE PYTHON BACKEND JOBS [SEED]; "-" for an argument that is not set. JOBS jobs run first, to warm
 * up code, interpreter and allocator; then as many are measured. Prints how many jobs ended in which way, and the memory in KiB with
 * every runtime closed: resident after the first 100 measured jobs, dirty at that time, and dirty at the end. */
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sdruntime/sdruntime.h"

enum { THREADS = 8, BURST = 3, LONGEST = 120000 };
static const long FIRST = 100; /* measured jobs before the first reading of memory */
enum { DONE, CANCELLED, CLOSED, DIED, REJECTED, REFUSED, FULL, FREED, ENDS };
static const char *const NAMES[ENDS] = {"done", "cancelled", "closed", "died", "rejected", "refused", "full", "freed"};

static sdr_open_params open_params;
static int workers; /* true: a job may kill its worker */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static sdr_runtime *current;   /* guarded by mutex, like the following variables */
static sdr_job *seen[THREADS]; /* the latest job of each thread, for others to interfere with */
static long left, ends[ENDS], faults, opened;

struct thread {
    uint64_t random;
    int number;
};

/* One job and the data of its callback. */
struct request {
    sdr_job *job;
    int cancel_at, calls, over;
};

static uint64_t next(struct thread *thread) {
    thread->random = thread->random * 6364136223846793005u + 1442695040888963407u;
    return thread->random >> 33;
}

static int chance(struct thread *thread, unsigned percent) { return next(thread) % 100 < percent; }

static void fault(const char *what, sdr_status *status) {
    pthread_mutex_lock(&mutex);
    ++faults;
    printf("FAULT %s: %d %d %s\n", what, (int)sdr_status_code(status), (int)sdr_status_reason(status),
           sdr_status_message(status));
    pthread_mutex_unlock(&mutex);
}

static void ended(int end) {
    pthread_mutex_lock(&mutex);
    ++ends[end];
    pthread_mutex_unlock(&mutex);
}

static sdr_runtime *open_one(void) {
    sdr_runtime *runtime = NULL;
    sdr_status *status = sdr_runtime_open(&open_params, &runtime);
    if (status) fault("open", status);
    sdr_status_free(status);
    return runtime;
}

/* Replace the current runtime, and close it while other threads use it. */
static void replace(void) {
    sdr_runtime *fresh = open_one(), *last;
    pthread_mutex_lock(&mutex);
    last = current;
    current = fresh;
    ++opened;
    pthread_mutex_unlock(&mutex);
    if (opened % 2) sdr_status_free(sdr_runtime_close(last));
    sdr_runtime_free(last);
    sdr_runtime_free(last);
}

static int32_t progress(void *user, sdr_job *job, const sdr_progress *now) {
    struct request *request = user;
    int32_t state;
    if (__atomic_load_n(&request->over, __ATOMIC_ACQUIRE)) fault("a callback after the end", NULL);
    sdr_status_free(sdr_job_poll(job, &state, NULL, NULL));
    if (now->preview && now->preview[0] != now->preview[0]) fault("a preview that is not a number", NULL);
    return ++request->calls == request->cancel_at;
}

/* Make the parameters invalid in some way. `late` is set if only the engines detect it. Returns 1. */
static int make_invalid(struct thread *thread, sdr_job_params *params, int *late) {
    static const char bad[] = "\xff";
    *late = 0;
    switch (next(thread) % 7) {
        case 0:
            params->prompt = NULL;
            return 1;
        case 1:
            params->prompt = bad;
            return 1;
        case 2:
            params->struct_size = (uint32_t)next(thread) % 8;
            return 1;
        case 3:
            params->options = "{";
            return 1;
        case 4:
            params->width = -8;
            return 1;
        case 5:
            params->steps = 0;
            *late = 1;
            return 1;
        default:
            params->sampler = "no such sampler";
            *late = 1;
            return 1;
    }
}

static int end_of(sdr_status *status, int invalid) {
    const int32_t code = sdr_status_code(status), reason = sdr_status_reason(status);
    if (!status) return invalid ? ENDS : DONE;
    if (code == SDR_CANCELLED && reason == SDR_REASON_CANCELLED) return CANCELLED;
    if (code == SDR_CANCELLED && reason == SDR_REASON_CLOSED) return CLOSED;
    if (code == SDR_FAILED && reason == SDR_REASON_WORKER_DIED) return workers ? DIED : ENDS;
    if (code == SDR_FAILED && reason == SDR_REASON_QUEUE_FULL) return FULL;
    if (code == SDR_USAGE && reason == SDR_REASON_NONE && invalid) return REJECTED;
    return ENDS;
}

static void submit(struct thread *thread, struct request *request, int *invalid) {
    sdr_job_params params;
    sdr_runtime *runtime;
    sdr_status *status;
    int late = 0;
    memset(request, 0, sizeof *request);
    sdr_job_params_init(&params, sizeof params);
    params.prompt = workers && chance(thread, 1) ? "kill" : "a red cat";
    params.sampler = "ddim";
    params.steps = 1 + (int32_t)(next(thread) % 8);
    params.seed = next(thread);
    params.png = chance(thread, 20);
    params.preview = chance(thread, 20);
    params.progress = progress;
    params.progress_user = request;
    if (chance(thread, 20)) request->cancel_at = 1 + (int)(next(thread) % 4);
    *invalid = chance(thread, 15) && make_invalid(thread, &params, &late);
    pthread_mutex_lock(&mutex);
    runtime = current;
    pthread_mutex_unlock(&mutex);
    status = sdr_job_submit(runtime, &params, &request->job);
    if (status) {
        const int32_t reason = sdr_status_reason(status);
        /* another thread has closed or freed the runtime */
        const int gone = reason == SDR_REASON_CLOSED || reason == SDR_REASON_BAD_HANDLE;
        if (request->job) fault("a job in addition to a status", status);
        if (reason == SDR_REASON_QUEUE_FULL) ended(FULL);
        else if (gone || (*invalid && !late && sdr_status_code(status) == SDR_USAGE) ||
                 (workers && reason == SDR_REASON_WORKER_DIED))
            ended(REFUSED);
        else fault("submit", status);
    } else if (*invalid && !late) {
        fault("an invalid parameter was accepted", NULL);
    }
    sdr_status_free(status);
    pthread_mutex_lock(&mutex);
    if (request->job) seen[thread->number] = request->job;
    pthread_mutex_unlock(&mutex);
}

static void interfere(struct thread *thread) {
    sdr_job *other;
    int32_t state, step, steps;
    pthread_mutex_lock(&mutex);
    other = seen[next(thread) % THREADS];
    pthread_mutex_unlock(&mutex);
    sdr_status_free(sdr_job_poll(other, &state, &step, &steps));
    if (chance(thread, 30)) sdr_status_free(sdr_job_cancel(other));
    if (chance(thread, 10)) sdr_status_free(sdr_job_wait(other, (int64_t)(next(thread) % 5)));
}

static void finish(struct thread *thread, struct request *request, int invalid) {
    sdr_status *status;
    const uint8_t *rows;
    size_t stride;
    int found;
    if (!request->job) return;
    if (chance(thread, 10)) {
        ended(FREED);
    } else {
        status = sdr_job_wait(request->job, LONGEST);
        found = end_of(status, invalid);
        if (found == ENDS) fault("an end", status);
        else ended(found);
        __atomic_store_n(&request->over, 1, __ATOMIC_RELEASE);
        sdr_status_free(status);
        status = sdr_job_rgb(request->job, &rows, &stride);
        if ((found == DONE) != (status == NULL)) fault("a picture", status);
        sdr_status_free(status);
    }
    sdr_job_free(request->job);
    __atomic_store_n(&request->over, 1, __ATOMIC_RELEASE);
    if (chance(thread, 10)) sdr_job_free(request->job);
}

/* Return 1 if another job is left to submit. */
static int take(void) {
    int granted;
    pthread_mutex_lock(&mutex);
    granted = left > 0;
    left -= granted;
    pthread_mutex_unlock(&mutex);
    return granted;
}

static void *work(void *user) {
    struct thread *thread = user;
    struct request requests[BURST];
    int invalid[BURST], count, k;
    do {
        const int wanted = 1 + (int)(next(thread) % BURST);
        for (count = 0; count < wanted && take(); ++count) submit(thread, &requests[count], &invalid[count]);
        if (chance(thread, 40)) interfere(thread);
        if (chance(thread, 1)) replace();
        for (k = 0; k < count; ++k) finish(thread, &requests[k], invalid[k]);
    } while (count);
    return NULL;
}

static void run(long jobs, uint64_t seed) {
    struct thread threads[THREADS];
    pthread_t ids[THREADS];
    int k;
    current = open_one();
    left = jobs;
    for (k = 0; k < THREADS; ++k) {
        threads[k].random = seed * 1000 + (uint64_t)k;
        threads[k].number = k;
        pthread_create(&ids[k], NULL, work, &threads[k]);
    }
    for (k = 0; k < THREADS; ++k) pthread_join(ids[k], NULL);
    replace(); /* closes the last runtime too */
    sdr_runtime_free(current);
}

/* Return the memory of this process in KiB. `dirty`: without the pages of programs and libraries, which the system drops and reads
 * again at any time. */
static long memory(int dirty) {
    static const char *const names[] = {"Rss: %ld", "Private_Dirty: %ld", "Shared_Dirty: %ld"};
    char line[128];
    long sum = 0, size;
    FILE *file = fopen("/proc/self/smaps_rollup", "r"); /* exact, unlike statm */
    while (file && fgets(line, sizeof line, file))
        if (dirty ? sscanf(line, names[1], &size) == 1 || sscanf(line, names[2], &size) == 1 : sscanf(line, names[0], &size) == 1)
            sum += size;
    if (file) fclose(file);
    return sum;
}

int main(int argc, char **argv) {
    long jobs, sum = 0, before, resident;
    uint64_t seed;
    int k;
    if (argc < 6) return 2;
    sdr_open_params_init(&open_params, sizeof open_params);
    open_params.isolation = strcmp(argv[1], "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    open_params.bundle = argv[2];
    open_params.python = strcmp(argv[3], "-") == 0 ? NULL : argv[3];
    open_params.backend = strcmp(argv[4], "-") == 0 ? NULL : argv[4];
    open_params.threads = 1;
    open_params.queue = 18;
    workers = open_params.isolation == SDR_ISOLATION_PROCESS && open_params.python;
    jobs = atol(argv[5]);
    seed = argc > 6 ? strtoull(argv[6], NULL, 10) : 1;
    run(jobs, seed);
    run(FIRST, seed + 1);
    malloc_trim(0); /* memory that the allocator keeps for later is not a leak */
    before = memory(1);
    resident = memory(0);
    run(jobs - FIRST, seed + 2);
    malloc_trim(0);
    printf("memory %ld %ld %ld\n", resident, before, memory(1));
    for (k = 0; k < ENDS; ++k) {
        printf("%s %ld\n", NAMES[k], ends[k]);
        sum += ends[k];
    }
    printf("jobs %ld of %ld, %ld runtimes, %ld faults, children %d\n", sum, 2 * jobs, opened, faults,
           waitpid(-1, NULL, WNOHANG) >= 0);
    return faults || sum != 2 * jobs;
}
