// Passes over scattered rows of host tables: AdamW, gather, accumulate, squared norm.
//
// A row is visited once, and every pass is limited by memory. Rows are independent, so results do not depend on the
// number of threads. Each arithmetic operation is rounded on its own (the build forbids contraction), so that the
// PyTorch path in kernels/rows.py gives the same bits. Plain C symbols over raw pointers: Python calls them through
// ctypes, which releases the GIL, and the files compile in seconds because they include nothing of torch.

#include "row_table.h"
#include "squared_norm.h"

#include <algorithm>
#include <cmath>

#if defined(__AVX2__)
#include "adam_avx2.h"
#endif

namespace {

// Idle rows are brought to date in chunks that stay in the first-level cache, so that each loop is a short one that
// compilers vectorise whole.
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

// Whether masters are still finite in the precision of the compute copy; what to do with the few columns where a loop
// has found that they may not be. Rounding can carry a NaN over into a zero of the other sign: its planes still join to
// it, so it is found here and mended.
template <bool kPlanes>
bool inspect(const Table& t, int64_t at, int64_t count) {
    bool finite = true;
    for (int64_t i = at; i < at + count; ++i) {
        const uint32_t bits = bits_of(load_master<kPlanes>(t, i));
        finite &= (bits & kMagnitude) < (kPlanes ? kTooLarge : kInfinity);
        if constexpr (kPlanes) {
            if ((bits & kMagnitude) <= kInfinity) continue;
            static_cast<uint16_t*>(t.high)[i] = static_cast<uint16_t>((bits >> 16) | 0x0040u), t.low[i] = 0;
        }
    }
    return finite;
}

// What bias correction makes of a step. Rows that are touched together have mostly been touched equally often, so a
// thread remembers what it has worked out.
struct Correction {
    int32_t t;  // a step is at least 1
    float step_size, inverse_root;
};

class Corrections {
  public:
    const Correction& at(const Adam& a, int32_t t) {
        Correction& known = known_[static_cast<uint32_t>(t) % kKnown];
        if (known.t != t) {
            // In double: 1 - beta2^t is 1e-3 at the first step, where a float would lose four digits.
            const double power = static_cast<double>(t);
            known = {t, static_cast<float>(a.lr / (1.0 - std::pow(a.precise_beta1, power))),
                     static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(a.precise_beta2, power)))};
        }
        return known;
    }

  private:
    static constexpr int kKnown = 128;
    Correction known_[kKnown] = {};
};

// A hash of seed, row and step (the finaliser of SplitMix64, S. Vigna, public domain).
inline uint32_t random_key(uint64_t seed, int64_t row, int32_t t) {
    uint64_t x = (static_cast<uint64_t>(row) << 32) + static_cast<uint64_t>(t) + seed;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>(x >> 32);
}

// What a thread that works on row `j` of the call will work on a little later: far enough away for memory to answer in
// time, near enough for the first-level cache to keep it until then. (Non-temporal stores have nothing to spare: every
// line that is written has been read.)
Ahead look_ahead(const Table& t, int64_t n, const int64_t* rows, int64_t j) {
    constexpr int64_t kColumns = 512;
    const int64_t further = std::max<int64_t>(1, kColumns / std::max<int64_t>(1, t.width));
    const int64_t next = std::min(j + further, n - 1);
    const int64_t turn = std::max<int64_t>(0, t.width - kColumns), back = turn ? kColumns - t.width : 0;
    return {turn, kColumns, kColumns, (rows[next] - rows[j]) * t.width + back, (next - j) * t.width + back};
}

