#include "wire/json.hpp"

#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>

namespace sdr {

namespace {

constexpr int DEEPEST = 64;

void append_utf8(std::string &out, uint32_t point) {
    if (point < 0x80) {
        out += static_cast<char>(point);
        return;
    }
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    const uint32_t lead = more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0;
    out += static_cast<char>(lead | point >> 6 * more);
    for (int k = more - 1; k >= 0; --k) out += static_cast<char>(0x80 | (point >> 6 * k & 0x3F));
}

void write_string(std::string &out, const std::string &text) {
    static const char *const hex = "0123456789abcdef";
    out += '"';
    for (const char letter : text) {
        const auto byte = static_cast<unsigned char>(letter);
        if (letter == '"' || letter == '\\') {
            out += '\\';
            out += letter;
        } else if (byte < 0x20) {
            out += "\\u00";
            out += hex[byte >> 4];
            out += hex[byte & 15];
        } else {
            out += letter;
        }
    }
    out += '"';
}

[[noreturn]] void wrong_type(const char *expected) { throw JsonError(std::string("JSON: expected ") + expected); }

// Return the value of a variant if it is a T. Throws JsonError otherwise.
template <class T, class Variant>
const T &held(const Variant &value, const char *expected) {
    if (const auto *content = std::get_if<T>(&value)) return *content;
    wrong_type(expected);
}

}  // namespace

size_t bad_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const auto lead = static_cast<unsigned char>(text[at]);
        const size_t more = lead < 0x80                   ? 0
                            : lead >= 0xC2 && lead < 0xE0 ? 1
                            : (lead & 0xF0) == 0xE0       ? 2
                            : lead >= 0xF0 && lead < 0xF5 ? 3
                                                          : 4;
        if (more == 4 || text.size() - at <= more) return at;
        for (size_t k = 1; k <= more; ++k)
            if ((static_cast<unsigned char>(text[at + k]) & 0xC0) != 0x80) return at;
        const auto next = more ? static_cast<unsigned char>(text[at + 1]) : 0;
        if ((lead == 0xE0 && next < 0xA0) || (lead == 0xED && next > 0x9F) || (lead == 0xF0 && next < 0x90) ||
            (lead == 0xF4 && next > 0x8F))
            return at;
        at += more + 1;
    }
    return std::string_view::npos;
}

class JsonReader {
public:
    explicit JsonReader(std::string_view text) : text_(text) {}

