#include "python/python_api.hpp"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

namespace sdr {

namespace {

std::atomic<const PythonApi *> the_api{nullptr};
std::atomic<pid_t> the_pid{0};

// Load all functions from a library. Returns false, with the name in `missing`, if one is missing.
bool load(PythonApi &api, void *handle, std::string &missing) {
    const auto get = [&](auto &member, const char *name) {
        void *symbol = dlsym(handle, name);
        static_assert(sizeof symbol == sizeof member);
        std::memcpy(&member, &symbol, sizeof symbol);
        return symbol != nullptr;
    };
    missing.clear();
#define SDR_LOAD(name, result, parameters) \
    if (missing.empty() && !get(api.name, #name)) missing = #name;
    SDR_PYTHON_FUNCTIONS(SDR_LOAD)
#undef SDR_LOAD
    if (missing.empty() && !get(api.none, "_Py_NoneStruct")) missing = "_Py_NoneStruct";
    if (missing.empty() && !get(api.runtime_error, "PyExc_RuntimeError")) missing = "PyExc_RuntimeError";
    if (!missing.empty()) return false;
    get(api.set_program_name, "Py_SetProgramName");
    if (!get(api.current_thread, "PyThreadState_GetUnchecked")) get(api.current_thread, "_PyThreadState_UncheckedGet");
    return true;
}

// Return the path of the libpython that is loaded in this process, even if its symbols are not global; "" if there is none.
std::string loaded_library() {
    std::string path;
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *out) {
            const char *name = std::strrchr(info->dlpi_name, '/');
            if (!name || std::strncmp(name, "/libpython3.", 12) != 0) return 0;
            *static_cast<std::string *>(out) = info->dlpi_name;
            return 1;
        },
        &path);
    return path;
}

// Load an interpreter that is already in this process, running or not.
bool load_existing(PythonApi &api, Search &search) {
    std::string missing;
    if (load(api, RTLD_DEFAULT, missing)) return true;
    const std::string library = loaded_library();
    void *handle = library.empty() ? nullptr : dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    if (handle && load(api, handle, missing)) return true;
    search.note("in this process: no interpreter");
    return false;
}

bool load_first(PythonApi &api, const Python &python, Search &search) {
    std::string missing;
    for (const std::string &library : python.libraries) {
        void *handle = dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);  // global: extension modules need its symbols
        if (!handle) {
            const char *why = dlerror();
            search.note(library + ": " + (why ? why : "cannot be opened"));
        } else if (load(api, handle, missing)) {
            return true;
        } else {
            search.note(library + ": has no " + missing);
        }
    }
    if (python.libraries.empty()) search.note(python.interpreter + ": no libpython beside it");
    return false;
}

std::string minor_of(const std::string &version) { return version.substr(0, version.find('.', version.find('.') + 1)); }

void check_version(PythonApi &api, Search &search) {
    const std::string whole = api.Py_GetVersion();
    api.version = whole.substr(0, whole.find(' '));
    int minor = 0;
    if (std::sscanf(whole.c_str(), "3.%d", &minor) != 1 || minor < 10) {
        search.note("Python " + api.version + " was found; 3.10 or later is required");
        throw search.failure("no usable Python");
    }
}

const PythonApi *start_now(const std::string &parameter) {
    auto api = std::make_unique<PythonApi>();
    Search search;
    Python python = explicit_python(parameter, search);
    const bool present = load_existing(*api, search), running = present && api->Py_IsInitialized();
    if (python.empty() && !running) python = installed_python(search);
    if (python.empty() && !present) python = system_python(search);
    if (!present && !load_first(*api, python, search)) throw search.failure("no libpython");
    check_version(*api, search);
    if (present && !python.version.empty() && python.version != minor_of(api->version)) {
        search.note("in this process: Python " + api->version);
        throw search.failure("this process already has Python " + api->version + ", but Python " + python.version +
                             " was requested");
    }
    api->site = python.site;
    if (running) return api.release();
    if (api->set_program_name && !python.interpreter.empty())
        // The interpreter uses it to find its files, and `site` to find the virtual environment. Never freed: Python keeps the
        // pointer.
        if (const wchar_t *name = api->Py_DecodeLocale(python.interpreter.c_str(), nullptr)) api->set_program_name(name);
    api->Py_InitializeEx(0);
    api->PyEval_SaveThread();
    return api.release();
}

}  // namespace

const PythonApi *PythonApi::started() { return the_api.load(); }

const PythonApi *PythonApi::present() {
    static std::atomic<const PythonApi *> in_process{nullptr};
    if (const PythonApi *api = started()) return api;
    if (const PythonApi *api = in_process.load()) return api;
    auto api = std::make_unique<PythonApi>();
    Search search;
    if (!load_existing(*api, search)) return nullptr;
    const PythonApi *none = nullptr;
    return in_process.compare_exchange_strong(none, api.get()) ? api.release() : none;
}

const PythonApi &PythonApi::start(const std::string &parameter) {
    static std::mutex mutex;
    if (const pid_t owner = the_pid.load(); owner && owner != getpid())
        throw usage(SDR_REASON_FORKED,
                    "sdr_runtime_open: this process was forked from one that runs the interpreter, and a child cannot use it: "
                    "call exec, or open with SDR_ISOLATION_PROCESS");
    const std::lock_guard lock(mutex);
    if (const PythonApi *api = the_api.load()) {
        if (!api->Py_IsInitialized())
            throw Failure(SDR_ENVIRONMENT, SDR_REASON_NO_PYTHON,
                          "sdr_runtime_open: the host has finalised the interpreter (Py_Finalize); it cannot be started again");
        Search search;
        if (const Python requested = explicit_python(parameter, search); !requested.site.empty() && requested.site != api->site)
            throw usage(SDR_REASON_UNSUPPORTED, "sdr_runtime_open: this process already runs Python " + api->version +
                                                    (api->site.empty() ? "" : " with " + api->site) +
                                                    ", and a process can have only one interpreter: to use " + requested.site +
                                                    ", open with SDR_ISOLATION_PROCESS");
        return *api;
    }
    the_api = start_now(parameter);
    the_pid = getpid();
    return *the_api.load();
}

GilPause::GilPause() : api_(PythonApi::present()) {
    const pid_t owner = the_pid.load();
    if (!api_ || !api_->current_thread || (owner && owner != getpid()) || !api_->Py_IsInitialized()) return;
    PyThreadState *own = api_->PyGILState_GetThisThreadState();
    if (own && api_->current_thread() == own) saved_ = api_->PyEval_SaveThread();
}

GilPause::~GilPause() {
    if (saved_) api_->PyEval_RestoreThread(saved_);
}

}  // namespace sdr
