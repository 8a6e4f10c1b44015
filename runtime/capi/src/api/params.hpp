// The caller's structs, read: of any age of the header, every text checked.
#pragma once

#include <cstddef>
#include <string>

#include "api/failure.hpp"
#include "wire/json.hpp"
#include "wire/message.hpp"

namespace sdr {

constexpr size_t LARGEST_STRUCT = 4096;  // no header will have longer ones: what says so is no struct

// A copy with defaults for what an older header lacks. Throws Failure for NULL, a struct_size that is none, and for what is set behind
// the end that this library knows.
sdr_open_params taken(const sdr_open_params *given);
sdr_job_params taken(const sdr_job_params *given);

// "" for NULL. Throws Failure where it is not UTF-8.
std::string text_of(const char *text, const char *field);

// Throw Failure, naming the field.
Json::Object open_options(const sdr_open_params &params);
Json::Object request_of(const sdr_job_params &params);
// RGB8 rows without gaps; empty where there is no start image.
Blob image_of(const sdr_job_params &params);

}  // namespace sdr
