// Strict JSON (RFC 8259): UTF-8 is checked, duplicate keys are rejected, nesting is limited to 64. Independent of the locale.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace sdr {

class JsonError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class Json {
public:
    using Array = std::vector<Json>;
    using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text

    Json() = default;
    Json(std::nullptr_t) {}
    Json(bool value) : value_(value) {}
    Json(int32_t value) : value_(int64_t{value}) {}
    Json(int64_t value) : value_(value) {}
    Json(uint32_t value) : value_(int64_t{value}) {}
    Json(uint64_t value);
    Json(double value) : value_(value) {}
    Json(std::string value) : value_(std::move(value)) {}
    Json(const char *text);  // null for NULL
    Json(Array value) : value_(std::move(value)) {}
    Json(Object value) : value_(std::move(value)) {}
    Json(const void *) = delete;

    // Throws JsonError, whose message says what is wrong at which byte.
    static Json parse(std::string_view text);
    // Throws JsonError for a number that is not finite.
    std::string text() const;

    bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
    bool is_object() const { return std::holds_alternative<Object>(value_); }
    bool is_string() const { return std::holds_alternative<std::string>(value_); }

    // Return a member of an object; null if there is no such member or this is not an object.
    const Json &operator[](std::string_view key) const;

    // Throw JsonError if the value has another type or does not fit.
    const std::string &string() const;
    const Array &array() const;
    const Object &object() const;
    int64_t integer() const;
    uint64_t natural() const;
    double number() const;

private:
    friend class JsonReader;
    void write(std::string &out) const;

    std::variant<std::monostate, bool, int64_t, uint64_t, double, std::string, Array, Object>
        value_;  // uint64_t: only if too large for int64_t
};

// Return the index of the first byte that is not valid UTF-8 (surrogates, overlong forms and code points above U+10FFFF are
// invalid), or npos.
size_t bad_utf8(std::string_view text);

}  // namespace sdr
