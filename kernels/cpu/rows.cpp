// Passes over scattered rows of host tables: AdamW, gather, accumulate, squared norm.
//
// A row is visited once, and every pass is limited by memory. Rows are independent, so results do not depend on the
// number of threads. Each arithmetic operation is rounded on its own (the build forbids contraction), so that the
// PyTorch path in kernels/rows.py gives the same bits. Plain C symbols over raw pointers: Python calls them through
// ctypes, which releases the GIL, and the file compiles in seconds because it includes nothing of torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
// of bit patterns. That difference is simply the lower half, read as signed. NaN is mended afterwards (`mend_nan`).
inline uint16_t high_plane(uint32_t bits) { return static_cast<uint16_t>((bits + 0x8000u) >> 16); }

inline float join(uint16_t high, uint16_t low) {
    const int32_t difference = static_cast<int16_t>(low);
    return float_of((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(difference));
}

// A counter hash (the finaliser of MurmurHash3, A. Appleby, public domain): 32 random bits for a row key and a column.
constexpr uint32_t kOdd = 0x9E3779B9u, kFirst = 0x85EBCA6Bu, kSecond = 0xC2B2AE35u;

inline uint32_t hash(uint32_t x) {
    x = (x ^ (x >> 16)) * kFirst;
    x = (x ^ (x >> 13)) * kSecond;
    return x ^ (x >> 16);
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

struct Adam {
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay;
    const float* step_size;          // [n] lr / (1 - beta1^t)
    const float* inverse_root;       // [n] 1 / √(1 - beta2^t)
    const uint32_t* random_key;      // [n] for bf16 moments
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

// Columns are worked on in chunks that stay in the first-level cache, so that each loop below is a short one that
// compilers vectorise whole. Software prefetch was tried at 64 to 2048 columns ahead, with every locality hint, and
// gained nothing; non-temporal stores have nothing to spare, since every line that is written has been read.
constexpr int64_t kChunk = 64;

template <bool kPlanes, typename Moment>
inline void load_chunk(const Table& t, int64_t at, int64_t count, float* w, float* m, float* v) {
    const Moment* exp_avg = static_cast<const Moment*>(t.exp_avg) + at;
    for (int64_t i = 0; i < count; ++i) w[i] = load_master<kPlanes>(t, at + i);
    if constexpr (std::is_same_v<Moment, float>) {
        std::memcpy(m, exp_avg, count * sizeof(float));
        std::memcpy(v, static_cast<const float*>(t.exp_avg_sq) + at, count * sizeof(float));
    } else {
        for (int64_t i = 0; i < count; ++i) m[i] = float_of(exp_avg[i] & kUpper);
        for (int64_t i = 0; i < count; ++i) v[i] = float_of(exp_avg[i] << 16);
    }
}

// Brings a chunk of an idle row to date, but for its gradient; `c` are the row's coefficients.
inline void coast_chunk(const float* c, int64_t terms, float eps, int64_t count, float* w, float* m, float* v) {
    float root[kChunk], sum[kChunk];
    for (int64_t i = 0; i < count; ++i) root[i] = std::sqrt(v[i]);
    for (int64_t i = 0; i < count; ++i) sum[i] = 0.0f;
    for (int64_t k = 0; k < terms; ++k) {
        const float a = c[3 + 2 * k], b = c[4 + 2 * k];
        for (int64_t i = 0; i < count; ++i) sum[i] = sum[i] + a / (root[i] * b + eps);
    }
    for (int64_t i = 0; i < count; ++i) w[i] = w[i] * c[0] - m[i] * sum[i];
    for (int64_t i = 0; i < count; ++i) m[i] = m[i] * c[1];
    for (int64_t i = 0; i < count; ++i) v[i] = v[i] * c[2];
}

// Rounding can carry a NaN over into a zero of the other sign. Its planes still join to it, so it can be found again.
inline void mend_nan(const Table& t, int64_t at, int count) {
    uint16_t* high = static_cast<uint16_t*>(t.high) + at;
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(join(high[i], t.low[at + i]));
        if ((bits & kMagnitude) > kInfinity) high[i] = static_cast<uint16_t>((bits >> 16) | 0x0040u), t.low[at + i] = 0;
    }
}

// What the chunk's loop needs of a row, in registers.
struct Scalars {
    float grad_scale, beta1, rest1, beta2, rest2, eps, decay, step_size, inverse_root;
    uint32_t key;
};

#if defined(__AVX2__)
// The same as the plain loop in adam_chunk, 16 columns at a time. Compilers vectorise that loop too, but spend twice
// the instructions on narrowing to 16 bits. Advances `i` past what it has done; returns a master's largest magnitude.
template <bool kPlanes, typename Moment>
inline uint32_t adam_avx2(const Scalars& s, int count, int& i, void* master, uint16_t* low, Moment* exp_avg,
                          float* exp_avg_sq, const float* grad) {
    constexpr bool kHalf = !std::is_same_v<Moment, float>;
    const auto all = [](float x) { return _mm256_set1_ps(x); };
    const auto constant = [](uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); };
    const auto load8 = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
    const auto upper_half = [&](const void* p) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(p)), 16); };
    const auto as_float = [](__m256i x) { return _mm256_castsi256_ps(x); };
    const auto as_bits = [](__m256 x) { return _mm256_castps_si256(x); };
    // Stores 16 words, each in the lower half of its lane.
    const auto narrow = [](void* p, __m256i x, __m256i y) {
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xD8);
        _mm256_storeu_si256(static_cast<__m256i*>(p), packed);
    };
    const __m256i lower = constant(0xFFFF), upper = constant(kUpper), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i counter = _mm256_add_epi32(constant(s.key), _mm256_mullo_epi32(lanes, constant(kOdd)));
    __m256i largest = _mm256_setzero_si256();
    for (; i + 16 <= count; i += 16) {
        __m256i bits[2];
        for (int k = 0; k < 2; ++k) {
            const int at = i + 8 * k;
            __m256 w, m, v;
            if constexpr (kPlanes) {
                const __m256i difference = _mm256_cvtepi16_epi32(load8(low + at));
                w = as_float(_mm256_add_epi32(upper_half(static_cast<uint16_t*>(master) + at), difference));
            } else {
                w = _mm256_loadu_ps(static_cast<float*>(master) + at);
            }
            if constexpr (kHalf) {
                const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(exp_avg + at));
                m = as_float(_mm256_and_si256(pair, upper)), v = as_float(_mm256_slli_epi32(pair, 16));
            } else {
                m = _mm256_loadu_ps(exp_avg + at), v = _mm256_loadu_ps(exp_avg_sq + at);
            }
            const __m256 g = _mm256_mul_ps(_mm256_loadu_ps(grad + at), all(s.grad_scale));
            m = _mm256_add_ps(_mm256_mul_ps(m, all(s.beta1)), _mm256_mul_ps(g, all(s.rest1)));
            v = _mm256_add_ps(_mm256_mul_ps(v, all(s.beta2)), _mm256_mul_ps(_mm256_mul_ps(g, g), all(s.rest2)));
            const __m256 root = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(v), all(s.inverse_root)), all(s.eps));
            const __m256 move = _mm256_div_ps(_mm256_mul_ps(m, all(s.step_size)), root);
            w = _mm256_sub_ps(_mm256_mul_ps(w, all(s.decay)), move);
            bits[k] = as_bits(w);
            largest = _mm256_max_epu32(largest, _mm256_and_si256(bits[k], constant(kMagnitude)));
            if constexpr (!kPlanes) _mm256_storeu_ps(static_cast<float*>(master) + at, w);
            if constexpr (kHalf) {
                __m256i x = counter;
                x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), constant(kFirst));
                x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 13)), constant(kSecond));
                x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
                const __m256i m_up = _mm256_add_epi32(as_bits(m), _mm256_and_si256(x, lower));
                const __m256i v_up = _mm256_add_epi32(as_bits(v), _mm256_srli_epi32(x, 16));
                const __m256i pair = _mm256_blend_epi16(_mm256_srli_epi32(v_up, 16), m_up, 0xAA);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(exp_avg + at), pair);
                counter = _mm256_add_epi32(counter, constant(8 * kOdd));
            } else {
                _mm256_storeu_ps(exp_avg + at, m), _mm256_storeu_ps(exp_avg_sq + at, v);
            }
        }
        if constexpr (kPlanes) {
            const auto round = [&](__m256i x) { return _mm256_srli_epi32(_mm256_add_epi32(x, constant(0x8000)), 16); };
            narrow(static_cast<uint16_t*>(master) + i, round(bits[0]), round(bits[1]));
            narrow(low + i, _mm256_and_si256(bits[0], lower), _mm256_and_si256(bits[1], lower));
        }
    }
    uint32_t each[8], most = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(each), largest);
    for (uint32_t one : each) most = std::max(most, one);
    return most;
}
#endif

