// Products of matrices in tiles that stay in registers and caches: in fp32 on any processor, in
// bf16 on those that multiply tiles of it (AMX) or pairs of it (AVX512-BF16).
//
// A product's block of 32 x 32 sums is in fp32, and is four tiles of 16 x 16. Its left side is two
// tiles of 16 rows with 32 numbers each. Its right side is two tiles of 16 columns, laid out by
// rows that hold the same four bytes of every column: one number in fp32, two in bf16.
//
// W: what the numbers of both sides are, float or BFloat16.

#pragma once

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vectors.h"

namespace {

constexpr int64_t TILE = 16;   // rows, and columns of the right side
constexpr int64_t CHUNK = 32;  // numbers of a row: two tiles of rows or columns
constexpr int64_t CELLS = TILE * CHUNK;

// ---- products ----

// Four sums of a block of 32 x 32, in tiles of 16 x 16 whose rows are ldc apart.
struct Sums {
    float* at[2][2];
    int64_t ldc;
};

// Left tiles have rows lda apart, and left_step numbers between chunks; right tiles have CELLS
// numbers.
template <class W>
struct Sides {
    const W* left[2];
    int64_t lda, left_step;
    const W* right[2];
    int64_t right_step;
};

// of_columns(): four bytes of each of NATIVE columns. of_row(): four bytes of a row, the same for
// every column.
inline Native of_columns(const float* right) { return load_native(right); }
inline Native of_row(const float* left) { return every(*left); }
inline Native plus_product(Native total, Native left, Native right) {
    return total + left * right;
}

#if defined(__AVX512BF16__)
inline __m512bh of_columns(const BFloat16* right) {
    return (__m512bh)_mm512_loadu_si512(right);
}
inline __m512bh of_row(const BFloat16* left) {
    int32_t two;
    std::memcpy(&two, left, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}
inline Native plus_product(Native total, __m512bh left, __m512bh right) {
    return (Native)_mm512_dpbf16_ps((__m512)total, left, right);
}
#endif

// Registers that hold the sums of a row at a time.
constexpr int WIDE = 2;

// multiply() for ROWS rows of a left tile, from `first` on, and WIDE registers of columns, from
// `column` on. All their sums stay in registers; of fewer than ten, each product would wait for the
// one before.
template <int ROWS, class W>
inline void multiply_rows(const Sums& sums, const Sides<W>& sides, int64_t chunks, bool add,
                          int half, int64_t first, int64_t column) {
    constexpr int64_t IN_FOUR_BYTES = 4 / sizeof(W);
    float* at[WIDE];
    const W* right[WIDE];
    for (int v = 0; v < WIDE; v++) {
        int64_t tile = (column + v * NATIVE) / TILE, lane = (column + v * NATIVE) % TILE;
        at[v] = sums.at[half][tile] + first * sums.ldc + lane;
        right[v] = sides.right[tile] + lane * IN_FOUR_BYTES;
    }
    const W* left = sides.left[half] + first * sides.lda;
    Native total[ROWS][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < WIDE; v++)
            total[r][v] = add ? load_native(at[v] + r * sums.ldc) : Native{};
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t i = 0; i < CHUNK; i += IN_FOUR_BYTES) {
            decltype(of_columns(left)) columns[WIDE];
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v++)
                columns[v] = of_columns(right[v] + chunk * sides.right_step + i * TILE);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                auto row = of_row(left + chunk * sides.left_step + r * sides.lda + i);
#pragma GCC unroll 2
                for (int v = 0; v < WIDE; v++)
                    total[r][v] = plus_product(total[r][v], row, columns[v]);
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < WIDE; v++) store_native(at[v] + r * sums.ldc, total[r][v]);
}

// The sums of so many chunks' products, added to what is there or put in its place.
template <class W>
inline void multiply(const Sums& sums, const Sides<W>& sides, int64_t chunks, bool add) {
    for (int half = 0; half < 2; half++) {
        if constexpr (NATIVE == LANES) {
            multiply_rows<8>(sums, sides, chunks, add, half, 0, 0);
            multiply_rows<8>(sums, sides, chunks, add, half, 8, 0);
        } else {
            for (int64_t column = 0; column < 2 * TILE; column += WIDE * NATIVE) {
                multiply_rows<6>(sums, sides, chunks, add, half, 0, column);
                multiply_rows<5>(sums, sides, chunks, add, half, 6, column);
                multiply_rows<5>(sums, sides, chunks, add, half, 11, column);
            }
        }
    }
}

// A thread has one of these while it calls multiply(): it configures AMX.
template <class W>
struct Tiles {
    Tiles() {}
};

// Whether this processor multiplies tiles of W.
template <class W>
inline bool has_tiles() {
#if defined(__AVX512BF16__)
    return true;
#else
    return sizeof(W) == sizeof(float);
#endif
}

// Machines that show AMX but hide AVX-512 have no layouts for it.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

