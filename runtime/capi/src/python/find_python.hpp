// Where an interpreter is looked for; the order is told at sdr_runtime_open.
#pragma once

#include <string>
#include <vector>

#include "api/failure.hpp"

namespace sdr {

struct Python {
    std::string interpreter;             // the program, "" where only a library was given
    std::vector<std::string> libraries;  // may be its libpython, best first; the loader finds names without a folder
    std::string site;                    // the site-packages of a virtual environment, else ""
    std::string version;                 // "3.11", "" where no file tells it

    bool empty() const { return interpreter.empty() && libraries.empty(); }
};

constexpr const char *NAME_A_PYTHON =
    "\ngive the folder of a virtual environment with sdruntime in it, as sdr_open_params.python or SDRUNTIME_PYTHON";

// What was looked at, and what was found there, for the status.
class Search {
public:
    void note(const std::string &line) { lines_.push_back(line); }
    Failure failure(const std::string &what) const;

private:
    std::vector<std::string> lines_;
};

// Each an empty one where there is none, and Failure thrown where a place is named and nothing is there: what the caller names, else
// SDRUNTIME_PYTHON; the virtual environment that is active, else the one beside this library; what PATH and the loader may have.
Python given_python(const std::string &given, Search &search);
Python installed_python(Search &search);
Python common_python(Search &search);

}  // namespace sdr
