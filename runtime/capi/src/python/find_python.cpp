#include "python/find_python.hpp"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <dlfcn.h>
#include <unistd.h>

namespace sdr {

namespace fs = std::filesystem;

namespace {

constexpr int OLDEST = 10, NEWEST = 30;  // minor versions of Python 3

std::string variable(const char *name) {
    const char *value = std::getenv(name);
    return value ? value : "";
}

bool is_library(const fs::path &path) {
    const std::string name = path.filename().string();
    return name.rfind("libpython", 0) == 0 && name.find(".so") != std::string::npos;
}

// Return "3.11" for "3.11.7" or "python3.11"; "" if there is no version.
std::string minor_version(const std::string &text) {
    const size_t from = text.find("3.");
    if (from == std::string::npos) return "";
    const size_t to = text.find_first_not_of("0123456789", from + 2);
    const std::string version = text.substr(from, to == std::string::npos ? to : to - from);
    return version.size() > 2 ? version : "";
}

// Return the value of the first line "key = value" of a pyvenv.cfg with one of these keys, or "".
std::string config_value(const fs::path &path, const std::vector<std::string> &keys) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        const size_t equals = line.find('=');
        if (equals == std::string::npos) continue;
        const auto trimmed = [](const std::string &text) {
            const size_t from = text.find_first_not_of(" \t\r"), to = text.find_last_not_of(" \t\r");
            return from == std::string::npos ? std::string() : text.substr(from, to - from + 1);
        };
        if (std::find(keys.begin(), keys.end(), trimmed(line.substr(0, equals))) != keys.end())
            return trimmed(line.substr(equals + 1));
    }
    return "";
}

// Return the paths that a libpython under `prefix` may have, the newest version first; with a version, also the name for the
// loader.
std::vector<std::string> libraries_under(const fs::path &prefix, const std::string &version) {
    std::vector<std::string> libraries;
    std::vector<fs::path> folders = {prefix / "lib", prefix / "lib64"};
    std::error_code error;
    for (fs::directory_iterator entry(prefix / "lib", error), last; !error && entry != last; entry.increment(error))
        if (entry->path().filename().string().find("-linux-gnu") != std::string::npos) folders.push_back(entry->path());
    for (int minor = NEWEST; minor >= OLDEST; --minor) {
        const std::string candidate = "3." + std::to_string(minor);
        if (!version.empty() && candidate != version) continue;
        for (const fs::path &folder : folders)
            for (const char *end : {".so.1.0", ".so"})
                if (const fs::path file = folder / ("libpython" + candidate + end); fs::exists(file, error))
                    libraries.push_back(file.string());
        if (!version.empty()) libraries.push_back("libpython" + candidate + ".so.1.0");
    }
    return libraries;
}

Python python_of_interpreter(const fs::path &path) {
    Python python;
    python.interpreter = path.string();
    const fs::path environment = path.parent_path().parent_path(), config = environment / "pyvenv.cfg";
    std::error_code error;
    if (fs::exists(config, error)) {
        python.version = minor_version(config_value(config, {"version", "version_info"}));
        if (!python.version.empty()) python.site = (environment / "lib" / ("python" + python.version) / "site-packages").string();
        python.libraries = libraries_under(fs::path(config_value(config, {"home"})).parent_path(), python.version);
    } else {
        const fs::path real = fs::canonical(path, error);
        python.version = error ? "" : minor_version(real.filename().string());
        if (!error) python.libraries = libraries_under(real.parent_path().parent_path(), python.version);
    }
    return python;
}

// Return the Python at a path: the folder of a virtual environment, an interpreter, or a libpython. Empty if it is none of them.
Python python_at(const fs::path &place) {
    std::error_code error;
    const fs::path path = fs::absolute(place, error);
    if (fs::is_directory(path, error)) {
        for (const char *name : {"python3", "python"})
            if (access((path / "bin" / name).c_str(), X_OK) == 0) return python_of_interpreter(path / "bin" / name);
        return {};
    }
    if (is_library(path) && fs::exists(path, error)) {
        Python python;
        python.libraries = {path.string()};
        python.version = minor_version(path.filename().string());
        return python;
    }
    return fs::is_regular_file(path, error) && access(path.c_str(), X_OK) == 0 ? python_of_interpreter(path) : Python();
}

// Return the Python at `place`, which the parameter or variable `name` contains. Empty if that is not set. Throws Failure if
// there is no Python.
Python named_python(const std::string &name, const std::string &place, Search &search) {
    if (place.empty()) {
        search.note(name + ": not set");
        return {};
    }
    Python python = python_at(place);
    search.note(name + ": " + place + (python.empty() ? ", which is not a virtual environment, interpreter or libpython" : ""));
    if (python.empty()) throw search.failure(name + " does not name a Python");
    return python;
}

fs::path beside_this_library() {
    Dl_info info;
    std::error_code error;
    if (!dladdr(reinterpret_cast<const void *>(&sdr_abi_version), &info) || !info.dli_fname) return {};
    const fs::path real = fs::canonical(info.dli_fname, error);
    return error ? fs::path() : real.parent_path() / "sdruntime";
}

}  // namespace

Failure Search::failure(const std::string &what) const {
    std::string text = what + "; searched:";
    for (const std::string &line : lines_) text += "\n  - " + line;
    return Failure(SDR_ENVIRONMENT, SDR_REASON_NO_PYTHON, text + PYTHON_ADVICE);
}

Python explicit_python(const std::string &parameter, Search &search) {
    Python python = named_python("sdr_open_params.python", parameter, search);
    return python.empty() ? named_python("SDRUNTIME_PYTHON", variable("SDRUNTIME_PYTHON"), search) : python;
}

Python installed_python(Search &search) {
    if (Python python = named_python("VIRTUAL_ENV", variable("VIRTUAL_ENV"), search); !python.empty()) return python;
    const fs::path beside = beside_this_library();
    std::error_code error;
    const bool exists = fs::exists(beside / "pyvenv.cfg", error);
    search.note((exists ? "beside this library: " : "beside this library: no virtual environment ") + beside.string());
    return exists ? python_at(beside) : Python();
}

Python system_python(Search &search) {
    Python python;
    std::istringstream path(variable("PATH"));
    for (std::string folder; python.interpreter.empty() && std::getline(path, folder, ':');)
        if (!folder.empty() && access((fs::path(folder) / "python3").c_str(), X_OK) == 0)
            python = python_of_interpreter(fs::path(folder) / "python3");
    search.note(python.interpreter.empty() ? "PATH: no python3" : "PATH: " + python.interpreter);
    python.libraries.push_back("libpython3.so");
    for (int minor = NEWEST; minor >= OLDEST; --minor)
        python.libraries.push_back("libpython3." + std::to_string(minor) + ".so.1.0");
    return python;
}

}  // namespace sdr
