// What tokens do with rows: score those of their experts, keep the largest, combine them; and the way back.
//
// kernels/sparse.py says what each pass computes. Rows are read where they lie, bf16 or fp32, and never copied to fp32 as
// a whole; arithmetic is in fp32. A sum has one order, whatever the number of threads, but not PyTorch's. Plain C symbols
// over raw pointers, as in rows.cpp.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "squared_norm.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

// Vectors of the compiler's own, which it maps to whatever the machine has.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// a · b + c, in one rounding where the machine has it.
inline Vector fused(const Vector& a, const Vector& b, const Vector& c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Vector load(const uint16_t* from) {  // bf16
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Vector v;
    std::memcpy(&v, &words, sizeof v);
    return v;
}

inline void store(float* to, const Vector& v) { std::memcpy(to, &v, sizeof v); }

// Copies what will not be read soon, so that no memory is read in order to be overwritten.
inline void copy_past_caches(const float* from, int64_t count, float* to) {
    int64_t i = 0;
#if defined(__SSE__)
    constexpr int kStored = 4;
    if (reinterpret_cast<uintptr_t>(to) % (kStored * sizeof(float)) == 0) {
        for (; i + kStored <= count; i += kStored) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
    }
#endif
    std::copy(from + i, from + count, to + i);
}

// Such copies of this thread are seen by others from here on.
inline void publish_copies() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

inline float scalar(float x) { return x; }
inline float scalar(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The sum of a vector's lanes, by halves.
inline float sum(const Vector& v) {
    typedef float Quarter __attribute__((vector_size(16)));
    Quarter parts[kLanes / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int stride = kLanes / 8; stride; stride /= 2) {
        for (int i = 0; i < stride; ++i) parts[i] += parts[i + stride];
    }
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

template <typename Row>
inline float dot(const float* x, const Row* row, int64_t width) {
    Vector a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
        a = fused(load(x + i), load(row + i), a);
        b = fused(load(x + i + kLanes), load(row + i + kLanes), b);
        c = fused(load(x + i + 2 * kLanes), load(row + i + 2 * kLanes), c);
        d = fused(load(x + i + 3 * kLanes), load(row + i + 3 * kLanes), d);
    }
    for (; i + kLanes <= width; i += kLanes) a = fused(load(x + i), load(row + i), a);
    float total = sum((a + b) + (c + d));
    for (; i < width; ++i) total += x[i] * scalar(row[i]);
    return total;
}

// Numbers in a line of memory, of which a processor fetches one at a time.
template <typename Row>
constexpr int64_t kLine = 64 / sizeof(Row);

template <typename Row>
inline void prefetch(const Row* row, int64_t width) {
    for (int64_t i = 0; i < width; i += kLine<Row>) __builtin_prefetch(row + i);
}

// out [width] += Σ weights[k] · rows[k], or without what was there if it is the `first`. Meanwhile the `next` rows are
// fetched, which lie anywhere, so that the hardware cannot know of them.
template <int kRows, typename Row>
inline void add_rows(const float* weights, const Row* const* rows, const Row* const* next, int more, int64_t width,
                     bool first, float* out) {
    Vector weight[kRows];
    for (int k = 0; k < kRows; ++k) weight[k] = Vector{} + weights[k];
    int64_t i = 0;
    for (; i + kLine<Row> <= width; i += kLine<Row>) {
        for (int k = 0; k < more; ++k) __builtin_prefetch(next[k] + i);
        for (int64_t j = i; j < i + kLine<Row>; j += kLanes) {
            Vector total = first ? Vector{} : load(out + j);
            for (int k = 0; k < kRows; ++k) total = fused(weight[k], load(rows[k] + j), total);
            store(out + j, total);
        }
    }
    for (; i < width; ++i) {
        float total = first ? 0.0f : out[i];
        for (int k = 0; k < kRows; ++k) total += weights[k] * scalar(rows[k][i]);
        out[i] = total;
    }
}

// out [width] = Σ weights[k] · table[ids[k]] over k < count, in their order.
template <typename Row>
inline void combine(int count, const float* weights, const int64_t* ids, const Row* table, int64_t width, float* out) {
    constexpr int kTogether = 4;
    const Row *rows[kTogether], *next[kTogether] = {};
    for (int k = 0; k < std::min(count, kTogether); ++k) next[k] = table + ids[k] * width;
    if (!count) std::fill(out, out + width, 0.0f);
    for (int done = 0; done < count; done += kTogether) {
        const int here = std::min(kTogether, count - done), more = std::clamp(count - done - kTogether, 0, kTogether);
        std::copy(next, next + kTogether, rows);
        for (int k = 0; k < more; ++k) next[k] = table + ids[done + kTogether + k] * width;
        switch (here) {
            case 4: add_rows<4>(weights + done, rows, next, more, width, !done, out); break;
            case 3: add_rows<3>(weights + done, rows, next, more, width, !done, out); break;
            case 2: add_rows<2>(weights + done, rows, next, more, width, !done, out); break;
            default: add_rows<1>(weights + done, rows, next, more, width, !done, out);
        }
    }
}

// The sums of the lanes of four vectors.
inline void sums(const Vector& a, const Vector& b, const Vector& c, const Vector& d, float* out) {
#if defined(__AVX__)
    const auto folded = [](const Vector& v) {
#if defined(__AVX512F__)
        return _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#else
        return (__m256)v;
#endif
    };
    const __m256 parts = _mm256_hadd_ps(_mm256_hadd_ps(folded(a), folded(b)), _mm256_hadd_ps(folded(c), folded(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1)));
#else
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// A vector that is used several times, in a register; compilers prefer to load it anew for each use.
inline Vector kept(Vector v) {
#if defined(__AVX__)
    asm("" : "+x"(v));
#endif
    return v;
}

// Scores of kTokens inputs against kKeys keys (fp32), which share what they load.
template <int kKeys, int kTokens>
inline void tile(const float* keys, const float* const* x, int64_t width, float* const* out) {
    Vector total[kKeys][kTokens] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        Vector of_token[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) of_token[t] = kept(load(x[t] + i));
#pragma GCC unroll 4
        for (int k = 0; k < kKeys; ++k) {
            const Vector key = kept(load(keys + k * width + i));
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) total[k][t] = fused(key, of_token[t], total[k][t]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
        if constexpr (kKeys == 4) {
            sums(total[0][t], total[1][t], total[2][t], total[3][t], out[t]);
        } else {
            for (int k = 0; k < kKeys; ++k) out[t][k] = sum(total[k][t]);
        }
    }
    for (; i < width; ++i) {
        for (int t = 0; t < kTokens; ++t) {
            for (int k = 0; k < kKeys; ++k) out[t][k] += keys[k * width + i] * x[t][i];
        }
    }
}

template <int kKeys>
void tiles(const float* keys, const float* const* x, int64_t tokens, int64_t width, float* const* out) {
    int64_t t = 0;
    for (; t + 3 <= tokens; t += 3) tile<kKeys, 3>(keys, x + t, width, out + t);
    if (tokens - t == 2) tile<kKeys, 2>(keys, x + t, width, out + t);
    if (tokens - t == 1) tile<kKeys, 1>(keys, x + t, width, out + t);
}

// Inputs of a task, and those that stay in the first-level cache while some keys in the second-level cache pass by.
constexpr int64_t kTokensOfTask = 48, kTokensTogether = 6, kKeysTogether = 64;

struct Task {
    int64_t expert, first, last;  // places in the list of pairs
};

// Scores of inputs x against `keys` (fp32): the j-th of them goes to out[t][j].
void score_keys(int64_t keys, const float* rows, const float* const* x, int64_t tokens, int64_t width,
                float* const* out) {
    constexpr int kKeys = 4;
    float* here[kTokensTogether];
    for (int64_t t = 0; t < tokens; t += kTokensTogether) {
        const int64_t some = std::min(kTokensTogether, tokens - t);
        std::copy(out + t, out + t + some, here);
        for (int64_t k = 0; k < keys; k += kKeys, rows += kKeys * width) {
            switch (std::min<int64_t>(kKeys, keys - k)) {
                case 4: tiles<4>(rows, x + t, some, width, here); break;
                case 3: tiles<3>(rows, x + t, some, width, here); break;
                case 2: tiles<2>(rows, x + t, some, width, here); break;
                default: tiles<1>(rows, x + t, some, width, here);
            }
            for (int64_t i = 0; i < some; ++i) here[i] += kKeys;
        }
        rows -= (keys + kKeys - 1) / kKeys * kKeys * width;
    }
}

template <typename Row>
void score_experts(int64_t tokens, int64_t per_token, int64_t width, int64_t num_experts, int64_t expert_rows,
                   const float* x, const Row* keys, const int64_t* experts, float* out, int threads) {
    const int64_t pairs = tokens * per_token;
    std::vector<int64_t> ends(num_experts + 1, 0), order(pairs);
    for (int64_t p = 0; p < pairs; ++p) ++ends[experts[p] + 1];
    std::vector<Task> tasks;
    for (int64_t e = 0; e < num_experts; ++e) {
        for (int64_t p = 0; p < ends[e + 1]; p += kTokensOfTask) {
            tasks.push_back({e, ends[e] + p, ends[e] + std::min(p + kTokensOfTask, ends[e + 1])});
        }
        ends[e + 1] += ends[e];
    }
    for (int64_t p = 0; p < pairs; ++p) order[ends[experts[p]]++] = p;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(sizeof(Row) == sizeof(float) ? 0 : kKeysTogether * width);
        const float* inputs[kTokensOfTask];
        float* outputs[kTokensOfTask];
#pragma omp for schedule(dynamic)
        for (size_t number = 0; number < tasks.size(); ++number) {
            const Task& task = tasks[number];
            const int64_t count = task.last - task.first;
            for (int64_t i = 0; i < count; ++i) inputs[i] = x + order[task.first + i] / per_token * width;
            for (int64_t k = 0; k < expert_rows; k += kKeysTogether) {
                const int64_t here = std::min(kKeysTogether, expert_rows - k);
                const Row* rows = keys + (task.expert * expert_rows + k) * width;
                for (int64_t i = 0; i < count; ++i) outputs[i] = out + order[task.first + i] * expert_rows + k;
                if constexpr (sizeof(Row) == sizeof(float)) {
                    score_keys(here, rows, inputs, count, width, outputs);
                } else {
                    int64_t i = 0;
                    for (; i + kLanes <= here * width; i += kLanes) store(wide.data() + i, load(rows + i));
                    for (; i < here * width; ++i) wide[i] = scalar(rows[i]);
                    score_keys(here, wide.data(), inputs, count, width, outputs);
                }
            }
        }
    }
}

// An integer of the same order as the score; NaN is the least of all, and both zeros are equal.
inline int32_t rank_of(float score) {
    if (score != score) return std::numeric_limits<int32_t>::min();
    int32_t bits;
    score += 0.0f;  // -0 becomes 0
    std::memcpy(&bits, &score, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The places of the k largest of `ranks` [count], ascending; ties go to the first. `scratch` [count].
inline void largest(const int32_t* ranks, int64_t count, int64_t k, int32_t* scratch, int64_t* places) {
    if (k >= count) {
        for (int64_t i = 0; i < count; ++i) places[i] = i;
        return;
    }
    std::memcpy(scratch, ranks, count * sizeof(int32_t));
    std::nth_element(scratch, scratch + k - 1, scratch + count, std::greater<int32_t>());
    const int32_t least = scratch[k - 1];
    int64_t equal = k - std::count_if(scratch, scratch + k - 1, [=](int32_t rank) { return rank > least; });
    for (int64_t i = 0, found = 0; found < k; ++i) {
        if (ranks[i] > least || (ranks[i] == least && equal-- > 0)) places[found++] = i;
    }
}

// Row by row, so that each value is read once; what tokens have is small enough to stay in caches.
template <typename Value>
void row_gradients(int64_t rows, int64_t top_k, int64_t per_token, int64_t width, const int64_t* ends,
                   const int64_t* picks, const int64_t* ids, const Value* values, const float* grad_y, const float* x,
                   const float* scores, const float* gates, const int64_t* slots, float* grad_z, float* grad_scores,
                   float* grad_values, double* value_norms, float* grad_keys, double* key_norms, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> activations, of_scores, total(width);
        std::vector<int64_t> tokens;
        const auto finish = [&](const std::vector<float>& weights, const float* lines, int64_t row, float* out,
                                double* norms) {
            combine(static_cast<int>(weights.size()), weights.data(), tokens.data(), lines, width, total.data());
            norms[row] = squared_norm(total.data(), width);
            copy_past_caches(total.data(), width, out + row * width);
        };
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            if (row + 1 < rows) prefetch(values + ids[row + 1] * width, width);
            activations.clear(), of_scores.clear(), tokens.clear();
            for (int64_t i = row ? ends[row - 1] : 0; i < ends[row]; ++i) {
                const int64_t p = picks[i], token = p / top_k;
                const float gate = gates[token * per_token + slots[p]];
                grad_z[p] = dot(grad_y + token * width, values + ids[row] * width, width);
                grad_scores[p] = grad_z[p] * gate;
                activations.push_back(scores[p] * gate), of_scores.push_back(grad_scores[p]), tokens.push_back(token);
            }
            finish(activations, grad_y, row, grad_values, value_norms);
            finish(of_scores, x, row, grad_keys, key_norms);
        }
        publish_copies();
    }
}

}  // namespace

extern "C" {

// out [tokens, per_token, expert_rows]: x · key of the rows of each token's experts.
void meft_score_experts(int64_t tokens, int64_t per_token, int64_t width, int64_t num_experts, int64_t expert_rows,
                        const float* x, const void* keys, int32_t bf16, const int64_t* experts, float* out,
                        int32_t threads) {
    const auto run = [&](auto row) {
        using Row = decltype(row);
        score_experts(tokens, per_token, width, num_experts, expert_rows, x, static_cast<const Row*>(keys), experts, out,
                      threads);
    };
    bf16 ? run(uint16_t{}) : run(float{});
}

// places [lines, k], ascending: those of the k largest of each line of scores [lines, count]; NaN last, ties to the first.
void meft_largest(int64_t lines, int64_t count, int64_t k, const float* scores, int64_t* places, int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> ranks(count), scratch(count);
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; ++line) {
            for (int64_t i = 0; i < count; ++i) ranks[i] = rank_of(scores[line * count + i]);
            largest(ranks.data(), count, k, scratch.data(), places + line * k);
        }
    }
}

