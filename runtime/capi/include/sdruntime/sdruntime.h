/* sdruntime.h: generate images from a Stable Diffusion bundle in C and C++ programs.
 *
 *     sdr_open_params open;
 *     sdr_open_params_init(&open, sizeof open);
 *     open.bundle = "bundle";
 *     sdr_runtime *runtime;
 *     sdr_status *status = sdr_runtime_open(&open, &runtime);
 *
 *     sdr_job_params params;
 *     sdr_job_params_init(&params, sizeof params);
 *     params.prompt = "a small red circle on the left on a blue background";
 *     params.seed = 7;
 *     sdr_job *job;
 *     status = sdr_job_submit(runtime, &params, &job);
 *     status = sdr_job_wait(job, -1);
 *     const uint8_t *rows; size_t stride;
 *     status = sdr_job_rgb(job, &rows, &stride);        the image, until sdr_job_free
 *
 * Errors.    Functions that can fail return NULL on success, or a status that the caller owns: read it, then sdr_status_free it. If
 *            a function fails, its outputs are NULL or 0, unless its description says otherwise. The library never exits,
 *            aborts, throws, prints (but see SDRUNTIME_DEBUG), installs a signal handler or raises SIGPIPE.
 * Text.      UTF-8, ending in NUL. Text that is not UTF-8 is refused with a status. What the caller passes (text, images, structs)
 *            is copied before the call returns.
 * Handles.   sdr_runtime, sdr_job and sdr_status are opaque and never reused: a handle that is NULL, freed or of another kind gets
 *            a status of code SDR_USAGE (reason SDR_REASON_BAD_HANDLE), never a crash. Freeing NULL does nothing. Freeing twice does
 *            nothing, and is reported on stderr if SDRUNTIME_DEBUG=1 is set. An invalid pointer, or one to too little memory, is
 *            undefined behaviour, as everywhere in C.
 * Threads.   Any function may be called from any thread at any time, on the same handle too. A handle that is freed while another
 *            thread waits on it ends that wait with a status.
 * Callbacks. See sdr_progress_callback and sdr_log_callback: they run on a thread of the library.
 * Structs.   Each begins with struct_size. Its _init function sets that and every default: call it with sizeof of the struct. A
 *            struct of an older header is accepted, with defaults for the missing fields. One of a newer header is accepted as long
 *            as the fields that this library does not know are zero, which is their default; otherwise you get a status. Pointers
 *            in it may be NULL unless noted.
 * Numbers.   An int32_t used as a boolean is false if 0, else true.
 * Fork.      isolation SDR_ISOLATION_IN_PROCESS: a child of fork() that does not exec gets a status (SDR_REASON_FORKED) from every
 *            function on handles of its parent, and must not open. SDR_ISOLATION_PROCESS: the parent may fork as it likes and
 *            the child may open runtimes of its own; handles of the parent give it the same status. A worker ends with the
 *            process that opened it, however long a child of that lives.
 *            In both, fork() while another thread is inside this library is as unsafe as with any C++ library.
 */
#ifndef SDRUNTIME_H
#define SDRUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SDR_API __attribute__((visibility("default")))
#else
#define SDR_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header, equal to that of the Python package that it came with. */
#define SDR_VERSION "0.1.0"

/* A new major number means that programs must be recompiled; a new minor number, that something was added. */
#define SDR_ABI_MAJOR 1
#define SDR_ABI_MINOR 0

/* The version of the library that is loaded, as SDR_VERSION. Static. */
SDR_API const char *sdr_version(void);

/* SDR_ABI_MAJOR << 16 | SDR_ABI_MINOR of the library that is loaded. */
SDR_API uint32_t sdr_abi_version(void);

typedef struct sdr_runtime sdr_runtime; /* an open bundle */
typedef struct sdr_job sdr_job;         /* one requested image */
typedef struct sdr_status sdr_status;   /* what went wrong */

/* ---- status ------------------------------------------------------------------------------------------------------------------ */

/* The code of a status: the exit codes of the command line. */
enum {
    SDR_OK = 0,
    SDR_FAILED = 1,       /* a failure that has no code of its own */
    SDR_USAGE = 2,        /* a wrong value from the caller */
    SDR_ENVIRONMENT = 3,  /* this machine lacks something: a library, a device, memory */
    SDR_VERIFICATION = 4, /* engines disagree with the reference outputs */
    SDR_BUNDLE = 5,       /* the bundle is damaged, or none of its engines fits */
    SDR_CANCELLED = 130
};

