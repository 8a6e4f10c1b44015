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
 *     status = sdr_job_rgb(job, &rows, &stride);        valid until sdr_job_free
 *
 * Errors.    A function that can fail returns NULL on success and a status on failure. The caller owns the status: read it, then
 *            free it with sdr_status_free. A function that fails sets its outputs to NULL or 0, unless its description says
 *            otherwise. The library never exits or aborts the process, throws an exception, prints (except with SDRUNTIME_DEBUG),
 *            installs a signal handler or raises SIGPIPE.
 * Text.      All text is UTF-8 and ends with NUL. Text that is not valid UTF-8 is rejected with SDR_REASON_BAD_TEXT. The library
 *            copies the text, images and structs that it is passed before the call returns.
 * Handles.   sdr_runtime, sdr_job and sdr_status are opaque, and their values are never reused. A handle that is NULL, freed or
 *            of another type never causes a crash: the function returns a status with code SDR_USAGE and reason
 *            SDR_REASON_BAD_HANDLE. Freeing NULL, or freeing a handle twice, has no effect. With SDRUNTIME_DEBUG=1 in the
 *            environment, a handle that is freed twice is reported on stderr. Any other invalid pointer, or one to too little
 *            memory, is undefined behaviour, as everywhere in C.
 * Threads.   Any function may be called from any thread at any time, even on the same handle. If a handle is freed while another
 *            thread waits on it, the wait returns a status.
 * Callbacks. Callbacks run on threads of the library. See sdr_progress_callback and sdr_log_callback.
 * Structs.   Every struct begins with struct_size. Its _init function sets struct_size and all defaults: call it with the sizeof
 *            of the struct. A struct from an older header is accepted; the missing fields get their defaults. A struct from a
 *            newer header is accepted if every field that this library does not know is zero, which is its default; otherwise the
 *            call fails with SDR_REASON_BAD_STRUCT. Pointers in a struct may be NULL unless noted.
 * Booleans.  An int32_t used as a boolean is false if it is 0 and true otherwise.
 * Fork.      With SDR_ISOLATION_IN_PROCESS, a child of fork() that does not call exec cannot open a runtime in process: that, and
 *            every function on a handle of the parent, fails with SDR_REASON_FORKED. With SDR_ISOLATION_PROCESS, the parent may
 *            fork freely and the child may open its own runtimes; handles of the parent fail in the child with the same reason. A
 *            worker process ends with the process that opened it, even if a child of that process lives on. With both, calling
 *            fork() while another thread is inside this library is as unsafe as with any C++ library.
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

/* The version of this header. It equals the version of the Python package that contains it. */
#define SDR_VERSION "0.1.0"

/* The major number changes when programs must be recompiled, the minor number when something is added. */
#define SDR_ABI_MAJOR 1
#define SDR_ABI_MINOR 3

/* Return the version of the loaded library, in the format of SDR_VERSION. The string is static. */
SDR_API const char *sdr_version(void);

/* Return SDR_ABI_MAJOR << 16 | SDR_ABI_MINOR of the loaded library. */
SDR_API uint32_t sdr_abi_version(void);

typedef struct sdr_runtime sdr_runtime; /* an open bundle */
typedef struct sdr_job sdr_job;         /* a request for one image */
typedef struct sdr_status sdr_status;   /* an error */

/* ---- status ------------------------------------------------------------------------------------------------------------------ */

/* The code of a status. It equals the exit code of the command line for the same error. */
enum {
    SDR_OK = 0,
    SDR_FAILED = 1,       /* an error without a code of its own */
    SDR_USAGE = 2,        /* an invalid value from the caller */
    SDR_ENVIRONMENT = 3,  /* this machine lacks a library, a device or memory */
    SDR_VERIFICATION = 4, /* engines disagree with the reference outputs */
    SDR_BUNDLE = 5,       /* the bundle is damaged, or none of its engines fits this machine */
    SDR_CANCELLED = 130
};

