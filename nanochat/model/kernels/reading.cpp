// Reading whole texts on a CPU, without gradients: attention of rows to a beginning and to
// themselves, in tiles, and the positions of queries and keys. See cpu_reading.py, which calls it.
//
// Letters as in the model: B beginnings, each continued by R of the rows, T tokens of a row, S of
// the longest beginning, K key/value heads, G query heads of each, D head dim.

#include "tile_attention.h"

namespace {

// of_row, of_beginning: numbers from a row of keys or values to the next one.
struct Reading {
    int64_t B, R, T, S, K, G, D, window, of_row, of_beginning, threads;
    float scale;
};

inline int64_t whole_chunks(int64_t n) { return n / CHUNK * CHUNK; }

// n heads of tokens, which are `stride` apart, as neighbours.
template <class W>
void gather(const W* x, int64_t stride, int64_t n, int64_t D, W* rows) {
    for (int64_t i = 0; i < n; i++) std::copy(x + i * stride, x + i * stride + D, rows + i * D);
}

// The keys or values of one head, in tiles whose first is a multiple of 32 positions from the
// beginning's first: a result has the same bits wherever a text is cut into beginning and row.
struct Head {
    int64_t start;   // the first key of the beginning that is seen, or a few before it
    int64_t shared;  // keys of the beginning in whole chunks, which all rows share
    int64_t rest;    // others, which are laid out again before each row's own

    explicit Head(int64_t length, int64_t window)
        : start(whole_chunks(std::max<int64_t>(0, length - window + 1))),
          shared(whole_chunks(length - start)),
          rest(length - start - shared) {}

    // Keys before the row's own.
    int64_t before() const { return shared + rest; }
};

// Queries and the result are (rows, T, K * G, D), keys and values (rows, T, K, D), those of
// beginnings (B, S, K, D).
template <class W>
void read(const W* q, const W* k, const W* v, const W* beginning_k, const W* beginning_v,
          const int64_t* lengths, W* out, const Reading& of) {
    int64_t T = of.T, K = of.K, G = of.G, D = of.D, heads = of.B * K;
    int64_t own_most = whole_chunks(T + 2 * CHUNK - 2);
    int64_t most = whole_chunks(std::min(of.S, of.window + CHUNK)) + own_most;
    // Where there are fewer heads than threads, several share one.
    int64_t parts = std::min(of.R * G, (of.threads + heads - 1) / heads);
#pragma omp parallel num_threads(of.threads)
    {
        Tiles<W> tiles;
        std::vector<W> rows(most * D), keys(most * D), values(most * D), weights(CHUNK * most);
        std::vector<float> scores(CHUNK * most), exponentials(most), result(CHUNK * D);
#pragma omp for
        for (int64_t i = 0; i < heads * parts; i++) {
            int64_t b = i / parts / K, head = i / parts % K, part = i % parts;
            Head kept(lengths ? lengths[b] : 0, of.window);
            int64_t trunk = b * of.of_beginning + (kept.start * K + head) * D;
            int64_t unshared = trunk + kept.shared * K * D;
            if (kept.shared) {
                gather(beginning_k + trunk, K * D, kept.shared, D, rows.data());
                as_right_transposed(rows.data(), kept.shared, D, keys.data());
                gather(beginning_v + trunk, K * D, kept.shared, D, rows.data());
                as_right(rows.data(), kept.shared, D, values.data());
            }
            int64_t own = whole_chunks(kept.rest + T + CHUNK - 1), laid_out = -1;
            for (int64_t u = part * of.R * G / parts; u < (part + 1) * of.R * G / parts; u++) {
                int64_t row = b * of.R + u / G;
                if (row != laid_out) {
                    laid_out = row;
                    int64_t at = row * of.of_row + head * D;
                    W* behind = rows.data() + kept.rest * D;
                    std::fill(behind, rows.data() + own * D, W{});
                    gather(beginning_k + unshared, K * D, kept.rest, D, rows.data());
                    gather(k + at, K * D, T, D, behind);
                    as_right_transposed(rows.data(), own, D, keys.data() + kept.shared * D);
                    gather(beginning_v + unshared, K * D, kept.rest, D, rows.data());
                    gather(v + at, K * D, T, D, behind);
                    as_right(rows.data(), own, D, values.data() + kept.shared * D);
                }
                int64_t of_head = (row * T * K * G + head * G + u % G) * D;
                for (int64_t t = 0; t < T; t += CHUNK) {
                    int64_t n = std::min(CHUNK, T - t), query = kept.before() + t;
                    gather(q + of_head + t * K * G * D, K * G * D, n, D, rows.data());
                    int64_t from = whole_chunks(std::max<int64_t>(0, query - of.window + 1));
                    int64_t width = whole_chunks(query + n + CHUNK - 1) - from;
                    times_transposed(rows.data(), D, keys, from, width, scores.data());
                    for (int64_t r = 0; r < n; r++) {
                        int64_t end = query + r + 1, first = std::max<int64_t>(0, end - of.window);
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

// ---- positions ----

// Pairs of a head, of which those from `shifted` on are from the position before; null is zeros.
template <class W>
inline F16 shifted_load(const W* x, const W* earlier, int64_t i, int64_t n, int64_t shifted) {
    if (i + LANES <= shifted) return load(x, i, n);
    F16 other = earlier ? load(earlier, i, n) : F16{};
    if (i >= shifted) return other;
    return within(load(x, i, n), i, 0, shifted, other);
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

// of: B, R, T, S, K, G, D, window, of_row, of_beginning, threads. Only where
// nanochat_has_tiles(is_bf16), and D is a multiple of 32.
void nanochat_read(const void* q, const void* k, const void* v, const void* beginning_k,
                   const void* beginning_v, const int64_t* lengths, void* out, int64_t is_bf16,
                   const int64_t* of, float scale) {
    Reading reading = {of[0], of[1], of[2], of[3], of[4],  of[5],
                       of[6], of[7], of[8], of[9], of[10], scale};
    if (!is_bf16)
        read((const float*)q, (const float*)k, (const float*)v, (const float*)beginning_k,
             (const float*)beginning_v, lengths, (float*)out, reading);
#if defined(__AVX512BF16__)
    else
        read((const BFloat16*)q, (const BFloat16*)k, (const BFloat16*)v,
             (const BFloat16*)beginning_k, (const BFloat16*)beginning_v, lengths, (BFloat16*)out,
             reading);
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
