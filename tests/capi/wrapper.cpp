// Tests of sdruntime.hpp: wrapper (in-process | process) BUNDLE PYTHON; "-": no python.
#include "sdruntime/sdruntime.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__cpp_lib_span) && defined(__cpp_lib_ranges)
#include <ranges>
#include <span>
#endif
#if __cplusplus >= 202002L && !defined(__cpp_lib_jthread)
#error "this standard library should have std::stop_token, and its overload is not tested"
#endif

using namespace std::chrono_literals;
using sdruntime::Error, sdruntime::Job, sdruntime::JobParams, sdruntime::OpenParams, sdruntime::Picture, sdruntime::Progress,
    sdruntime::Runtime, sdruntime::View;

// wrapper_unit.cpp
void submit_without_prompt(Runtime &runtime);
Job pass_through(Job job);
std::size_t rows_of(const Picture &image);

namespace {

template <class T>
constexpr bool MOVES_ONLY =
    !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> && std::is_nothrow_move_constructible_v<T> &&
    std::is_nothrow_move_assignable_v<T> && std::is_nothrow_default_constructible_v<T> && std::is_nothrow_swappable_v<T>;
static_assert(MOVES_ONLY<Runtime> && MOVES_ONLY<Job>);
static_assert(std::is_base_of_v<std::runtime_error, Error> && std::is_nothrow_copy_constructible_v<Error>);
static_assert(std::is_trivially_copyable_v<View<uint8_t>> && std::is_trivially_copyable_v<Picture> && View<float>().empty());
static_assert(!std::is_convertible_v<OpenParams, Runtime>);
#if defined(__cpp_lib_span) && defined(__cpp_lib_ranges)
static_assert(std::ranges::contiguous_range<View<float>> && std::ranges::sized_range<View<float>> &&
              std::is_convertible_v<const View<uint8_t> &, std::span<const uint8_t>>);
#endif

int faults = 0;
OpenParams open_params;

#define CHECK(condition) (void)((condition) || (++faults, std::printf("%s:%d: %s\n", __func__, __LINE__, #condition)))

template <class Body>
void fails(int line, int32_t code, int32_t reason, Body body) {
    try {
        body();
        std::printf("line %d: nothing was thrown\n", line);
    } catch (const std::runtime_error &caught) {
        const auto *error = dynamic_cast<const Error *>(&caught);
        if (error && error->code() == code && error->reason() == reason && error->cancelled() == (code == SDR_CANCELLED) &&
            *error->what())
            return;
        std::printf("line %d: %d %d %s\n", line, error ? static_cast<int>(error->code()) : -1,
                    error ? static_cast<int>(error->reason()) : -1, caught.what());
    }
    ++faults;
}
#define FAILS(code, reason, expression) fails(__LINE__, code, reason, [&] { static_cast<void>(expression); })

JobParams job_params(int32_t steps = 3) {
    JobParams params;
    params.prompt = "a red cat";
    params.sampler = "ddim";
    params.seed = 7;
    params.steps = steps;
    return params;
}

// A progress function that blocks in its first call until the gate is opened.
class Gate {
public:
    bool hold() {
        std::unique_lock<std::mutex> lock(mutex_);
        reached_ = true;
        changed_.notify_all();
        changed_.wait(lock, [this] { return open_; });
        return true;
    }
    void reached() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return reached_; });
    }
    void open() {
        const std::lock_guard<std::mutex> lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool reached_ = false, open_ = false;
};

bool is_freed(sdr_job *job) {
    sdr_status *status = sdr_job_poll(job, nullptr, nullptr, nullptr);
    const bool freed = sdr_status_reason(status) == SDR_REASON_BAD_HANDLE;
    sdr_status_free(status);
    return freed;
}

