// Reading the caller's structs, of any header version. All texts are checked.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "api/failure.hpp"
#include "wire/json.hpp"
#include "wire/message.hpp"

namespace sdr {

constexpr size_t LARGEST_STRUCT = 4096;  // bytes; a larger struct_size is not a struct

// Copy a struct, with defaults for the fields that an older header lacks. Throws Failure for NULL, an invalid struct_size, and if
// a field is set that this library does not know.
sdr_open_params copy_of(const sdr_open_params *original);
sdr_job_params copy_of(const sdr_job_params *original);
std::vector<sdr_control> controls_of(const sdr_job_params &params);

// Return the text, or "" for NULL. Throws Failure if it is not UTF-8.
std::string text_of(const char *text, const char *field);

// The messages that the service expects. They throw Failure, which names the field.
Json::Object open_options(const sdr_open_params &params);
Json::Object request_of(const sdr_job_params &params);
Json::Array control_messages(const std::vector<sdr_control> &controls);
// Return the images of a job, their rows without gaps, one after the other; empty if there is none.
Blob images_of(const sdr_job_params &params, const std::vector<sdr_control> &controls);

}  // namespace sdr
