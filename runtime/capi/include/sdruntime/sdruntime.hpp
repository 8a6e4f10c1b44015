// sdruntime.hpp: the C library in C++17. Header-only: the library itself exports only C functions.
//
//     sdruntime::OpenParams open;
//     open.bundle = "bundle";
//     sdruntime::Runtime runtime(open);
//
//     sdruntime::JobParams params;
//     params.prompt = "a small red circle on the left on a blue background";
//     params.seed = 7;
//     sdruntime::Job job = runtime.submit(params, [](const sdruntime::Progress &now) { return now.step < 10; });
//     job.wait();
//     sdruntime::Picture picture = job.picture();        // a view, valid until the job is destroyed
//
// Errors:    every status is thrown as an Error. Ownership: Runtime and Job own their handles. They can be moved but not copied.
// An object that was moved from may be destroyed or
//            assigned to; any other use throws Error (SDR_REASON_BAD_HANDLE). A Job may outlive its Runtime.
// Threads:   as described in sdruntime.h for handles. Do not move or destroy an object while another thread uses it.
//
// Everything else is as documented in sdruntime.h. Requires exceptions, but not RTTI. Files compiled as C++17 and as C++20 may be
// linked together.
#ifndef SDRUNTIME_HPP
#define SDRUNTIME_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#if __cplusplus >= 202002L
#include <version>
#if defined(__cpp_lib_jthread)
#include <stop_token>
#endif
#endif

#include "sdruntime/sdruntime.h"

namespace sdruntime {

// The code, reason and message of a status. Its symbols are visible, so that it can be caught across shared libraries.
class SDR_API Error : public std::runtime_error {
public:
    Error(int32_t code, int32_t reason, const std::string &message) : std::runtime_error(message), code_(code), reason_(reason) {}

    [[nodiscard]] int32_t code() const noexcept { return code_; }      // SDR_USAGE, SDR_BUNDLE, ...; also an exit code
    [[nodiscard]] int32_t reason() const noexcept { return reason_; }  // SDR_REASON_...
    [[nodiscard]] bool cancelled() const noexcept { return code_ == SDR_CANCELLED; }

private:
    int32_t code_, reason_;
};

// Throw Error for a status and free it; do nothing for NULL.
inline void check(sdr_status *status) {
    if (!status) return;
    const std::unique_ptr<sdr_status, void (*)(sdr_status *)> owner(status, sdr_status_free);
    throw Error(sdr_status_code(status), sdr_status_reason(status), sdr_status_message(status));
}

// A contiguous range of elements that it does not own. Converts to std::span<const T>.
template <class T>
class View {
public:
    using value_type = T;
    using const_iterator = const T *;

    constexpr View() noexcept = default;
    constexpr View(const T *data, std::size_t size) noexcept : data_(data), size_(size) {}

    [[nodiscard]] constexpr const T *data() const noexcept { return data_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return size_ == 0; }
    [[nodiscard]] constexpr const T *begin() const noexcept { return data_; }
    [[nodiscard]] constexpr const T *end() const noexcept { return data_ + size_; }
    [[nodiscard]] constexpr const T &operator[](std::size_t k) const noexcept { return data_[k]; }

private:
    const T *data_ = nullptr;
    std::size_t size_ = 0;
};

// The C structs with their defaults. Texts must stay valid until the call that receives the struct has returned. Pass `log` and
// `progress` to Runtime and Runtime::submit.
struct OpenParams : sdr_open_params {
    OpenParams() noexcept { sdr_open_params_init(this, sizeof(sdr_open_params)); }
};

struct Control : sdr_control {
    Control() noexcept { sdr_control_init(this, sizeof(sdr_control)); }
};

struct JobParams : sdr_job_params {
    JobParams() noexcept { sdr_job_params_init(this, sizeof(sdr_job_params)); }
};

// The progress of a job. `preview`: latents [channels][height][width], the estimate of the finished ones, valid during the call;
// empty unless JobParams::preview is set.
struct Progress {
    int32_t step = 0, steps = 0;
    View<float> preview;
    int32_t preview_channels = 0, preview_height = 0, preview_width = 0;
};

// The state of a job: one of SDR_JOB_..., the finished steps and their total.
struct State {
    int32_t state = SDR_JOB_QUEUED, step = 0, steps = 0;
    [[nodiscard]] bool ended() const noexcept { return state >= SDR_JOB_DONE; }
};

// A view of a job's image: RGB8 rows from top to bottom, 3 * width bytes each, `stride` bytes apart. `bytes` ends with the last
// row.
struct Picture {
    int32_t width = 0, height = 0;
    std::size_t stride = 0;
    View<uint8_t> bytes;
    // Return row `y`, from 0 to height - 1 (not checked).
    [[nodiscard]] View<uint8_t> row(int32_t y) const noexcept {
        return {bytes.data() + static_cast<std::size_t>(y) * stride, 3 * static_cast<std::size_t>(width)};
    }
};

// Called after each step, on a thread of the library. Returns true to continue, false to cancel the job. An exception that it
// throws also cancels the job, and Job::wait throws it again. The function is destroyed with the Job, after its last call; if it
// destroys its own Job, it is destroyed when it has returned.
using ProgressFunction = std::function<bool(const Progress &)>;

// Called for each line of a runtime's log, on a thread of the library, never twice at a time. Exceptions that it throws are
// discarded.
using LogFunction = std::function<void(int32_t level, const char *message)>;

// A request for one image. The destructor cancels a job that has not ended, and waits for its progress function if that is
// running on another thread. Inside a callback it does not wait: there, destroy only the callback's own Job, or one without a
// progress function.
class [[nodiscard]] Job {
public:
    Job() noexcept = default;
    Job(Job &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)), watcher_(std::move(other.watcher_)) {}
    Job &operator=(Job &&other) noexcept {
        Job moved(std::move(other));
        std::swap(handle_, moved.handle_);
        std::swap(watcher_, moved.watcher_);
        return *this;
    }
    ~Job() { sdr_job_free(handle_); }

