/* A host with a GPU, which is the strict fake of the tests: the library's interpreter stores its functions in `fake`.
 *
 * device WORD...: settings, which apply until they are set again, and actions, in order.
 *   isolation=process  bundle=  device=  memory=
 *   stream            create a stream on the GPU and open with it; stream=NUMBER: open with this number
 *   buffer=BYTES      allocate a buffer on the GPU and generate into it too; size=BYTES: pass this as its size. (With the
 *                     engines in a worker there is no fake, and stream and buffer are arbitrary addresses.)
 *   out=FILE          write the rows of images to it, and the content of the buffer to FILE.device
 *   open  generate  close
 *   start  cancel  end   a long job: start it and wait for its first step; cancel it; wait for its end
 *   report            print the state of the fake as a line of JSON
 *   release           free what this host has allocated on the GPU */
#include "sdruntime/sdruntime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct {
    void *(*stream)(void);
    void *(*allocate)(size_t size);
    void (*read)(const void *from, void *to, size_t size);
    void (*report)(void);
    void (*release)(void);
} fake;

static sdr_open_params open_params;
static sdr_job_params job_params;
static sdr_runtime *runtime;
static sdr_job *started;
static const char *out = "";

/* Print a status and free it. Returns its code. */
static int report(const char *what, sdr_status *status) {
    int code = (int)sdr_status_code(status);
    printf("%s %d %d %s\n", what, code, (int)sdr_status_reason(status), sdr_status_message(status));
    sdr_status_free(status);
    return code;
}

static void save(const char *end, const void *bytes, size_t size) {
    char path[4096];
    FILE *file;
    snprintf(path, sizeof path, "%s%s", out, end);
    file = fopen(path, "wb");
    if (!file) abort();
    fwrite(bytes, 1, size, file);
    fclose(file);
}

static void generate(void) {
    sdr_job *job = NULL;
    const uint8_t *rows;
    uint8_t *copy;
    size_t stride, size;
    if (report("submit", sdr_job_submit(runtime, &job_params, &job))) return;
    if (!report("job", sdr_job_wait(job, 60000)) && !report("rgb", sdr_job_rgb(job, &rows, &stride))) {
        size = stride * (size_t)job_params.height;
        save("", rows, size);
        if (job_params.device_buffer) {
            copy = malloc(size);
            fake.read(job_params.device_buffer, copy, size);
            save(".device", copy, size);
            free(copy);
        }
    }
    sdr_job_free(job);
}

static void start(void) {
    sdr_job_params params = job_params;
    int32_t step = 0;
    params.steps = 999;
    if (report("submit", sdr_job_submit(runtime, &params, &started))) return;
    while (step < 1) sdr_job_poll(started, NULL, &step, NULL);
}

static void end(void) {
    report("job", sdr_job_wait(started, 60000));
    sdr_job_free(started);
}

/* Return what follows `key` in `word`, or NULL if it does not begin with `key`. */
static const char *after(const char *word, const char *key) {
    size_t size = strlen(key);
    return strncmp(word, key, size) == 0 ? word + size : NULL;
}

static void act(const char *word) {
    const char *value;
    if ((value = after(word, "isolation=")))
        open_params.isolation = strcmp(value, "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    else if ((value = after(word, "bundle="))) open_params.bundle = value;
    else if ((value = after(word, "device="))) open_params.device = value;
    else if ((value = after(word, "memory="))) open_params.memory_cap = strtoull(value, NULL, 10);
    else if ((value = after(word, "stream="))) open_params.stream = (void *)(uintptr_t)strtoull(value, NULL, 10);
    else if ((value = after(word, "size="))) job_params.device_buffer_size = strtoull(value, NULL, 10);
    else if ((value = after(word, "out="))) out = value;
    else if ((value = after(word, "buffer="))) {
        job_params.device_buffer_size = strtoull(value, NULL, 10);
        job_params.device_buffer = fake.allocate ? fake.allocate((size_t)job_params.device_buffer_size) : &fake;
    } else if (strcmp(word, "stream") == 0) open_params.stream = fake.stream ? fake.stream() : &fake;
    else if (strcmp(word, "open") == 0) report("open", sdr_runtime_open(&open_params, &runtime));
    else if (strcmp(word, "generate") == 0) generate();
    else if (strcmp(word, "start") == 0) start();
    else if (strcmp(word, "cancel") == 0) report("cancel", sdr_job_cancel(started));
    else if (strcmp(word, "end") == 0) end();
    else if (strcmp(word, "close") == 0) report("close", sdr_runtime_close(runtime)), sdr_runtime_free(runtime);
    else if (strcmp(word, "report") == 0) fflush(stdout), fake.report();
    else if (strcmp(word, "release") == 0) fake.release();
    else abort();
}

int main(int argc, char **argv) {
    int k;
    sdr_open_params_init(&open_params, sizeof open_params);
    sdr_job_params_init(&job_params, sizeof job_params);
    job_params.prompt = "a cat";
    job_params.steps = 3;
    job_params.seed = 3;
    job_params.width = 128;
    job_params.height = 64;
    for (k = 1; k < argc; ++k) act(argv[k]);
    return 0;
}
