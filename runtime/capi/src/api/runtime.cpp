#include "api/runtime.hpp"

#include <chrono>
#include <filesystem>

#include <cxxabi.h>

#include "api/params.hpp"
#include "python/find_python.hpp"
#include "python/python_api.hpp"
#include "transport/descriptor.hpp"
#include "transport/in_process.hpp"
#include "transport/worker.hpp"

namespace sdr {

namespace {

using namespace std::chrono_literals;

constexpr uint32_t DEFAULT_QUEUE = 64;
constexpr auto CLOSE_TIMEOUT = 60s;  // for a worker to finish its step, before its socket is closed

sdr_open_params checked(sdr_open_params params) {
    if (!params.bundle) throw usage(SDR_REASON_BAD_ARGUMENT, "bundle is NULL");
    if (params.isolation != SDR_ISOLATION_IN_PROCESS && params.isolation != SDR_ISOLATION_PROCESS)
        throw usage(SDR_REASON_BAD_ARGUMENT, "isolation " + std::to_string(params.isolation) +
                                                 ": expected SDR_ISOLATION_IN_PROCESS or SDR_ISOLATION_PROCESS");
    if (params.stream && params.isolation == SDR_ISOLATION_PROCESS)
        throw usage(SDR_REASON_UNSUPPORTED, "stream: a CUDA stream belongs to one process; open with SDR_ISOLATION_IN_PROCESS");
    if (!params.queue) params.queue = DEFAULT_QUEUE;
    return params;
}

// Make a path absolute, since the host may change its working directory before another worker starts. "" stays "".
std::string absolute(const char *path, const char *field) {
    const std::string text = text_of(path, field);
    return text.empty() ? text : text_of(std::filesystem::absolute(text).string().c_str(), field);
}

std::string open_message(const sdr_open_params &params) {
    return Json(Json::Object{{"op", "open"}, {"bundle", absolute(params.bundle, "bundle")}, {"options", open_options(params)}})
        .text();
}

int32_t level_of(const Json &level) {
    static const std::pair<const char *, int32_t> names[] = {
        {"debug", SDR_LOG_DEBUG}, {"info", SDR_LOG_INFO}, {"warning", SDR_LOG_WARNING}, {"error", SDR_LOG_ERROR}};
    for (const auto &[name, number] : names)
        if (level.is_string() && level.string() == name) return number;
    return level.is_string() ? SDR_LOG_INFO : static_cast<int32_t>(level.integer());
}

int32_t int32_of(const Json &number) {
    const int64_t value = number.integer();
    if (value < 0 || value > INT32_MAX) throw JsonError("a number out of range: " + std::to_string(value));
    return static_cast<int32_t>(value);
}

// Return the reason of a "refused" or "failed" event. Keep equal to REASONS of sdruntime/serving/service.py. A newer service may
// send an unknown name: SDR_REASON_NONE.
int32_t reason_of(const Json &event) {
    static const std::pair<const char *, int32_t> names[] = {{"no_runtime", SDR_REASON_NO_RUNTIME},
                                                             {"queue_full", SDR_REASON_QUEUE_FULL},
                                                             {"unsupported", SDR_REASON_UNSUPPORTED},
                                                             {"buffer_too_small", SDR_REASON_BUFFER_TOO_SMALL},
                                                             {"out_of_memory", SDR_REASON_OUT_OF_MEMORY}};
    for (const auto &[name, number] : names)
        if (event["reason"].is_string() && event["reason"].string() == name) return number;
    return SDR_REASON_NONE;
}

double seconds(const Json &timings, const char *name) { return timings[name].is_null() ? 0 : timings[name].number(); }

Failure ended_by_closing() { return Failure(SDR_CANCELLED, SDR_REASON_CLOSED, "the runtime was closed before the job ended"); }

Failure closed() { return usage(SDR_REASON_CLOSED, "the runtime was closed"); }

}  // namespace

Runtime::Runtime(const sdr_open_params &params)
    : isolation_(checked(params).isolation),
      python_(absolute(params.python, "python")),
      open_message_(open_message(checked(params))),
      queue_(checked(params).queue),
      log_(params.log),
      log_user_(params.log_user),
      log_level_(params.log_level) {}

Runtime::~Runtime() { stop(); }

void Runtime::open() {
    const GilPause pause;  // before every lock: a thread that holds a lock must never wait for the GIL
    const std::lock_guard one(starting_);
    start();
}

// Requires starting_.
void Runtime::start() {
    {
        const std::lock_guard lock(mutex_);
        phase_ = Phase::STARTING;
        refused_.reset();
    }
    try {
        require_descriptors();
        auto transport =
            isolation_ == SDR_ISOLATION_PROCESS ? worker_transport(*this, python_) : in_process_transport(*this, python_);
        std::unique_lock lock(mutex_);
        transport_ = std::move(transport);
        transport_->send({open_message_, {}});
        changed_.wait(lock, [this] { return phase_ != Phase::STARTING; });
        if (phase_ == Phase::OPEN) return;
    } catch (...) {
        const std::lock_guard lock(mutex_);
        phase_ = Phase::ENDED;
        throw;
    }
    stop();
    throw *refused_;
}

// Requires starting_. Afterwards every thread of the transport has ended.
void Runtime::stop() {
    std::unique_ptr<Transport> transport;
    {
        const std::lock_guard lock(mutex_);
        transport = std::move(transport_);
    }
    transport.reset();
}

const char *Runtime::describe() {
    const std::lock_guard lock(mutex_);
    if (closing_) throw closed();
    return described_.back().c_str();
}

// Start a new worker if the last one died.
void Runtime::ready_for_jobs() {
    {
        const std::lock_guard lock(mutex_);
        if (closing_) throw closed();
        if (phase_ == Phase::OPEN) return;
    }
    const GilPause pause;
    const std::lock_guard one(starting_);
    {
        const std::lock_guard lock(mutex_);
        if (closing_) throw closed();
        if (phase_ == Phase::OPEN) return;
    }
    stop();
    start();
}

uint64_t Runtime::submit(const sdr_job_params &params) {
    Json::Object message{{"op", "submit"},
                         {"job", Json()},
                         {"request", request_of(params)},
                         {"preview", params.preview != 0},
                         {"png", params.png != 0}};
    const std::vector<sdr_control> controls = controls_of(params);
    Blob images = images_of(params, controls);
    if (params.image) message.emplace_back("image", Json::Array{params.image_width, params.image_height});
    if (params.mask) message.emplace_back("mask", true);
    if (params.depth) message.emplace_back("depth", Json::Array{params.depth_width, params.depth_height});
    if (!controls.empty()) message.emplace_back("controls", control_messages(controls));
    if (params.device_buffer) {
        if (isolation_ == SDR_ISOLATION_PROCESS)
            throw usage(SDR_REASON_UNSUPPORTED,
                        "device_buffer: device memory belongs to one process; open with SDR_ISOLATION_IN_PROCESS");
        message.emplace_back("device_buffer", uint64_t{reinterpret_cast<uintptr_t>(params.device_buffer)});
        message.emplace_back("device_buffer_size", params.device_buffer_size);
    }
    Process &process = Process::current();
    const uint64_t id = process.new_id();
    message[1].second = id;
    std::string text = Json(std::move(message)).text();
    const auto job = std::make_shared<Job>(id, weak_from_this(), params);
    for (;;) {
        ready_for_jobs();
        const std::lock_guard lock(mutex_);
        if (closing_) throw closed();
        if (phase_ != Phase::OPEN) continue;  // the worker has just died
        if (waiting_.size() >= queue_)
            throw Failure(
                SDR_FAILED, SDR_REASON_QUEUE_FULL,
                "the queue is full: " + std::to_string(waiting_.size()) + " of at most " + std::to_string(queue_) +
                    " jobs are waiting; submit again when one has started, or open with a larger sdr_open_params.queue");
        jobs_.emplace(id, job);
        waiting_.insert(id);
        process.jobs.put(id, job);
        transport_->send({std::move(text), std::move(images)});
        return id;
    }
}

void Runtime::cancel(Job &job) {
    if (!job.mark_cancelled()) return;
    const std::lock_guard lock(mutex_);
    if (transport_ && jobs_.count(job.id)) transport_->send({Json(Json::Object{{"op", "cancel"}, {"job", job.id}}).text(), {}});
}

void Runtime::close() {
    if (InCallback::active()) throw usage(SDR_REASON_REENTERED, "sdr_runtime_close: cannot be called inside a callback");
    const GilPause pause;
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
    }
    const std::lock_guard one(starting_);
    {
        std::unique_lock lock(mutex_);
        if (phase_ == Phase::OPEN) {
            transport_->send({Json(Json::Object{{"op", "close"}}).text(), {}});
            const auto over = [this] { return phase_ != Phase::OPEN; };
            if (transport_->in_process()) changed_.wait(lock, over);
            else if (!changed_.wait_for(lock, CLOSE_TIMEOUT, over)) transport_->hang_up();
        }
        phase_ = Phase::CLOSED;
    }
    stop();
    end_jobs(ended_by_closing());
}