/* The reason of a status: more precise than its code. New reasons may be added: treat an unknown one as SDR_REASON_NONE. */
enum {
    SDR_REASON_NONE = 0,
    SDR_REASON_BAD_HANDLE = 1,        /* SDR_USAGE: the handle is NULL, freed or of another type */
    SDR_REASON_BAD_ARGUMENT = 2,      /* SDR_USAGE: a required value is NULL, a value is out of range, or options are not JSON */
    SDR_REASON_BAD_STRUCT = 3,        /* SDR_USAGE: struct_size is invalid, or a field is set that this library does not know */
    SDR_REASON_BAD_TEXT = 4,          /* SDR_USAGE: the text is not UTF-8 */
    SDR_REASON_UNSUPPORTED = 5,       /* SDR_USAGE: not supported with this isolation, these engines or this library */
    SDR_REASON_REENTERED = 6,         /* SDR_USAGE: a function that waits was called inside a callback */
    SDR_REASON_CLOSED = 7,            /* SDR_USAGE or, for a job, SDR_CANCELLED: the runtime was closed */
    SDR_REASON_NOT_FINISHED = 8,      /* SDR_USAGE: the job has no image yet */
    SDR_REASON_NOT_ASKED = 9,         /* SDR_USAGE: the job was submitted without `png` */
    SDR_REASON_BUFFER_TOO_SMALL = 10, /* SDR_USAGE: the message contains both sizes */
    SDR_REASON_FORKED = 11,           /* SDR_USAGE: this process is a fork of the process that opened the runtime */
    SDR_REASON_QUEUE_FULL = 12,       /* SDR_FAILED: the queue is full; submit again when a waiting job has started */
    SDR_REASON_TIMEOUT = 13,          /* SDR_FAILED: the timeout of a wait has expired; the job continues */
    SDR_REASON_CANCELLED = 14,        /* SDR_CANCELLED */
    SDR_REASON_WORKER_DIED = 15,      /* SDR_FAILED: the worker process crashed or was killed; the next job starts a new one */
    SDR_REASON_CALLBACK = 16,         /* SDR_FAILED: the progress callback threw an exception */
    SDR_REASON_NO_PYTHON = 17,        /* SDR_ENVIRONMENT: no interpreter was found; the message lists the places searched */
    SDR_REASON_NO_RUNTIME = 18,   /* SDR_ENVIRONMENT: the interpreter lacks sdruntime or NumPy; the message lists the places */
    SDR_REASON_OUT_OF_MEMORY = 19 /* SDR_ENVIRONMENT: out of host memory */
};

/* Return the code of a status: SDR_OK for NULL, SDR_USAGE for an invalid handle. */
SDR_API int32_t sdr_status_code(const sdr_status *status);

/* Return the reason of a status: SDR_REASON_NONE for NULL, SDR_REASON_BAD_HANDLE for an invalid handle. */
SDR_API int32_t sdr_status_reason(const sdr_status *status);

/* Return the message of a status: what is wrong, where, the values, and how to fix it, in one or more lines. Returns "" for NULL,
 * and never NULL. The library owns the text, which is valid until the status is freed. */
SDR_API const char *sdr_status_message(const sdr_status *status);

/* Free a status. */
SDR_API void sdr_status_free(sdr_status *status);

/* ---- opening a bundle -------------------------------------------------------------------------------------------------------- */

enum {
    SDR_ISOLATION_IN_PROCESS = 0, /* the interpreter and the engines run in this process */
    SDR_ISOLATION_PROCESS = 1     /* they run in a worker process; images are returned through shared memory */
};

enum { SDR_LOG_DEBUG = 10, SDR_LOG_INFO = 20, SDR_LOG_WARNING = 30, SDR_LOG_ERROR = 40 };

/* A callback that receives one line of a runtime's log.
 *
 * `user` is sdr_open_params.log_user, `level` one of SDR_LOG_.... `message` is valid during the call.
 * It is called on a thread of the library, never twice at a time for one runtime. It is not called after sdr_runtime_close or
 * sdr_runtime_free has returned. If that was inside a callback, a call on another thread may still be running.
 * It must not call a function that waits (sdr_job_wait, sdr_runtime_open, sdr_runtime_close): these fail with
 * SDR_REASON_REENTERED. An exception that it throws is discarded. */
