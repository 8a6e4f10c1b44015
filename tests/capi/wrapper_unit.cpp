// A second file that includes sdruntime.hpp. Always compiled as C++17, and linked with wrapper.cpp of any standard.
#include "sdruntime/sdruntime.hpp"

void submit_without_prompt(sdruntime::Runtime &runtime) {
    const sdruntime::JobParams params;  // no prompt
    const sdruntime::Job job = runtime.submit(params);
}

sdruntime::Job pass_through(sdruntime::Job job) { return job; }

std::size_t rows_of(const sdruntime::Picture &image) {
    std::size_t rows = 0;
    for (int32_t y = 0; y < image.height; ++y) rows += image.row(y).size() == 3 * static_cast<std::size_t>(image.width);
    return rows;
}