bool Runtime::on_event(Message &&message) noexcept {
    try {
        take_event(std::move(message));
        return true;
    } catch (const std::exception &error) {
        log(SDR_LOG_ERROR, std::string("invalid event: ") + error.what());
        return false;
    }
}

void Runtime::take_event(Message &&message) {
    const Json event = Json::parse(message.json);
    const std::string &name = event["event"].string();
    if (name == "progress") {
        progress(event, message.blob);
    } else if (name == "started") {
        const auto job = job_of(event);
        if (!job) return;
        job->started();
        const std::lock_guard lock(mutex_);
        waiting_.erase(job->id);
    } else if (name == "done") {
        done(event, message.blob);
    } else if (name == "failed") {
        failed(event);
    } else if (name == "log") {
        log(level_of(event["level"]), event["message"].string());
    } else if (name == "ready") {
        std::string text = event["describe"].text();
        const std::lock_guard lock(mutex_);
        if (described_.empty() || described_.back() != text) described_.push_back(std::move(text));
        if (phase_ == Phase::STARTING) phase_ = Phase::OPEN;
        changed_.notify_all();
    } else if (name == "refused") {
        const int32_t reason = reason_of(event);
        const std::lock_guard lock(mutex_);
        refused_.emplace(int32_of(event["code"]), reason,
                         event["message"].string() + (reason == SDR_REASON_NO_RUNTIME ? PYTHON_ADVICE : ""));
        phase_ = Phase::ENDED;
        changed_.notify_all();
    } else if (name == "closed") {
        const std::lock_guard lock(mutex_);
        phase_ = Phase::ENDED;
        changed_.notify_all();
    } else {
        throw JsonError("\"" + name + "\"");
    }
}

