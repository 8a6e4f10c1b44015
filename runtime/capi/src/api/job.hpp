// A job: the state of one requested image, and the threads that wait for it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "api/handles.hpp"
#include "wire/message.hpp"

namespace sdr {

struct Image {
    int32_t width = 0, height = 0;
    uint64_t seed = 0;
    double queued = 0, encode = 0, denoise = 0, decode = 0, total = 0;
    std::string sampler, warnings;
    Blob blob;  // RGB8 rows, then the PNG
    size_t rgb = 0, png = 0;
};

// Marks that a callback of the host is running on this thread. Functions that wait check active() and fail.
class InCallback {
public:
    InCallback() { ++depth_; }
    ~InCallback() { --depth_; }
    InCallback(const InCallback &) = delete;
    InCallback &operator=(const InCallback &) = delete;
    static bool active() { return depth_ > 0; }

private:
    static thread_local int depth_;
};

class Job {
public:
    Job(uint64_t id, std::weak_ptr<Runtime> runtime, const sdr_job_params &params)
        : id(id),
          runtime(std::move(runtime)),
          callback_(params.progress),
          user_(params.progress_user),
          png_requested_(params.png) {}

    // Events from the service.

    void started();
    // Call the progress callback. Returns true if it cancels the job. `threw` is set if it threw an exception.
    bool progress(const sdr_progress &progress, bool &threw);
    void done(Image image);
    void failed(const Failure &failure);

    // Calls from the host.

    void poll(int32_t *state, int32_t *step, int32_t *steps) const;
    // Wait for the end of the job. Throws the job's failure, or SDR_REASON_TIMEOUT, _REENTERED or _BAD_HANDLE.
    void wait(int64_t timeout_ms);
    // Return the image, shared with the caller. Throws the job's failure, or SDR_REASON_NOT_FINISHED.
    std::shared_ptr<const Image> image() const;
    // Drop the image and end all waits. No callback runs afterwards.
    void release();
    // Mark the job as cancelled. Returns false if it has ended or is already cancelled.
    bool mark_cancelled();
    bool png_requested() const { return png_requested_; }

    const uint64_t id;
    const std::weak_ptr<Runtime> runtime;

private:
    bool ended() const { return state_ >= SDR_JOB_DONE; }
    bool calling_elsewhere() const { return calling_ && caller_ != std::this_thread::get_id(); }
    void end(int32_t state);

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    int32_t state_ = SDR_JOB_QUEUED, step_ = 0, steps_ = 0;
    bool freed_ = false, cancelled_ = false;
    bool calling_ = false;  // the callback is running, on the thread caller_
    std::thread::id caller_;
    sdr_progress_callback callback_;
    void *user_;
    const bool png_requested_;
    std::unique_ptr<const Failure> failure_;
    std::shared_ptr<const Image> image_;
};

}  // namespace sdr
