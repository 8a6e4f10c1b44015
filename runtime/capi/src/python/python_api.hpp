// CPython, loaded at run time: the functions of its stable ABI (3.10 and later) that the library uses.
#pragma once

#include <cstddef>
#include <string>

#include "python/find_python.hpp"

namespace sdr {

struct PyObject;
struct PyThreadState;

using PyFunction = PyObject *(*)(PyObject *self, PyObject *arguments);

struct PyMethodDef {
    const char *name;
    PyFunction function;
    int flags;
    const char *doc;
};

constexpr int PY_VARARGS = 1, PY_FILE_INPUT = 257;

// name, result, parameters
#define SDR_PYTHON_FUNCTIONS(X)                                               \
    X(Py_IsInitialized, int, (void))                                          \
    X(Py_InitializeEx, void, (int))                                           \
    X(Py_GetVersion, const char *, (void))                                    \
    X(Py_DecodeLocale, wchar_t *, (const char *, size_t *))                   \
    X(Py_CompileString, PyObject *, (const char *, const char *, int))        \
    X(Py_IncRef, void, (PyObject *))                                          \
    X(Py_DecRef, void, (PyObject *))                                          \
    X(PyBytes_AsStringAndSize, int, (PyObject *, char **, std::ptrdiff_t *))  \
    X(PyBytes_FromStringAndSize, PyObject *, (const char *, std::ptrdiff_t))  \
    X(PyCFunction_NewEx, PyObject *, (PyMethodDef *, PyObject *, PyObject *)) \
    X(PyDict_GetItemString, PyObject *, (PyObject *, const char *))           \
    X(PyDict_New, PyObject *, (void))                                         \
    X(PyDict_SetItemString, int, (PyObject *, const char *, PyObject *))      \
    X(PyErr_Clear, void, (void))                                              \
    X(PyErr_SetString, void, (PyObject *, const char *))                      \
    X(PyEval_EvalCode, PyObject *, (PyObject *, PyObject *, PyObject *))      \
    X(PyEval_GetBuiltins, PyObject *, (void))                                 \
    X(PyEval_RestoreThread, void, (PyThreadState *))                          \
    X(PyEval_SaveThread, PyThreadState *, (void))                             \
    X(PyGILState_Ensure, int, (void))                                         \
    X(PyGILState_GetThisThreadState, PyThreadState *, (void))                 \
    X(PyGILState_Release, void, (int))                                        \
    X(PyLong_AsUnsignedLongLong, unsigned long long, (PyObject *))            \
    X(PyLong_FromUnsignedLongLong, PyObject *, (unsigned long long))          \
    X(PyObject_CallObject, PyObject *, (PyObject *, PyObject *))              \
    X(PyTuple_GetItem, PyObject *, (PyObject *, std::ptrdiff_t))              \
    X(PyTuple_New, PyObject *, (std::ptrdiff_t))                              \
    X(PyTuple_SetItem, int, (PyObject *, std::ptrdiff_t, PyObject *))         \
    X(PyUnicode_AsUTF8String, PyObject *, (PyObject *))                       \
    X(PyUnicode_DecodeFSDefaultAndSize, PyObject *, (const char *, std::ptrdiff_t))

struct PythonApi {
#define SDR_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
    SDR_PYTHON_FUNCTIONS(SDR_MEMBER)
#undef SDR_MEMBER
    PyObject *none = nullptr;
    PyObject **runtime_error = nullptr;
    // not in the stable ABI: may be null
    void (*set_program_name)(const wchar_t *) = nullptr;
    PyThreadState *(*current_thread)() = nullptr;

    std::string site;     // site-packages of the requested environment, or ""
    std::string version;  // "3.11.7"

    // Return the interpreter of this process: the one that already runs, otherwise a new one, which runs until the process ends.
    // Throws Failure if none is found, if another one already runs, or in a child of the process that started it.
    static const PythonApi &start(const std::string &parameter);
    // Return the interpreter that start() returned, or nullptr.
    static const PythonApi *started();
    // Return the interpreter of this process, whoever started it, or nullptr.
    static const PythonApi *present();
};

// Holds the GIL during its lifetime.
class Gil {
public:
    explicit Gil(const PythonApi &api) : api_(api), state_(api.PyGILState_Ensure()) {}
    ~Gil() { api_.PyGILState_Release(state_); }
    Gil(const Gil &) = delete;
    Gil &operator=(const Gil &) = delete;

private:
    const PythonApi &api_;
    const int state_;
};

// Releases the GIL during its lifetime if this thread holds it, as a host written in Python may. For calls that wait.
class GilPause {
public:
    GilPause();
    ~GilPause();
    GilPause(const GilPause &) = delete;
    GilPause &operator=(const GilPause &) = delete;

private:
    const PythonApi *api_;
    PyThreadState *saved_ = nullptr;
};

}  // namespace sdr