void moving(Runtime &runtime) {
    Job first = runtime.submit(job_params());
    sdr_job *handle = first.get();
    Job second(std::move(first));
    CHECK(!first && !first.get() && second.get() == handle);  // NOLINT: deliberate use after move
    FAILS(SDR_USAGE, SDR_REASON_BAD_HANDLE, first.wait());
    FAILS(SDR_USAGE, SDR_REASON_BAD_HANDLE, first.poll());
    FAILS(SDR_USAGE, SDR_REASON_BAD_HANDLE, first.cancel());
    FAILS(SDR_USAGE, SDR_REASON_BAD_HANDLE, first.picture());
    Job &same = second;
    second = std::move(same);
    CHECK(second.get() == handle);
    first = pass_through(std::move(second));
    first.wait();
    CHECK(first.get() == handle && rows_of(first.picture()) == static_cast<std::size_t>(first.picture().height));
    std::vector<Job> many;
    for (int k = 0; k < 5; ++k) many.push_back(runtime.submit(job_params()));
    many.push_back(std::move(first));
    for (Job &job : many) job.wait();
    many.back() = Job();  // the previous job is freed
    CHECK(is_freed(handle));

    Runtime other(open_params), moved(std::move(other));
    FAILS(SDR_USAGE, SDR_REASON_BAD_HANDLE, other.describe());  // NOLINT
    FAILS(SDR_USAGE, SDR_REASON_BAD_HANDLE, static_cast<void>(other.submit(job_params())));
    other = std::move(moved);
    CHECK(other && !moved);  // NOLINT
    other.submit(job_params()).wait();
}

void unwinding(Runtime &runtime) {
    sdr_job *job = nullptr;
    sdr_runtime *opened = nullptr;
    try {
        const Runtime own(open_params);
        opened = own.get();
        const Job running = runtime.submit(job_params(900));
        job = running.get();
        CHECK(!is_freed(job));
        throw std::logic_error("unwinding");
    } catch (const std::logic_error &) {}
    const char *json = nullptr;
    sdr_status *status = sdr_runtime_describe(opened, &json);
    CHECK(sdr_status_reason(status) == SDR_REASON_BAD_HANDLE && is_freed(job));
    sdr_status_free(status);
}

void errors(Runtime &runtime) {
    OpenParams nowhere = open_params;
    nowhere.bundle = "/nonexistent";
    FAILS(SDR_BUNDLE, SDR_REASON_NONE, Runtime(nowhere));
    FAILS(SDR_USAGE, SDR_REASON_BAD_ARGUMENT, submit_without_prompt(runtime));  // thrown in the other file
    JobParams unknown = job_params();
    unknown.sampler = "no such sampler";
    Job job = runtime.submit(unknown);
    FAILS(SDR_USAGE, SDR_REASON_NONE, job.wait());
    FAILS(SDR_USAGE, SDR_REASON_NONE, job.wait_for(1s));
    FAILS(SDR_USAGE, SDR_REASON_NONE, job.picture());
    CHECK(job.poll().state == SDR_JOB_FAILED && job.poll().ended());
    sdruntime::check(nullptr);
}