void Runtime::on_end(const std::string &why) noexcept {
    bool expected;
    {
        const std::lock_guard lock(mutex_);
        expected = closing_ || refused_;
    }
    if (!expected) log(SDR_LOG_ERROR, why);
    {
        const std::lock_guard lock(mutex_);
        if (!refused_) refused_.emplace(SDR_FAILED, SDR_REASON_WORKER_DIED, why + " while the bundle was opened");
        phase_ = Phase::ENDED;
        changed_.notify_all();
    }
    end_jobs(is_closing() ? ended_by_closing()
                          : Failure(SDR_FAILED, SDR_REASON_WORKER_DIED, why + "; the next job starts a new one"));
}

void Runtime::end_jobs(const Failure &failure) {
    std::unordered_map<uint64_t, std::shared_ptr<Job>> jobs;
    {
        const std::lock_guard lock(mutex_);
        jobs.swap(jobs_);
        waiting_.clear();
    }
    for (const auto &[unused, job] : jobs) job->failed(failure);
}

bool Runtime::is_closing() {
    const std::lock_guard lock(mutex_);
    return closing_;
}

// Return the job of an event, or null if it has ended.
std::shared_ptr<Job> Runtime::job_of(const Json &event) {
    const std::lock_guard lock(mutex_);
    const auto entry = jobs_.find(event["job"].natural());
    return entry == jobs_.end() ? nullptr : entry->second;
}

