#include "transport/in_process.hpp"

#include <condition_variable>
#include <mutex>
#include <thread>

#include "api/handles.hpp"
#include "python/find_python.hpp"
#include "python/python_api.hpp"
#include "python/service_source.hpp"
#include "transport/outbox.hpp"

namespace sdr {

namespace {

// Passes events from Python's emit to one sink, which may be destroyed while Python still holds emit.
class Gate {
public:
    explicit Gate(Sink &sink) : sink_(&sink) {}

    // Return false if the event is invalid.
    bool pass(Message message) {
        {
            const std::lock_guard lock(mutex_);
            if (!sink_) return true;
            ++inside_;
        }
        const bool valid = sink_->on_event(std::move(message));
        {
            const std::lock_guard lock(mutex_);
            --inside_;
        }
        left_.notify_all();
        return valid;
    }

    void end(const std::string &why) {
        {
            const std::lock_guard lock(mutex_);
            if (!sink_) return;
            ++inside_;
        }
        sink_->on_end(why);
        {
            const std::lock_guard lock(mutex_);
            --inside_;
        }
        left_.notify_all();
    }

    // Wait for running calls. No event is passed afterwards.
    void shut() {
        std::unique_lock lock(mutex_);
        left_.wait(lock, [this] { return inside_ == 0; });
        sink_ = nullptr;
    }

private:
    std::mutex mutex_;
    std::condition_variable left_;
    Sink *sink_;
    int inside_ = 0;
};

Table<Gate> &gates() {
    static auto &table = *new Table<Gate>;
    return table;
}

// Owns a reference. Requires the GIL.
class Ref {
public:
    Ref(const PythonApi &api, PyObject *object) : api_(api), object_(object) {
        if (object) return;
        api.PyErr_Clear();
        throw Failure(SDR_ENVIRONMENT, SDR_REASON_OUT_OF_MEMORY, "Python could not create an object");
    }
    ~Ref() {
        if (object_) api_.Py_DecRef(object_);
    }
    Ref(const Ref &) = delete;
    Ref &operator=(const Ref &) = delete;
    PyObject *get() const { return object_; }
    PyObject *release() { return std::exchange(object_, nullptr); }

private:
    const PythonApi &api_;
    PyObject *object_;
};

PyObject *bytes(const PythonApi &api, const void *data, size_t size) {
    return api.PyBytes_FromStringAndSize(static_cast<const char *>(data), static_cast<std::ptrdiff_t>(size));
}

PyObject *call(const PythonApi &api, PyObject *function, PyObject *first, PyObject *second) {
    const Ref arguments(api, api.PyTuple_New(2));
    api.PyTuple_SetItem(arguments.get(), 0, first);
    api.PyTuple_SetItem(arguments.get(), 1, second);
    return api.PyObject_CallObject(function, arguments.get());
}

// emit(message, blob), called by Python with the GIL held. `self` is the id of a gate.
PyObject *emit(PyObject *self, PyObject *arguments) {
    const PythonApi &api = *PythonApi::started();
    char *json = nullptr, *blob = nullptr;
    std::ptrdiff_t json_size = 0, blob_size = 0;
    PyObject *first = api.PyTuple_GetItem(arguments, 0), *second = first ? api.PyTuple_GetItem(arguments, 1) : nullptr;
    if (!second || api.PyBytes_AsStringAndSize(first, &json, &json_size) != 0 ||
        api.PyBytes_AsStringAndSize(second, &blob, &blob_size) != 0)
        return nullptr;
    const uint64_t id = api.PyLong_AsUnsignedLongLong(self);
    const char *fault = nullptr;
    PyThreadState *saved = api.PyEval_SaveThread();  // the caller holds references to the arguments
    try {
        if (const auto gate = gates().find(id)) {
            Message message{std::string(json, static_cast<size_t>(json_size)), {}};
            if (blob_size) message.blob = Blob(std::vector<uint8_t>(blob, blob + blob_size));
            if (!gate->pass(std::move(message))) fault = "sdruntime: the C library does not know this event";
        }
    } catch (const std::exception &) {
        fault = "sdruntime: the C library has no memory for this event";
    }
    api.PyEval_RestoreThread(saved);
    if (fault) {
        api.PyErr_SetString(*api.runtime_error, fault);
        return nullptr;
    }
    api.Py_IncRef(api.none);
    return api.none;
}

PyMethodDef emit_method = {"emit", emit, PY_VARARGS, "emit(message: bytes, blob: bytes) -> None"};

class InProcess : public Transport {
public:
    InProcess(Sink &sink, const std::string &python)
        : api_(PythonApi::start(python)), gate_(std::make_shared<Gate>(sink)), id_(Process::current().new_id()) {
        gates().put(id_, gate_);
        try {
            const Gil gil(api_);
            handle_ = start_service();
        } catch (...) {
            gates().take(id_);
            throw;
        }
        sender_ = quiet_thread([this] { run(); });
    }