    Json document() {
        if (const size_t at = bad_utf8(text_); at != std::string_view::npos) at_ = at, fail("not UTF-8");
        Json root = value(0);
        space();
        if (at_ != text_.size()) fail("unexpected data after the document");
        return root;
    }

private:
    [[noreturn]] void fail(const std::string &what) const { throw JsonError("JSON, byte " + std::to_string(at_) + ": " + what); }
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    bool take(char wanted) {
        if (at_ >= text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }
    void space() {
        while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
    }
    bool word(std::string_view wanted) {
        if (text_.substr(at_, wanted.size()) != wanted) return false;
        at_ += wanted.size();
        return true;
    }

    Json value(int depth) {
        if (depth > DEEPEST) fail("nested deeper than " + std::to_string(DEEPEST));
        space();
        if (take('{')) return object(depth);
        if (take('[')) return array(depth);
        if (take('"')) return Json(string());
        if (word("null")) return Json();
        if (word("true")) return Json(true);
        if (word("false")) return Json(false);
        return number();
    }

    Json object(int depth) {
        Json::Object members;
        space();
        if (take('}')) return Json(std::move(members));
        do {
            space();
            if (!take('"')) fail("expected a key");
            std::string key = string();
            for (const auto &[other, unused] : members)
                if (other == key) fail("duplicate key \"" + key + "\"");
            space();
            if (!take(':')) fail("expected ':'");
            members.emplace_back(std::move(key), value(depth + 1));
            space();
        } while (take(','));
        if (!take('}')) fail("expected ',' or '}'");
        return Json(std::move(members));
    }

    Json array(int depth) {
        Json::Array elements;
        space();
        if (take(']')) return Json(std::move(elements));
        do {
            elements.push_back(value(depth + 1));
            space();
        } while (take(','));
        if (!take(']')) fail("expected ',' or ']'");
        return Json(std::move(elements));
    }

    uint32_t hex4() {
        uint32_t code = 0;
        const std::string_view digits = text_.substr(at_, 4);
        const char *end = digits.data() + digits.size();
        if (digits.size() < 4 || std::from_chars(digits.data(), end, code, 16).ptr != end)
            fail("expected four hexadecimal digits after \\u");
        at_ += 4;
        return code;
    }

    std::string string() {
        std::string text;
        for (;;) {
            if (at_ >= text_.size()) fail("unterminated string");
            const char letter = text_[at_++];
            if (letter == '"') return text;
            if (static_cast<unsigned char>(letter) < 0x20) --at_, fail("control character in a string");
            if (letter != '\\') {
                text += letter;
                continue;
            }
            const char name = peek();
            static constexpr std::string_view names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
            if (const size_t k = name ? names.find(name) : names.npos; k != names.npos) {
                ++at_;
                text += meant[k];
            } else if (take('u')) {
                uint32_t point = hex4();
                if (point >= 0xD800 && point < 0xDC00 && word("\\u")) {
                    const uint32_t low = hex4();
                    if (low < 0xDC00 || low > 0xDFFF) fail("unpaired surrogate");
                    point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
                }
                if (point >= 0xD800 && point < 0xE000) fail("unpaired surrogate");
                append_utf8(text, point);
            } else {
                fail("unknown escape");
            }
        }
    }

    size_t digits() {
        const size_t from = at_;
        while (peek() >= '0' && peek() <= '9') ++at_;
        if (at_ == from) fail("expected a value");
        return at_ - from;
    }

    Json number() {
        const size_t from = at_;
        take('-');
        if (!take('0')) digits();
        bool whole = true;
        if (take('.')) whole = false, digits();
        if (take('e') || take('E')) {
            whole = false;
            if (!take('+')) take('-');
            digits();
        }
        const std::string_view spelled = text_.substr(from, at_ - from);
        const auto fits = [spelled](auto &number) {
            return std::from_chars(spelled.data(), spelled.data() + spelled.size(), number).ec == std::errc();
        };
        if (int64_t number = 0; whole && fits(number)) return Json(number);
        if (uint64_t number = 0; whole && fits(number)) return Json(number);
        std::istringstream stream{std::string(spelled)};  // some supported compilers lack from_chars for double
        stream.imbue(std::locale::classic());
        double number = 0;
        if (!(stream >> number)) fail("number out of range");
        return Json(number);
    }

    std::string_view text_;
    size_t at_ = 0;
};

Json::Json(uint64_t value) {
    if (value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) value_ = static_cast<int64_t>(value);
    else value_ = value;
}

Json::Json(const char *text) {
    if (text) value_ = std::string(text);
}

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

std::string Json::text() const {
    std::string out;
    write(out);
    return out;
}

void Json::write(std::string &out) const {
    if (is_null()) {
        out += "null";
    } else if (const auto *truth = std::get_if<bool>(&value_)) {
        out += *truth ? "true" : "false";
    } else if (const auto *whole = std::get_if<int64_t>(&value_)) {
        out += std::to_string(*whole);
    } else if (const auto *large = std::get_if<uint64_t>(&value_)) {
        out += std::to_string(*large);
    } else if (const auto *real = std::get_if<double>(&value_)) {
        if (!std::isfinite(*real)) throw JsonError("JSON: number is not finite");
        std::ostringstream stream;
        stream.imbue(std::locale::classic());
        stream.precision(17);
        stream << *real;
        const std::string digits = stream.str();
        out += digits;
        if (digits.find_first_of(".e") == std::string::npos) out += ".0";
    } else if (const auto *string = std::get_if<std::string>(&value_)) {
        write_string(out, *string);
    } else if (const auto *array = std::get_if<Array>(&value_)) {
        out += '[';
        const char *comma = "";
        for (const Json &element : *array) {
            out += std::exchange(comma, ",");
            element.write(out);
        }
        out += ']';
    } else {
        out += '{';
        const char *comma = "";
        for (const auto &[key, value] : std::get<Object>(value_)) {
            out += std::exchange(comma, ",");
            write_string(out, key);
            out += ':';
            value.write(out);
        }
        out += '}';
    }
}

const Json &Json::operator[](std::string_view key) const {
    static const Json null;
    if (const auto *object = std::get_if<Object>(&value_))
        for (const auto &[name, value] : *object)
            if (name == key) return value;
    return null;
}

const std::string &Json::string() const { return held<std::string>(value_, "a string"); }

const Json::Array &Json::array() const { return held<Array>(value_, "an array"); }

const Json::Object &Json::object() const { return held<Object>(value_, "an object"); }

int64_t Json::integer() const { return held<int64_t>(value_, "a whole number below 2^63"); }

uint64_t Json::natural() const {
    if (const auto *large = std::get_if<uint64_t>(&value_)) return *large;
    if (const auto *whole = std::get_if<int64_t>(&value_); whole && *whole >= 0) return static_cast<uint64_t>(*whole);
    wrong_type("a whole number from 0 to 2^64 - 1");
}

double Json::number() const {
    if (const auto *real = std::get_if<double>(&value_)) return *real;
    if (const auto *whole = std::get_if<int64_t>(&value_)) return static_cast<double>(*whole);
    if (const auto *large = std::get_if<uint64_t>(&value_)) return static_cast<double>(*large);
    wrong_type("a number");
}

}  // namespace sdr
