// What goes wrong inside the library is thrown as a Failure, and becomes an sdr_status where C begins.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "sdruntime/sdruntime.h"

namespace sdr {

// Copies share nothing (those of std::runtime_error do: a string counted inside the standard library, which ThreadSanitizer cannot follow).
class Failure : public std::exception {
public:
    Failure(int32_t code, int32_t reason, std::string message) : code(code), reason(reason), message_(std::move(message)) {}

    const char *what() const noexcept override { return message_.c_str(); }

    int32_t code;
    int32_t reason;

private:
    std::string message_;
};

inline Failure usage(int32_t reason, const std::string &message) { return Failure(SDR_USAGE, reason, message); }

}  // namespace sdr