/* The reason, more precise than the code. New reasons may be added: treat an unknown one as SDR_REASON_NONE. */
enum {
    SDR_REASON_NONE = 0,
    SDR_REASON_BAD_HANDLE = 1,        /* SDR_USAGE: NULL, freed, or of another kind */
    SDR_REASON_BAD_ARGUMENT = 2,      /* SDR_USAGE: NULL where a value belongs, out of range, options that are no JSON */
    SDR_REASON_BAD_STRUCT = 3,        /* SDR_USAGE: struct_size is 0, or too small, or what is set is newer than this library */
    SDR_REASON_BAD_TEXT = 4,          /* SDR_USAGE: not UTF-8 */
    SDR_REASON_UNSUPPORTED = 5,       /* SDR_USAGE: not with this isolation, these engines, or this library */
    SDR_REASON_REENTERED = 6,         /* SDR_USAGE: a call that waits, from inside a callback */
    SDR_REASON_CLOSED = 7,            /* SDR_USAGE: the runtime was closed */
    SDR_REASON_NOT_FINISHED = 8,      /* SDR_USAGE: the job has no image yet */
    SDR_REASON_NOT_ASKED = 9,         /* SDR_USAGE: a PNG of a job that was submitted without `png` */
    SDR_REASON_BUFFER_TOO_SMALL = 10, /* SDR_USAGE: the message has both sizes */
    SDR_REASON_FORKED = 11,           /* SDR_USAGE: this is a child of the process that opened it */
    SDR_REASON_QUEUE_FULL = 12,       /* SDR_FAILED: as many jobs wait as the queue holds; try again when one has started */
    SDR_REASON_TIMEOUT = 13,          /* SDR_FAILED: the time of a wait is over; the job goes on */
    SDR_REASON_CANCELLED = 14,        /* SDR_CANCELLED */
    SDR_REASON_WORKER_DIED = 15,      /* SDR_FAILED: the worker was killed or crashed; the next job starts a new one */
    SDR_REASON_CALLBACK = 16,         /* SDR_FAILED: the progress callback threw an exception */
    SDR_REASON_NO_PYTHON = 17,        /* SDR_ENVIRONMENT: no interpreter; the message lists what was searched */
    SDR_REASON_NO_RUNTIME = 18,       /* SDR_ENVIRONMENT: the interpreter has no sdruntime or no NumPy; the same */
    SDR_REASON_OUT_OF_MEMORY = 19     /* SDR_ENVIRONMENT: of the host */
};

/* The code. NULL: SDR_OK. A handle that is no status: SDR_USAGE. */
SDR_API int32_t sdr_status_code(const sdr_status *status);

/* The reason. NULL: SDR_REASON_NONE. A handle that is no status: SDR_REASON_BAD_HANDLE. */
SDR_API int32_t sdr_status_reason(const sdr_status *status);

/* What is wrong, where, the values, and how to fix it; one line or several. Never NULL; valid until the status is freed.
 * NULL: "". */
SDR_API const char *sdr_status_message(const sdr_status *status);

/* Free a status. NULL: nothing. */
SDR_API void sdr_status_free(sdr_status *status);

/* ---- opening a bundle -------------------------------------------------------------------------------------------------------- */

enum {
    SDR_ISOLATION_IN_PROCESS = 0, /* the interpreter and the engines live in this process */
    SDR_ISOLATION_PROCESS = 1     /* they live in a worker process; images are returned through shared memory */
};

enum { SDR_LOG_DEBUG = 10, SDR_LOG_INFO = 20, SDR_LOG_WARNING = 30, SDR_LOG_ERROR = 40 };

/* Called for each line of the log of one runtime, on a thread of the library, never two at a time for one runtime. `message` is
 * valid during the call. Not called after sdr_runtime_close or sdr_runtime_free has returned; but if that was inside a callback,
 * a call on another thread may still be running. It must not call functions that wait
 * (sdr_job_wait, sdr_runtime_open, sdr_runtime_close): they give it a status (SDR_REASON_REENTERED). An exception that it throws
 * is dropped. */
