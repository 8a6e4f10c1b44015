/* A host that generates images and prints the status of each job, for tests that observe it from outside.
 *
 * host KEY=VALUE...
 *   isolation     must be the first word
 *   bundle, python, backend, prompt, seed, steps, size
 *   jobs          how many are submitted at once
 *   rounds        how many times; all rounds after the first have three steps and a fixed prompt
 *   out           a file for the rows of the last image
 *   image         the side of a start image
 *   prompt_bytes  the length of the first round's prompts
 *   hold=1        print "held" when jobs run, and let them continue when a line is read
 *   cycles        first, open a runtime, generate and free it this many times
 *   chdir         change to this folder after opening the bundle
 *   fork=1        the parent opens the bundle, its child tries to use the runtime
 *   idle_child=1  after opening the bundle, fork a child that does nothing, and wait forever
 *   ignore=1      ignore SIGCHLD
 *   block=1       block every signal
 *   no_stdio=1    close descriptors 0, 1 and 2, and print to a copy of 1
 *   file_limit    first, open once with this limit of open descriptors, and print the result; then continue without the limit
 *   no_files=1    no more descriptors may be opened during the first round */
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

/* Return the value of a key, or `fallback`. */
static const char *value(const char *key, const char *fallback) {
    size_t size = strlen(key);
    int k;
    for (k = 1; k < count; ++k)
        if (strncmp(words[k], key, size) == 0 && words[k][size] == '=') return words[k] + size + 1;
    return fallback;
}

/* Print a status and free it. Returns its code. */
static int report(const char *what, sdr_status *status) {
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

/* Wait until jobs run, then let them continue when a line is read. */
static void wait_for_line(void) {
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
    if (report("result", sdr_job_result(job, &result)) || report("rgb", sdr_job_rgb(job, &rows, &stride))) return 1;
    file = fopen(path, "wb");
    if (!file) return 1;
    for (y = 0; y < (size_t)result.height; ++y) fwrite(rows + y * stride, 3, (size_t)result.width, file);
    return fclose(file);
}

static sdr_runtime *open_bundle(int isolation) {
    sdr_open_params params;
    sdr_runtime *runtime = NULL;
    const char *json;
    sdr_open_params_init(&params, sizeof params);
    params.isolation = isolation;
    params.bundle = value("bundle", "");
    params.python = value("python", NULL);
    params.backend = value("backend", NULL);
    params.threads = 1;
    if (report("open", sdr_runtime_open(&params, &runtime)) || sdr_runtime_describe(runtime, &json)) return NULL;
    printf("describe %s\n", json);
    return runtime;
}

/* Set the limit of open descriptors. Returns the previous limit. */
static rlim_t set_file_limit(rlim_t count) {
    struct rlimit limit;
    rlim_t before;
    getrlimit(RLIMIT_NOFILE, &limit);
    before = limit.rlim_cur;
    limit.rlim_cur = count;
    setrlimit(RLIMIT_NOFILE, &limit);
    return before;
}

static int generate(sdr_runtime *runtime, int round) {
    int jobs = atoi(value("jobs", "1")), failed = 0, side = atoi(value("image", "0")), k;
    size_t size = round ? 0 : strtoul(value("prompt_bytes", "0"), NULL, 10);
    sdr_job **submitted = calloc((size_t)jobs, sizeof *submitted);
    uint8_t *image = calloc(3, (size_t)side * (size_t)side + 1);
    char *prompt = calloc(size + 1, 1);
    rlim_t previous;
    memset(prompt, 'a', size);
    previous = !round && value("no_files", NULL) ? set_file_limit(3) : 0;
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
        failed |= report("submit", sdr_job_submit(runtime, &params, &submitted[k]));
    }
    if (!round && value("hold", NULL)) wait_for_line();
    for (k = 0; k < jobs; ++k) failed |= report("job", sdr_job_wait(submitted[k], 60000));
    if (previous) set_file_limit(previous);
    if (!failed && value("out", NULL)) failed |= save(submitted[jobs - 1], value("out", NULL));
    for (k = 0; k < jobs; ++k) sdr_job_free(submitted[k]);
    free(submitted), free(image), free(prompt);
    return failed;
}

/* Use the runtime in a child of fork() that does not exec. */
static int use_in_child(sdr_runtime *runtime, int isolation) {
    const char *json;
    sdr_runtime *own;
    pid_t pid = fork();
    int status = 0;
    if (pid == 0) {
        report("child-describe", sdr_runtime_describe(runtime, &json));
        own = open_bundle(isolation);
        if (own) generate(own, 1);
        sdr_runtime_free(own);
        sdr_runtime_free(runtime);
        fflush(stdout);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    printf("child ended with %d\n", status);
    return status;
}

/* Return the number of open descriptors. */
static int descriptors(void) {
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;
    while (readdir(folder)) ++count;
    closedir(folder);
    return count - 3; /* ".", ".." and the descriptor of the folder */
}

/* Open, generate and free repeatedly. Prints the number of open descriptors before and after. */
static int cycles(int isolation, int times) {
    int failed = 0, before = 0, k;
    for (k = 0; k < times; ++k) {
        sdr_runtime *runtime = open_bundle(isolation);
        failed |= !runtime || generate(runtime, 0);
        sdr_runtime_free(runtime);
        if (k == 0) before = descriptors(); /* after the first cycle, since the interpreter keeps some open */
    }
    printf("descriptors %d %d\n", before, descriptors());
    return failed;
}

static void open_with_few_files(int isolation, rlim_t files) {
    int before = descriptors();
    rlim_t previous = set_file_limit(files);
    sdr_runtime_free(open_bundle(isolation));
    set_file_limit(previous);
    printf("descriptors %d %d\n", before, descriptors());
}

static void close_standard_descriptors(void) {
    int copy = fcntl(1, F_DUPFD_CLOEXEC, 100);
    close(0), close(1), close(2);
    stdout = fdopen(copy, "w");
}

int main(int argc, char **argv) {
    int isolation = strcmp(argv[1], "isolation=process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    int failed = 0, round;
    sdr_runtime *runtime;
    count = argc;
    words = argv;
    if (value("ignore", NULL)) signal(SIGCHLD, SIG_IGN);
    if (value("no_stdio", NULL)) close_standard_descriptors();
    if (value("block", NULL)) {
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, NULL);
    }
    if (value("file_limit", NULL)) open_with_few_files(isolation, (rlim_t)atoi(value("file_limit", "")));
    if (value("cycles", NULL)) failed |= cycles(isolation, atoi(value("cycles", "")));
    runtime = open_bundle(isolation);
    if (!runtime) return 1;
    if (value("no_stdio", NULL))
        printf("taken %d\n", (fcntl(0, F_GETFD) >= 0) + (fcntl(1, F_GETFD) >= 0) + (fcntl(2, F_GETFD) >= 0));
    if (value("idle_child", NULL)) {
        pid_t child = fork();
        if (child) printf("child %d\n", (int)child), fflush(stdout);
        for (;;) pause();
    }
    if (value("chdir", NULL) && chdir(value("chdir", NULL))) return 1;
    if (value("fork", NULL)) failed |= use_in_child(runtime, isolation);
    for (round = 0; round < atoi(value("rounds", "1")); ++round) failed |= generate(runtime, round);
    failed |= report("close", sdr_runtime_close(runtime));
    sdr_runtime_free(runtime);
    printf("children %d\n", waitpid(-1, NULL, WNOHANG) >= 0); /* 0: no child is left, not even a zombie */
    return failed ? 1 : 0;
}