typedef void (*sdr_log_callback)(void *user, int32_t level, const char *message);

typedef struct sdr_open_params {
    uint32_t struct_size;
    int32_t isolation;    /* SDR_ISOLATION_IN_PROCESS (default) or SDR_ISOLATION_PROCESS */
    const char *bundle;   /* the bundle's folder; a relative path starts at the current folder; must not be NULL */
    const char *backend;  /* "onnxruntime", "tensorrt", ...; NULL: the best engine that fits this machine */
    const char *device;   /* the GPU: an index "1", "cuda:1", or a UUID "GPU-..." or its beginning; NULL: the first GPU */
    const char *python;   /* a virtual environment's folder, an interpreter or a libpython; NULL: see sdr_runtime_open */
    int32_t threads;      /* CPU threads for one operator; 0: the engine library decides */
    int32_t low_memory;   /* true: keep only one component on the GPU at a time */
    uint64_t memory_cap;  /* GPU memory limit in bytes; opening fails, with both numbers, if more is needed; 0: no limit */
    void *stream;         /* the caller's cudaStream_t for all GPU work, in process only; NULL: the library creates a stream */
    uint32_t queue;       /* the maximum number of waiting jobs; further ones fail with SDR_REASON_QUEUE_FULL; 0: 64 */
    int32_t log_level;    /* the lowest level that `log` receives; default SDR_LOG_INFO */
    sdr_log_callback log; /* NULL: no log */
    void *log_user;       /* passed to `log` */
    const char *options;  /* rare options as JSON: {"session": {"engine_host_code": "true"}, "measure": false}; NULL: none */
} sdr_open_params;

/* Set every field to its default. `struct_size` is sizeof(sdr_open_params). Does nothing if `params` is NULL. */
SDR_API void sdr_open_params_init(sdr_open_params *params, size_t struct_size);

/* Open a bundle: start the interpreter or a worker process, read the bundle and open its engines. Blocks for seconds.
 *
 * `params` and `runtime` must not be NULL. A process may open several runtimes. In process they share one interpreter, which the
 * first runtime chooses and which is never shut down. The library searches for it in this order:
 *   1. params->python, then the variable SDRUNTIME_PYTHON: the folder of a virtual environment, an interpreter or a libpython;
 *   2. in process: an interpreter that already runs in this process;
 *   3. the virtual environment of VIRTUAL_ENV;
 *   4. the folder `sdruntime` beside this library (lib/sdruntime), if it is a virtual environment;
 *   5. python3 on PATH; in process also libpython3.so, and libpython3.10 or later, if the loader finds it.
 * It uses the first one that exists. If params->python or a variable names something that is not Python, opening fails.
 *
 * The caller owns *runtime and frees it with sdr_runtime_free.
 *
 * Errors: SDR_USAGE for an invalid parameter. SDR_ENVIRONMENT for a missing library, device or memory, for fewer than 16 free
 * file descriptors, and with SDR_REASON_NO_PYTHON or SDR_REASON_NO_RUNTIME and a list of the places searched. SDR_BUNDLE for a
 * bundle that does not exist, is damaged, or has no engine that fits this machine. SDR_FAILED with SDR_REASON_WORKER_DIED. */
SDR_API sdr_status *sdr_runtime_open(const sdr_open_params *params, sdr_runtime **runtime);

/* Describe the open bundle as JSON: model, components (backend and engine of each), sizes, samplers, versions. Does not block.
 *
 * `json` must not be NULL. The library owns *json, which ends with NUL and is valid until the runtime is freed.
 * Errors: SDR_USAGE, with SDR_REASON_CLOSED after sdr_runtime_close. */
SDR_API sdr_status *sdr_runtime_describe(sdr_runtime *runtime, const char **json);

/* Stop all work: cancel waiting and running jobs, release the engines and end the worker process. Blocks until that is done (at
 * most one sampling step); no callback of this runtime is called afterwards.
 *
 * The cancelled jobs end with SDR_CANCELLED and SDR_REASON_CLOSED. Finished jobs keep their images. Closing twice has no effect.
 * Errors: SDR_USAGE, with SDR_REASON_REENTERED inside a callback. */