typedef void (*sdr_log_callback)(void *user, int32_t level, const char *message);

typedef struct sdr_open_params {
    uint32_t struct_size;
    int32_t isolation;    /* SDR_ISOLATION_IN_PROCESS, which is the default, or SDR_ISOLATION_PROCESS */
    const char *bundle;   /* the bundle's folder, from the current one where it is relative; must not be NULL */
    const char *backend;  /* "onnxruntime", "tensorrt", ...; NULL: the best engine that fits this machine */
    const char *device;   /* which GPU: an index "1", "cuda:1", or a UUID "GPU-..." or the beginning of one; NULL: the first */
    const char *python;   /* a virtual environment's folder, an interpreter, or a libpython; NULL: searched, see below */
    int32_t threads;      /* of the CPU, for one operator; 0: the engines' library decides */
    int32_t low_memory;   /* true: one component on the GPU at a time */
    uint64_t memory_cap;  /* bytes of the GPU that may be used; a need above it is refused at open with both numbers; 0: no cap */
    void *stream;         /* the caller's cudaStream_t, on which all work is done; NULL: one of the library's. In process only */
    uint32_t queue;       /* the most jobs that wait to start; one more is refused (SDR_REASON_QUEUE_FULL). 0: 64 */
    int32_t log_level;    /* the lowest level that is handed to `log`; SDR_LOG_INFO */
    sdr_log_callback log; /* NULL: no log */
    void *log_user;       /* handed to `log` */
    const char *options;  /* rare options as JSON: {"session": {"engine_host_code": "true"}, "measure": false}; NULL: none */
} sdr_open_params;

/* Set every field to its default. `struct_size`: sizeof(sdr_open_params). NULL: nothing. */
SDR_API void sdr_open_params_init(sdr_open_params *params, size_t struct_size);

/* Open a bundle: start the interpreter or a worker, read the bundle and open its engines. Blocks until that is done (seconds).
 *
 * *runtime is the caller's: sdr_runtime_free it. It is NULL where a status is returned, and may be NULL only by mistake (a status).
 * One process may open several runtimes; those in process share one interpreter, which the first of them chooses and which is
 * never taken down. The interpreter is looked for in this order:
 *   1. params->python, then the variable SDRUNTIME_PYTHON: a virtual environment's folder, an interpreter or a libpython;
 *   2. in process: the interpreter that runs in this process already;
 *   3. the virtual environment of VIRTUAL_ENV;
 *   4. the folder `sdruntime` beside this library (lib/sdruntime, a virtual environment put there), if there is one;
 *   5. python3 on PATH; and in process libpython3.so and libpython3.10 and later where the loader finds them.
 * The first one that exists is used. One that you name explicitly but that does not work is an error.
 *
 * Errors: SDR_USAGE for a parameter; SDR_ENVIRONMENT with SDR_REASON_NO_PYTHON or _NO_RUNTIME and the list of what was searched,
 * for a missing library, device or memory, or where fewer than 16 file descriptors are free; SDR_BUNDLE for a bundle that is not
 * there, damaged, or fits no engine of this machine; SDR_FAILED with SDR_REASON_WORKER_DIED. */
SDR_API sdr_status *sdr_runtime_open(const sdr_open_params *params, sdr_runtime **runtime);

/* What was opened, as a JSON object: model, components (backend and engine of each), sizes, samplers, versions. Blocks on nothing.
 * *json is the library's, ends in NUL, and is valid until the runtime is freed. Errors: SDR_USAGE. */
SDR_API sdr_status *sdr_runtime_describe(sdr_runtime *runtime, const char **json);

/* End all work: jobs that wait or run are cancelled and end with SDR_CANCELLED (SDR_REASON_CLOSED), engines are released, a worker
 * process ends. Blocks until that is done (at most a step of the sampler), then no callback of this runtime is called any more.
 * Finished jobs keep their images. Closing twice does nothing. From inside a callback: SDR_REASON_REENTERED. */
SDR_API sdr_status *sdr_runtime_close(sdr_runtime *runtime);

/* Close the runtime, if it is still open, and free the handle. Its jobs stay valid until each is freed. From inside a callback of
 * the library the handle is freed at once and the runtime closes in the background. */
SDR_API void sdr_runtime_free(sdr_runtime *runtime);

