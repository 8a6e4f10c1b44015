/* A host that draws one picture after another and says what became of each, for tests that look at it from outside.
 *
 * host KEY=VALUE...: isolation (first), bundle, python, backend, prompt, seed, steps, size, jobs (at once), rounds (the first as asked,
 * the others of three steps), out (a file for the rows of the last picture), fork (1: the parent opens, its child tries), hold (1:
 * "held" is printed once jobs run, and they go on when a line is read), ignore (1: SIGCHLD), bare (1: descriptors 0, 1 and 2 are closed,
 * and what is printed goes to a copy of 1), block (1: every signal), files (as many descriptors may be open at first: what opening gives
 * is printed, before it goes on without that limit), full (1: no more may be opened during the first round), image (the side of a start
 * image), long (bytes of the first round's prompts), cycles (runtimes that are opened, drawn with and freed before), away (a folder that
 * it changes to once the bundle is open), stay (1: with a child of fork() that does nothing, once the bundle is open, for good). */
#include "sdruntime/sdruntime.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static int count;
static char **words;

static const char *value(const char *key, const char *otherwise) {
    size_t size = strlen(key);
    int k;
    for (k = 1; k < count; ++k)
        if (strncmp(words[k], key, size) == 0 && words[k][size] == '=') return words[k] + size + 1;
    return otherwise;
}

