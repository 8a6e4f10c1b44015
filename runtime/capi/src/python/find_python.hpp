// Searching for an interpreter, in the order that sdr_runtime_open documents.
#pragma once

#include <string>
#include <vector>

#include "api/failure.hpp"

namespace sdr {

struct Python {
    std::string interpreter;             // the program; "" if only a library was named
    std::vector<std::string> libraries;  // candidates for its libpython, best first; a name without a folder is for the loader
    std::string site;                    // the site-packages of a virtual environment, or ""
    std::string version;                 // "3.11", or "" if unknown

    bool empty() const { return interpreter.empty() && libraries.empty(); }
};

constexpr const char *PYTHON_ADVICE =
    "\npass the folder of a virtual environment that has sdruntime, as sdr_open_params.python or SDRUNTIME_PYTHON";

// Records the places searched and what was found there, for the error message.
class Search {
public:
    void note(const std::string &line) { lines_.push_back(line); }
    Failure failure(const std::string &what) const;

private:
    std::vector<std::string> lines_;
};

// The Python that the caller names, otherwise that of SDRUNTIME_PYTHON. Empty if neither is set. Throws Failure if it does not
// exist.
Python explicit_python(const std::string &parameter, Search &search);
// The virtual environment that is active, otherwise the one beside this library; may be empty. Throws Failure if VIRTUAL_ENV is
// wrong.
Python installed_python(Search &search);
// The python3 on PATH, and the libpythons that the loader may find.
Python system_python(Search &search);

}  // namespace sdr
