// sdruntime.hpp: the C library in C++17. Header only: what the library exports stays C.
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
//     sdruntime::Picture picture = job.picture();        // a view, as long as the job
//
// Every status becomes an Error. Runtime and Job own their handles and are moved, not copied; one that was moved from may be destroyed
// and assigned to, and any other use throws Error (SDR_REASON_BAD_HANDLE). A Job may outlive its Runtime.
// Threads: as in sdruntime.h for the handles; moving or destroying an object while another thread uses that very object is the
// caller's to prevent, as with any other. The text of sdruntime.h holds for all that is not said here.
// It needs exceptions, and no RTTI. Files compiled as C++17 and as C++20 may be linked together.
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

// What a status says. Visible, so that it is caught as what it is across shared libraries.
class SDR_API Error : public std::runtime_error {
public:
    Error(int32_t code, int32_t reason, const std::string &message) : std::runtime_error(message), code_(code), reason_(reason) {}

    [[nodiscard]] int32_t code() const noexcept { return code_; }      // SDR_USAGE, SDR_BUNDLE, ...: an exit code
    [[nodiscard]] int32_t reason() const noexcept { return reason_; }  // SDR_REASON_...
    [[nodiscard]] bool cancelled() const noexcept { return code_ == SDR_CANCELLED; }

private:
    int32_t code_, reason_;
};

// Throws Error for a status, and frees it.
inline void check(sdr_status *status) {
    if (!status) return;
    const std::unique_ptr<sdr_status, void (*)(sdr_status *)> owner(status, sdr_status_free);
    throw Error(sdr_status_code(status), sdr_status_reason(status), sdr_status_message(status));
}

// Elements that something else owns: a contiguous range, which std::span<const T> takes.
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

// The structs of C with their defaults. Texts are the caller's until the call that takes them returned. What Runtime and Job take as
// functions (`log`, `progress`) is not set here.
struct OpenParams : sdr_open_params {
    OpenParams() noexcept { sdr_open_params_init(this, sizeof(sdr_open_params)); }
};

struct JobParams : sdr_job_params {
    JobParams() noexcept { sdr_job_params_init(this, sizeof(sdr_job_params)); }
};

// How far a job is. `preview`: latents [channels][height][width], empty where JobParams::preview is not set; valid during the call.
struct Progress {
    int32_t step = 0, steps = 0;
    View<float> preview;
    int32_t preview_channels = 0, preview_height = 0, preview_width = 0;
};

struct State {
    int32_t state = SDR_JOB_QUEUED, step = 0, steps = 0;
    [[nodiscard]] bool ended() const noexcept { return state >= SDR_JOB_DONE; }
};

// RGB8 rows from the top, 3 * width bytes each, `stride` apart: the job's own, not copied. `bytes` ends with the last row.
struct Picture {
    int32_t width = 0, height = 0;
    std::size_t stride = 0;
    View<uint8_t> bytes;
    // `y` from 0 to height - 1, which is not checked.
    [[nodiscard]] View<uint8_t> row(int32_t y) const noexcept {
        return {bytes.data() + static_cast<std::size_t>(y) * stride, 3 * static_cast<std::size_t>(width)};
    }
};

// Called after each step, on a thread of the library; false cancels. What it throws cancels too, and Job::wait throws that again. It,
// and what it holds, is destroyed with the Job: after its last call, except where the Job is destroyed by its own function.
using ProgressFunction = std::function<bool(const Progress &)>;

// Called for each line of a runtime's log, on a thread of the library, never two at a time. What it throws is dropped.
using LogFunction = std::function<void(int32_t level, const char *message)>;

// One requested image. Destroying it cancels a job that has not ended, and waits for its progress function if that runs on another
// thread. Inside a callback it does not wait: there, destroy only the callback's own Job, or one without a progress function.
class [[nodiscard]] Job {
public:
    Job() noexcept = default;
    Job(Job &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)), watcher_(std::move(other.watcher_)) {}
    Job &operator=(Job &&other) noexcept {
        Job taken(std::move(other));
        std::swap(handle_, taken.handle_);
        std::swap(watcher_, taken.watcher_);
        return *this;
    }
    ~Job() { sdr_job_free(handle_); }

    // Wait for the image. Throws Error otherwise (cancelled() where it was), or what the progress function threw; the same at
    // each call. Functions that read the image throw Error then.
    void wait() { ended(sdr_job_wait(handle_, -1)); }

    // The same within a time. False where that is over and the job goes on.
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
    // The same; a requested stop, before or meanwhile, cancels the job. One after the end does nothing.
    void wait(std::stop_token token) {
        const std::stop_callback on_stop(std::move(token), [handle = handle_] { sdr_status_free(sdr_job_cancel(handle)); });
        wait();
    }