// The k largest positive activations gates · scores [tokens, per_token, expert_rows] of each token, in the order of their
// rows, and 0 behind them: row_ids, slots, valid and the raw scores, each [tokens, k]. An expert that is not `usable`
// [tokens, per_token] gives none.
void meft_select(int64_t tokens, int64_t per_token, int64_t expert_rows, int64_t k, const float* scores,
                 const float* gates, const uint8_t* usable, const int64_t* experts, int64_t* row_ids, int64_t* slots,
                 uint8_t* valid, float* raw, float* activations, int32_t threads) {
    const int64_t count = per_token * expert_rows;
#pragma omp parallel num_threads(threads)
    {
        // Candidates with a positive activation, whose bits are in the order of their values.
        std::vector<int32_t> ranks(count), scratch(count);
        std::vector<int64_t> candidates(count), places(k);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            int64_t positive = 0;
            for (int64_t s = 0; s < per_token; ++s) {
                if (!usable[t * per_token + s]) continue;
                const float gate = gates[t * per_token + s];
                const float* of_expert = scores + t * count + s * expert_rows;
                for (int64_t j = 0; j < expert_rows; ++j) {
                    const float z = gate * of_expert[j];
                    std::memcpy(&ranks[positive], &z, sizeof z);
                    candidates[positive] = s * expert_rows + j;
                    positive += z > 0.0f;
                }
            }
            const int64_t found = std::min(positive, k);
            largest(ranks.data(), positive, found, scratch.data(), places.data());
            for (int64_t i = 0; i < k; ++i) {
                const int64_t p = t * k + i;
                valid[p] = i < found;
                if (i >= found) {
                    row_ids[p] = slots[p] = 0, raw[p] = activations[p] = 0.0f;
                    continue;
                }
                const int64_t place = candidates[places[i]], slot = place / expert_rows;
                slots[p] = slot, raw[p] = scores[t * count + place];
                row_ids[p] = experts[t * per_token + slot] * expert_rows + place % expert_rows;
                std::memcpy(&activations[p], &ranks[places[i]], sizeof(float));
            }
        }
    }
}

