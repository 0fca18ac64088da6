// The squared norm of a row, in double, since that of a large gradient is beyond a float.

#pragma once

#include <cstdint>

namespace {

// One order of summation, whoever computes it and however many threads do.
inline double squared_norm(const float* __restrict row, int64_t width) {
    constexpr int kSums = 16;
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= width; i += kSums) {
        for (int k = 0; k < kSums; ++k) sums[k] += static_cast<double>(row[i + k]) * row[i + k];
    }
    double sum = 0.0;
    for (; i < width; ++i) sum += static_cast<double>(row[i]) * row[i];
    for (double some : sums) sum += some;
    return sum;
}

}  // namespace
