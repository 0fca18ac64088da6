// What a table's rows look like in memory, bit by bit, for the passes of rows.cpp.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;  // without the sign
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kTooLarge = kInfinity - 0x8000u;  // from here on a master's bf16 is infinite, or it is NaN

// A master is two planes of 16 bits: its bf16 to nearest, ties away from zero, and the rest, as the signed difference
// of bit patterns. That difference is simply the lower half, read as signed. NaN is mended afterwards (`inspect`).
inline uint16_t high_plane(uint32_t bits) { return static_cast<uint16_t>((bits + 0x8000u) >> 16); }

inline float join(uint16_t high, uint16_t low) {
    const int32_t difference = static_cast<int16_t>(low);
    return float_of((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(difference));
}

// Random bits for stochastic rounding, 16 for each moment of a column. `key` is a full hash of (seed, row, step). For
// every column the hash below maps keys one to one, so over its steps an element's bits are uniform, and those of its
// two moments independent; one multiplication then suffices to tell columns apart. A hash gives 32 bits and serves two
// columns, eight apart: `exp_avg` of the one and `exp_avg_sq` of the other have the same.
constexpr uint32_t kOdd = 0x9E3779B9u, kFactor = 0xC2B2AE35u;

struct Random {
    uint32_t exp_avg, exp_avg_sq;
};

inline Random random_bits(uint32_t key, int64_t column) {
    const uint32_t x = key + static_cast<uint32_t>(column / 16 * 8 + column % 8) * kOdd;
    const uint32_t bits = (x ^ (x >> 15)) * kFactor;
    return column % 16 < 8 ? Random{bits & 0xFFFFu, bits >> 16} : Random{bits >> 16, bits & 0xFFFFu};
}

// bf16 to one of the two neighbours, the nearer one more often: `random` is uniform over 16 bits.
// It is left in the upper half of the result.
inline uint32_t stochastic(float value, uint32_t random) { return bits_of(value) + random; }

}  // namespace

extern "C" {

// Of the passes that read or write parameters. The layouts of the three structs are repeated in native.py.
struct Table {
    int64_t width;
    void* high;           // uint16 bf16 plane, or float master where `low` is null
    uint16_t* low;        // null: `high` holds whole fp32 masters
    // Moments are two tables of float; or, where `moments_bf16`, one of pairs in 32 bits, `exp_avg` in the upper half,
    // so that neither widening nor narrowing costs an instruction; `exp_avg_sq` is not looked at then.
    void* exp_avg;
    void* exp_avg_sq;
    int32_t* step;  // [rows] how many steps a row has behind it
    int32_t moments_bf16;
    int32_t threads;
};

// How idle rows move on, `stride` floats for each distinct idle time:
//   decay, beta1 product, beta2 product, then `terms` pairs (a, b):  w = decay w - m Σ a / (√v b + eps)
struct Coast {
    const int32_t* of_row;     // null: rows have no idle time
    const float* coefficients;
    int64_t terms;
};

// A step; the bias corrections of a row follow from its own number of the step: `now`, or one more than `step` says.
struct Adam {
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay;
    int32_t now;  // 0: rows count their own
    double lr, precise_beta1, precise_beta2;
    uint64_t seed;  // for bf16 moments
};
}

namespace {

using Pair = uint32_t;  // of bf16 moments
constexpr Pair kUpper = 0xFFFF0000u;

template <bool kPlanes>
inline float load_master(const Table& t, int64_t i) {
    if constexpr (kPlanes) {
        return join(static_cast<const uint16_t*>(t.high)[i], t.low[i]);
    } else {
        return static_cast<const float*>(t.high)[i];
    }
}

// Where the columns lie that a thread will work on a little later: so many elements behind those at hand, in the table
// and in the gradients. That is in the same row up to column `turn`, and in another from there on.
struct Ahead {
    int64_t turn, table, grad, next_table, next_grad;
};

}  // namespace
