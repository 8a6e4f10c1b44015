// One picture that was asked for: its state, and who waits for it.
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

struct Picture {
    int32_t width = 0, height = 0;
    uint64_t seed = 0;
    double queued = 0, encode = 0, denoise = 0, decode = 0, total = 0;
    std::string sampler, warnings;
    Blob blob;  // RGB8 rows, then the PNG
    size_t rgb = 0, png = 0;
};

// True while a callback of the host runs on this thread: what waits must not be called then.
class InCallback {
public:
    InCallback() { ++depth_; }
    ~InCallback() { --depth_; }
    InCallback(const InCallback &) = delete;
    InCallback &operator=(const InCallback &) = delete;
    static bool here() { return depth_ > 0; }

private:
    static thread_local int depth_;
};

class Job {
public:
    Job(uint64_t id, std::weak_ptr<Runtime> runtime, const sdr_job_params &params)
        : id(id), runtime(std::move(runtime)), callback_(params.progress), user_(params.progress_user), png_asked_(params.png) {}

    // The events of the service.
    void started();
    // True where the callback wants the job to end. `threw` is set where it threw an exception.
    bool progress(const sdr_progress &progress, bool &threw);
    void done(Picture picture);
    void failed(const Failure &failure);

    // The calls of the host.
    void poll(int32_t *state, int32_t *step, int32_t *steps) const;
    // Throws the job's failure, or why there is no end yet.
    void wait(int64_t timeout_ms);
    // The picture, kept by the caller. Throws as wait, or SDR_REASON_NOT_FINISHED.
    std::shared_ptr<const Picture> picture() const;
    // No callback afterwards.
    void freed();
    // The first time, and as long as it has not ended.
    bool cancel_now();
    bool png_asked() const { return png_asked_; }

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
    bool calling_ = false;  // the callback runs, on the thread caller_
    std::thread::id caller_;
    sdr_progress_callback callback_;
    void *user_;
    const bool png_asked_;
    std::unique_ptr<const Failure> failure_;
    std::shared_ptr<const Picture> picture_;
};

}  // namespace sdr