// out [tokens, width]: each token's sum of the rows `ids` [tokens, k] of a table, by `weights`, where `valid`.
void meft_combine_rows(int64_t tokens, int64_t k, int64_t width, const float* weights, const int64_t* ids,
                       const uint8_t* valid, const void* table, int32_t bf16, float* out, int32_t threads) {
    const auto run = [&](auto row) {
        using Row = decltype(row);
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> own(k);
            std::vector<int64_t> rows(k);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; ++t) {
                int count = 0;
                for (int64_t p = t * k; p < (t + 1) * k; ++p) {
                    if (valid[p]) own[count] = weights[p], rows[count++] = ids[p];
                }
                combine(count, own.data(), rows.data(), static_cast<const Row*>(table), width, out + t * width);
            }
        }
    };
    bf16 ? run(uint16_t{}) : run(float{});
}

// out [tokens, k]: x [tokens, width] · the rows `ids` of a table, where `valid`, and 0 elsewhere.
void meft_score_picks(int64_t tokens, int64_t k, int64_t width, const float* x, const int64_t* ids, const uint8_t* valid,
                      const void* table, int32_t bf16, float* out, int32_t threads) {
    const auto run = [&](auto row) {
        using Row = decltype(row);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t p = t * k; p < (t + 1) * k; ++p) {
                const Row* of_pick = static_cast<const Row*>(table) + ids[p] * width;
                out[p] = valid[p] ? dot(x + t * width, of_pick, width) : 0.0f;
            }
        }
    };
    bf16 ? run(uint16_t{}) : run(float{});
}

