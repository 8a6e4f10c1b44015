// Errors inside the library are thrown as a Failure. The C functions turn it into an sdr_status.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "sdruntime/sdruntime.h"

namespace sdr {

// Copies share no memory. Copies of std::runtime_error share a reference-counted string of the standard library, which
// ThreadSanitizer cannot follow.
class Failure : public std::exception {
public:
    Failure(int32_t code, int32_t reason, std::string message) : code(code), reason(reason), message_(std::move(message)) {}

    const char *what() const noexcept override { return message_.c_str(); }

    int32_t code;
    int32_t reason;

private:
    std::string message_;
};

// Return a Failure with code SDR_USAGE.
inline Failure usage(int32_t reason, const std::string &message) { return Failure(SDR_USAGE, reason, message); }

}  // namespace sdr
