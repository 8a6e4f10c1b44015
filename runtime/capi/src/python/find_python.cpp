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

constexpr int OLDEST = 10, NEWEST = 30;  // of Python 3

std::string variable(const char *name) {
    const char *value = std::getenv(name);
    return value ? value : "";
}

bool is_library(const fs::path &path) {
    const std::string name = path.filename().string();
    return name.rfind("libpython", 0) == 0 && name.find(".so") != std::string::npos;
}

// "3.11" out of "3.11.7" or "python3.11"; "" where there is none.
std::string minor_version(const std::string &text) {
    const size_t from = text.find("3.");
    if (from == std::string::npos) return "";
    const size_t to = text.find_first_not_of("0123456789", from + 2);
    const std::string found = text.substr(from, to == std::string::npos ? to : to - from);
    return found.size() > 2 ? found : "";
}

// The lines "key = value" of a pyvenv.cfg.
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

std::vector<std::string> libraries_under(const fs::path &prefix, const std::string &version) {
    std::vector<std::string> found;
    std::vector<fs::path> folders = {prefix / "lib", prefix / "lib64"};
    std::error_code error;
    for (fs::directory_iterator each(prefix / "lib", error), last; !error && each != last; each.increment(error))
        if (each->path().filename().string().find("-linux-gnu") != std::string::npos) folders.push_back(each->path());
    for (int minor = NEWEST; minor >= OLDEST; --minor) {
        const std::string each = "3." + std::to_string(minor);
        if (!version.empty() && each != version) continue;
        for (const fs::path &folder : folders)
            for (const char *end : {".so.1.0", ".so"})
                if (const fs::path file = folder / ("libpython" + each + end); fs::exists(file, error))
                    found.push_back(file.string());
        if (!version.empty()) found.push_back("libpython" + each + ".so.1.0");
    }
    return found;
}

Python of_interpreter(const fs::path &path) {
    Python found;
    found.interpreter = path.string();
    const fs::path environment = path.parent_path().parent_path(), config = environment / "pyvenv.cfg";
    std::error_code error;
    if (fs::exists(config, error)) {
        found.version = minor_version(config_value(config, {"version", "version_info"}));
        if (!found.version.empty()) found.site = (environment / "lib" / ("python" + found.version) / "site-packages").string();
        found.libraries = libraries_under(fs::path(config_value(config, {"home"})).parent_path(), found.version);
    } else {
        const fs::path real = fs::canonical(path, error);
        found.version = error ? "" : minor_version(real.filename().string());
        if (!error) found.libraries = libraries_under(real.parent_path().parent_path(), found.version);
    }
    return found;
}

// A folder (of a virtual environment), an interpreter, or a libpython. Empty where it is none of them.
Python at(const fs::path &place) {
    std::error_code error;
    const fs::path path = fs::absolute(place, error);
    if (fs::is_directory(path, error)) {
        for (const char *name : {"python3", "python"})
            if (access((path / "bin" / name).c_str(), X_OK) == 0) return of_interpreter(path / "bin" / name);
        return {};
    }
    if (is_library(path) && fs::exists(path, error)) {
        Python found;
        found.libraries = {path.string()};
        found.version = minor_version(path.filename().string());
        return found;
    }
    return fs::is_regular_file(path, error) && access(path.c_str(), X_OK) == 0 ? of_interpreter(path) : Python();
}

// What `name` (a parameter or a variable) says, if anything.
Python named(const std::string &name, const std::string &place, Search &search) {
    if (place.empty()) {
        search.note(name + ": not set");
        return {};
    }
    Python found = at(place);
    search.note(name + ": " + place + (found.empty() ? ", which is no virtual environment, interpreter or libpython" : ""));
    if (found.empty()) throw search.failure(name + " contains no Python");
    return found;
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
    return Failure(SDR_ENVIRONMENT, SDR_REASON_NO_PYTHON, text + NAME_A_PYTHON);
}

Python given_python(const std::string &given, Search &search) {
    Python found = named("sdr_open_params.python", given, search);
    return found.empty() ? named("SDRUNTIME_PYTHON", variable("SDRUNTIME_PYTHON"), search) : found;
}

Python installed_python(Search &search) {
    if (Python found = named("VIRTUAL_ENV", variable("VIRTUAL_ENV"), search); !found.empty()) return found;
    const fs::path beside = beside_this_library();
    std::error_code error;
    const bool there = fs::exists(beside / "pyvenv.cfg", error);
    search.note((there ? "beside this library: " : "beside this library: no virtual environment ") + beside.string());
    return there ? at(beside) : Python();
}

Python common_python(Search &search) {
    Python found;
    std::istringstream path(variable("PATH"));
    for (std::string folder; found.interpreter.empty() && std::getline(path, folder, ':');)
        if (!folder.empty() && access((fs::path(folder) / "python3").c_str(), X_OK) == 0)
            found = of_interpreter(fs::path(folder) / "python3");
    search.note(found.interpreter.empty() ? "PATH: no python3" : "PATH: " + found.interpreter);
    found.libraries.push_back("libpython3.so");
    for (int minor = NEWEST; minor >= OLDEST; --minor)
        found.libraries.push_back("libpython3." + std::to_string(minor) + ".so.1.0");
    return found;
}

}  // namespace sdr