void views(Runtime &runtime) {
    JobParams params = job_params();
    params.png = 1;
    Job job = runtime.submit(params);
    job.wait();
    const Picture image = job.picture();
    const uint8_t *rows = nullptr;
    std::size_t stride = 0;
    sdruntime::check(sdr_job_rgb(job.get(), &rows, &stride));
    CHECK(image.bytes.data() == rows && image.stride == stride);  // no copy: the same memory
    CHECK(image.bytes.size() == stride * static_cast<std::size_t>(image.height - 1) + 3 * static_cast<std::size_t>(image.width));
    CHECK(image.row(1).data() == rows + stride && image.row(image.height - 1).end() == image.bytes.end());
    CHECK(static_cast<std::size_t>(std::count_if(image.bytes.begin(), image.bytes.end(), [](uint8_t) { return true; })) ==
          image.bytes.size());
#if defined(__cpp_lib_span) && defined(__cpp_lib_ranges)
    const std::span<const uint8_t> span = image.row(0);
    CHECK(span.data() == rows && std::ranges::equal(span, image.row(0)));
#endif
    const std::size_t row = 3 * static_cast<std::size_t>(image.width), wide = row + 5;
    std::vector<uint8_t> copy(job.copy_size(wide), 0xEE);
    CHECK(copy.size() == wide * static_cast<std::size_t>(image.height - 1) + row &&
          job.copy_size() == row * static_cast<std::size_t>(image.height));
    job.copy_to(copy.data(), copy.size(), wide);
    for (int32_t y = 0; y < image.height; ++y)
        CHECK(std::equal(image.row(y).begin(), image.row(y).end(), copy.data() + static_cast<std::size_t>(y) * wide));
    CHECK(copy[row] == 0xEE);
    FAILS(SDR_USAGE, SDR_REASON_BUFFER_TOO_SMALL, job.copy_to(copy.data(), 10));

    const sdr_result result = job.result();
    CHECK(result.seed == 7 && result.width == image.width && result.png_size == job.png().size() &&
          std::strcmp(result.sampler, "ddim") == 0);
    CHECK(job.png().size() > 50 && std::memcmp(job.png().data(), "\x89PNG", 4) == 0);
    Job plain = runtime.submit(job_params());
    plain.wait();
    FAILS(SDR_USAGE, SDR_REASON_NOT_ASKED, plain.png());
    CHECK(std::equal(image.bytes.begin(), image.bytes.end(), plain.picture().bytes.begin(), plain.picture().bytes.end()));
}

struct Stopped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void progress(Runtime &runtime) {
    std::vector<int32_t> steps;
    Job job = runtime.submit(job_params(), [&steps](const Progress &now) {
        steps.push_back(now.step);
        return now.steps == 3 && now.preview.empty();
    });
    job.wait();
    CHECK((steps == std::vector<int32_t>{1, 2, 3}) && job.poll().step == 3 && job.poll().ended());

    int calls = 0;
    Job cancelled = runtime.submit(job_params(900), [&calls](const Progress &now) { return ++calls, now.step < 2; });
    FAILS(SDR_CANCELLED, SDR_REASON_CANCELLED, cancelled.wait());
    CHECK(cancelled.poll().state == SDR_JOB_CANCELLED && cancelled.poll().steps == 900 && calls == 2);

    Job threw = runtime.submit(job_params(900), [](const Progress &) -> bool { throw Stopped("by the function"); });
    for (int k = 0; k < 2; ++k) {
        try {
            threw.wait();
            CHECK(false);
        } catch (const Stopped &stopped) {
            CHECK(std::strcmp(stopped.what(), "by the function") == 0);
        }
    }
    FAILS(SDR_CANCELLED, SDR_REASON_CANCELLED, threw.picture());
    Job plain = runtime.submit(job_params(), [](const Progress &now) {
        return now.step == 3 ? throw 7 : true;
    });  // not a std::exception, at the last step
    try {
        plain.wait();
        CHECK(false);
    } catch (int number) {
        CHECK(number == 7);
    }

    JobParams params = job_params();
    params.preview = 1;
    std::size_t elements = 0;
    bool finite = true;
    Job shown = runtime.submit(params, [&](const Progress &now) {
        elements += now.preview.size();
        finite = finite && std::all_of(now.preview.begin(), now.preview.end(), [](float value) { return value - value == 0; });
        return now.preview.size() == static_cast<std::size_t>(now.preview_channels * now.preview_height * now.preview_width);
    });
    shown.wait();
    const Picture image = shown.picture();
    CHECK(elements > 0 && elements % 3 == 0 && finite && image.height > 0);
}

void callbacks(Runtime &runtime) {
    std::optional<Job> own;
    Gate gate, ended;
    own = runtime.submit(job_params(900), [&](const Progress &) {
        gate.hold();
        try {
            own->wait();
        } catch (const Error &error) {
            CHECK(error.reason() == SDR_REASON_REENTERED);
        }
        CHECK(!own->wait_for(0ms));
        own.reset();  // its own function continues
        ended.open();
        return true;
    });
    sdr_job *handle = own->get();
    gate.reached();
    gate.open();
    ended.hold();
    CHECK(is_freed(handle));

    Gate slow;
    Job job = runtime.submit(job_params(), [&slow](const Progress &) { return slow.hold(); });
    slow.reached();
    CHECK(!job.wait_for(0ms) && !job.wait_for(-1s) && !job.wait_for(20ms) && !job.poll().ended());
    slow.open();
    CHECK(job.wait_for(std::chrono::milliseconds::max()) && job.wait_for(0ms) && job.poll().state == SDR_JOB_DONE);
}

