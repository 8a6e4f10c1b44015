// An open bundle: its jobs, and the service that draws them. All state of jobs lives here, and no call but open and close waits for
// the service.
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
    // Open the engines. Throws Failure; nothing is left running then.
    void open();
    // Valid as long as the runtime.
    const char *describe();
    // Throws Failure.
    uint64_t submit(const sdr_job_params &params);
    void cancel(Job &job);
    void close();
    // No line of the log begins any more.
    void hush() { hushed_ = true; }

    bool on_event(Message &&message) noexcept override;
    void on_end(const std::string &why) noexcept override;

private:
    enum class Phase { STARTING, OPEN, ENDED, CLOSED };

    void start();
    void stop();
    void ready_for_jobs();
    bool closes();
    void take_event(Message &&message);
    std::shared_ptr<Job> job_of(const Json &event);
    std::shared_ptr<Job> last_of(const Json &event);
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

    std::atomic<bool> hushed_{false};
    std::mutex logging_;   // one line at a time
    std::mutex starting_;  // one thread starts or stops the service; taken before mutex_
    std::mutex mutex_;
    std::condition_variable changed_;
    Phase phase_ = Phase::ENDED;
    bool closing_ = false;
    std::optional<Failure> refused_;    // why it did not open, or ended
    std::list<std::string> described_;  // the latest last; earlier ones are kept, since hosts may read them
    std::unique_ptr<Transport> transport_;
    std::unordered_map<uint64_t, std::shared_ptr<Job>> jobs_;  // those that have not ended
    std::unordered_set<uint64_t> waiting_;                     // those that have not started
};

}  // namespace sdr
