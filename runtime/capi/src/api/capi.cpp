// The C functions: they turn handles into objects and exceptions into statuses.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "api/handles.hpp"
#include "api/job.hpp"
#include "api/params.hpp"
#include "api/runtime.hpp"
#include "python/python_api.hpp"
#include "transport/outbox.hpp"

namespace sdr {
namespace {

constexpr uint64_t NO_MEMORY = 16;  // the handle of a static status, returned if there is no memory for a new one

sdr_status *new_status(int32_t code, int32_t reason, const char *message) noexcept {
    try {
        Process &process = Process::current();
        const uint64_t id = process.new_id();
        process.statuses.put(id, std::make_shared<Status>(Status{code, reason, message}));
        return handle_of<sdr_status>(id);
    } catch (const std::exception &) {
        return handle_of<sdr_status>(NO_MEMORY);
    }
}

// Run `body`. Returns NULL, or a status for what it threw.
template <class Body>
sdr_status *guarded(Body body) {
    try {
        body();
        return nullptr;
    } catch (const Failure &failure) {
        return new_status(failure.code, failure.reason, failure.what());
    } catch (const std::bad_alloc &) {
        return handle_of<sdr_status>(NO_MEMORY);
    } catch (const std::exception &error) {
        return new_status(SDR_FAILED, SDR_REASON_NONE, error.what());
    }
}

const Status &status_of(const sdr_status *handle) {
    static const Status none{SDR_OK, SDR_REASON_NONE, ""};
    static const Status no_memory{SDR_ENVIRONMENT, SDR_REASON_OUT_OF_MEMORY, "out of memory"};
    static const Status invalid{SDR_USAGE, SDR_REASON_BAD_HANDLE, "status: the handle was freed, or is not a status handle"};
    if (!handle) return none;
    if (id_of(handle) == NO_MEMORY) return no_memory;
    const auto status = Process::current().statuses.find(id_of(handle));
    return status ? *status : invalid;  // the reference stays valid: the table owns the status
}

std::shared_ptr<Runtime> runtime_of(const sdr_runtime *handle) { return object_of(&Process::runtimes, handle, "runtime"); }
std::shared_ptr<Job> job_of(const sdr_job *handle) { return object_of(&Process::jobs, handle, "job"); }

template <class T>
void require(T *pointer, const char *name) {
    if (!pointer) throw usage(SDR_REASON_BAD_ARGUMENT, std::string(name) + " is NULL");
}

// Remove a handle's object from its table and return it; null if there is none, which SDRUNTIME_DEBUG=1 reports on stderr.
template <class T, class Handle>
std::shared_ptr<T> remove_object(Table<T> Process::*table, Handle *handle, const char *function) {
    if (!handle) return nullptr;
    auto object = (Process::current().*table).take(id_of(handle));
    const char *debug = object ? nullptr : std::getenv("SDRUNTIME_DEBUG");
    if (debug && std::strcmp(debug, "1") == 0)
        std::fprintf(stderr, "sdruntime: %s(%p): already freed, or not a valid handle\n", function, static_cast<void *>(handle));
    return object;
}

template <class T>
void init(T *params, size_t size, const T &defaults) {
    if (!params || size < sizeof(uint32_t)) return;
    std::memset(static_cast<void *>(params), 0, size);
    std::memcpy(static_cast<void *>(params), &defaults, std::min(size, sizeof defaults));
    const auto struct_size = static_cast<uint32_t>(std::min<size_t>(size, UINT32_MAX));
    std::memcpy(static_cast<void *>(params), &struct_size, sizeof struct_size);
}

void copy_rows(const Image &image, uint8_t *buffer, size_t size, size_t stride, size_t *needed) {
    const size_t row = 3 * static_cast<size_t>(image.width), height = static_cast<size_t>(image.height);
    if (!stride) stride = row;
    if (stride < row)
        throw usage(SDR_REASON_BAD_ARGUMENT,
                    "stride " + std::to_string(stride) + " is less than the " + std::to_string(row) + " bytes of a row");
    if (stride > static_cast<size_t>(PTRDIFF_MAX) / height)
        throw usage(SDR_REASON_BAD_ARGUMENT, "stride " + std::to_string(stride) + " is too large");
    const size_t required = stride * (height - 1) + row;
    if (needed) *needed = required;
    if (!buffer && !size && needed) return;
    require(buffer, "buffer");
    if (size < required)
        throw usage(SDR_REASON_BUFFER_TOO_SMALL,
                    "the buffer has " + std::to_string(size) + " bytes, but the image needs " + std::to_string(required));
    for (size_t k = 0; k < height; ++k) std::memcpy(buffer + k * stride, image.blob.data() + k * row, row);
}

}  // namespace
}  // namespace sdr

using namespace sdr;