    ~InProcess() override {
        const GilPause pause;
        outbox_.close();
        sender_.join();
        gate_->shut();
        gates().take(id_);
        const Gil gil(api_);
        api_.Py_DecRef(handle_);
    }

    void send(Message message) override { outbox_.put(std::move(message)); }
    void hang_up() override {}
    bool in_process() const override { return true; }

private:
    PyObject *start_service() {
        const Ref code(api_, api_.Py_CompileString(IN_PROCESS_SOURCE, "<sdruntime.h>", PY_FILE_INPUT));
        const Ref globals(api_, api_.PyDict_New());
        api_.PyDict_SetItemString(globals.get(), "__builtins__", api_.PyEval_GetBuiltins());
        const Ref result(api_, api_.PyEval_EvalCode(code.get(), globals.get(), globals.get()));
        Ref number(api_, api_.PyLong_FromUnsignedLongLong(id_));
        const Ref emitter(api_, api_.PyCFunction_NewEx(&emit_method, number.get(), nullptr));
        Ref site(api_, text_from_bytes(api_.site));
        api_.Py_IncRef(emitter.get());
        const Ref pair(api_, call(api_, api_.PyDict_GetItemString(globals.get(), "start"), emitter.get(), site.release()));
        PyObject *handle = api_.PyTuple_GetItem(pair.get(), 0);
        if (handle == api_.none)
            throw Failure(SDR_ENVIRONMENT, SDR_REASON_NO_RUNTIME,
                          "cannot import sdruntime: " + text(api_.PyTuple_GetItem(pair.get(), 1)) + PYTHON_ADVICE);
        api_.Py_IncRef(handle);
        return handle;
    }

    PyObject *text_from_bytes(const std::string &value) {
        return api_.PyUnicode_DecodeFSDefaultAndSize(value.data(), static_cast<std::ptrdiff_t>(value.size()));
    }

    std::string text(PyObject *string) {
        const Ref encoded(api_, api_.PyUnicode_AsUTF8String(string));
        char *data = nullptr;
        std::ptrdiff_t size = 0;
        api_.PyBytes_AsStringAndSize(encoded.get(), &data, &size);
        return std::string(data, static_cast<size_t>(size));
    }

    void run() {
        for (Message message; outbox_.take(message);) {
            const Gil gil(api_);
            try {
                Ref json(api_, bytes(api_, message.json.data(), message.json.size()));
                PyObject *blob = api_.none;
                if (message.blob.size()) blob = Ref(api_, bytes(api_, message.blob.data(), message.blob.size())).release();
                else api_.Py_IncRef(blob);
                const Ref none(api_, call(api_, handle_, json.release(), blob));
            } catch (const std::exception &error) {
                gate_->end(std::string("the service in this process raised an exception: ") + error.what());
            }
            message = {};
        }
    }

    const PythonApi &api_;
    const std::shared_ptr<Gate> gate_;
    const uint64_t id_;
    PyObject *handle_ = nullptr;
    Outbox outbox_;
    std::thread sender_;
};

}  // namespace

std::unique_ptr<Transport> in_process_transport(Sink &sink, const std::string &python) {
    return std::make_unique<InProcess>(sink, python);
}

}  // namespace sdr
