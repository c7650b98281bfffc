// What Muon does on a CPU between its matrix products: the momentum, norms, and the change of the
// weights. Each reads memory once, the norms twice; torch's operations read it a dozen times.
//
// Work is dealt out in whole rows, or in blocks of one size: no number depends on the threads.
//
// Letters as in muon.py: N matrices, R rows, C columns. W: what products are computed in.

#include <vector>

#include "softmax.h"

namespace {

// Numbers that one thread takes at a time; their squares are added up together.
constexpr int64_t BLOCK = 1 << 14;

inline int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// Takes n numbers of a gradient into the momentum; ahead: the momentum one gradient ahead.
template <class W>
void look_ahead(const float* gradient, float* momentum, W* ahead, int64_t n, float mu) {
#pragma omp parallel for
    for (int64_t block = 0; block < blocks_of(n); block++) {
        int64_t end = std::min(n, (block + 1) * BLOCK);
        for (int64_t i = block * BLOCK; i < end; i += LANES) {
            F16 g = load(gradient, i, end), m = load(momentum, i, end);
            m += (1 - mu) * (g - m);
            store(momentum, i, end, m);
            store(ahead, i, end, m + (1 - mu) * (g - m));
        }
    }
}

// Each of N matrices of n numbers, divided by its Frobenius norm times `slack`, and a little more.
template <class W>
void normalize(const W* matrices, W* normalized, int64_t N, int64_t n, float slack) {
    int64_t per_matrix = blocks_of(n);
    std::vector<float> squares(N * per_matrix);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < N * per_matrix; block++) {
            const W* matrix = matrices + block / per_matrix * n;
            int64_t first = block % per_matrix * BLOCK, end = std::min(n, first + BLOCK);
            F16 total = {};
            for (int64_t i = first; i < end; i += LANES) {
                F16 x = load(matrix, i, end);
                total += x * x;
            }
            squares[block] = sum(total);
        }
        // the same blocks are the same thread's, which has them in its cache
#pragma omp for schedule(static)
        for (int64_t block = 0; block < N * per_matrix; block++) {
            int64_t own = block / per_matrix;
            const W* matrix = matrices + own * n;
            int64_t first = block % per_matrix * BLOCK, end = std::min(n, first + BLOCK);
            float whole = 0;
            for (int64_t i = 0; i < per_matrix; i++) whole += squares[own * per_matrix + i];
            float scale = 1 / (std::sqrt(whole) * slack + 1e-6f);
            for (int64_t i = first; i < end; i += LANES)
                store(normalized + own * n, i, end, load(matrix, i, end) * scale);
        }
    }
}

// Mean squares of the rows of tall matrices, (N, R), or of the columns of others, (N, C).
template <class W>
void mean_squares(const W* matrices, float* means, int64_t N, int64_t R, int64_t C, bool tall) {
    if (tall) {
#pragma omp parallel for
        for (int64_t row = 0; row < N * R; row++) {
            F16 total = {};
            for (int64_t i = 0; i < C; i += LANES) {
                F16 x = load(matrices + row * C, i, C);
                total += x * x;
            }
            means[row] = sum(total) / C;
        }
        return;
    }
    int64_t strips = (C + LANES - 1) / LANES;
#pragma omp parallel for
    for (int64_t strip = 0; strip < N * strips; strip++) {
        int64_t own = strip / strips, i = strip % strips * LANES;
        F16 total = {};
        for (int64_t r = 0; r < R; r++) {
            F16 x = load(matrices + (own * R + r) * C, i, C);
            total += x * x;
        }
        store(means + own * C, i, C, total * (1.0f / R));
    }
}

// R rows of each matrix, or all of them. scale: of each of these rows if tall, (N, R), or of each
// column, (N, C). Every matrix of weights has an address of its own.
template <class W>
void descend(float* const* weights, const W* update, const float* scale, int64_t N, int64_t R,
             int64_t C, bool tall, float rate, float shrinkage) {
#pragma omp parallel for
    for (int64_t row = 0; row < N * R; row++) {
        float* weight = weights[row / R] + row % R * C;
        for (int64_t i = 0; i < C; i += LANES) {
            F16 factor = tall ? all(scale[row]) : load(scale + row / R * C, i, C);
            F16 u = load(update + row * C, i, C) * factor;
            F16 w = load(weight, i, C);
            F16 towards_zero = where_positive(u * w, w);
            store(weight, i, C, w - (rate * u + shrinkage * towards_zero));
        }
    }
}

}  // namespace

// See cpu_muon.py, which calls these.
extern "C" {

void nanochat_look_ahead(const float* gradient, float* momentum, void* ahead, int64_t is_bf16,
                         int64_t n, float mu) {
    if (is_bf16)
        look_ahead(gradient, momentum, (BFloat16*)ahead, n, mu);
    else
        look_ahead(gradient, momentum, (float*)ahead, n, mu);
}

void nanochat_normalize(const void* matrices, void* normalized, int64_t is_bf16, int64_t N,
                        int64_t n, float slack) {
    if (is_bf16)
        normalize((const BFloat16*)matrices, (BFloat16*)normalized, N, n, slack);
    else
        normalize((const float*)matrices, (float*)normalized, N, n, slack);
}

void nanochat_mean_squares(const void* matrices, int64_t is_bf16, float* means, int64_t N,
                           int64_t R, int64_t C) {
    if (is_bf16)
        mean_squares((const BFloat16*)matrices, means, N, R, C, R >= C);
    else
        mean_squares((const float*)matrices, means, N, R, C, R >= C);
}

void nanochat_descend(float* const* weights, const void* update, int64_t is_bf16,
                      const float* scale, int64_t N, int64_t R, int64_t C, int64_t tall, float rate,
                      float shrinkage) {
    if (is_bf16)
        descend(weights, (const BFloat16*)update, scale, N, R, C, tall, rate, shrinkage);
    else
        descend(weights, (const float*)update, scale, N, R, C, tall, rate, shrinkage);
}

}  // extern "C"
