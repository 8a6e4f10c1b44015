// An open bundle: its jobs, and the service that generates their images. The state of all jobs is kept here, so only open and
// close wait for the service.
#pragma once

#include <atomic>
#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "api/job.hpp"
#include "wire/message.hpp"

namespace sdr {

class Runtime : public Sink, public std::enable_shared_from_this<Runtime> {
public:
    // Throws Failure.
    explicit Runtime(const sdr_open_params &params);
    ~Runtime();
    // Open the engines. Throws Failure, and then leaves nothing running.
    void open();
    // Return the description as JSON, valid until the runtime is destroyed.
    const char *describe();
    // Submit a job and return its handle. Throws Failure.
    uint64_t submit(const sdr_job_params &params);
    void cancel(Job &job);
    void close();
    // Stop calling the log callback; a call that is running ends normally.
    void mute_log() { log_muted_ = true; }

    bool on_event(Message &&message) noexcept override;
    void on_end(const std::string &why) noexcept override;

private:
    enum class Phase { STARTING, OPEN, ENDED, CLOSED };

    void start();
    void stop();
    void ready_for_jobs();
    bool is_closing();
    void take_event(Message &&message);
    std::shared_ptr<Job> job_of(const Json &event);
    std::shared_ptr<Job> take_job(const Json &event);
    void progress(const Json &event, const Blob &blob);
    void done(const Json &event, const Blob &blob);
    void failed(const Json &event);
    void log(int32_t level, const std::string &message);
    void end_jobs(const Failure &failure);

    const int32_t isolation_;
    const std::string python_, open_message_;
    const uint32_t queue_;
    const sdr_log_callback log_;
    void *const log_user_;
    const int32_t log_level_;

    std::atomic<bool> log_muted_{false};
    std::mutex logging_;   // serialises the log callback
    std::mutex starting_;  // held by the thread that starts or stops the service; locked before mutex_
    std::mutex mutex_;
    std::condition_variable changed_;
    Phase phase_ = Phase::ENDED;
    bool closing_ = false;
    std::optional<Failure> refused_;    // why the service did not open, or ended
    std::list<std::string> described_;  // the latest is last; earlier ones are kept because hosts may still read them
    std::unique_ptr<Transport> transport_;
    std::unordered_map<uint64_t, std::shared_ptr<Job>> jobs_;  // jobs that have not ended
    std::unordered_set<uint64_t> waiting_;                     // jobs that have not started
};

}  // namespace sdr
