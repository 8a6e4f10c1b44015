// What goes wrong inside the library is thrown as a Failure, and becomes an sdr_status where C begins.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "sdruntime/sdruntime.h"

namespace sdr {

class Failure : public std::runtime_error {
public:
    Failure(int32_t code, int32_t reason, const std::string &message) : std::runtime_error(message), code(code), reason(reason) {}

    int32_t code;
    int32_t reason;
};

inline Failure usage(int32_t reason, const std::string &message) { return Failure(SDR_USAGE, reason, message); }

}  // namespace sdr