template <bool kPlanes, typename Moment, bool kCoast>
inline bool adam_chunk(const Table& t, const Adam& a, const Coast& coast, int64_t j, int64_t row, int64_t column,
                       int count, const float* __restrict grad) {
    const int64_t at = row * t.width + column;
    float w_idle[kChunk], m_idle[kChunk], v_idle[kChunk];
    if constexpr (kCoast) {
        load_chunk<kPlanes, Moment>(t, at, count, w_idle, m_idle, v_idle);
        const float* c = coast.coefficients + coast.of_row[j] * (3 + 2 * coast.terms);
        coast_chunk(c, coast.terms, a.eps, count, w_idle, m_idle, v_idle);
    }
    using Master = std::conditional_t<kPlanes, uint16_t, float>;
    Master* __restrict master = static_cast<Master*>(t.high) + at;
    uint16_t* __restrict low = t.low + at;
    Moment* __restrict exp_avg = static_cast<Moment*>(t.exp_avg) + at;
    float* __restrict exp_avg_sq = static_cast<float*>(t.exp_avg_sq) + at;
    const float step_size = a.step_size[j], inverse_root = a.inverse_root[j];
    const uint32_t key = (std::is_same_v<Moment, float> ? 0u : a.random_key[j]) + static_cast<uint32_t>(column) * kOdd;
    const float grad_scale = a.grad_scale, beta1 = a.beta1, rest1 = a.one_minus_beta1, beta2 = a.beta2;
    const float rest2 = a.one_minus_beta2, eps = a.eps, decay = a.decay;
    uint32_t largest = 0;
    int i = 0;
#if defined(__AVX2__)
    if constexpr (!kCoast) {
        const Scalars s{grad_scale, beta1, rest1, beta2, rest2, eps, decay, step_size, inverse_root, key};
        largest = adam_avx2<kPlanes, Moment>(s, count, i, master, low, exp_avg, exp_avg_sq, grad);
    }
#endif
    for (; i < count; ++i) {
        float w, m, v;
        if constexpr (kCoast) {
            w = w_idle[i], m = m_idle[i], v = v_idle[i];
        } else {
            w = load_master<kPlanes>(t, at + i);
            if constexpr (std::is_same_v<Moment, float>) {
                m = exp_avg[i], v = exp_avg_sq[i];
            } else {
                m = float_of(exp_avg[i] & kUpper), v = float_of(exp_avg[i] << 16);
            }
        }
        const float g = grad[i] * grad_scale;
        m = m * beta1 + g * rest1;
        v = v * beta2 + (g * g) * rest2;
        w = w * decay - (m * step_size) / (std::sqrt(v) * inverse_root + eps);
        const uint32_t bits = bits_of(w);
        largest = std::max(largest, bits & kMagnitude);
        if constexpr (kPlanes) {
            master[i] = high_plane(bits);
            low[i] = static_cast<uint16_t>(bits);
        } else {
            master[i] = w;
        }
        if constexpr (std::is_same_v<Moment, float>) {
            exp_avg[i] = m, exp_avg_sq[i] = v;
        } else {
            const uint32_t random = hash(key + static_cast<uint32_t>(i) * kOdd);
            exp_avg[i] = (stochastic(m, random & 0xFFFFu) & kUpper) | (stochastic(v, random >> 16) >> 16);
        }
    }
    if (kPlanes && largest > kInfinity) mend_nan(t, at, count);
    return largest < (kPlanes ? kTooLarge : kInfinity);
}

