// Runs the service in this process, with an interpreter that is loaded at run time.
#pragma once

#include <memory>
#include <string>

#include "wire/message.hpp"

namespace sdr {

// `python` is sdr_open_params.python; "": search. Throws Failure.
std::unique_ptr<Transport> in_process_transport(Sink &sink, const std::string &python);

}  // namespace sdr
