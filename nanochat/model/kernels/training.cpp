// What a training step on a CPU does besides the products of its layers: attention, in tiles or as
// the softmax between torch's products, and the softmax of the loss, each with its gradient.
//
// A row of scores or logits is read once from memory and written once: every pass over it but the
// first finds it in the cache. A row is one thread's, so no number depends on how many there are.
//
// Letters as in the model: R rows, V vocabulary, T queries, S keys.

#include <algorithm>
#include <vector>

#include "softmax.h"
#include "tile_attention.h"

namespace {

// ---- attention ----

// own: the key of the first query. Rows go through the T queries again and again.
inline Seen seen_by(int64_t row, int64_t T, int64_t S, int64_t own, int64_t window) {
    int64_t end = std::min(S, own + row % T + 1);
    return {std::max<int64_t>(0, end - window), end};
}

// ---- loss ----

struct Row {
    int64_t V, target;
    float softcap;       // 0: none
    const float* scale;  // of the gradient; null: none is wanted
};

// Within 1e-7, absolutely.
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
        F16 top = all(-INFINITE);
        for (int64_t i = 0; i < V; i += LANES) {
            F16 x = load(logits, i, V);
            if (i + LANES > V) x = within(x, i, 0, V, all(-INFINITE));
            top = larger(x, top);
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
        if (i + LANES > V) x = within(x, i, 0, V, F16{});
        store(exponentials + i, x);
        total += x;
    }
    float whole = sum(total);
    float of_target = 0, slope = 1;
    if (counts) {
        of_target = to_float(logits[row.target]);
        if (row.softcap != 0) {
            float tanh = tanh_of(all(of_target * (1 / row.softcap))).part[0][0];
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
            softmax(scores + r * S, scores + r * S, S, seen_by(r, T, S, own, window), scale,
                    exponentials.data());
    }
}

template <class W>
void softmax_gradients(W* gradients, const W* weights, int64_t R, int64_t T, int64_t S, int64_t own,
                       int64_t window, float scale) {
#pragma omp parallel for
    for (int64_t r = 0; r < R; r++)
        softmax_gradient(gradients + r * S, gradients + r * S, weights + r * S, S,
                         seen_by(r, T, S, own, window), scale);
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

// of: N, G, T, D, window. Only where nanochat_has_tiles(is_bf16), and D is a multiple of 32.
void nanochat_attention(const void* q, const void* k, const void* v, void* out, void* weights,
                        int64_t is_bf16, const int64_t* of, float scale) {
    Shape shape = {of[0], of[1], of[2], of[3], of[4], scale};
    if (!is_bf16)
        forward((const float*)q, (const float*)k, (const float*)v, (float*)out, (float*)weights,
                shape);
#if defined(__AVX512BF16__)
    else
        forward((const BFloat16*)q, (const BFloat16*)k, (const BFloat16*)v, (BFloat16*)out,
                (BFloat16*)weights, shape);
#endif
}

void nanochat_attention_gradient(const void* upstream, const void* q, const void* k, const void* v,
                                 const void* weights, void* dq, void* dk, void* dv, int64_t is_bf16,
                                 const int64_t* of, float scale) {
    Shape shape = {of[0], of[1], of[2], of[3], of[4], scale};
    if (!is_bf16)
        backward((const float*)upstream, (const float*)q, (const float*)k, (const float*)v,
                 (const float*)weights, (float*)dq, (float*)dk, (float*)dv, shape);
#if defined(__AVX512BF16__)
    else
        backward((const BFloat16*)upstream, (const BFloat16*)q, (const BFloat16*)k,
                 (const BFloat16*)v, (const BFloat16*)weights, (BFloat16*)dq, (BFloat16*)dk,
                 (BFloat16*)dv, shape);
#endif
}

}  // extern "C"
