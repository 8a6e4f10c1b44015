// The service in a process of its own.
#pragma once

#include <memory>
#include <string>

#include "wire/message.hpp"

namespace sdr {

// `python`: what the caller gave, "" for a search. Throws Failure.
std::unique_ptr<Transport> worker_transport(Sink &sink, const std::string &python);

}  // namespace sdr
