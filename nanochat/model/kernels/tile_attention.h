// Causal attention with a window, in tiles: scores stay in fp32 and in the cache, and keys that no
// query of a chunk of 32 sees are skipped.
//
// A batch row's head is one thread's, so no number depends on how many there are.
//
// Letters as in the model: N rows of a batch times key/value heads, G query heads of each, T
// tokens, D head dim, a multiple of 32. W: float or BFloat16, as in tiles.h.

#pragma once

#include "softmax.h"
#include "tiles.h"

namespace {

// Chunks of queries that the gradients of keys and values take together: their sums are then loaded
// and stored once for so many products.
constexpr int64_t GROUP = 4;

// T rows, and zeros up to a multiple of 32.
template <class W>
struct Padded {
    std::vector<W> copied;
    const W* rows;

    Padded(const W* x, int64_t T, int64_t D) : rows(x) {
        if (T % CHUNK == 0) return;
        copied.resize((T + CHUNK - 1) / CHUNK * CHUNK * D);
        std::copy(x, x + T * D, copied.begin());
        rows = copied.data();
    }
};

// ---- attention ----

struct Shape {
    int64_t N, G, T, D, window;
    float scale;

    int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }

    // Of a chunk of queries: the first key that its tiles visit, and how many.
    int64_t first_key(int64_t chunk) const {
        int64_t first = std::max<int64_t>(0, chunk * CHUNK - window + 1);
        return first / CHUNK * CHUNK;
    }
    int64_t keys(int64_t chunk) const { return (chunk + 1) * CHUNK - first_key(chunk); }

    // Weights of a head: CHUNK rows of keys() for each chunk.
    int64_t weights() const {
        int64_t total = 0;
        for (int64_t chunk = 0; chunk < chunks(); chunk++) total += CHUNK * keys(chunk);
        return total;
    }

    // Counted from the first key that is visited.
    Seen seen(int64_t chunk, int64_t row) const {
        int64_t query = chunk * CHUNK + row;
        int64_t first = std::max<int64_t>(0, query - window + 1);
        return {first - first_key(chunk), query + 1 - first_key(chunk)};
    }
};

// The rows of a chunk that exist.
template <class W>
void put_rows(const float* x, int64_t chunk, const Shape& shape, W* rows) {
    int64_t D = shape.D, end = std::min(shape.T, (chunk + 1) * CHUNK) * D;
    for (int64_t i = chunk * CHUNK * D; i < end; i += LANES)
        store(rows + i, load(x + i - chunk * CHUNK * D));
}

template <class W>
void forward(const W* q, const W* k, const W* v, W* out, W* weights, const Shape& shape) {
    int64_t T = shape.T, D = shape.D, G = shape.G, rows = shape.chunks() * CHUNK;
    int64_t of_head = shape.weights();
#pragma omp parallel
    {
        Tiles<W> tiles;
        std::vector<W> keys(rows * D), values(rows * D);
        std::vector<float> scores(CHUNK * rows), exponentials(rows), result(CHUNK * D);
#pragma omp for
        for (int64_t n = 0; n < shape.N; n++) {
            as_right_transposed(Padded<W>(k + n * T * D, T, D).rows, rows, D, keys.data());
            as_right(Padded<W>(v + n * T * D, T, D).rows, rows, D, values.data());
            for (int64_t head = n * G; head < (n + 1) * G; head++) {
                Padded<W> queries(q + head * T * D, T, D);
                W* own = weights + head * of_head;
                for (int64_t chunk = 0; chunk < shape.chunks(); chunk++) {
                    int64_t from = shape.first_key(chunk), width = shape.keys(chunk);
                    times_transposed(queries.rows + chunk * CHUNK * D, D, keys, from, width,
                                     scores.data());
                    for (int64_t row = 0; row < CHUNK; row++)
                        softmax(scores.data() + row * width, own + row * width, width,
                                shape.seen(chunk, row), shape.scale, exponentials.data());
                    times(own, width, values, from, D, result.data());
                    put_rows(result.data(), chunk, shape, out + head * T * D);
                    own += CHUNK * width;
                }
            }
        }
    }
}

// Gradients of keys or values: sums over queries of a left side of D rows and of weights, (D, T) in
// tiles of 16 x 16, D / 16 of them for each 16 keys.
template <class W>
struct KeyGradient {
    int64_t D;
    std::vector<float> tiles;
    std::vector<W> right;  // of a group: for each 16 keys, GROUP tiles of queries

    KeyGradient(int64_t rows, int64_t D)
        : D(D), tiles(rows * D), right(rows / TILE * GROUP * CELLS) {}

