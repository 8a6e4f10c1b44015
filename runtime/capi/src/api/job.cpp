#include "api/job.hpp"

#include <algorithm>
#include <chrono>

#include <cxxabi.h>

namespace sdr {

thread_local int InCallback::depth_ = 0;

namespace {
constexpr int64_t MAX_TIMEOUT_MS = int64_t{1000} * 60 * 60 * 24 * 3650;  // ten years: more would overflow some clocks
}

void Job::started() {
    const std::lock_guard lock(mutex_);
    if (!ended()) state_ = SDR_JOB_RUNNING;
}

bool Job::progress(const sdr_progress &progress, bool &threw) {
    sdr_progress_callback callback;
    {
        const std::lock_guard lock(mutex_);
        if (ended()) return false;
        state_ = SDR_JOB_RUNNING;
        step_ = progress.step;
        steps_ = progress.steps;
        if (freed_ || cancelled_ || !callback_) return false;
        callback = callback_;
        calling_ = true;
        caller_ = std::this_thread::get_id();
    }
    int32_t cancel = 0;
    try {
        const InCallback inside;
        cancel = callback(user_, handle_of<sdr_job>(id), &progress);
    } catch (abi::__forced_unwind &) {
        throw;  // the thread is being cancelled
    } catch (...) {
        threw = true;
    }
    {
        const std::lock_guard lock(mutex_);
        calling_ = false;
    }
    changed_.notify_all();
    return cancel != 0 || threw;
}

void Job::end(int32_t state) {
    state_ = state;
    changed_.notify_all();
}

void Job::done(Image image) {
    const std::lock_guard lock(mutex_);
    if (ended()) return;
    if (cancelled_) {  // the image was finished before the cancellation reached the service
        failure_ = std::make_unique<const Failure>(SDR_CANCELLED, SDR_REASON_CANCELLED, "cancelled");
        end(SDR_JOB_CANCELLED);
        return;
    }
    if (!freed_) image_ = std::make_shared<const Image>(std::move(image));
    end(SDR_JOB_DONE);
}

void Job::failed(const Failure &failure) {
    const std::lock_guard lock(mutex_);
    if (ended()) return;
    failure_ = std::make_unique<const Failure>(failure);
    end(failure.code == SDR_CANCELLED ? SDR_JOB_CANCELLED : SDR_JOB_FAILED);
}

void Job::poll(int32_t *state, int32_t *step, int32_t *steps) const {
    const std::lock_guard lock(mutex_);
    if (state) *state = state_;
    if (step) *step = step_;
    if (steps) *steps = steps_;
}

void Job::wait(int64_t timeout_ms) {
    if (InCallback::active() && timeout_ms != 0)
        throw usage(SDR_REASON_REENTERED,
                    "sdr_job_wait: cannot wait inside a callback, because jobs wait for the callback; use a timeout of 0");
    std::unique_lock lock(mutex_);
    const auto over = [this] { return freed_ || (ended() && !calling_elsewhere()); };
    if (timeout_ms < 0) {
        changed_.wait(lock, over);
    } else if (!changed_.wait_until(
                   lock, std::chrono::steady_clock::now() + std::chrono::milliseconds(std::min(timeout_ms, MAX_TIMEOUT_MS)),
                   over)) {
        throw Failure(SDR_FAILED, SDR_REASON_TIMEOUT,
                      "sdr_job_wait: the job has not ended after " + std::to_string(timeout_ms) + " ms; it is at step " +
                          std::to_string(step_) + " of " + std::to_string(steps_));
    }
    if (freed_) throw usage(SDR_REASON_BAD_HANDLE, "sdr_job_wait: the job was freed during the wait");
    if (failure_) throw *failure_;
}

std::shared_ptr<const Image> Job::image() const {
    const std::lock_guard lock(mutex_);
    if (failure_) throw *failure_;
    if (!image_)
        throw usage(SDR_REASON_NOT_FINISHED, "the job has no image yet, at step " + std::to_string(step_) + " of " +
                                                 std::to_string(steps_) + ": call sdr_job_wait first");
    return image_;
}

void Job::release() {
    std::unique_lock lock(mutex_);
    freed_ = true;
    image_.reset();
    changed_.notify_all();
    if (!InCallback::active()) changed_.wait(lock, [this] { return !calling_; });
}

bool Job::mark_cancelled() {
    const std::lock_guard lock(mutex_);
    if (ended() || cancelled_) return false;
    cancelled_ = true;
    return true;
}

}  // namespace sdr