// The distinct rows among `row_ids` [count] where `valid`, ascending, and each pick's place among them (0 where not).
// Returns how many there are.
int64_t meft_index_rows(int64_t count, int64_t rows, const int64_t* row_ids, const uint8_t* valid, int64_t* active,
                        int64_t* picks) {
    constexpr int kBits = 64;
    const int64_t words = (rows + kBits - 1) / kBits;
    std::vector<uint64_t> present(words, 0);
    std::vector<int64_t> before(words);
    for (int64_t p = 0; p < count; ++p) {
        if (valid[p]) present[row_ids[p] / kBits] |= uint64_t{1} << row_ids[p] % kBits;
    }
    int64_t found = 0;
    for (int64_t word = 0; word < words; ++word) {
        before[word] = found;
        for (uint64_t left = present[word]; left; left &= left - 1) {
            active[found++] = word * kBits + __builtin_ctzll(left);
        }
    }
    for (int64_t p = 0; p < count; ++p) {
        const int64_t word = row_ids[p] / kBits;
        const uint64_t below = (uint64_t{1} << row_ids[p] % kBits) - 1;
        picks[p] = valid[p] ? before[word] + __builtin_popcountll(present[word] & below) : 0;
    }
    return found;
}

// The transpose of `picks` [count], row numbers where `valid`: `ends` [rows], where each row's part of `places` ends, and
// in `places` where its picks are, ascending.
void meft_picks_of_rows(int64_t count, int64_t rows, const int64_t* picks, const uint8_t* valid, int64_t* ends,
                        int64_t* places) {
    std::fill(ends, ends + rows, 0);
    for (int64_t p = 0; p < count; ++p) {
        if (valid[p]) ++ends[picks[p]];
    }
    for (int64_t row = 0, total = 0; row < rows; ++row) {
        const int64_t own = ends[row];
        ends[row] = total, total += own;
    }
    for (int64_t p = 0; p < count; ++p) {
        if (valid[p]) places[ends[picks[p]]++] = p;
    }
}

// The way back through values and activations. Row j of the call is line ids[j] of the table of values, and its picks end
// in `picks` at ends[j]; a pick is a place in [tokens, k], where its score, slot and gradients are. Gives the gradients
// of z and of the scores [tokens, k], which are left alone where there is no pick, and those of the rows [rows, width]
// with the squares of their norms [rows].
void meft_row_gradients(int64_t rows, int64_t k, int64_t per_token, int64_t width, const int64_t* ends,
                        const int64_t* picks, const int64_t* ids, const void* values, int32_t bf16, const float* grad_y,
                        const float* x, const float* scores, const float* gates, const int64_t* slots, float* grad_z,
                        float* grad_scores, float* grad_values, double* value_norms, float* grad_keys,
                        double* key_norms, int32_t threads) {
    const auto run = [&](auto value) {
        row_gradients(rows, k, per_token, width, ends, picks, ids, static_cast<const decltype(value)*>(values), grad_y,
                      x, scores, gates, slots, grad_z, grad_scores, grad_values, value_norms, grad_keys, key_norms,
                      threads);
    };
    bf16 ? run(uint16_t{}) : run(float{});
}
}