SDR_API sdr_status *sdr_runtime_close(sdr_runtime *runtime);

/* Close the runtime if it is open, and free the handle. Its jobs stay valid until they are freed.
 *
 * Blocks like sdr_runtime_close. Inside a callback of the library it does not block: it frees the handle, and the runtime closes
 * in the background. */
SDR_API void sdr_runtime_free(sdr_runtime *runtime);

/* ---- jobs -------------------------------------------------------------------------------------------------------------------- */

enum { SDR_JOB_QUEUED = 0, SDR_JOB_RUNNING = 1, SDR_JOB_DONE = 2, SDR_JOB_FAILED = 3, SDR_JOB_CANCELLED = 4 };

/* The progress of a job. The library sets struct_size. Read a field that was added after ABI 1.0 only if struct_size covers it. */
typedef struct sdr_progress {
    uint32_t struct_size;
    int32_t step; /* finished steps, 1 to `steps` */
    int32_t steps;
    int32_t preview_channels;
    int32_t preview_height;
    int32_t preview_width;
    const float *preview; /* latents [channels][height][width], the estimate of the finished ones; NULL if not requested */
} sdr_progress;

/* A callback that receives the progress of one job after each step. It returns 0, or any other value to cancel the job.
 *
 * `user` is sdr_job_params.progress_user. `progress` and what it points to are valid during the call. `job` may be passed to any
 * function that does not wait, including sdr_job_free. Functions that wait (sdr_job_wait, sdr_runtime_open, sdr_runtime_close)
 * fail with SDR_REASON_REENTERED.
 * It is called on a thread of the library, in order, never twice at a time for one job. The first call may come before
 * sdr_job_submit has returned. No call comes after sdr_job_wait has reported the end of the job, or after sdr_job_free has
 * returned.
 * All jobs that share engine calls wait while it runs: return quickly. If it throws an exception, the job fails with
 * SDR_REASON_CALLBACK. */
typedef int32_t (*sdr_progress_callback)(void *user, sdr_job *job, const sdr_progress *progress);

/* An image for a ControlNet of the bundle: Control in Python. Since ABI 1.3. */
typedef struct sdr_control {
    uint32_t struct_size;
    int32_t width; /* of `image` in pixels, any; it is resized */
    int32_t height;
    int32_t reserved;     /* must be 0 */
    const uint8_t *image; /* RGB8 rows from top to bottom */
    size_t stride;        /* bytes between the beginnings of two rows; 0: 3 * width */
    const char *net;      /* the name of the ControlNet; NULL: the only one */
    double scale;         /* how much it counts, default 1 */
    double start;         /* the part of the model calls in which it acts, from 0 to 1; default 0 */
    double end;           /* default 1 */
    const char *fit;      /* how to bring the image to the size that is generated: "resize", "crop", "exact"; NULL: "resize" */
} sdr_control;

/* Set every field to its default. `struct_size` is sizeof(sdr_control). Does nothing if `control` is NULL. */
SDR_API void sdr_control_init(sdr_control *control, size_t struct_size);

