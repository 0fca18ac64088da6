// AdamW over the columns of a row, 16 at a time, for processors with AVX2. Gives the bits of the plain loop in
// rows.cpp, which compilers vectorise too, but into chains of dependent operations that take twice the time.

#pragma once

#include <immintrin.h>

#include <algorithm>

#include "row_table.h"

// Lambdas that are called twice would otherwise stay functions that reach their variables through memory; and GCC takes
// one that does nothing but fetch for one without effect, and leaves its calls out.
#define MEFT_INLINE __attribute__((always_inline))

namespace {

// What the columns of a row have in common.
struct Scalars {
    float grad_scale, beta1, rest1, beta2, rest2, eps, decay, step_size, inverse_root;
    uint32_t key;
};

// A row; Master is uint16_t for planes, float for whole masters.
template <typename Master, typename Moment>
struct Row {
    int count;
    Master* master;
    uint16_t* low;
    Moment* exp_avg;
    float* exp_avg_sq;
    const float* grad;
};

// Does the first `count & ~15` columns; raises `largest` to at least the largest upper half of a master, sign removed.
//
// The divider is slow, and a step's root, quotient and difference wait for each other. So 16 columns begin while the 16
// before them are divided and finished: then a processor finds something else to do within the few dozen instructions
// that it looks ahead. Later columns are fetched by hand, because rows are too short for the hardware to notice where
// they go on, and the next row lies anywhere.
template <typename Master, typename Moment>
int adam_avx2(const Scalars& s, const Row<Master, Moment>& row, const Ahead& ahead, uint32_t& largest) {
    constexpr bool kPlanes = std::is_same_v<Master, uint16_t>, kPairs = std::is_same_v<Moment, Pair>;
    const int whole = row.count & ~15;
    if (!whole) return 0;
    Master* __restrict master = row.master;
    uint16_t* __restrict low = row.low;
    Moment* __restrict exp_avg = row.exp_avg;
    float* __restrict exp_avg_sq = row.exp_avg_sq;
    const float* __restrict grad = row.grad;

    const auto all = [](float x) { return _mm256_set1_ps(x); };
    const auto constant = [](uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); };
    const auto as_float = [](__m256i x) { return _mm256_castsi256_ps(x); };
    const auto as_bits = [](__m256 x) { return _mm256_castps_si256(x); };
    const auto load = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
    const auto store = [](void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); };
    const __m256 grad_scale = all(s.grad_scale), beta1 = all(s.beta1), rest1 = all(s.rest1), beta2 = all(s.beta2);
    const __m256 rest2 = all(s.rest2), eps = all(s.eps), decay = all(s.decay), step_size = all(s.step_size);
    const __m256 inverse_root = all(s.inverse_root);
    const __m256i lower_half = constant(0xFFFF), upper_half = constant(kUpper), zero = _mm256_setzero_si256();
    const __m256i lanes = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), constant(kOdd));
    __m256i counter = _mm256_add_epi32(constant(s.key), lanes), most = zero;

    const auto fetch = [&](int64_t table, int64_t gradient) MEFT_INLINE {
        __builtin_prefetch(exp_avg + table);
        if constexpr (!kPairs) __builtin_prefetch(exp_avg_sq + table);
        __builtin_prefetch(grad + gradient);
        __builtin_prefetch(master + table);
        if constexpr (kPlanes) __builtin_prefetch(low + table);
    };

    __m256 root[2], moved[2];  // √v and step size · m of columns that have begun; then `moved` is their quotient
    const auto begin = [&](int i) MEFT_INLINE {
        __m256 g[2], m[2], v[2];
        for (int k = 0; k < 2; ++k) {
            const int at = i + 8 * k;
            if constexpr (kPairs) {
                const __m256i pair = load(exp_avg + at);
                m[k] = as_float(_mm256_and_si256(pair, upper_half)), v[k] = as_float(_mm256_slli_epi32(pair, 16));
            } else {
                m[k] = _mm256_loadu_ps(exp_avg + at), v[k] = _mm256_loadu_ps(exp_avg_sq + at);
            }
            g[k] = _mm256_mul_ps(_mm256_loadu_ps(grad + at), grad_scale);
        }
        for (int k = 0; k < 2; ++k) {
            const __m256 added = _mm256_mul_ps(_mm256_mul_ps(g[k], g[k]), rest2);
            v[k] = _mm256_add_ps(_mm256_mul_ps(v[k], beta2), added);
        }
        for (int k = 0; k < 2; ++k) root[k] = _mm256_sqrt_ps(v[k]);
        for (int k = 0; k < 2; ++k) m[k] = _mm256_add_ps(_mm256_mul_ps(m[k], beta1), _mm256_mul_ps(g[k], rest1));
        for (int k = 0; k < 2; ++k) moved[k] = _mm256_mul_ps(m[k], step_size);
        if constexpr (kPairs) {
            const __m256i mixed = _mm256_xor_si256(counter, _mm256_srli_epi32(counter, 15));
            const __m256i bits = _mm256_mullo_epi32(mixed, constant(kFactor));
            const __m256i random[2] = {_mm256_and_si256(bits, lower_half), _mm256_srli_epi32(bits, 16)};
            counter = _mm256_add_epi32(counter, constant(8 * kOdd));
            for (int k = 0; k < 2; ++k) {
                const __m256i m_up = _mm256_add_epi32(as_bits(m[k]), random[k]);
                const __m256i v_up = _mm256_add_epi32(as_bits(v[k]), random[1 - k]);
                store(exp_avg + i + 8 * k, _mm256_blend_epi16(_mm256_srli_epi32(v_up, 16), m_up, 0xAA));
            }
        } else {
            for (int k = 0; k < 2; ++k) _mm256_storeu_ps(exp_avg + i + 8 * k, m[k]);
            for (int k = 0; k < 2; ++k) _mm256_storeu_ps(exp_avg_sq + i + 8 * k, v[k]);
        }
    };

    const auto divide = [&]() MEFT_INLINE {
        for (auto& x : root) x = _mm256_add_ps(_mm256_mul_ps(x, inverse_root), eps);
        for (int k = 0; k < 2; ++k) moved[k] = _mm256_div_ps(moved[k], root[k]);
    };

    const auto finish = [&](int i, __m256 move0, __m256 move1) MEFT_INLINE {
        if constexpr (kPlanes) {
            // In words of 16 bits, all 16 columns at once: joining is an interleaving, after the upper words have been
            // lowered by one where the lower ones are negative; splitting is a packing, and then a raising by one.
            // Interleaving takes the columns in the order 0-3, 8-11 and 4-7, 12-15; packing undoes that.
            const __m256i lower = load(low + i);
            const __m256i upper = _mm256_add_epi16(load(master + i), _mm256_srai_epi16(lower, 15));
            __m256 w0 = _mm256_mul_ps(as_float(_mm256_unpacklo_epi16(lower, upper)), decay);
            __m256 w1 = _mm256_mul_ps(as_float(_mm256_unpackhi_epi16(lower, upper)), decay);
            w0 = _mm256_sub_ps(w0, _mm256_permute2f128_ps(move0, move1, 0x20));
            w1 = _mm256_sub_ps(w1, _mm256_permute2f128_ps(move0, move1, 0x31));
            const __m256i rest = _mm256_packus_epi32(_mm256_blend_epi16(as_bits(w0), zero, 0xAA),
                                                     _mm256_blend_epi16(as_bits(w1), zero, 0xAA));
            const __m256i cut =
                _mm256_packus_epi32(_mm256_srli_epi32(as_bits(w0), 16), _mm256_srli_epi32(as_bits(w1), 16));
            most = _mm256_max_epu16(most, _mm256_and_si256(cut, _mm256_set1_epi16(0x7FFF)));
            store(master + i, _mm256_sub_epi16(cut, _mm256_srai_epi16(rest, 15)));
            store(low + i, rest);
        } else {
            const __m256 w0 = _mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(master + i), decay), move0);
            const __m256 w1 = _mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(master + i + 8), decay), move1);
            const __m256i larger = _mm256_max_epu32(_mm256_and_si256(as_bits(w0), constant(kMagnitude)),
                                                    _mm256_and_si256(as_bits(w1), constant(kMagnitude)));
            most = _mm256_max_epu32(most, larger);
            _mm256_storeu_ps(master + i, w0), _mm256_storeu_ps(master + i + 8, w1);
        }
    };

    begin(0);
    int i = 16;
    const auto until = [&](int64_t end, int64_t table, int64_t gradient) MEFT_INLINE {
        for (; i < end; i += 16) {
            fetch(i - 16 + table, i - 16 + gradient), divide();
            const __m256 move0 = moved[0], move1 = moved[1];
            begin(i), finish(i - 16, move0, move1);
        }
    };
    until(std::min<int64_t>(ahead.turn, whole), ahead.table, ahead.grad);
    until(whole, ahead.next_table, ahead.next_grad);
    fetch(whole - 16 + ahead.next_table, whole - 16 + ahead.next_grad);
    divide(), finish(whole - 16, moved[0], moved[1]);
    if constexpr (!kPlanes) most = _mm256_srli_epi32(most, 16);
    uint16_t each[16];
    store(each, most);
    for (uint32_t one : each) largest = std::max(largest, one);
    return whole;
}

}  // namespace

#undef MEFT_INLINE