// Tiles 0 to 3 hold sums, 4 and 5 the left side, 6 and 7 the right one: all of 16 rows of 64 bytes.
template <>
struct Tiles<BFloat16> {
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

template <>
inline void multiply(const Sums& sums, const Sides<BFloat16>& sides, int64_t chunks, bool add) {
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
template <>
inline bool has_tiles<BFloat16>() {
#if defined(__linux__)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

#endif

// ---- tiles in fp32 ----

// Rows to columns, of 16 x 16 numbers; four are stored together.
inline void transpose(const float* x, int64_t stride, float* columns, int64_t column_stride) {
    for (int64_t r = 0; r < TILE; r += 4)
        for (int64_t c = 0; c < TILE; c++) {
            float four[4];
            for (int64_t i = 0; i < 4; i++) four[i] = x[(r + i) * stride + c];
            std::memcpy(columns + c * column_stride + r, four, sizeof four);
        }
}

// A right tile of 16 columns of 32 rows.
inline void right_tile(const float* x, int64_t stride, float* tile) {
    for (int64_t r = 0; r < CHUNK; r++) store(tile + r * TILE, load(x + r * stride));
}

// A right tile of 16 rows of 32 numbers, transposed.
inline void right_tile_transposed(const float* x, int64_t stride, float* tile) {
    for (int64_t i = 0; i < CHUNK; i += TILE) transpose(x + i, stride, tile + i * TILE, TILE);
}

// A left tile of 16 columns of 32 rows, transposed.
inline void left_tile_transposed(const float* x, int64_t stride, float* tile) {
    for (int64_t i = 0; i < CHUNK; i += TILE) transpose(x + i * stride, stride, tile + i, CHUNK);
}

// The first rows of 16 x 16 sums, transposed.
inline void put_transposed(const float* sums, float* rows, int64_t stride, int64_t n_rows) {
    float tile[TILE * TILE];
    transpose(sums, TILE, tile, TILE);
    for (int64_t r = 0; r < n_rows; r++) store(rows + r * stride, load(tile + r * TILE));
}

// ---- tiles in bf16 ----

#if defined(__AVX512BF16__)

typedef uint32_t U16 __attribute__((vector_size(64)));

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

inline void right_tile(const BFloat16* x, int64_t stride, BFloat16* tile) {
    U16 rows[TILE];
    pair_rows(x, stride, rows);
    std::memcpy(tile, rows, sizeof rows);
}

inline void right_tile_transposed(const BFloat16* x, int64_t stride, BFloat16* tile) {
    U16 rows[TILE];
    for (int r = 0; r < TILE; r++) std::memcpy(rows + r, x + r * stride, sizeof rows[r]);
    transpose(rows);
    std::memcpy(tile, rows, sizeof rows);
}

inline void left_tile_transposed(const BFloat16* x, int64_t stride, BFloat16* tile) {
    U16 rows[TILE];
    pair_rows(x, stride, rows);
    transpose(rows);
    std::memcpy(tile, rows, sizeof rows);
}

inline void put_transposed(const float* sums, BFloat16* rows, int64_t stride, int64_t n_rows) {
    U16 tile[TILE];
    std::memcpy(tile, sums, sizeof tile);
    transpose(tile);
    for (int64_t r = 0; r < n_rows; r++) store(rows + r * stride, F16{{(Native)tile[r]}});
}

#endif

// ---- matrices ----

// Of a matrix of numbers whose rows are D long, in tiles:
//
// Right side of products with the matrix: for each chunk of 32 rows, D / 16 tiles.
template <class W>
void as_right(const W* x, int64_t rows, int64_t D, W* tiles) {
    for (int64_t row = 0; row < rows; row += CHUNK)
        for (int64_t d = 0; d < D; d += TILE, tiles += CELLS) right_tile(x + row * D + d, D, tiles);
}

// Right side of products with the transposed matrix: for each 16 rows, D / 32 tiles.
template <class W>
void as_right_transposed(const W* x, int64_t rows, int64_t D, W* tiles) {
    for (int64_t row = 0; row < rows; row += TILE)
        for (int64_t d = 0; d < D; d += CHUNK, tiles += CELLS)
            right_tile_transposed(x + row * D + d, D, tiles);
}

// Left side of products with the transposed matrix: for each chunk of 32 rows, D / 16 tiles.
template <class W>
void as_left_transposed(const W* x, int64_t rows, int64_t D, W* tiles) {
    for (int64_t row = 0; row < rows; row += CHUNK)
        for (int64_t d = 0; d < D; d += TILE, tiles += CELLS)
            left_tile_transposed(x + row * D + d, D, tiles);
}

// 32 rows of D times the transposed matrix of as_right_transposed(), from a row on: (32, n).
template <class W>
void times_transposed(const W* x, int64_t D, const std::vector<W>& tiles, int64_t from, int64_t n,
                      float* result) {
    for (int64_t column = 0; column < n; column += CHUNK) {
        const W* right = tiles.data() + (from + column) * D;
        float* at = result + column;
        multiply<W>({{{at, at + TILE}, {at + TILE * n, at + TILE * n + TILE}}, n},
                    {{x, x + TILE * D}, D, CHUNK, {right, right + TILE * D}, CELLS}, D / CHUNK,
                    false);
    }
}

// 32 rows of n times the matrix of as_right(), from a row on: (32, D).
template <class W>
void times(const W* x, int64_t n, const std::vector<W>& tiles, int64_t from, int64_t D,
           float* result) {
    for (int64_t d = 0; d < D; d += CHUNK) {
        const W* right = tiles.data() + from * D + d * CHUNK;
        float* at = result + d;
        multiply<W>({{{at, at + TILE}, {at + TILE * D, at + TILE * D + TILE}}, D},
                    {{x, x + TILE * n}, n, CHUNK, {right, right + CELLS}, D * CHUNK}, n / CHUNK,
                    false);
    }
}

}  // namespace

// Whether what computes in tiles can be called, for numbers in bf16 or in fp32.
extern "C" int64_t nanochat_has_tiles(int64_t is_bf16) {
    return is_bf16 ? has_tiles<BFloat16>() : has_tiles<float>();
}