typedef struct sdr_job_params {
    uint32_t struct_size;
    int32_t steps;        /* default 20 */
    const char *prompt;   /* must not be NULL; may be "" */
    const char *negative; /* the negative prompt: what the image should not show; NULL: none */
    uint64_t seed;        /* default 0; the same seed generates the same image */
    int32_t random_seed;  /* true: ignore `seed` and use a random one, which sdr_result returns */
    int32_t width;        /* in pixels; width and height 0: the model's default size */
    int32_t height;
    int32_t png;          /* true: also encode the image as PNG, for sdr_job_png */
    double guidance;      /* guidance scale, default 7.5; at 1 or less the negative prompt has no effect */
    double rescale;       /* guidance rescale, 0 to 1, default 0 */
    const char *sampler;  /* "dpmpp_2m", ...; NULL: the checkpoint's sampler */
    const char *schedule; /* "karras", ...; NULL: the checkpoint's schedule */
    const char *options;  /* settings of the sampler as a JSON object, such as {"eta": 0.5}; NULL: none */
    const uint8_t *image; /* the start image, RGB8 rows from top to bottom; NULL: text to image */
    int32_t image_width;
    int32_t image_height;
    size_t image_stride;            /* bytes between the beginnings of two rows; 0: 3 * image_width */
    double strength;                /* how much `image` is changed: above 0, at most 1; default 0.8 */
    sdr_progress_callback progress; /* NULL: none */
    void *progress_user;            /* passed to `progress` */
    int32_t preview;                /* true: `progress` receives preview latents, copied at each step */
    int32_t reserved;               /* must be 0 */
    void *device_buffer;            /* the caller's memory on the engines' GPU, for the image, see sdr_job_submit; NULL: none */
    uint64_t device_buffer_size;    /* its size in bytes, at least 3 * width * height */
    /* since ABI 1.1 */
    const uint8_t *mask;  /* the part of `image` to regenerate: rows of 8 bits of gray, 255 regenerated, as large as the image */
    size_t mask_stride;   /* bytes between the beginnings of two rows; 0: image_width */
    const char *settings; /* other settings of a Request as a JSON object, such as {"hires": 2, "mask_blur": 4}; NULL: none */
    int32_t model_defaults; /* true: ignore `steps` and `guidance`: those of the model, or of `settings`, where it names them */
    /* since ABI 1.2 */
    const uint8_t *depth; /* for models with depth: how near each part of `image` is: rows of 8 bits of gray, white is near */
    int32_t depth_width;  /* the depth map is resized to the image */
    int32_t depth_height;
    size_t depth_stride; /* bytes between the beginnings of two rows; 0: depth_width */
    /* since ABI 1.3 */
    const sdr_control *const *controls; /* images for the bundle's ControlNets; NULL: none */
    size_t control_count;               /* how many pointers `controls` has */
} sdr_job_params;

/* Set every field to its default. `struct_size` is sizeof(sdr_job_params). Does nothing if `params` is NULL. */
SDR_API void sdr_job_params_init(sdr_job_params *params, size_t struct_size);

/* Request an image. Returns at once: the job waits in the queue, then shares engine calls with other jobs of the same size.
 *
 * `params` and `job` must not be NULL. The caller owns *job and frees it with sdr_job_free, before or after the runtime.
 * If the worker process has died, the call starts a new one and blocks until it is ready.
 *
 * `device_buffer` receives the image as RGB8 rows without gaps. It requires SDR_ISOLATION_IN_PROCESS and engines on a GPU
 * (SDR_REASON_UNSUPPORTED) and enough space (SDR_REASON_BUFFER_TOO_SMALL). Read it after sdr_job_wait has reported the end of the
 * job.
 *
 * Errors: SDR_USAGE for an invalid parameter, with SDR_REASON_CLOSED after sdr_runtime_close. SDR_FAILED with
 * SDR_REASON_QUEUE_FULL. The errors of sdr_runtime_open, if a new worker process is started. Errors that only the engines detect,
 * such as an unknown sampler or a size that no engine supports, are reported by sdr_job_wait. */
SDR_API sdr_status *sdr_job_submit(sdr_runtime *runtime, const sdr_job_params *params, sdr_job **job);

/* Get the state of a job: one of SDR_JOB_..., the number of finished steps, and the total number of steps (0 before the first
 * step). Does not block.
 *
 * `state`, `step` and `steps` may each be NULL. They are unchanged if the call fails. Errors: SDR_USAGE. */
SDR_API sdr_status *sdr_job_poll(sdr_job *job, int32_t *state, int32_t *step, int32_t *steps);

/* Wait for the end of a job. Returns NULL if the image is ready.
 *
 * `timeout_ms` is the timeout in milliseconds. A negative value waits without limit, 0 does not wait.
 * Errors: the error of a job that has failed, returned again by each call. SDR_CANCELLED. SDR_FAILED with SDR_REASON_WORKER_DIED,
 * or with SDR_REASON_TIMEOUT, after which the job continues. SDR_USAGE with SDR_REASON_BAD_HANDLE if another thread frees the job
 * during the call, or with SDR_REASON_REENTERED inside a callback, unless `timeout_ms` is 0. */