extern "C" {

const char *sdr_version(void) { return SDR_VERSION; }

uint32_t sdr_abi_version(void) { return uint32_t{SDR_ABI_MAJOR} << 16 | SDR_ABI_MINOR; }

int32_t sdr_status_code(const sdr_status *status) { return status_of(status).code; }

int32_t sdr_status_reason(const sdr_status *status) { return status_of(status).reason; }

const char *sdr_status_message(const sdr_status *status) { return status_of(status).message.c_str(); }

void sdr_status_free(sdr_status *status) {
    if (id_of(status) != NO_MEMORY) remove_object(&Process::statuses, status, "sdr_status_free");
}

void sdr_open_params_init(sdr_open_params *params, size_t struct_size) {
    sdr_open_params defaults = {};
    defaults.log_level = SDR_LOG_INFO;
    init(params, struct_size, defaults);
}

void sdr_job_params_init(sdr_job_params *params, size_t struct_size) {
    sdr_job_params defaults = {};
    defaults.steps = 20;
    defaults.guidance = 7.5;
    defaults.strength = 0.8;
    init(params, struct_size, defaults);
}

void sdr_control_init(sdr_control *control, size_t struct_size) {
    sdr_control defaults = {};
    defaults.scale = 1;
    defaults.end = 1;
    init(control, struct_size, defaults);
}

void sdr_result_init(sdr_result *result, size_t struct_size) { init(result, struct_size, sdr_result{}); }

sdr_status *sdr_runtime_open(const sdr_open_params *params, sdr_runtime **runtime) {
    return guarded([&] {
        require(runtime, "runtime");
        *runtime = nullptr;
        if (InCallback::active()) throw usage(SDR_REASON_REENTERED, "sdr_runtime_open: cannot be called inside a callback");
        const auto opened = std::make_shared<Runtime>(copy_of(params));
        opened->open();
        Process &process = Process::current();
        const uint64_t id = process.new_id();
        process.runtimes.put(id, opened);
        *runtime = handle_of<sdr_runtime>(id);
    });
}

sdr_status *sdr_runtime_describe(sdr_runtime *runtime, const char **json) {
    return guarded([&] {
        require(json, "json");
        *json = nullptr;
        *json = runtime_of(runtime)->describe();
    });
}

sdr_status *sdr_runtime_close(sdr_runtime *runtime) {
    return guarded([&] { runtime_of(runtime)->close(); });
}

void sdr_runtime_free(sdr_runtime *runtime) {
    sdr_status *status = guarded([&] {
        auto removed = remove_object(&Process::runtimes, runtime, "sdr_runtime_free");
        if (!removed) return;
        if (InCallback::active()) {
            removed->mute_log();
            quiet_thread([removed = std::move(removed)] { removed->close(); }).detach();
        } else {
            removed->close();
        }
    });
    sdr_status_free(status);
}

sdr_status *sdr_job_submit(sdr_runtime *runtime, const sdr_job_params *params, sdr_job **job) {
    return guarded([&] {
        require(job, "job");
        *job = nullptr;
        *job = handle_of<sdr_job>(runtime_of(runtime)->submit(copy_of(params)));
    });
}

sdr_status *sdr_job_poll(sdr_job *job, int32_t *state, int32_t *step, int32_t *steps) {
    return guarded([&] { job_of(job)->poll(state, step, steps); });
}

sdr_status *sdr_job_wait(sdr_job *job, int64_t timeout_ms) {
    return guarded([&] {
        const auto waited = job_of(job);
        const GilPause pause;
        waited->wait(timeout_ms);
    });
}

sdr_status *sdr_job_cancel(sdr_job *job) {
    return guarded([&] {
        const auto cancelled = job_of(job);
        if (const auto runtime = cancelled->runtime.lock()) runtime->cancel(*cancelled);
    });
}

void sdr_job_free(sdr_job *job) {
    sdr_status *status = guarded([&] {
        const auto removed = remove_object(&Process::jobs, job, "sdr_job_free");
        if (!removed) return;
        if (const auto runtime = removed->runtime.lock()) runtime->cancel(*removed);
        const GilPause pause;
        removed->release();
    });
    sdr_status_free(status);
}

sdr_status *sdr_job_result(sdr_job *job, sdr_result *result) {
    return guarded([&] {
        require(result, "result");
        uint32_t size;
        std::memcpy(&size, result, sizeof size);
        if (size < sizeof size || size > LARGEST_STRUCT)
            throw usage(SDR_REASON_BAD_STRUCT,
                        "sdr_result.struct_size is " + std::to_string(size) + ": call sdr_result_init first");
        const auto image = job_of(job)->image();
        sdr_result data = {};
        data.struct_size = size;
        data.width = image->width;
        data.height = image->height;
        data.seed = image->seed;
        data.queued = image->queued;
        data.encode = image->encode;
        data.denoise = image->denoise;
        data.decode = image->decode;
        data.total = image->total;
        data.png_size = image->png;
        data.sampler = image->sampler.c_str();
        data.warnings = image->warnings.c_str();
        std::memcpy(result, &data, std::min<size_t>(size, sizeof data));
    });
}

sdr_status *sdr_job_rgb(sdr_job *job, const uint8_t **rows, size_t *stride) {
    return guarded([&] {
        require(rows, "rows");
        require(stride, "stride");
        *rows = nullptr;
        *stride = 0;
        const auto image = job_of(job)->image();
        *rows = image->blob.data();
        *stride = 3 * static_cast<size_t>(image->width);
    });
}

sdr_status *sdr_job_copy_rgb(sdr_job *job, uint8_t *buffer, size_t size, size_t stride, size_t *needed) {
    return guarded([&] {
        if (needed) *needed = 0;
        copy_rows(*job_of(job)->image(), buffer, size, stride, needed);
    });
}

sdr_status *sdr_job_png(sdr_job *job, const uint8_t **bytes, size_t *size) {
    return guarded([&] {
        require(bytes, "bytes");
        require(size, "size");
        *bytes = nullptr;
        *size = 0;
        const auto finished = job_of(job);
        const auto image = finished->image();
        if (!finished->png_requested()) throw usage(SDR_REASON_NOT_ASKED, "no PNG was requested: set sdr_job_params.png");
        *bytes = image->blob.data() + image->rgb;
        *size = image->png;
    });
}

}  // extern "C"