    void clear() { std::fill(tiles.begin(), tiles.end(), 0.0f); }

    W* tile_at(int64_t key_tile, int64_t chunk) {
        return right.data() + (key_tile * GROUP + chunk % GROUP) * CELLS;
    }

    // Takes 32 rows of weights, whose first key is `from`.
    void take(const W* weights, int64_t chunk, int64_t from, int64_t width) {
        for (int64_t key = 0; key < width; key += TILE)
            right_tile(weights + key, width, tile_at((from + key) / TILE, chunk));
    }

    // Adds the products of the chunks of a group. left: of as_left_transposed().
    void add(const std::vector<W>& left, int64_t first, int64_t end, const Shape& shape) {
        for (int64_t key = shape.first_key(first); key < end * CHUNK; key += CHUNK) {
            // chunks before have no such key, and chunks after have passed it
            int64_t begin = std::max(first, key / CHUNK), last = begin;
            while (last < end && shape.first_key(last) <= key) last++;
            if (begin == last) continue;
            for (int64_t d = 0; d < D; d += CHUNK) {
                float* at = tiles.data() + (key * D + d * TILE);
                const W* rows = left.data() + begin * CHUNK * D + d * CHUNK;
                Sums sums = {{{at, at + TILE * D}, {at + TILE * TILE, at + TILE * (D + TILE)}}, TILE};
                Sides<W> sides = {{rows, rows + CELLS},
                                  CHUNK,
                                  D * CHUNK,
                                  {tile_at(key / TILE, begin), tile_at(key / TILE + 1, begin)},
                                  CELLS};
                multiply(sums, sides, last - begin, true);
            }
        }
    }

    void put_into(W* rows, int64_t T) {
        for (int64_t key = 0; key < T; key += TILE)
            for (int64_t d = 0; d < D; d += TILE)
                put_transposed(tiles.data() + key * D + d * TILE, rows + key * D + d, D,
                               std::min(TILE, T - key));
    }
};

template <class W>
void backward(const W* upstream, const W* q, const W* k, const W* v, const W* weights, W* dq, W* dk,
              W* dv, const Shape& shape) {
    int64_t T = shape.T, D = shape.D, G = shape.G, rows = shape.chunks() * CHUNK;
    int64_t of_head = shape.weights();
#pragma omp parallel
    {
        Tiles<W> tiles;
        std::vector<W> keys(rows * D), values(rows * D), left_up(rows * D), left_q(rows * D);
        std::vector<W> score_gradients(CHUNK * rows);
        KeyGradient<W> of_keys(rows, D), of_values(rows, D);
        std::vector<float> gradients(CHUNK * rows), result(CHUNK * D);
#pragma omp for
        for (int64_t n = 0; n < shape.N; n++) {
            as_right(Padded<W>(k + n * T * D, T, D).rows, rows, D, keys.data());
            as_right_transposed(Padded<W>(v + n * T * D, T, D).rows, rows, D, values.data());
            of_keys.clear();
            of_values.clear();
            for (int64_t head = n * G; head < (n + 1) * G; head++) {
                Padded<W> up(upstream + head * T * D, T, D);
                as_left_transposed(up.rows, rows, D, left_up.data());
                as_left_transposed(Padded<W>(q + head * T * D, T, D).rows, rows, D, left_q.data());
                const W* own = weights + head * of_head;
                for (int64_t first = 0; first < shape.chunks(); first += GROUP) {
                    int64_t end = std::min(first + GROUP, shape.chunks());
                    for (int64_t chunk = first; chunk < end; chunk++) {
                        int64_t from = shape.first_key(chunk), width = shape.keys(chunk);
                        times_transposed(up.rows + chunk * CHUNK * D, D, values, from, width,
                                         gradients.data());
                        for (int64_t row = 0; row < CHUNK; row++)
                            softmax_gradient(gradients.data() + row * width,
                                             score_gradients.data() + row * width,
                                             own + row * width, width, shape.seen(chunk, row),
                                             shape.scale);
                        times(score_gradients.data(), width, keys, from, D, result.data());
                        put_rows(result.data(), chunk, shape, dq + head * T * D);
                        of_values.take(own, chunk, from, width);
                        of_keys.take(score_gradients.data(), chunk, from, width);
                        own += CHUNK * width;
                    }
                    of_values.add(left_up, first, end, shape);
                    of_keys.add(left_q, first, end, shape);
                }
            }
            of_keys.put_into(dk + n * T * D, T);
            of_values.put_into(dv + n * T * D, T);
        }
    }
}

}  // namespace
