// A second file that uses sdruntime.hpp, always C++17: linked with wrapper.cpp of whatever standard.
#include "sdruntime/sdruntime.hpp"

void draw_nothing(sdruntime::Runtime &runtime) {
    const sdruntime::JobParams params;  // no prompt
    const sdruntime::Job job = runtime.submit(params);
}

sdruntime::Job passed_on(sdruntime::Job job) { return job; }

std::size_t rows_of(const sdruntime::Picture &picture) {
    std::size_t rows = 0;
    for (int32_t y = 0; y < picture.height; ++y) rows += picture.row(y).size() == 3 * static_cast<std::size_t>(picture.width);
    return rows;
}
