// Handles are numbers, not addresses: one that is freed, foreign or made up is found out without touching memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include <sys/types.h>

#include "api/failure.hpp"

namespace sdr {

template <class T>
class Table {
public:
    void put(uint64_t id, std::shared_ptr<T> object) {
        const std::unique_lock lock(mutex_);
        objects_.emplace(id, std::move(object));
    }

    std::shared_ptr<T> find(uint64_t id) const {
        const std::shared_lock lock(mutex_);
        const auto found = objects_.find(id);
        return found == objects_.end() ? nullptr : found->second;
    }

    std::shared_ptr<T> take(uint64_t id) {
        const std::unique_lock lock(mutex_);
        const auto found = objects_.find(id);
        if (found == objects_.end()) return nullptr;
        auto object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

private:
    mutable std::shared_mutex mutex_;
    std::unordered_map<uint64_t, std::shared_ptr<T>> objects_;
};

class Runtime;
class Job;

struct Status {
    int32_t code;
    int32_t reason;
    std::string message;
};

// What one process has: a child of fork() begins with tables of its own, since the mutexes of its parent's may be locked for good.
struct Process {
    Process(pid_t pid, uint64_t first, Process *parent) : pid(pid), first(first), parent(parent), next(first) {}

    static Process &here();

    uint64_t new_id() { return next.fetch_add(16); }

    const pid_t pid;
    const uint64_t first;  // handles below it are the parent's
    Process *const parent;
    std::atomic<uint64_t> next;
    Table<Runtime> runtimes;
    Table<Job> jobs;
    Table<Status> statuses;
};

template <class Handle>
uint64_t id_of(const Handle *handle) {
    return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(handle));
}

template <class Handle>
Handle *handle_of(uint64_t id) {
    return reinterpret_cast<Handle *>(static_cast<uintptr_t>(id));
}

// The object of a handle. Throws Failure where there is none.
template <class T, class Handle>
std::shared_ptr<T> object_of(Table<T> Process::*table, const Handle *handle, const char *kind) {
    if (!handle) throw usage(SDR_REASON_BAD_HANDLE, std::string(kind) + ": the handle is NULL");
    Process &process = Process::here();
    if (auto found = (process.*table).find(id_of(handle))) return found;
    if (id_of(handle) < process.first)
        throw usage(SDR_REASON_FORKED,
                    std::string(kind) +
                        ": the handle belongs to the process that this one was forked from; open a runtime of its own here");
    throw usage(SDR_REASON_BAD_HANDLE, std::string(kind) + ": the handle was freed, or is none of this kind");
}

}  // namespace sdr