/* ---- jobs -------------------------------------------------------------------------------------------------------------------- */

enum { SDR_JOB_QUEUED = 0, SDR_JOB_RUNNING = 1, SDR_JOB_DONE = 2, SDR_JOB_FAILED = 3, SDR_JOB_CANCELLED = 4 };

/* How far a job is. The library sets struct_size: read a field that is newer than SDR_ABI_MINOR 0 only where struct_size covers it. */
typedef struct sdr_progress {
    uint32_t struct_size;
    int32_t step; /* steps that are done: 1 to `steps` */
    int32_t steps;
    int32_t preview_channels;
    int32_t preview_height;
    int32_t preview_width;
    const float *preview; /* the current latents, [channels][height][width]; NULL if not requested */
} sdr_progress;

/* Called after each step of one job, on a thread of the library, in order, never two at a time for one job. Another result than 0
 * cancels the job. `progress` and what it points to are valid during the call. `job` may be handed to any function that does not
 * wait (sdr_job_free too); those that do (sdr_job_wait, sdr_runtime_open, sdr_runtime_close) give a status
 * (SDR_REASON_REENTERED). It may be called before sdr_job_submit has returned, and is not called after sdr_job_wait has reported
 * the end of the job, nor after sdr_job_free has returned. Jobs that share engine calls wait for it: be quick. An exception that it
 * throws ends the job with SDR_REASON_CALLBACK. */
typedef int32_t (*sdr_progress_callback)(void *user, sdr_job *job, const sdr_progress *progress);

typedef struct sdr_job_params {
    uint32_t struct_size;
    int32_t steps;        /* 20 */
    const char *prompt;   /* must not be NULL; "" is a prompt */
    const char *negative; /* what the image should not show; NULL: none */
    uint64_t seed;        /* 0; the same seed gives the same image */
    int32_t random_seed;  /* true: `seed` is not used, a random one is; sdr_result has it */
    int32_t width;        /* in pixels; 0 with height 0: the model's own */
    int32_t height;
    int32_t png;          /* true: make the PNG's bytes as well, for sdr_job_png */
    double guidance;      /* 7.5; at 1 or less, the negative prompt has no effect */
    double rescale;       /* guidance rescale, 0 to 1; 0 */
    const char *sampler;  /* "dpmpp_2m", ...; NULL: the checkpoint's own */
    const char *schedule; /* "karras", ...; NULL: the checkpoint's own */
    const char *options;  /* the sampler's own settings, a JSON object such as {"eta": 0.5}; NULL: none */
    const uint8_t *image; /* the start image, RGB8 rows from the top; NULL: text to image */
    int32_t image_width;
    int32_t image_height;
    size_t image_stride;            /* bytes from row to row; 0: 3 * image_width */
    double strength;                /* how much of `image` is changed, above 0 to 1; 0.8 */
    sdr_progress_callback progress; /* NULL: none */
    void *progress_user;            /* handed to `progress` */
    int32_t preview;                /* true: `progress` gets preview latents; a copy a step */
    int32_t reserved;               /* 0 */
    void *device_buffer;            /* device memory of the caller's on the engines' GPU, for the image as RGB8 rows without gaps;
                                       in process only (SDR_REASON_UNSUPPORTED). Read it once sdr_job_wait has reported the end.
                                       NULL: none */
    uint64_t device_buffer_size;    /* its bytes, 3 * width * height at least (SDR_REASON_BUFFER_TOO_SMALL) */
} sdr_job_params;

/* Set every field to its default. `struct_size`: sizeof(sdr_job_params). NULL: nothing. */
SDR_API void sdr_job_params_init(sdr_job_params *params, size_t struct_size);

/* Request an image. Returns at once; the job waits in the queue, then runs, sharing engine calls with others of its size.
 *
 * *job is the caller's: sdr_job_free it, before or after the runtime. It is NULL where a status is returned.
 * sdr_job_wait reports what only the engine side knows (an unknown sampler, a size that no engine takes).
 * Errors: SDR_USAGE for a parameter; SDR_REASON_CLOSED; SDR_REASON_QUEUE_FULL; with SDR_ISOLATION_PROCESS, where the worker died
 * since, what sdr_runtime_open may give (a new one is started, and the call blocks until it is ready). */