template <bool kPlanes, typename Moment, bool kCoast>
int64_t adam_rows(const Table& t, const Adam& a, const Coast& coast, int64_t n, const int64_t* rows,
                  const float* grad) {
    int64_t infinite = 0;
#pragma omp parallel for schedule(dynamic, 4) num_threads(t.threads) reduction(+ : infinite)
    for (int64_t j = 0; j < n; ++j) {
        bool finite = true;
        for (int64_t column = 0; column < t.width; column += kChunk) {
            const int count = static_cast<int>(std::min(t.width - column, kChunk));
            const float* g = grad + j * t.width + column;
            finite &= adam_chunk<kPlanes, Moment, kCoast>(t, a, coast, j, rows[j], column, count, g);
        }
        infinite += !finite;
    }
    return infinite;
}

template <bool kPlanes, typename Moment>
void read_coasted(const Table& t, const Coast& coast, float eps, int64_t n, const int64_t* rows, float* out) {
#pragma omp parallel for schedule(static) num_threads(t.threads)
    for (int64_t j = 0; j < n; ++j) {
        const float* c = coast.coefficients + coast.of_row[j] * (3 + 2 * coast.terms);
        for (int64_t column = 0; column < t.width; column += kChunk) {
            const int64_t count = std::min(t.width - column, kChunk);
            float w[kChunk], m[kChunk], v[kChunk];
            load_chunk<kPlanes, Moment>(t, rows[j] * t.width + column, count, w, m, v);
            coast_chunk(c, coast.terms, eps, count, w, m, v);
            std::memcpy(out + j * t.width + column, w, count * sizeof(float));
        }
    }
}

}  // namespace