// Return the job of its last event and forget it; null if it has ended.
std::shared_ptr<Job> Runtime::take_job(const Json &event) {
    const std::lock_guard lock(mutex_);
    const auto entry = jobs_.find(event["job"].natural());
    if (entry == jobs_.end()) return nullptr;
    auto job = std::move(entry->second);
    waiting_.erase(entry->first);
    jobs_.erase(entry);
    return job;
}

void Runtime::progress(const Json &event, const Blob &blob) {
    sdr_progress now = {};
    now.struct_size = sizeof now;
    now.step = int32_of(event["step"]);
    now.steps = int32_of(event["steps"]);
    if (!event["preview"].is_null()) {
        const Json::Array &shape = event["preview"].array();
        if (shape.size() != 3) throw JsonError("a preview with " + std::to_string(shape.size()) + " dimensions");
        now.preview_channels = int32_of(shape[0]);
        now.preview_height = int32_of(shape[1]);
        now.preview_width = int32_of(shape[2]);
        const uint64_t size = uint64_t{sizeof(float)} * static_cast<uint64_t>(now.preview_channels) *
                              static_cast<uint64_t>(now.preview_height) * static_cast<uint64_t>(now.preview_width);
        if (size != blob.size())
            throw JsonError("a preview of " + std::to_string(size) + " bytes in a blob of " + std::to_string(blob.size()));
        now.preview = reinterpret_cast<const float *>(blob.data());
    }
    const auto job = job_of(event);
    if (!job) return;
    bool threw = false;
    if (!job->progress(now, threw)) return;
    cancel(*job);
    if (threw)
        job->failed(Failure(SDR_FAILED, SDR_REASON_CALLBACK,
                            "the progress callback threw an exception at step " + std::to_string(now.step)));
}

void Runtime::done(const Json &event, const Blob &blob) {
    Image image;
    image.width = int32_of(event["width"]);
    image.height = int32_of(event["height"]);
    image.seed = event["seed"].natural();
    const Json &timings = event["timings"];
    image.queued = seconds(timings, "queued");
    image.encode = seconds(timings, "encode");
    image.denoise = seconds(timings, "denoise");
    image.decode = seconds(timings, "decode");
    image.total = seconds(timings, "total");
    image.sampler = event["sampler"].is_null() ? "" : event["sampler"].string();
    image.warnings = event["warnings"].is_null() ? "[]" : event["warnings"].text();
    image.rgb = event["rgb"].natural();
    image.png = event["png"].is_null() ? 0 : event["png"].natural();
    image.blob = blob;
    const size_t rows = 3 * static_cast<size_t>(image.width) * static_cast<size_t>(image.height);
    if (image.rgb != rows || image.png > blob.size() || blob.size() - image.png != image.rgb)
        throw JsonError("an image of " + std::to_string(rows) + " bytes and a PNG of " + std::to_string(image.png) +
                        " in a blob of " + std::to_string(blob.size()));
    const auto job = take_job(event);
    if (job && is_closing()) job->failed(ended_by_closing());
    else if (job) job->done(std::move(image));
}

void Runtime::failed(const Json &event) {
    const int32_t code = int32_of(event["code"]);
    const std::string &message = event["message"].string();
    if (!code) throw JsonError("a failure with code 0");
    const int32_t reason = code == SDR_CANCELLED ? SDR_REASON_CANCELLED : reason_of(event);
    if (const auto job = take_job(event)) job->failed(is_closing() ? ended_by_closing() : Failure(code, reason, message));
}

void Runtime::log(int32_t level, const std::string &message) {
    if (!log_ || level < log_level_) return;
    try {
        const std::lock_guard one(logging_);
        if (log_muted_) return;
        const InCallback inside;
        log_(log_user_, level, message.c_str());
    } catch (abi::__forced_unwind &) {
        throw;
    } catch (...) {  // exceptions of the host's log callback are discarded
    }
}

}  // namespace sdr