static int told(const char *what, sdr_status *status) {
    int code = (int)sdr_status_code(status);
    printf("%s %d %d %s\n", what, code, (int)sdr_status_reason(status), sdr_status_message(status));
    fflush(stdout);
    sdr_status_free(status);
    return code;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int running, released;

static int32_t hold(void *user, sdr_job *job, const sdr_progress *progress) {
    (void)user, (void)job, (void)progress;
    pthread_mutex_lock(&mutex);
    ++running;
    pthread_cond_broadcast(&changed);
    while (!released) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    return 0;
}

static void held(void) {
    pthread_mutex_lock(&mutex);
    while (!running) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    printf("held\n");
    fflush(stdout);
    (void)getchar();
    pthread_mutex_lock(&mutex);
    released = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

static int save(sdr_job *job, const char *path) {
    sdr_result result;
    const uint8_t *rows;
    size_t stride, y;
    FILE *file;
    sdr_result_init(&result, sizeof result);
    if (told("result", sdr_job_result(job, &result)) || told("rgb", sdr_job_rgb(job, &rows, &stride))) return 1;
    file = fopen(path, "wb");
    if (!file) return 1;
    for (y = 0; y < (size_t)result.height; ++y) fwrite(rows + y * stride, 3, (size_t)result.width, file);
    return fclose(file);
}

static sdr_runtime *opened(int isolation) {
    sdr_open_params params;
    sdr_runtime *runtime = NULL;
    const char *json;
    sdr_open_params_init(&params, sizeof params);
    params.isolation = isolation;
    params.bundle = value("bundle", "");
    params.python = value("python", NULL);
    params.backend = value("backend", NULL);
    params.threads = 1;
    if (told("open", sdr_runtime_open(&params, &runtime)) || sdr_runtime_describe(runtime, &json)) return NULL;
    printf("describe %s\n", json);
    return runtime;
}

/* The numbers of descriptors that may be opened end at `end`; the limit that was before. */
static rlim_t limited(rlim_t end) {
    struct rlimit limit;
    rlim_t before;
    getrlimit(RLIMIT_NOFILE, &limit);
    before = limit.rlim_cur;
    limit.rlim_cur = end;
    setrlimit(RLIMIT_NOFILE, &limit);
    return before;
}

static int draw(sdr_runtime *runtime, int round) {
    int jobs = atoi(value("jobs", "1")), failed = 0, side = atoi(value("image", "0")), k;
    size_t size = round ? 0 : strtoul(value("long", "0"), NULL, 10);
    sdr_job **made = calloc((size_t)jobs, sizeof *made);
    uint8_t *image = calloc(3, (size_t)side * (size_t)side + 1);
    char *prompt = calloc(size + 1, 1);
    rlim_t usual;
    memset(prompt, 'a', size);
    usual = !round && value("full", NULL) ? limited(3) : 0;
    for (k = 0; k < jobs; ++k) {
        sdr_job_params params;
        sdr_job_params_init(&params, sizeof params);
        params.prompt = round ? "a red cat" : size ? prompt : value("prompt", "a red cat");
        params.seed = strtoull(value("seed", "7"), NULL, 10) + (uint64_t)k;
        params.steps = atoi(round ? "3" : value("steps", "3"));
        params.width = params.height = atoi(value("size", "0"));
        params.sampler = "ddim";
        params.image = side ? image : NULL;
        params.image_width = params.image_height = side;
        if (!round && value("hold", NULL)) params.progress = hold;
        failed |= told("submit", sdr_job_submit(runtime, &params, &made[k]));
    }
    if (!round && value("hold", NULL)) held();
    for (k = 0; k < jobs; ++k) failed |= told("job", sdr_job_wait(made[k], 60000));
    if (usual) limited(usual);
    if (!failed && value("out", NULL)) failed |= save(made[jobs - 1], value("out", NULL));
    for (k = 0; k < jobs; ++k) sdr_job_free(made[k]);
    free(made), free(image), free(prompt);
    return failed;
}

/* What a child of fork() gets that does not exec. */
static int in_child(sdr_runtime *runtime, int isolation) {
    const char *json;
    sdr_runtime *own;
    pid_t pid = fork();
    int status = 0;
    if (pid == 0) {
        told("child-describe", sdr_runtime_describe(runtime, &json));
        own = opened(isolation);
        if (own) draw(own, 1);
        sdr_runtime_free(own);
        sdr_runtime_free(runtime);
        fflush(stdout);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    printf("child ended with %d\n", status);
    return status;
}

static int descriptors(void) {
    DIR *folder = opendir("/proc/self/fd");
    int found = 0;
    while (readdir(folder)) ++found;
    closedir(folder);
    return found - 3; /* ".", ".." and the folder's own */
}

/* How many descriptors are open before and after. */
static int cycles(int isolation, int times) {
    int failed = 0, before = 0, k;
    for (k = 0; k < times; ++k) {
        sdr_runtime *runtime = opened(isolation);
        failed |= !runtime || draw(runtime, 0);
        sdr_runtime_free(runtime);
        if (k == 0) before = descriptors(); /* the interpreter keeps some */
    }
    printf("descriptors %d %d\n", before, descriptors());
    return failed;
}

static void with_few_files(int isolation, rlim_t files) {
    int before = descriptors();
    rlim_t usual = limited(files);
    sdr_runtime_free(opened(isolation));
    limited(usual);
    printf("descriptors %d %d\n", before, descriptors());
}

static void without_descriptors(void) {
    int kept = fcntl(1, F_DUPFD_CLOEXEC, 100);
    close(0), close(1), close(2);
    stdout = fdopen(kept, "w");
}

int main(int argc, char **argv) {
    int isolation = strcmp(argv[1], "isolation=process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    int failed = 0, round;
    sdr_runtime *runtime;
    count = argc;
    words = argv;
    if (value("ignore", NULL)) signal(SIGCHLD, SIG_IGN);
    if (value("bare", NULL)) without_descriptors();
    if (value("block", NULL)) {
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, NULL);
    }
    if (value("files", NULL)) with_few_files(isolation, (rlim_t)atoi(value("files", "")));
    if (value("cycles", NULL)) failed |= cycles(isolation, atoi(value("cycles", "")));
    runtime = opened(isolation);
    if (!runtime) return 1;
    if (value("bare", NULL)) printf("taken %d\n", (fcntl(0, F_GETFD) >= 0) + (fcntl(1, F_GETFD) >= 0) + (fcntl(2, F_GETFD) >= 0));
    if (value("stay", NULL)) {
        pid_t child = fork();
        if (child) printf("child %d\n", (int)child), fflush(stdout);
        for (;;) pause();
    }
    if (value("away", NULL) && chdir(value("away", NULL))) return 1;
    if (value("fork", NULL)) failed |= in_child(runtime, isolation);
    for (round = 0; round < atoi(value("rounds", "1")); ++round) failed |= draw(runtime, round);
    failed |= told("close", sdr_runtime_close(runtime));
    sdr_runtime_free(runtime);
    printf("children %d\n", waitpid(-1, NULL, WNOHANG) >= 0); /* 0: none is left, not even a zombie */
    return failed ? 1 : 0;
}