    // Wait for the image. If the job ends without one, throws Error (cancelled() is true if it was cancelled) or the exception of
    // the progress function, again at each call. Functions that read the image then throw Error.
    void wait() { ended(sdr_job_wait(handle_, -1)); }

    // Wait like wait(), but at most `time`. Returns false if the job has not ended by then; it continues.
    [[nodiscard]] bool wait_for(std::chrono::milliseconds time) {
        sdr_status *status = sdr_job_wait(handle_, time.count() < 0 ? 0 : time.count());
        if (sdr_status_reason(status) == SDR_REASON_TIMEOUT) {
            sdr_status_free(status);
            return false;
        }
        ended(status);
        return true;
    }

#if defined(__cpp_lib_jthread)
    // Wait like wait(). A stop that is requested before or during the call cancels the job. A later one has no effect.
    void wait(std::stop_token token) {
        const std::stop_callback on_stop(std::move(token), [handle = handle_] { sdr_status_free(sdr_job_cancel(handle)); });
        wait();
    }
#endif

    // Return the state of the job. Does not block.
    [[nodiscard]] State poll() const {
        State now;
        check(sdr_job_poll(handle_, &now.state, &now.step, &now.steps));
        return now;
    }

    // Cancel the job at its next step. Returns at once; wait() returns when the job has ended. No effect on a job that has ended.
    void cancel() { check(sdr_job_cancel(handle_)); }

    // Return the size, seed and times of the image. The texts are valid until the job is destroyed.
    [[nodiscard]] sdr_result result() const {
        sdr_result data;
        sdr_result_init(&data, sizeof data);
        check(sdr_job_result(handle_, &data));
        return data;
    }

    // Return a view of the image, valid until the job is destroyed.
    [[nodiscard]] Picture picture() const {
        const sdr_result data = result();
        Picture image;
        const uint8_t *rows = nullptr;
        check(sdr_job_rgb(handle_, &rows, &image.stride));
        image.width = data.width;
        image.height = data.height;
        image.bytes = View<uint8_t>(
            rows, image.stride * static_cast<std::size_t>(data.height - 1) + 3 * static_cast<std::size_t>(data.width));
        return image;
    }

    // Return the size in bytes that copy_to requires for rows `stride` bytes apart (0: 3 * width).
    [[nodiscard]] std::size_t copy_size(std::size_t stride = 0) const {
        std::size_t needed = 0;
        check(sdr_job_copy_rgb(handle_, nullptr, 0, stride, &needed));
        return needed;
    }

    // Copy the image into `buffer`, which has `size` bytes.
    void copy_to(uint8_t *buffer, std::size_t size, std::size_t stride = 0) const {
        check(sdr_job_copy_rgb(handle_, buffer, size, stride, nullptr));
    }

    // Return the PNG of a job that was submitted with JobParams::png. It is valid until the job is destroyed.
    [[nodiscard]] View<uint8_t> png() const {
        const uint8_t *bytes = nullptr;
        std::size_t size = 0;
        check(sdr_job_png(handle_, &bytes, &size));
        return {bytes, size};
    }

