// Runs the service in a worker process.
#pragma once

#include <memory>
#include <string>

#include "wire/message.hpp"

namespace sdr {

// `python` is sdr_open_params.python; "": search. Throws Failure.
std::unique_ptr<Transport> worker_transport(Sink &sink, const std::string &python);

}  // namespace sdr
