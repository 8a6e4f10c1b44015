// Handles are numbers, not addresses, so an invalid handle is detected without accessing memory.
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

// The objects of one type by handle. Thread-safe.
template <class T>
class Table {
public:
    void put(uint64_t id, std::shared_ptr<T> object) {
        const std::unique_lock lock(mutex_);
        objects_.emplace(id, std::move(object));
    }

    // Return the object of a handle, or null.
    std::shared_ptr<T> find(uint64_t id) const {
        const std::shared_lock lock(mutex_);
        const auto entry = objects_.find(id);
        return entry == objects_.end() ? nullptr : entry->second;
    }

    // Remove the object of a handle and return it, or null.
    std::shared_ptr<T> take(uint64_t id) {
        const std::unique_lock lock(mutex_);
        const auto entry = objects_.find(id);
        if (entry == objects_.end()) return nullptr;
        auto object = std::move(entry->second);
        objects_.erase(entry);
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

// The handles of one process. A child of fork() gets its own tables, since the mutexes of the parent's tables may stay locked
// forever.
struct Process {
    Process(pid_t pid, uint64_t first, Process *parent) : pid(pid), first(first), parent(parent), next(first) {}

    // Return the tables of the calling process.
    static Process &current();

    uint64_t new_id() { return next.fetch_add(16); }

    const pid_t pid;
    const uint64_t first;  // smaller handles belong to the parent
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

// Return the object of a handle. Throws Failure if there is none.
template <class T, class Handle>
std::shared_ptr<T> object_of(Table<T> Process::*table, const Handle *handle, const char *kind) {
    if (!handle) throw usage(SDR_REASON_BAD_HANDLE, std::string(kind) + ": the handle is NULL");
    Process &process = Process::current();
    if (auto object = (process.*table).find(id_of(handle))) return object;
    if (id_of(handle) < process.first)
        throw usage(SDR_REASON_FORKED,
                    std::string(kind) + ": the handle belongs to the parent of this process; open a new runtime here");
    throw usage(SDR_REASON_BAD_HANDLE, std::string(kind) + ": the handle was freed, or is not a " + kind + " handle");
}

}  // namespace sdr