    // Return the handle, which this object still owns; NULL if it was moved from.
    [[nodiscard]] sdr_job *get() const noexcept { return handle_; }
    explicit operator bool() const noexcept { return handle_ != nullptr; }

private:
    friend class Runtime;

    struct Watcher : std::enable_shared_from_this<Watcher> {
        ProgressFunction function;
        std::mutex mutex;
        std::exception_ptr thrown;

        static int32_t call(void *user, sdr_job *, const sdr_progress *now) {
            const auto self = static_cast<Watcher *>(user)->shared_from_this();  // the function may destroy its own Job
            Progress progress;
            progress.step = now->step;
            progress.steps = now->steps;
            progress.preview_channels = now->preview_channels;
            progress.preview_height = now->preview_height;
            progress.preview_width = now->preview_width;
            if (now->preview)
                progress.preview = View<float>(now->preview, static_cast<std::size_t>(now->preview_channels) *
                                                                 static_cast<std::size_t>(now->preview_height) *
                                                                 static_cast<std::size_t>(now->preview_width));
            try {
                return self->function(progress) ? 0 : 1;
            } catch (...) {
                std::exception_ptr exception = std::current_exception();
                if (!exception) throw;  // not a C++ exception: the thread is being cancelled
                self->keep(std::move(exception));
            }
            return 1;
        }

        void keep(std::exception_ptr exception) {
            const std::lock_guard<std::mutex> lock(mutex);
            thrown = std::move(exception);
        }
    };

    void ended(sdr_status *status) {
        if (watcher_) {
            const std::lock_guard<std::mutex> lock(watcher_->mutex);
            if (watcher_->thrown) {
                sdr_status_free(status);
                std::rethrow_exception(watcher_->thrown);
            }
        }
        check(status);
    }

    sdr_job *handle_ = nullptr;
    std::shared_ptr<Watcher> watcher_;
};

// An open bundle. The destructor closes it and blocks until all of its work has ended: do not destroy it inside a callback.
class [[nodiscard]] Runtime {
public:
    Runtime() noexcept = default;
    // Open a bundle. Blocks for seconds. Throws Error.
    explicit Runtime(const OpenParams &params, LogFunction log = {}) {
        sdr_open_params settings = params;
        if (log) {
            log_ = std::make_unique<LogFunction>(std::move(log));
            settings.log = [](void *user, int32_t level, const char *message) {
                (*static_cast<LogFunction *>(user))(level, message);
            };
            settings.log_user = log_.get();
        }
        check(sdr_runtime_open(&settings, &handle_));
    }
    Runtime(Runtime &&other) noexcept : log_(std::move(other.log_)), handle_(std::exchange(other.handle_, nullptr)) {}
    Runtime &operator=(Runtime &&other) noexcept {
        Runtime moved(std::move(other));
        std::swap(log_, moved.log_);
        std::swap(handle_, moved.handle_);
        return *this;
    }
    ~Runtime() { sdr_runtime_free(handle_); }

    // Return the JSON of sdr_runtime_describe, valid until the runtime is destroyed.
    [[nodiscard]] const char *describe() const {
        const char *json = nullptr;
        check(sdr_runtime_describe(handle_, &json));
        return json;
    }

    // Request an image. Returns at once, unless a worker that died must be replaced. `progress` may be called before this returns.
    // Throws Error.
    [[nodiscard]] Job submit(const JobParams &params, ProgressFunction progress = {}) {
        sdr_job_params settings = params;
        Job job;
        if (progress) {
            job.watcher_ = std::make_shared<Job::Watcher>();
            job.watcher_->function = std::move(progress);
            settings.progress = Job::Watcher::call;
            settings.progress_user = job.watcher_.get();
        }
        check(sdr_job_submit(handle_, &settings, &job.handle_));
        return job;
    }

    // Stop all work and wait until it has ended. Finished jobs keep their images. Throws Error.
    void close() { check(sdr_runtime_close(handle_)); }

    // Return the handle, which this object still owns; NULL if it was moved from.
    [[nodiscard]] sdr_runtime *get() const noexcept { return handle_; }
    explicit operator bool() const noexcept { return handle_ != nullptr; }

private:
    std::unique_ptr<LogFunction> log_;  // declared first, so that it outlives the handle
    sdr_runtime *handle_ = nullptr;
};

}  // namespace sdruntime

#endif