extern "C" {

// What AdamW needs to know of each of `n` rows: its step after this one (`now`, or where that is 0 one more than `step`
// says), the scalars of its bias correction, and (where `random_key` is not null) a key for stochastic rounding.
void meft_row_scalars(const int32_t* step, int64_t n, const int64_t* rows, int32_t now, double lr, double beta1,
                      double beta2, uint64_t seed, int32_t* steps, float* step_size, float* inverse_root,
                      uint32_t* random_key) {
    for (int64_t j = 0; j < n; ++j) {
        const int32_t t = now ? now : step[rows[j]] + 1;
        // In double: 1 - beta2^t is 1e-3 at the first step, where a float would lose four digits.
        steps[j] = t;
        step_size[j] = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(t))));
        inverse_root[j] = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(t))));
        if (random_key) {  // the finaliser of SplitMix64 (S. Vigna, public domain)
            uint64_t x = (static_cast<uint64_t>(rows[j]) << 32) + static_cast<uint64_t>(t) + seed;
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
            x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
            random_key[j] = static_cast<uint32_t>(x >> 32);
        }
    }
}

// AdamW over `n` distinct rows with gradients [n, width]; returns how many of them are no longer finite.
int64_t meft_adam_rows(const Table* t, const Adam* a, const Coast* c, int64_t n, const int64_t* rows,
                       const float* grad) {
    const bool coast = c->of_row != nullptr;
    const auto run = [&](auto planes, auto moment) {
        using Moment = decltype(moment);
        return coast ? adam_rows<planes, Moment, true>(*t, *a, *c, n, rows, grad)
                     : adam_rows<planes, Moment, false>(*t, *a, *c, n, rows, grad);
    };
    if (t->low) return t->moments_bf16 ? run(std::true_type{}, Pair{}) : run(std::true_type{}, float{});
    return t->moments_bf16 ? run(std::false_type{}, Pair{}) : run(std::false_type{}, float{});
}

// The masters of `n` rows, brought to date but left as they are, as fp32 [n, width].
void meft_read_coasted(const Table* t, const Coast* c, float eps, int64_t n, const int64_t* rows, float* out) {
    const auto run = [&](auto planes, auto moment) {
        read_coasted<planes, decltype(moment)>(*t, *c, eps, n, rows, out);
    };
    if (t->low) return t->moments_bf16 ? run(std::true_type{}, Pair{}) : run(std::true_type{}, float{});
    return t->moments_bf16 ? run(std::false_type{}, Pair{}) : run(std::false_type{}, float{});
}

// The compute copies of `n` rows as fp32 [n, width]; `high` is a bf16 plane, or fp32 where `low` is null.
void meft_gather_rows(const Table* t, int64_t n, const int64_t* rows, float* out) {
#pragma omp parallel for schedule(static) num_threads(t->threads)
    for (int64_t j = 0; j < n; ++j) {
        float* __restrict to = out + j * t->width;
        if (!t->low) {
            std::memcpy(to, static_cast<const float*>(t->high) + rows[j] * t->width, t->width * sizeof(float));
            continue;
        }
        const uint16_t* __restrict high = static_cast<const uint16_t*>(t->high) + rows[j] * t->width;
        for (int64_t i = 0; i < t->width; ++i) to[i] = float_of(static_cast<uint32_t>(high[i]) << 16);
    }
}

// Puts row j of `grad` [n, width] into row `slots[j]` of `total`, added to it or (where `fresh[j]`) in its place.
void meft_accumulate_rows(int64_t width, int64_t n, const int64_t* slots, const uint8_t* fresh, const float* grad,
                          float* total, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < n; ++j) {
        const float* __restrict from = grad + j * width;
        float* __restrict to = total + slots[j] * width;
        if (fresh[j]) {
            std::memcpy(to, from, width * sizeof(float));
        } else {
            for (int64_t i = 0; i < width; ++i) to[i] += from[i];
        }
    }
}

// The squared norm of each row of x [n, width]; the order of summation does not depend on the number of threads.
void meft_squared_norms(int64_t width, int64_t n, const float* x, double* out, int32_t threads) {
    constexpr int kLanes = 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < n; ++j) {
        const float* __restrict row = x + j * width;
        double lanes[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            for (int k = 0; k < kLanes; ++k) lanes[k] += static_cast<double>(row[i + k]) * row[i + k];
        }
        double sum = 0.0;
        for (; i < width; ++i) sum += static_cast<double>(row[i]) * row[i];
        for (double lane : lanes) sum += lane;
        out[j] = sum;
    }
}
}
