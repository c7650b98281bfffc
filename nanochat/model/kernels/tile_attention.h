// Causal attention with a window in bf16, for processors that multiply tiles of it (AMX) or pairs
// of it (AVX512-BF16): scores stay in fp32 and in the cache, and keys that no query of a chunk of 32
// sees are skipped.
//
// Products work on tiles of 16 rows. Their left side has 32 numbers a row; their right side has 16
// columns, whose numbers stand in pairs: row r holds numbers 2r and 2r + 1 of every column.
//
// A batch row's head is one thread's, so no number depends on how many there are.
//
// Letters as in the model: N rows of a batch times key/value heads, G query heads of each, T
// tokens, D head dim.

#pragma once

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "softmax.h"

#if defined(__AVX512BF16__)

namespace {

constexpr int64_t TILE = 16;   // rows, and columns of the right side
constexpr int64_t CHUNK = 32;  // numbers of a row: two tiles of queries or keys
constexpr int64_t CELLS = TILE * CHUNK;
// Chunks of queries that the gradients of keys and values take together: their sums are then loaded
// and stored once for so many products.
constexpr int64_t GROUP = 4;

typedef std::vector<BFloat16> Numbers;
typedef uint32_t U16 __attribute__((vector_size(64)));

// ---- products ----

// Four sums of a block of 32 x 32, in tiles of 16 x 16 whose rows are ldc apart.
struct Sums {
    float* at[2][2];
    int64_t ldc;
};

// Left tiles have rows lda apart, and left_step numbers between chunks; right tiles have rows of
// CHUNK.
struct Sides {
    const BFloat16* left[2];
    int64_t lda, left_step;
    const BFloat16* right[2];
    int64_t right_step;
};

// multiply(): the sums of so many chunks' products, added to what is there or put in its place.

#if defined(__AMX_BF16__)

// Tiles 0 to 3 hold sums, 4 and 5 the left side, 6 and 7 the right one: all of 16 rows of 64 bytes.
struct Tiles {
    Tiles() {
        alignas(64) uint8_t shape[64] = {1};
        for (int tile = 0; tile < 8; tile++) {
            shape[16 + 2 * tile] = 64;
            shape[48 + tile] = TILE;
        }
        _tile_loadconfig(shape);
    }
    ~Tiles() { _tile_release(); }
};

inline void multiply(Sums sums, Sides sides, int64_t chunks, bool add) {
    int64_t ldc = sums.ldc * 4, lda = sides.lda * 2;
    if (add) {
        _tile_loadd(0, sums.at[0][0], ldc);
        _tile_loadd(1, sums.at[0][1], ldc);
        _tile_loadd(2, sums.at[1][0], ldc);
        _tile_loadd(3, sums.at[1][1], ldc);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        _tile_loadd(4, sides.left[0] + chunk * sides.left_step, lda);
        _tile_loadd(6, sides.right[0] + chunk * sides.right_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, sides.right[1] + chunk * sides.right_step, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, sides.left[1] + chunk * sides.left_step, lda);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums.at[0][0], ldc);
    _tile_stored(1, sums.at[0][1], ldc);
    _tile_stored(2, sums.at[1][0], ldc);
    _tile_stored(3, sums.at[1][1], ldc);
}

// Linux gives a process its tiles when it asks for them.
inline bool usable() {
#if defined(__linux__)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

#else

struct Tiles {
    Tiles() {}
};

inline void multiply(Sums sums, Sides sides, int64_t chunks, bool add) {
    constexpr int ROWS = 8;  // with two columns of tiles, sums that fit into registers
    for (int half = 0; half < 2; half++)
        for (int64_t first = 0; first < TILE; first += ROWS) {
            __m512 total[ROWS][2];
            for (int r = 0; r < ROWS; r++)
                for (int column = 0; column < 2; column++) {
                    float* at = sums.at[half][column] + (first + r) * sums.ldc;
                    total[r][column] = add ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
                }
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const BFloat16* left = sides.left[half] + chunk * sides.left_step;
                for (int64_t pair = 0; pair < TILE; pair++) {
                    __m512bh right[2];
                    for (int column = 0; column < 2; column++)
                        right[column] = (__m512bh)_mm512_loadu_si512(
                            sides.right[column] + chunk * sides.right_step + pair * CHUNK);
                    for (int r = 0; r < ROWS; r++) {
                        int32_t two;
                        std::memcpy(&two, left + (first + r) * sides.lda + 2 * pair, 4);
                        __m512bh wide = (__m512bh)_mm512_set1_epi32(two);
                        for (int column = 0; column < 2; column++)
                            total[r][column] =
                                _mm512_dpbf16_ps(total[r][column], wide, right[column]);
                    }
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int column = 0; column < 2; column++)
                    _mm512_storeu_ps(sums.at[half][column] + (first + r) * sums.ldc,
                                     total[r][column]);
        }
}

inline bool usable() { return true; }

#endif

// ---- layouts ----

// Number i of a and number i of b, side by side.
inline U16 pairs(const BFloat16* a, const BFloat16* b) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
    return (U16)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 16 columns of 32 rows that are `stride` apart, as pairs of rows.
inline void pair_rows(const BFloat16* x, int64_t stride, U16 (&tile)[TILE]) {
    for (int r = 0; r < TILE; r++) tile[r] = pairs(x + 2 * r * stride, x + (2 * r + 1) * stride);
}

// Rows to columns, 16 x 16: within blocks of 4 x 4 first, then these blocks.
inline void transpose(U16 (&x)[TILE]) {
    U16 y[TILE];
    for (int i = 0; i < 16; i += 2) {
        y[i] = (U16)_mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        y[i + 1] = (U16)_mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = (U16)_mm512_unpacklo_epi64((__m512i)y[i + j], (__m512i)y[i + j + 2]);
            x[i + 2 * j + 1] = (U16)_mm512_unpackhi_epi64((__m512i)y[i + j], (__m512i)y[i + j + 2]);
        }
    // x[4b + c] has, in each quarter q, column 4q + c of rows 4b to 4b + 3
    for (int c = 0; c < 4; c++) {
        __m512i low0 = _mm512_shuffle_i32x4((__m512i)x[c], (__m512i)x[4 + c], 0x88);
        __m512i high0 = _mm512_shuffle_i32x4((__m512i)x[c], (__m512i)x[4 + c], 0xdd);
        __m512i low1 = _mm512_shuffle_i32x4((__m512i)x[8 + c], (__m512i)x[12 + c], 0x88);
        __m512i high1 = _mm512_shuffle_i32x4((__m512i)x[8 + c], (__m512i)x[12 + c], 0xdd);
        y[c] = (U16)_mm512_shuffle_i32x4(low0, low1, 0x88);
        y[8 + c] = (U16)_mm512_shuffle_i32x4(low0, low1, 0xdd);
        y[4 + c] = (U16)_mm512_shuffle_i32x4(high0, high1, 0x88);
        y[12 + c] = (U16)_mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
    std::copy(y, y + TILE, x);
}

inline void put(BFloat16* tile, const U16 (&x)[TILE]) { std::memcpy(tile, x, sizeof x); }

// Of a matrix of numbers whose rows are D long, in tiles:
//
// Right side of products with the matrix: for each chunk of 32 rows, D / 16 tiles of pairs of rows.
void as_right(const BFloat16* x, int64_t rows, int64_t D, BFloat16* tiles) {
    for (int64_t row = 0; row < rows; row += CHUNK)
        for (int64_t d = 0; d < D; d += TILE, tiles += CELLS) {
            U16 tile[TILE];
            pair_rows(x + row * D + d, D, tile);
            put(tiles, tile);
        }
}

// Right side of products with the transposed matrix: for each 16 rows, D / 32 tiles.
void as_right_transposed(const BFloat16* x, int64_t rows, int64_t D, BFloat16* tiles) {
    for (int64_t row = 0; row < rows; row += TILE)
        for (int64_t d = 0; d < D; d += CHUNK, tiles += CELLS) {
            U16 tile[TILE];
            for (int r = 0; r < TILE; r++) std::memcpy(tile + r, x + (row + r) * D + d, 64);
            transpose(tile);
            put(tiles, tile);
        }
}

// Left side of products with the transposed matrix: for each chunk of 32 rows, D / 16 tiles.
void as_left_transposed(const BFloat16* x, int64_t rows, int64_t D, BFloat16* tiles) {
    for (int64_t row = 0; row < rows; row += CHUNK)
        for (int64_t d = 0; d < D; d += TILE, tiles += CELLS) {
            U16 tile[TILE];
            pair_rows(x + row * D + d, D, tile);
            transpose(tile);
            put(tiles, tile);
        }
}

// T rows, and zeros up to a multiple of 32.
struct Padded {
    Numbers copied;
    const BFloat16* rows;

    Padded(const BFloat16* x, int64_t T, int64_t D) : rows(x) {
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

// 32 rows of D times the transposed matrix of as_right_transposed(), from a row on: (32, n).
void times_transposed(const BFloat16* x, int64_t D, const Numbers& tiles, int64_t from, int64_t n,
                      float* result) {
    for (int64_t key = 0; key < n; key += CHUNK) {
        const BFloat16* right = tiles.data() + (from + key) * D;
        float* at = result + key;
        multiply({{{at, at + TILE}, {at + TILE * n, at + TILE * n + TILE}}, n},
                 {{x, x + TILE * D}, D, CHUNK, {right, right + TILE * D}, CELLS}, D / CHUNK, false);
    }
}

// 32 rows of n times the matrix of as_right(), from a row on: (32, D).
void times(const BFloat16* x, int64_t n, const Numbers& tiles, int64_t from, int64_t D,
           float* result) {
    for (int64_t d = 0; d < D; d += CHUNK) {
        const BFloat16* right = tiles.data() + from * D + d * CHUNK;
        float* at = result + d;
        multiply({{{at, at + TILE}, {at + TILE * D, at + TILE * D + TILE}}, D},
                 {{x, x + TILE * n}, n, CHUNK, {right, right + CELLS}, D * CHUNK}, n / CHUNK,
                 false);
    }
}

// The rows of a chunk that exist.
void put_rows(const float* x, int64_t chunk, const Shape& shape, BFloat16* rows) {
    int64_t D = shape.D, end = std::min(shape.T, (chunk + 1) * CHUNK) * D;
    for (int64_t i = chunk * CHUNK * D; i < end; i += LANES)
        store(rows + i, load(x + i - chunk * CHUNK * D));
}

void forward(const BFloat16* q, const BFloat16* k, const BFloat16* v, BFloat16* out,
             BFloat16* weights, const Shape& shape) {
    int64_t T = shape.T, D = shape.D, G = shape.G, rows = shape.chunks() * CHUNK;
    int64_t of_head = shape.weights();
#pragma omp parallel
    {
        Tiles tiles;
        Numbers keys(rows * D), values(rows * D);
        std::vector<float> scores(CHUNK * rows), exponentials(rows), result(CHUNK * D);
#pragma omp for
        for (int64_t n = 0; n < shape.N; n++) {
            as_right_transposed(Padded(k + n * T * D, T, D).rows, rows, D, keys.data());
            as_right(Padded(v + n * T * D, T, D).rows, rows, D, values.data());
            for (int64_t head = n * G; head < (n + 1) * G; head++) {
                Padded queries(q + head * T * D, T, D);
                BFloat16* own = weights + head * of_head;
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
struct KeyGradient {
    int64_t D;
    std::vector<float> tiles;
    Numbers right;  // of a group: for each 16 keys, GROUP tiles of pairs of queries

    KeyGradient(int64_t rows, int64_t D)
        : D(D), tiles(rows * D), right(rows / TILE * GROUP * CELLS) {}

    void clear() { std::fill(tiles.begin(), tiles.end(), 0.0f); }

    BFloat16* right_tile(int64_t key_tile, int64_t chunk) {
        return right.data() + (key_tile * GROUP + chunk % GROUP) * CELLS;
    }

    // Takes 32 rows of weights, whose first key is `from`.
    void take(const BFloat16* weights, int64_t chunk, int64_t from, int64_t width) {
        for (int64_t key = 0; key < width; key += TILE) {
            U16 tile[TILE];
            pair_rows(weights + key, width, tile);
            put(right_tile((from + key) / TILE, chunk), tile);
        }
    }

    // Adds the products of the chunks of a group. left: of as_left_transposed().
    void add(const Numbers& left, int64_t first, int64_t end, const Shape& shape) {
        for (int64_t key = shape.first_key(first); key < end * CHUNK; key += CHUNK) {
            // chunks before have no such key, and chunks after have passed it
            int64_t begin = std::max(first, key / CHUNK), last = begin;
            while (last < end && shape.first_key(last) <= key) last++;
            if (begin == last) continue;
            for (int64_t d = 0; d < D; d += CHUNK) {
                float* at = tiles.data() + (key * D + d * TILE);
                const BFloat16* rows = left.data() + begin * CHUNK * D + d * CHUNK;
                multiply({{{at, at + TILE * D}, {at + TILE * TILE, at + TILE * D + TILE * TILE}},
                          TILE},
                         {{rows, rows + CELLS},
                          CHUNK,
                          D * CHUNK,
                          {right_tile(key / TILE, begin), right_tile(key / TILE + 1, begin)},
                          CELLS},
                         last - begin, true);
            }
        }
    }

    void put_into(BFloat16* rows, int64_t T) {
        for (int64_t key = 0; key < T; key += TILE)
            for (int64_t d = 0; d < D; d += TILE) {
                U16 tile[TILE];
                std::memcpy(tile, tiles.data() + key * D + d * TILE, sizeof tile);
                transpose(tile);
                for (int64_t r = 0; r < std::min(TILE, T - key); r++)
                    store(rows + (key + r) * D + d, F16{{(Native)tile[r]}});
            }
    }
};

void backward(const BFloat16* upstream, const BFloat16* q, const BFloat16* k, const BFloat16* v,
              const BFloat16* weights, BFloat16* dq, BFloat16* dk, BFloat16* dv,
              const Shape& shape) {
    int64_t T = shape.T, D = shape.D, G = shape.G, rows = shape.chunks() * CHUNK;
    int64_t of_head = shape.weights();
#pragma omp parallel
    {
        Tiles tiles;
        Numbers keys(rows * D), values(rows * D), left_up(rows * D), left_q(rows * D);
        Numbers score_gradients(CHUNK * rows);
        KeyGradient of_keys(rows, D), of_values(rows, D);
        std::vector<float> gradients(CHUNK * rows), result(CHUNK * D);
#pragma omp for
        for (int64_t n = 0; n < shape.N; n++) {
            as_right(Padded(k + n * T * D, T, D).rows, rows, D, keys.data());
            as_right_transposed(Padded(v + n * T * D, T, D).rows, rows, D, values.data());
            of_keys.clear();
            of_values.clear();
            for (int64_t head = n * G; head < (n + 1) * G; head++) {
                Padded up(upstream + head * T * D, T, D);
                as_left_transposed(up.rows, rows, D, left_up.data());
                as_left_transposed(Padded(q + head * T * D, T, D).rows, rows, D, left_q.data());
                const BFloat16* own = weights + head * of_head;
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

#endif

// Whether what computes in tiles can be called: for bf16, and D a multiple of 32.
extern "C" int64_t nanochat_has_tiles() {
#if defined(__AVX512BF16__)
    return usable();
#else
    return 0;
#endif
}
