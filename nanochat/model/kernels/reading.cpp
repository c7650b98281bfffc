// Reading whole texts on a CPU, without gradients: attention in tiles, to what a row continues and
// to the row itself, and the positions of queries and keys. See cpu_reading.py, which calls it.
//
// Letters as in the model: B beginnings, each continued by R of the rows, T tokens of a row, S of
// the longest beginning, K key/value heads, G query heads of each, D head dim.

#include "tile_attention.h"

namespace {

#if defined(__AVX512BF16__)

struct Reading {
    int64_t B, R, T, S, K, G, D, window;
    float scale;
};

inline int64_t round_to_chunk(int64_t n) { return (n + CHUNK - 1) / CHUNK * CHUNK; }

// n rows of D numbers, `stride` apart, as neighbours; the space before and behind them becomes 0.
void gather(const BFloat16* x, int64_t stride, int64_t n, int64_t D, int64_t before, int64_t total,
            BFloat16* rows) {
    std::fill(rows, rows + before * D, BFloat16{});
    for (int64_t i = 0; i < n; i++)
        std::copy(x + i * stride, x + i * stride + D, rows + (before + i) * D);
    std::fill(rows + (before + n) * D, rows + total * D, BFloat16{});
}

// Queries, keys, values and the result are (rows, T, heads, D), those of beginnings (B, S, K, D).
void read(const BFloat16* q, const BFloat16* k, const BFloat16* v, const BFloat16* beginning_k,
          const BFloat16* beginning_v, const int64_t* lengths, BFloat16* out, const Reading& of) {
    int64_t T = of.T, S = of.S, K = of.K, G = of.G, D = of.D;
    int64_t own = round_to_chunk(T), most = round_to_chunk(S) + own;
#pragma omp parallel
    {
        Tiles tiles;
        Numbers rows(most * D), keys(most * D), values(most * D), weights(CHUNK * most);
        std::vector<float> scores(CHUNK * most), exponentials(most), result(CHUNK * D);
#pragma omp for
        for (int64_t i = 0; i < of.B * K; i++) {
            int64_t b = i / K, head = i % K;
            // The first query sees no more of the beginning. Zeros before it let its last key be
            // followed by the first of a row, whose tiles begin there.
            int64_t length = std::min(lengths ? lengths[b] : 0, of.window - 1);
            int64_t trunk = round_to_chunk(length), before = trunk - length;
            if (length) {
                int64_t at = ((b * S + lengths[b] - length) * K + head) * D;
                gather(beginning_k + at, K * D, length, D, before, trunk, rows.data());
                as_right_transposed(rows.data(), trunk, D, keys.data());
                gather(beginning_v + at, K * D, length, D, before, trunk, rows.data());
                as_right(rows.data(), trunk, D, values.data());
            }
            for (int64_t row = b * of.R; row < (b + 1) * of.R; row++) {
                int64_t at = (row * T * K + head) * D;
                gather(k + at, K * D, T, D, 0, own, rows.data());
                as_right_transposed(rows.data(), own, D, keys.data() + trunk * D);
                gather(v + at, K * D, T, D, 0, own, rows.data());
                as_right(rows.data(), own, D, values.data() + trunk * D);
                for (int64_t g = 0; g < G; g++) {
                    int64_t of_head = (row * T * K * G + head * G + g) * D;
                    gather(q + of_head, K * G * D, T, D, 0, own, rows.data());
                    for (int64_t t = 0; t < T; t += CHUNK) {
                        // Keys are counted from the first of the tiles.
                        int64_t seen = before + std::max<int64_t>(0, length + t - of.window + 1);
                        int64_t from = seen / CHUNK * CHUNK, width = trunk + t + CHUNK - from;
                        times_transposed(rows.data() + t * D, D, keys, from, width, scores.data());
                        int64_t n = std::min(CHUNK, T - t);
                        for (int64_t r = 0; r < n; r++) {
                            int64_t end = trunk + t + r + 1;
                            int64_t first = std::max(before, end - of.window);
                            softmax(scores.data() + r * width, weights.data() + r * width, width,
                                    {first - from, end - from}, of.scale, exponentials.data());
                        }
                        times(weights.data(), width, values, from, D, result.data());
                        for (int64_t r = 0; r < n; r++)
                            for (int64_t d = 0; d < D; d += LANES)
                                store(out + of_head + (t + r) * K * G * D + d,
                                      load(result.data() + r * D + d));
                    }
                }
            }
        }
    }
}

#endif

// ---- positions ----

// Pairs of a head, of which those from `shifted` on are from the position before; null is zeros.
template <class W>
inline F16 shifted_load(const W* x, const W* earlier, int64_t i, int64_t n, int64_t shifted) {
    if (i + LANES <= shifted) return load(x, i, n);
    F16 other = earlier ? load(earlier, i, n) : F16{};
    if (i >= shifted) return other;
    return LANE + int32_t(i) < int32_t(shifted) ? load(x, i, n) : other;
}

struct Heads {
    int64_t B, T, H, D, shifted, tables;
};

// Heads (B, T, H, D), rotated by the angles of (T, D / 2), or of B such tables, after the pairs
// from `shifted` on came from the position before; of the first position that is (B, H, D) or null.
// eps: of the norm that follows, or negative for none.
template <class W>
void positions(const W* x, const W* previous, const float* cos, const float* sin, const Heads& of,
               float eps, W* out) {
    int64_t T = of.T, H = of.H, D = of.D, half = D / 2;
#pragma omp parallel
    {
        std::vector<float> real(round_up(half)), imaginary(round_up(half));
#pragma omp for
        for (int64_t i = 0; i < of.B * T; i++) {
            int64_t t = i % T, angle = (of.tables > 1 ? i : t) * half;
            for (int64_t h = 0; h < H; h++) {
                const W* own = x + (i * H + h) * D;
                const W* earlier = own - H * D;
                if (!t) earlier = previous ? previous + (i / T * H + h) * D : nullptr;
                const W* earlier_half = earlier ? earlier + half : nullptr;
                F16 squares = {};
                for (int64_t d = 0; d < half; d += LANES) {
                    F16 a = shifted_load(own, earlier, d, half, of.shifted);
                    F16 b = shifted_load(own + half, earlier_half, d, half, of.shifted);
                    F16 c = load(cos + angle, d, half), s = load(sin + angle, d, half);
                    F16 x = a * c - b * s, y = b * c + a * s;
                    squares += x * x + y * y;
                    store(real.data() + d, x);
                    store(imaginary.data() + d, y);
                }
                float factor = eps < 0 ? 1 : 1 / std::sqrt(sum(squares) / D + eps);
                W* to = out + (i * H + h) * D;
                for (int64_t d = 0; d < half; d += LANES) {
                    store(to, d, half, load(real.data() + d) * factor);
                    store(to + half, d, half, load(imaginary.data() + d) * factor);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// Whether nanochat_read() can be called: bf16, and D a multiple of 32.
int64_t nanochat_has_tiles() {
#if defined(__AVX512BF16__)
    return usable();
#else
    return 0;
#endif
}

// of: B, R, T, S, K, G, D, window
void nanochat_read(const void* q, const void* k, const void* v, const void* beginning_k,
                   const void* beginning_v, const int64_t* lengths, void* out, const int64_t* of,
                   float scale) {
#if defined(__AVX512BF16__)
    read((const BFloat16*)q, (const BFloat16*)k, (const BFloat16*)v, (const BFloat16*)beginning_k,
         (const BFloat16*)beginning_v, lengths, (BFloat16*)out,
         {of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], scale});
#endif
}

// of: B, T, H, D, shifted, tables
void nanochat_positions(const void* x, const void* previous, const float* cos, const float* sin,
                        int64_t is_bf16, const int64_t* of, float eps, void* out) {
    Heads heads = {of[0], of[1], of[2], of[3], of[4], of[5]};
    if (is_bf16)
        positions((const BFloat16*)x, (const BFloat16*)previous, cos, sin, heads, eps,
                  (BFloat16*)out);
    else
        positions((const float*)x, (const float*)previous, cos, sin, heads, eps, (float*)out);
}

}  // extern "C"