#endif

    // Blocks on nothing.
    [[nodiscard]] State poll() const {
        State found;
        check(sdr_job_poll(handle_, &found.state, &found.step, &found.steps));
        return found;
    }

    // Cancel the job at its next step; wait returns when it has ended. A job that has ended is unchanged.
    void cancel() { check(sdr_job_cancel(handle_)); }

    // Size, seed, seconds. Its texts are valid as long as the job.
    [[nodiscard]] sdr_result result() const {
        sdr_result found;
        sdr_result_init(&found, sizeof found);
        check(sdr_job_result(handle_, &found));
        return found;
    }

    // Valid as long as the job.
    [[nodiscard]] Picture picture() const {
        const sdr_result found = result();
        Picture made;
        const uint8_t *rows = nullptr;
        check(sdr_job_rgb(handle_, &rows, &made.stride));
        made.width = found.width;
        made.height = found.height;
        made.bytes = View<uint8_t>(
            rows, made.stride * static_cast<std::size_t>(found.height - 1) + 3 * static_cast<std::size_t>(found.width));
        return made;
    }

    // The bytes that copy_to needs for rows `stride` bytes apart (0: 3 * width).
    [[nodiscard]] std::size_t copy_size(std::size_t stride = 0) const {
        std::size_t needed = 0;
        check(sdr_job_copy_rgb(handle_, nullptr, 0, stride, &needed));
        return needed;
    }

    void copy_to(uint8_t *buffer, std::size_t size, std::size_t stride = 0) const {
        check(sdr_job_copy_rgb(handle_, buffer, size, stride, nullptr));
    }

    // Of a job that was submitted with JobParams::png. Valid as long as the job.
    [[nodiscard]] View<uint8_t> png() const {
        const uint8_t *bytes = nullptr;
        std::size_t size = 0;
        check(sdr_job_png(handle_, &bytes, &size));
        return {bytes, size};
    }

    // The handle, still this object's; NULL where it was moved from.
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
                if (!exception) throw;  // none of C++: the thread is being ended
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

// An open bundle. Destroying it closes it, which blocks until all of its work has ended: not from inside a callback.
class [[nodiscard]] Runtime {
public:
    Runtime() noexcept = default;
    // Blocks for seconds. Throws Error.
    explicit Runtime(const OpenParams &params, LogFunction log = {}) {
        sdr_open_params given = params;
        if (log) {
            log_ = std::make_unique<LogFunction>(std::move(log));
            given.log = [](void *user, int32_t level, const char *message) {
                (*static_cast<LogFunction *>(user))(level, message);
            };
            given.log_user = log_.get();
        }
        check(sdr_runtime_open(&given, &handle_));
    }
    Runtime(Runtime &&other) noexcept : log_(std::move(other.log_)), handle_(std::exchange(other.handle_, nullptr)) {}
    Runtime &operator=(Runtime &&other) noexcept {
        Runtime taken(std::move(other));
        std::swap(log_, taken.log_);
        std::swap(handle_, taken.handle_);
        return *this;
    }
    ~Runtime() { sdr_runtime_free(handle_); }

    // JSON, valid as long as the runtime.
    [[nodiscard]] const char *describe() const {
        const char *json = nullptr;
        check(sdr_runtime_describe(handle_, &json));
        return json;
    }

    // Returns at once, but for a worker that died before. `progress` may be called before this returns. Throws Error.
    [[nodiscard]] Job submit(const JobParams &params, ProgressFunction progress = {}) {
        sdr_job_params given = params;
        Job job;
        if (progress) {
            job.watcher_ = std::make_shared<Job::Watcher>();
            job.watcher_->function = std::move(progress);
            given.progress = Job::Watcher::call;
            given.progress_user = job.watcher_.get();
        }
        check(sdr_job_submit(handle_, &given, &job.handle_));
        return job;
    }

    // End all work and wait for that; jobs that have ended keep their images. Throws Error.
    void close() { check(sdr_runtime_close(handle_)); }

    // The handle, still this object's; NULL where it was moved from.
    [[nodiscard]] sdr_runtime *get() const noexcept { return handle_; }
    explicit operator bool() const noexcept { return handle_ != nullptr; }

private:
    std::unique_ptr<LogFunction> log_;  // outlives the handle: it is declared first
    sdr_runtime *handle_ = nullptr;
};

}  // namespace sdruntime

#endif