#if defined(__cpp_lib_jthread)
void stopping(Runtime &runtime) {
    std::stop_source before;
    before.request_stop();
    Job first = runtime.submit(job_params(900), [](const Progress &) { return std::this_thread::sleep_for(10ms), true; });
    FAILS(SDR_CANCELLED, SDR_REASON_CANCELLED, first.wait(before.get_token()));

    std::stop_source during;
    Job second =
        runtime.submit(job_params(900), [&during](const Progress &now) { return now.step == 2 ? during.request_stop() : true; });
    FAILS(SDR_CANCELLED, SDR_REASON_CANCELLED, second.wait(during.get_token()));
    CHECK(second.poll().step < 900);

    std::stop_source after;
    Job third = runtime.submit(job_params());
    third.wait(after.get_token());
    after.request_stop();
    third.wait(after.get_token());
    CHECK(third.picture().width > 0);
    third.wait(std::stop_token());  // one that never stops

    Gate gate;
    Job fourth = runtime.submit(job_params(900), [&gate](const Progress &) { return gate.hold(); });
    std::jthread waiter(
        [&fourth](std::stop_token token) { FAILS(SDR_CANCELLED, SDR_REASON_CANCELLED, fourth.wait(std::move(token))); });
    gate.reached();
    waiter.request_stop();
    gate.open();
}
#endif

void life_of_a_runtime() {
    int lines = 0;
    Gate busy;
    OpenParams loud = open_params;
    loud.log_level = SDR_LOG_DEBUG;
    Runtime runtime(loud, [&lines](int32_t level, const char *message) {
        lines += level >= SDR_LOG_DEBUG && *message;
        throw Stopped("by the log, which is discarded");
    });
    CHECK(runtime && runtime.describe()[0] == '{' && runtime.describe() == runtime.describe());
    Runtime moved = std::move(runtime);  // the log goes with it
    Job done = moved.submit(job_params());
    done.wait();
    Job running = moved.submit(job_params(900), [&busy](const Progress &) { return busy.hold(); });
    busy.reached();
    std::thread opener([&busy] { busy.open(); });
    moved.close();
    opener.join();
    moved.close();
    FAILS(SDR_CANCELLED, SDR_REASON_CLOSED, running.wait());
    FAILS(SDR_USAGE, SDR_REASON_CLOSED, moved.describe());
    FAILS(SDR_USAGE, SDR_REASON_CLOSED, static_cast<void>(moved.submit(job_params())));
    moved = Runtime();
    CHECK(done.picture().bytes.size() == done.copy_size());  // a job outlives its runtime
    std::printf("%s\n", lines ? "lines of the log" : "no log");
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    open_params.isolation = std::strcmp(argv[1], "process") == 0 ? SDR_ISOLATION_PROCESS : SDR_ISOLATION_IN_PROCESS;
    open_params.bundle = argv[2];
    open_params.python = std::strcmp(argv[3], "-") == 0 ? nullptr : argv[3];
    open_params.threads = 1;
    try {
        Runtime runtime(open_params);
        moving(runtime);
        unwinding(runtime);
        errors(runtime);
        views(runtime);
        progress(runtime);
        callbacks(runtime);
#if defined(__cpp_lib_jthread)
        stopping(runtime);
#endif
        life_of_a_runtime();
    } catch (const std::exception &error) {
        ++faults;
        std::printf("%s\n", error.what());
    }
    std::printf("%d faults as C++ %ld\n", faults, static_cast<long>(__cplusplus));
    return faults != 0;
}
