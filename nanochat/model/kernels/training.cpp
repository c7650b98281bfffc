// What a training step on a CPU does between its matrix products: the softmax of attention and of
// the loss, each with its gradient.
//
// A row of scores or logits is read once from memory and written once: every pass over it but the
// first finds it in the cache. A row is one thread's, so no number depends on how many there are.
//
// Letters as in the model: R rows, V vocabulary, T queries, S keys.

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr I16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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

// x where first <= i + lane < end, elsewhere `other`.
inline F16 within(F16 x, int64_t i, int64_t first, int64_t end, float other) {
    I16 at = LANE + int32_t(i);
    I16 inside = (at >= int32_t(first)) & (at < int32_t(end));
    return inside ? x : F16{} + other;
}

inline float largest(F16 x) {
    float result = x[0];
    for (int lane = 1; lane < LANES; lane++) result = std::max(result, x[lane]);
    return result;
}

// ---- attention ----

// The keys that a row of scores sees: from first, before end.
struct Seen {
    int64_t first, end;
};

// own: the key of the first query. Rows go through the T queries again and again.
inline Seen seen_by(int64_t row, int64_t T, int64_t S, int64_t own, int64_t window) {
    int64_t end = std::min(S, own + row % T + 1);
    return {std::max<int64_t>(0, end - window), end};
}

template <class W>
void softmax(W* row, int64_t S, Seen seen, float scale, float* exponentials) {
    F16 top = F16{} - INFINITE;
    int64_t first = seen.first / LANES * LANES;
    for (int64_t i = first; i < seen.end; i += LANES) {
        F16 x = load(row, i, S);
        if (i < seen.first || i + LANES > seen.end)
            x = within(x, i, seen.first, seen.end, -INFINITE);
        top = x > top ? x : top;
    }
    float shift = largest(top) * scale;
    F16 total = {};
    for (int64_t i = first; i < seen.end; i += LANES) {
        F16 x = exp(load(row, i, S) * scale - shift);
        if (i < seen.first || i + LANES > seen.end) x = within(x, i, seen.first, seen.end, 0);
        total += x;
        store(exponentials + i, x);
    }
    float inverse = 1 / sum(total);
    int64_t end = round_up(seen.end);
    for (int64_t i = 0; i < S; i += LANES) {
        bool inside = i >= first && i < end;
        store(row, i, S, inside ? load(exponentials + i) * inverse : F16{});
    }
}

// The gradient of the scores over that of the weights.
template <class W>
void softmax_gradient(W* gradient, const W* weights, int64_t S, Seen seen, float scale) {
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
        store(gradient, i, S, x);
    }
}

// ---- loss ----

struct Row {
    int64_t V, target;
    float softcap;       // 0: none
    const float* scale;  // of the gradient; null: none is wanted
};

// Within 1e-7.
inline F16 tanh_of(F16 x) { return 1.0f - 2.0f * reciprocal(exp(2.0f * x) + 1.0f); }

