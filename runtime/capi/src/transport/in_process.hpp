// The service in this process, over an interpreter that was opened at run time.
#pragma once

#include <memory>
#include <string>

#include "wire/message.hpp"

namespace sdr {

// `python`: what the caller gave, "" for a search. Throws Failure.
std::unique_ptr<Transport> in_process_transport(Sink &sink, const std::string &python);

}  // namespace sdr
