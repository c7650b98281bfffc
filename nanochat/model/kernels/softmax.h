// The softmax of a row of scores and its gradient: every pass but the first finds the row in the
// cache.

#pragma once

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Elements i to i + 15 of a row of n; what is past its end is 0.
template <class W>
inline F16 load(const W* row, int64_t i, int64_t n) {
    if (i + LANES <= n) return load(row + i);
    W part[LANES] = {};
    std::copy(row + i, row + n, part);
    return load(part);
}

template <class W>
inline void store(W* row, int64_t i, int64_t n, F16 x) {
    if (i + LANES <= n) return store(row + i, x);
    W part[LANES];
    store(part, x);
    std::copy(part, part + (n - i), row + i);
}

// The keys that a row of scores sees: from first, before end.
struct Seen {
    int64_t first, end;
};

// weights may be where the scores are.
template <class X, class W>
void softmax(const X* scores, W* weights, int64_t S, Seen seen, float scale, float* exponentials) {
    F16 top = all(-INFINITE);
    int64_t first = seen.first / LANES * LANES;
    for (int64_t i = first; i < seen.end; i += LANES) {
        F16 x = load(scores, i, S);
        if (i < seen.first || i + LANES > seen.end)
            x = within(x, i, seen.first, seen.end, all(-INFINITE));
        top = larger(x, top);
    }
    float shift = largest(top) * scale;
    F16 total = {};
    for (int64_t i = first; i < seen.end; i += LANES) {
        F16 x = exp(load(scores, i, S) * scale - shift);
        if (i < seen.first || i + LANES > seen.end) x = within(x, i, seen.first, seen.end, F16{});
        total += x;
        store(exponentials + i, x);
    }
    float inverse = 1 / sum(total);
    int64_t end = round_up(seen.end);
    for (int64_t i = 0; i < S; i += LANES) {
        bool inside = i >= first && i < end;
        store(weights, i, S, inside ? load(exponentials + i) * inverse : F16{});
    }
}

// The gradient of the scores, which may be where that of the weights is.
template <class X, class W>
void softmax_gradient(const X* gradient, W* of_scores, const W* weights, int64_t S, Seen seen,
                      float scale) {
    int64_t first = seen.first / LANES * LANES;
    F16 total = {};
    // weights that are not seen are 0
    for (int64_t i = first; i < seen.end; i += LANES)
        total += load(weights, i, S) * load(gradient, i, S);
    float mean = sum(total);
    int64_t end = round_up(seen.end);
    for (int64_t i = 0; i < S; i += LANES) {
        F16 x = {};
        if (i >= first && i < end)
            x = load(weights, i, S) * (load(gradient, i, S) - mean) * scale;
        store(of_scores, i, S, x);
    }
}

}  // namespace
