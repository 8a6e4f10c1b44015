// JSON as RFC 8259 has it, and no more: UTF-8 is checked, a key comes once, nesting ends at 64. No locale has a say.
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
    Json(const char *text);  // null where it is NULL
    Json(Array value) : value_(std::move(value)) {}
    Json(Object value) : value_(std::move(value)) {}
    Json(const void *) = delete;

    // Throws JsonError, which says what is wrong at which byte.
    static Json parse(std::string_view text);
    // Throws JsonError for a number that is not finite.
    std::string text() const;

    bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
    bool is_object() const { return std::holds_alternative<Object>(value_); }
    bool is_string() const { return std::holds_alternative<std::string>(value_); }

    // A member of an object; null where there is none, or this is no object.
    const Json &operator[](std::string_view key) const;

    // Throw JsonError where the value is of another type, or does not fit.
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
        value_;  // uint64_t: above int64_t only
};

// The byte at which `text` ceases to be UTF-8 (surrogates, overlong forms and what is above U+10FFFF are none), or npos.
size_t bad_utf8(std::string_view text);

}  // namespace sdr
