#include "api/params.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>

namespace sdr {

namespace {

constexpr int32_t LARGEST_SIDE = 1 << 14;  // keep equal to runtime/sdruntime/bundle/limits.py
constexpr size_t MOST_CONTROLS = 16;       // keep equal to runtime/sdruntime/pipeline/requests/control.py

Failure bad(const std::string &message) { return usage(SDR_REASON_BAD_ARGUMENT, message); }

// Copy a struct of any header version. `first_size` is its size in the first header.
template <class T>
T copy_struct(const T *original, const char *name, size_t first_size, void (*init)(T *, size_t)) {
    if (!original) throw bad(std::string(name) + " is NULL");
    uint32_t size;
    std::memcpy(&size, original, sizeof size);
    if (size < first_size || size > LARGEST_STRUCT)
        throw usage(SDR_REASON_BAD_STRUCT, std::string(name) + ".struct_size is " + std::to_string(size) + "; expected " +
                                               std::to_string(first_size) + " to " + std::to_string(LARGEST_STRUCT) + ": call " +
                                               name + "_init first");
    T copy;
    init(&copy, sizeof copy);
    std::memcpy(&copy, original, std::min<size_t>(size, sizeof copy));
    const auto *bytes = reinterpret_cast<const unsigned char *>(original);
    for (size_t k = sizeof copy; k < size; ++k)
        if (bytes[k])
            throw usage(SDR_REASON_BAD_STRUCT, std::string(name) + ": byte " + std::to_string(k) +
                                                   " is set, but this library (ABI " + std::to_string(SDR_ABI_MAJOR) + "." +
                                                   std::to_string(SDR_ABI_MINOR) + ") knows only " + std::to_string(sizeof copy) +
                                                   " bytes: install a newer library");
    return copy;
}

void put_text(Json::Object &object, const char *key, const char *text) {
    if (text) object.emplace_back(key, text_of(text, key));
}

double finite(double value, const char *field) {
    if (!std::isfinite(value)) throw bad(std::string(field) + " is not a finite number");
    return value;
}

Json object_of(const char *text, const char *field) {
    try {
        Json object = Json::parse(text_of(text, field));
        if (!object.is_object()) throw JsonError("expected a JSON object");
        return object;
    } catch (const JsonError &error) {
        throw bad(std::string(field) + ": " + error.what());
    }
}

}  // namespace

sdr_open_params copy_of(const sdr_open_params *original) {
    return copy_struct(original, "sdr_open_params", sizeof(sdr_open_params), sdr_open_params_init);
}

sdr_job_params copy_of(const sdr_job_params *original) {
    return copy_struct(original, "sdr_job_params", offsetof(sdr_job_params, mask), sdr_job_params_init);
}

std::vector<sdr_control> controls_of(const sdr_job_params &params) {
    if (params.control_count > MOST_CONTROLS)
        throw bad("control_count " + std::to_string(params.control_count) + ": at most " + std::to_string(MOST_CONTROLS));
    if (params.control_count && !params.controls) throw bad("controls is NULL");
    constexpr size_t first_size = offsetof(sdr_control, fit) + sizeof(sdr_control::fit);
    std::vector<sdr_control> controls;
    for (size_t k = 0; k < params.control_count; ++k) {
        controls.push_back(copy_struct(params.controls[k], "sdr_control", first_size, sdr_control_init));
        if (controls.back().reserved)
            throw usage(SDR_REASON_BAD_STRUCT, "sdr_control.reserved is not 0: call sdr_control_init first");
    }
    return controls;
}

std::string text_of(const char *text, const char *field) {
    if (!text) return "";
    if (const size_t at = bad_utf8(text); at != std::string::npos)
        throw usage(SDR_REASON_BAD_TEXT, std::string(field) + ": byte " + std::to_string(at) + " is not UTF-8");
    return text;
}

Json::Object open_options(const sdr_open_params &params) {
    Json::Object options;
    put_text(options, "backend", params.backend);
    put_text(options, "device", params.device);
    if (params.threads < 0) throw bad("threads: " + std::to_string(params.threads) + " is negative");
    if (params.threads) options.emplace_back("threads", params.threads);
    if (params.low_memory) options.emplace_back("low_memory", true);
    if (params.memory_cap) options.emplace_back("memory", params.memory_cap);
    if (params.stream) options.emplace_back("stream", uint64_t{reinterpret_cast<uintptr_t>(params.stream)});
    options.emplace_back("queue", params.queue);
    const Json rare = params.options ? object_of(params.options, "options") : Json(Json::Object());
    for (const auto &[key, value] : rare.object()) {
        for (const char *field : {"backend", "device", "threads", "low_memory", "memory", "stream", "queue"})
            if (key == field) throw bad("options: \"" + key + "\" is not accepted here: set its field in sdr_open_params");
        options.emplace_back(key, value);
    }
    return options;
}

Json::Object request_of(const sdr_job_params &params) {
    if (!params.prompt) throw bad("prompt is NULL");
    if (params.reserved) throw usage(SDR_REASON_BAD_STRUCT, "sdr_job_params.reserved is not 0: call sdr_job_params_init first");
    Json::Object request;
    put_text(request, "prompt", params.prompt);
    put_text(request, "negative", params.negative);
    request.emplace_back("seed", params.random_seed ? uint64_t{std::random_device()()} : params.seed);
    if (!params.model_defaults) request.emplace_back("steps", params.steps);
    put_text(request, "sampler", params.sampler);
    put_text(request, "schedule", params.schedule);
    if (!params.model_defaults) request.emplace_back("guidance", finite(params.guidance, "guidance"));
    request.emplace_back("rescale", finite(params.rescale, "rescale"));
    if (params.width || params.height) {
        if (params.width <= 0 || params.height <= 0)
            throw bad("size " + std::to_string(params.width) + "x" + std::to_string(params.height) +
                      ": expected both above 0, or both 0 for the model's default size");
        request.emplace_back("width", params.width);
        request.emplace_back("height", params.height);
    }
    if (params.image) request.emplace_back("strength", finite(params.strength, "strength"));
    if (params.options) request.emplace_back("options", object_of(params.options, "options"));
    const Json rare = params.settings ? object_of(params.settings, "settings") : Json(Json::Object());
    for (const auto &[key, value] : rare.object()) {
        for (const char *field : {"prompt", "negative", "seed", "steps", "sampler", "schedule", "guidance", "rescale", "width",
                                  "height", "strength", "options", "image", "mask", "depth", "control"})
            if (key == field && !(params.model_defaults && (key == "steps" || key == "guidance")))
                throw bad("settings: \"" + key + "\" is not accepted here: set its field in sdr_job_params");
        request.emplace_back(key, value);
    }
    return request;
}

namespace {

void check_sides(int32_t width, int32_t height, const char *field) {
    if (width <= 0 || height <= 0 || width > LARGEST_SIDE || height > LARGEST_SIDE)
        throw bad(std::string(field) + " of " + std::to_string(width) + "x" + std::to_string(height) +
                  ": expected width and height from 1 to " + std::to_string(LARGEST_SIDE));
}

// Copy rows of `row` bytes without the gaps between them.
void copy_rows(std::vector<uint8_t> &bytes, const uint8_t *first, size_t row, size_t stride, int32_t height, const char *field) {
    if (!stride) stride = row;
    if (stride < row)
        throw bad(std::string(field) + " " + std::to_string(stride) + " is less than the " + std::to_string(row) +
                  " bytes of a row");
    if (stride > static_cast<size_t>(PTRDIFF_MAX) / static_cast<size_t>(height))
        throw bad(std::string(field) + " " + std::to_string(stride) + " is too large");
    bytes.reserve(bytes.size() + row * static_cast<size_t>(height));
    for (size_t k = 0; k < static_cast<size_t>(height); ++k)
        bytes.insert(bytes.end(), first + k * stride, first + k * stride + row);
}

}  // namespace

Json::Array control_messages(const std::vector<sdr_control> &controls) {
    Json::Array messages;
    for (const sdr_control &control : controls) {
        Json::Object message{{"size", Json::Array{control.width, control.height}},
                             {"scale", finite(control.scale, "control: scale")},
                             {"start", finite(control.start, "control: start")},
                             {"end", finite(control.end, "control: end")}};
        put_text(message, "net", control.net);
        put_text(message, "fit", control.fit);
        messages.emplace_back(std::move(message));
    }
    return messages;
}

Blob images_of(const sdr_job_params &params, const std::vector<sdr_control> &controls) {
    if (!params.image && params.mask) throw bad("mask: it marks a part of an image: set image too");
    if (!params.image && params.depth) throw bad("depth: it is that of an image: set image too");
    std::vector<uint8_t> bytes;
    if (params.image) {
        const auto row = static_cast<size_t>(params.image_width);
        check_sides(params.image_width, params.image_height, "image");
        if (params.depth) check_sides(params.depth_width, params.depth_height, "depth");
        copy_rows(bytes, params.image, 3 * row, params.image_stride, params.image_height, "image_stride");
        if (params.mask) copy_rows(bytes, params.mask, row, params.mask_stride, params.image_height, "mask_stride");
        if (params.depth)
            copy_rows(bytes, params.depth, static_cast<size_t>(params.depth_width), params.depth_stride, params.depth_height,
                      "depth_stride");
    }
    for (const sdr_control &control : controls) {
        if (!control.image) throw bad("control: image is NULL");
        check_sides(control.width, control.height, "control");
        copy_rows(bytes, control.image, 3 * static_cast<size_t>(control.width), control.stride, control.height,
                  "control: stride");
    }
    return bytes.empty() ? Blob() : Blob(std::move(bytes));
}

}  // namespace sdr