SDR_API sdr_status *sdr_job_wait(sdr_job *job, int64_t timeout_ms);

/* Cancel a job at its next step. Returns at once; sdr_job_wait returns when the job has ended.
 *
 * The job ends without an image: with SDR_CANCELLED, or with an earlier error. Its progress callback is not called again. If the
 * job has ended or is already cancelled, the call has no effect and returns NULL. Errors: SDR_USAGE. */
SDR_API sdr_status *sdr_job_cancel(sdr_job *job);

/* Free a job and its image. A job that has not ended is cancelled.
 *
 * Pointers to its image, PNG and texts (sdr_job_rgb, sdr_job_png, sdr_result) become invalid. If the job's progress callback is
 * running on another thread, waits for it, except inside a callback. The callback is not called after it has returned. */
SDR_API void sdr_job_free(sdr_job *job);

/* ---- results ----------------------------------------------------------------------------------------------------------------- */

/* The data of a finished image. The library owns the texts, which are valid until the job is freed. */
typedef struct sdr_result {
    uint32_t struct_size;
    int32_t width; /* in pixels */
    int32_t height;
    int32_t reserved;
    uint64_t seed;        /* the seed that was used */
    double queued;        /* seconds from submit until the job started */
    double encode;        /* seconds in the text encoders and the VAE encoder */
    double denoise;       /* seconds from the first to the last step */
    double decode;        /* seconds in the VAE decoder */
    double total;         /* seconds from submit to the end */
    size_t png_size;      /* in bytes; 0 if no PNG was requested */
    const char *sampler;  /* the sampler that was used */
    const char *warnings; /* a JSON array of strings, usually "[]" */
} sdr_result;

/* Set struct_size, and every other field to 0. `struct_size` is sizeof(sdr_result). Does nothing if `result` is NULL. */
SDR_API void sdr_result_init(sdr_result *result, size_t struct_size);

/* Get the data of a finished image.
 *
 * `result` must not be NULL. At most result->struct_size bytes are written; nothing is written if the call fails.
 * Errors: SDR_USAGE, with SDR_REASON_NOT_FINISHED if the job has no image yet. The error that sdr_job_wait returns, if the job
 * ended without an image. */
SDR_API sdr_status *sdr_job_result(sdr_job *job, sdr_result *result);

/* Get a pointer to the image, without a copy.
 *
 * `rows` and `stride` must not be NULL. *rows points to the first of `height` rows, from top to bottom, each 3 * width bytes in
 * the order R, G, B. *stride is the number of bytes between the beginnings of two rows. The library owns the image, which is
 * read-only and valid until the job is freed. Errors: those of sdr_job_result. */
SDR_API sdr_status *sdr_job_rgb(sdr_job *job, const uint8_t **rows, size_t *stride);

/* Copy the image into the caller's memory.
 *
 * `buffer` has `size` bytes. Its rows begin `stride` bytes apart (0: 3 * width); the bytes between two rows are unchanged.
 * *needed is set to the required size, stride * (height - 1) + 3 * width; `needed` may be NULL. To get only *needed, pass NULL
 * and 0 as `buffer` and `size`.
 * Errors: SDR_USAGE with SDR_REASON_BUFFER_TOO_SMALL, which sets *needed but does not write to `buffer`; with
 * SDR_REASON_BAD_ARGUMENT if `stride` is less than 3 * width. Those of sdr_job_result. */
SDR_API sdr_status *sdr_job_copy_rgb(sdr_job *job, uint8_t *buffer, size_t size, size_t stride, size_t *needed);

/* Get a pointer to the PNG of a job that was submitted with `png`. Its text chunks contain the settings.
 *
 * `bytes` and `size` must not be NULL. The library owns the bytes, which are read-only and valid until the job is freed.
 * Errors: SDR_USAGE with SDR_REASON_NOT_ASKED if the job was submitted without `png`. Those of sdr_job_result. */
SDR_API sdr_status *sdr_job_png(sdr_job *job, const uint8_t **bytes, size_t *size);

#ifdef __cplusplus
}
#endif

#endif
