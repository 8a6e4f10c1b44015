/* A host with a GPU, which is the strict fake of the tests: the interpreter of the library puts its functions into `fake`.
 *
 * device WORD...: settings, kept until they are set anew, and what to do with them, in order.
 *   isolation=process  bundle=  device=  memory=
 *   stream            make one on the GPU and open with it; stream=NUMBER: with this
 *   buffer=BYTES      allocate them on the GPU and draw to them too; size=BYTES: say that they are so many. (Where there is no fake,
 *                     since the engines are in a worker, stream and buffer are some address.)
 *   out=FILE          for the rows of pictures; FILE.device is what the buffer has
 *   open  draw  close
 *   start  cancel  end   a long job: until its first step is done; as it says; how it ended
 *   tell              of the fake, a line of JSON
 *   leave             free what this host has on the GPU */
#include "sdruntime/sdruntime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct {
    void *(*stream)(void);
    void *(*allocate)(size_t size);
    void (*read)(const void *from, void *to, size_t size);
    void (*tell)(void);
    void (*leave)(void);
} fake;

static sdr_open_params opening;
static sdr_job_params drawing;
static sdr_runtime *runtime;
static sdr_job *started;
static const char *out = "";

static int told(const char *what, sdr_status *status) {
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

static void draw(void) {
    sdr_job *job = NULL;
    const uint8_t *rows;
    uint8_t *copy;
    size_t stride, size;
    if (told("submit", sdr_job_submit(runtime, &drawing, &job))) return;
    if (!told("job", sdr_job_wait(job, 60000)) && !told("rgb", sdr_job_rgb(job, &rows, &stride))) {
        size = stride * (size_t)drawing.height;
        save("", rows, size);
        if (drawing.device_buffer) {
            copy = malloc(size);
            fake.read(drawing.device_buffer, copy, size);
            save(".device", copy, size);
            free(copy);
        }
    }
    sdr_job_free(job);
}

static void start(void) {
    sdr_job_params params = drawing;
    int32_t step = 0;
    params.steps = 999;
    if (told("submit", sdr_job_submit(runtime, &params, &started))) return;
    while (step < 1) sdr_job_poll(started, NULL, &step, NULL);
}

static void end(void) {
    told("job", sdr_job_wait(started, 60000));
    sdr_job_free(started);
}

static const char *after(const char *word, const char *key) {
    size_t size = strlen(key);
    return strncmp(word, key, size) == 0 ? word + size : NULL;
}

static void act(const char *word) {
    const char *value;
    if ((value = after(word, "isolation=")))
        opening.isolation = strcmp(value, "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    else if ((value = after(word, "bundle="))) opening.bundle = value;
    else if ((value = after(word, "device="))) opening.device = value;
    else if ((value = after(word, "memory="))) opening.memory_cap = strtoull(value, NULL, 10);
    else if ((value = after(word, "stream="))) opening.stream = (void *)(uintptr_t)strtoull(value, NULL, 10);
    else if ((value = after(word, "size="))) drawing.device_buffer_size = strtoull(value, NULL, 10);
    else if ((value = after(word, "out="))) out = value;
    else if ((value = after(word, "buffer="))) {
        drawing.device_buffer_size = strtoull(value, NULL, 10);
        drawing.device_buffer = fake.allocate ? fake.allocate((size_t)drawing.device_buffer_size) : &fake;
    } else if (strcmp(word, "stream") == 0) opening.stream = fake.stream ? fake.stream() : &fake;
    else if (strcmp(word, "open") == 0) told("open", sdr_runtime_open(&opening, &runtime));
    else if (strcmp(word, "draw") == 0) draw();
    else if (strcmp(word, "start") == 0) start();
    else if (strcmp(word, "cancel") == 0) told("cancel", sdr_job_cancel(started));
    else if (strcmp(word, "end") == 0) end();
    else if (strcmp(word, "close") == 0) told("close", sdr_runtime_close(runtime)), sdr_runtime_free(runtime);
    else if (strcmp(word, "tell") == 0) fflush(stdout), fake.tell();
    else if (strcmp(word, "leave") == 0) fake.leave();
    else abort();
}

int main(int argc, char **argv) {
    int k;
    sdr_open_params_init(&opening, sizeof opening);
    sdr_job_params_init(&drawing, sizeof drawing);
    drawing.prompt = "a cat";
    drawing.steps = 3;
    drawing.seed = 3;
    drawing.width = 128;
    drawing.height = 64;
    for (k = 1; k < argc; ++k) act(argv[k]);
    return 0;
}