// AdamW over `count` columns of row `j` of the call. Returns whether they are still finite.
template <bool kPlanes, typename Moment, bool kCoast>
inline bool adam_part(const Table& t, const Adam& a, const Coast& coast, const Correction& correction, uint32_t key,
                      int64_t j, int64_t row, int64_t column, int count, const float* __restrict grad,
                      [[maybe_unused]] const Ahead& ahead) {
    using Master = std::conditional_t<kPlanes, uint16_t, float>;
    const int64_t at = row * t.width + column;
    float w_idle[kChunk], m_idle[kChunk], v_idle[kChunk];
    if constexpr (kCoast) {
        load_chunk<kPlanes, Moment>(t, at, count, w_idle, m_idle, v_idle);
        const float* c = coast.coefficients + coast.of_row[j] * (3 + 2 * coast.terms);
        coast_chunk(c, coast.terms, a.eps, count, w_idle, m_idle, v_idle);
    }
    Master* __restrict master = static_cast<Master*>(t.high) + at;
    uint16_t* __restrict low = t.low + at;
    Moment* __restrict exp_avg = static_cast<Moment*>(t.exp_avg) + at;
    float* __restrict exp_avg_sq = static_cast<float*>(t.exp_avg_sq) + at;
    const float step_size = correction.step_size, inverse_root = correction.inverse_root;
    const float grad_scale = a.grad_scale, beta1 = a.beta1, rest1 = a.one_minus_beta1, beta2 = a.beta2;
    const float rest2 = a.one_minus_beta2, eps = a.eps, decay = a.decay;
    uint32_t largest = 0;  // upper half of a master, without its sign
    int i = 0;
#if defined(__AVX2__)
    if constexpr (!kCoast) {
        const Scalars s{grad_scale, beta1, rest1, beta2, rest2, eps, decay, step_size, inverse_root, key};
        const Row<Master, Moment> whole{count, master, low, exp_avg, exp_avg_sq, grad};
        i = adam_avx2(s, whole, ahead, largest);
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
        largest = std::max(largest, (bits & kMagnitude) >> 16);
        if constexpr (kPlanes) {
            master[i] = high_plane(bits);
            low[i] = static_cast<uint16_t>(bits);
        } else {
            master[i] = w;
        }
        if constexpr (std::is_same_v<Moment, float>) {
            exp_avg[i] = m, exp_avg_sq[i] = v;
        } else {
            const Random random = random_bits(key, column + i);
            exp_avg[i] = (stochastic(m, random.exp_avg) & kUpper) | (stochastic(v, random.exp_avg_sq) >> 16);
        }
    }
    return largest < kTooLarge >> 16 || inspect<kPlanes>(t, at, count);
}

template <bool kPlanes, typename Moment, bool kCoast>
int64_t adam_rows(const Table& t, const Adam& a, const Coast& coast, int64_t n, const int64_t* rows,
                  const float* grad) {
    const int64_t part = kCoast ? kChunk : std::max<int64_t>(1, t.width);
    // A thread takes several rows at a time, because it fetches the next of them early.
    const int64_t taken = std::clamp<int64_t>(n / (16 * t.threads), 1, 16);
    int64_t infinite = 0;
#pragma omp parallel num_threads(t.threads)
    {
        Corrections corrections;
#pragma omp for schedule(dynamic, taken) reduction(+ : infinite)
        for (int64_t j = 0; j < n; ++j) {
            bool finite = true;
            const int64_t row = rows[j];
            const int32_t now = a.now ? a.now : t.step[row] + 1;
            const Correction correction = corrections.at(a, now);
            const uint32_t key = std::is_same_v<Moment, Pair> ? random_key(a.seed, row, now) : 0u;
            const Ahead ahead = look_ahead(t, n, rows, j);
            for (int64_t column = 0; column < t.width; column += part) {
                const int count = static_cast<int>(std::min(t.width - column, part));
                const float* g = grad + j * t.width + column;
                finite &= adam_part<kPlanes, Moment, kCoast>(t, a, coast, correction, key, j, row, column, count, g,
                                                             ahead);
            }
            t.step[row] = now;
            infinite += !finite;
        }
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
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < n; ++j) out[j] = squared_norm(x + j * width, width);
}
}