// Cross-entropy in nats of one row of logits, which its gradient replaces.
//
// exponentials, slopes: of V numbers each, rounded up.
template <class W>
float cross_entropy(W* logits, Row row, float* exponentials, float* slopes) {
    int64_t V = row.V;
    bool counts = row.target != -1;
    if (!counts && !row.scale) return 0;
    if (counts && (row.target < 0 || row.target >= V)) {
        for (int64_t i = 0; row.scale && i < V; i++) store(logits + i, NAN);
        return NAN;
    }
    // Exponentials of capped logits cannot overflow.
    float shift = 0;
    if (row.softcap == 0) {
        F16 top = F16{} - INFINITE;
        for (int64_t i = 0; i < V; i += LANES) {
            F16 x = load(logits, i, V);
            if (i + LANES > V) x = within(x, i, 0, V, -INFINITE);
            top = x > top ? x : top;
        }
        shift = largest(top);
    }
    F16 total = {};
    for (int64_t i = 0; i < V; i += LANES) {
        F16 x = load(logits, i, V);
        if (row.softcap != 0) {
            F16 tanh = tanh_of(x * (1 / row.softcap));
            x = row.softcap * tanh;
            store(slopes + i, 1.0f - tanh * tanh);
        }
        x = exp(x - shift);
        // only the last of them can be past the end
        if (i + LANES > V) x = within(x, i, 0, V, 0);
        store(exponentials + i, x);
        total += x;
    }
    float whole = sum(total);
    float of_target = 0, slope = 1;
    if (counts) {
        of_target = to_float(logits[row.target]);
        if (row.softcap != 0) {
            float tanh = tanh_of(F16{} + of_target * (1 / row.softcap))[0];
            of_target = row.softcap * tanh;
            slope = 1 - tanh * tanh;
        }
    }
    if (row.scale) {
        float scale = counts ? *row.scale : 0;
        float share = scale / whole;
        for (int64_t i = 0; i < V; i += LANES) {
            F16 x = load(exponentials + i) * share;
            if (row.softcap != 0) x *= load(slopes + i);
            store(logits, i, V, x);
        }
        if (counts)
            store(logits + row.target, (exponentials[row.target] * share - scale) * slope);
    }
    return counts ? std::log(whole) + shift - of_target : 0;
}

template <class W>
void cross_entropies(W* logits, int64_t R, int64_t stride, int64_t V, const int64_t* targets,
                     const float* scales, float softcap, float* nats) {
#pragma omp parallel
    {
        std::vector<float> exponentials(round_up(V)), slopes(round_up(V));
#pragma omp for
        for (int64_t r = 0; r < R; r++) {
            Row row = {V, targets[r], softcap, scales ? scales + r : nullptr};
            nats[r] = cross_entropy(logits + r * stride, row, exponentials.data(), slopes.data());
        }
    }
}

template <class W>
void softmaxes(W* scores, int64_t R, int64_t T, int64_t S, int64_t own, int64_t window,
               float scale) {
#pragma omp parallel
    {
        std::vector<float> exponentials(round_up(S));
#pragma omp for
        for (int64_t r = 0; r < R; r++)
            softmax(scores + r * S, S, seen_by(r, T, S, own, window), scale, exponentials.data());
    }
}

template <class W>
void softmax_gradients(W* gradients, const W* weights, int64_t R, int64_t T, int64_t S, int64_t own,
                       int64_t window, float scale) {
#pragma omp parallel for
    for (int64_t r = 0; r < R; r++)
        softmax_gradient(gradients + r * S, weights + r * S, S, seen_by(r, T, S, own, window),
                         scale);
}

}  // namespace

// See cpu_training.py, which calls these.
extern "C" {

void nanochat_cross_entropy(void* logits, int64_t is_bf16, int64_t R, int64_t stride, int64_t V,
                            const int64_t* targets, const float* scales, float softcap,
                            float* nats) {
    if (is_bf16)
        cross_entropies((BFloat16*)logits, R, stride, V, targets, scales, softcap, nats);
    else
        cross_entropies((float*)logits, R, stride, V, targets, scales, softcap, nats);
}

void nanochat_softmax(void* scores, int64_t is_bf16, int64_t R, int64_t T, int64_t S, int64_t own,
                      int64_t window, float scale) {
    if (is_bf16)
        softmaxes((BFloat16*)scores, R, T, S, own, window, scale);
    else
        softmaxes((float*)scores, R, T, S, own, window, scale);
}

void nanochat_softmax_gradient(void* gradients, const void* weights, int64_t is_bf16, int64_t R,
                               int64_t T, int64_t S, int64_t own, int64_t window, float scale) {
    if (is_bf16)
        softmax_gradients((BFloat16*)gradients, (const BFloat16*)weights, R, T, S, own, window,
                          scale);
    else
        softmax_gradients((float*)gradients, (const float*)weights, R, T, S, own, window, scale);
}

}  // extern "C"