SDR_API sdr_status *sdr_job_submit(sdr_runtime *runtime, const sdr_job_params *params, sdr_job **job);

/* Where a job is: one of SDR_JOB_..., the steps that are done, and of how many (0 before the first). Each pointer may be NULL.
 * Blocks on nothing. Errors: SDR_USAGE. */
SDR_API sdr_status *sdr_job_poll(sdr_job *job, int32_t *state, int32_t *step, int32_t *steps);

/* Wait for the end of a job: at most `timeout_ms` milliseconds, or without limit if negative. NULL: the image is ready. Otherwise
 * the reason: the job's own failure, again at each call; SDR_CANCELLED; SDR_REASON_WORKER_DIED; SDR_REASON_TIMEOUT, after which the job
 * goes on; SDR_REASON_BAD_HANDLE where it is freed meanwhile; SDR_REASON_REENTERED from inside a callback, unless `timeout_ms` is 0. */
SDR_API sdr_status *sdr_job_wait(sdr_job *job, int64_t timeout_ms);

/* Cancel a job at its next step. Returns at once; sdr_job_wait returns when it has ended: with SDR_CANCELLED or an earlier failure,
 * but without an image. Its progress callback is not called again. Cancelling a job that has ended or is already cancelled has no
 * effect: NULL in both cases. Errors: SDR_USAGE. */
SDR_API sdr_status *sdr_job_cancel(sdr_job *job);

/* Free a job and its image. One that has not ended is cancelled. Waits for a progress callback of this job that runs on another
 * thread (but not from inside a callback); after it returned, none is called. Views of the image (sdr_job_rgb, sdr_job_png, texts
 * of sdr_result) end here. */
SDR_API void sdr_job_free(sdr_job *job);

/* ---- results ----------------------------------------------------------------------------------------------------------------- */

/* A finished image. Texts are the library's and valid until the job is freed. */
typedef struct sdr_result {
    uint32_t struct_size;
    int32_t width; /* in pixels */
    int32_t height;
    int32_t reserved;
    uint64_t seed;        /* that was used */
    double queued;        /* seconds until the job started */
    double encode;        /* seconds of its text encoders, and of its VAE encoder */
    double denoise;       /* seconds from its first to its last step */
    double decode;        /* seconds of its VAE decoder */
    double total;         /* seconds from submit to the end */
    size_t png_size;      /* bytes; 0 if no PNG was requested */
    const char *sampler;  /* that was used */
    const char *warnings; /* a JSON array of strings; "[]" mostly */
} sdr_result;

/* Set struct_size, and every other field to 0. `struct_size`: sizeof(sdr_result). NULL: nothing. */
SDR_API void sdr_result_init(sdr_result *result, size_t struct_size);

/* The numbers of a finished image, written up to result->struct_size.
 * Errors: SDR_USAGE, SDR_REASON_NOT_FINISHED; for a job that ended without an image, the status of sdr_job_wait. */
SDR_API sdr_status *sdr_job_result(sdr_job *job, sdr_result *result);

/* The image in place: *rows is the first of `height` rows from the top, each 3 * width bytes R, G, B, *stride bytes apart.
 * The library's, read only, valid until the job is freed. Errors as sdr_job_result. */
SDR_API sdr_status *sdr_job_rgb(sdr_job *job, const uint8_t **rows, size_t *stride);

/* Copy the image to the caller's memory: rows `stride` bytes apart (0: 3 * width), bytes between rows left as they are.
 * *needed (may be NULL) is set to stride * (height - 1) + 3 * width, also where `size` is less: that gives SDR_REASON_BUFFER_TOO_SMALL
 * and writes nothing else. `buffer` NULL with `size` 0 only sets *needed. A stride below 3 * width: SDR_REASON_BAD_ARGUMENT.
 * Other errors as sdr_job_result. */
SDR_API sdr_status *sdr_job_copy_rgb(sdr_job *job, uint8_t *buffer, size_t size, size_t stride, size_t *needed);

/* The PNG's bytes, with the settings as text keys, of a job that was submitted with `png`. The library's, read only, valid until the
 * job is freed. Errors as sdr_job_result, and SDR_REASON_NOT_ASKED. */
SDR_API sdr_status *sdr_job_png(sdr_job *job, const uint8_t **bytes, size_t *size);

#ifdef __cplusplus
}
#endif

#endif
