// Vectors of 16 numbers, in fp32 and bf16, for the C++ of this folder.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

// How many numbers a register holds. Compilers keep larger vectors in memory, and every operation
// then waits for loads and stores.
#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX2__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
constexpr int PARTS = LANES / NATIVE;
typedef float Native __attribute__((vector_size(NATIVE * sizeof(float))));
typedef int32_t Whole __attribute__((vector_size(NATIVE * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(NATIVE * sizeof(uint32_t))));
typedef uint16_t Narrow __attribute__((vector_size(NATIVE * sizeof(uint16_t))));

struct BFloat16 {
    uint16_t bits;
};

// ---- one number ----

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float* at, float x) { *at = x; }

// Rounds to nearest, ties to even. NaN stays NaN: the bits added do not reach its exponent.
inline void store(BFloat16* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- a register ----

inline Native load_native(const float* at) {
    Native x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Native load_native(const BFloat16* at) {
    Narrow x;
    std::memcpy(&x, at, sizeof x);
#if defined(__AVX512F__)
    // GCC would widen each half.
    return (Native)((Bits)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (Native)(__builtin_convertvector(x, Bits) << 16);
#endif
}

inline void store_native(float* at, Native x) { std::memcpy(at, &x, sizeof x); }

// Rounds as store() of one number.
inline void store_native(BFloat16* at, Native x) {
#if defined(__AVX512BF16__)
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
#else
    Bits bits = (Bits)x;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Narrow narrow = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Narrow);
#endif
    std::memcpy(at, &narrow, sizeof narrow);
}

// Subtracting 0 changes no number, which compilers know; adding it would change -0.
inline Native every(float x) { return x - Native{}; }

// The larger one of each pair, and b where a is NaN.
inline Native larger(Native a, Native b) { return a > b ? a : b; }

// x where it is positive at the same place, elsewhere 0.
inline Native where_positive(Native sign, Native x) { return sign > 0.0f ? x : Native{}; }

// x where first <= i + lane < end, elsewhere `other`.
inline Native within(Native x, int64_t i, int64_t first, int64_t end, Native other) {
    Whole at;
    for (int lane = 0; lane < NATIVE; lane++) at[lane] = lane;
    at += int32_t(i);
    return (at >= int32_t(first)) & (at < int32_t(end)) ? x : other;
}

// x, but at least `least` and at most `most`; NaN stays NaN.
inline Native clamp(Native x, float least, float most) {
    Native low = every(least), high = every(most);
#if defined(__AVX512F__)
    // Of these the second operand is the result if one is NaN.
    return (Native)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
    x = x < low ? low : x;
    return x > high ? high : x;
#endif
}

// x times 2 to the power of n, whole numbers from -126 to 127.
inline Native scaled(Native x, Native n) {
#if defined(__AVX512F__)
    return (Native)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    return x * (Native)((__builtin_convertvector(n, Whole) + 127) << 23);
#endif
}

// e^x within 2 units in the last place: x = n ln 2 + r, and a polynomial of r (Cephes' expf).
inline Native exp(Native x) {
    x = clamp(x, -87.3f, 88.3f);
    Native shifted = x * 1.44269504f + 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
    Native n = shifted - 12582912.0f;
    Native r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Native p = every(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return scaled(p, n);
}

// 1 / x within 2 units in the last place, for numbers from 1 to 3 x 10^38.
inline Native reciprocal(Native x) {
#if defined(__AVX512F__)
    // A division takes as long as ten other operations.
    Native y = (Native)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

inline float exp(float x) { return exp(every(x))[0]; }

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// ---- 16 numbers ----

struct F16 {
    Native part[PARTS];
};

// A function of the first parts of all x, then of the second ones, and so on.
template <class Function, class... X>
inline F16 each(Function function, const X&... x) {
    F16 result;
    for (int p = 0; p < PARTS; p++) result.part[p] = function(x.part[p]...);
    return result;
}

inline F16 all(float x) {
    return each([=](Native) { return every(x); }, F16{});
}

inline F16 operator+(F16 a, F16 b) {
    return each([](Native a, Native b) { return a + b; }, a, b);
}
inline F16 operator-(F16 a, F16 b) {
    return each([](Native a, Native b) { return a - b; }, a, b);
}
inline F16 operator*(F16 a, F16 b) {
    return each([](Native a, Native b) { return a * b; }, a, b);
}
inline F16 operator/(F16 a, F16 b) {
    return each([](Native a, Native b) { return a / b; }, a, b);
}
inline F16 operator+(F16 a, float b) { return a + all(b); }
inline F16 operator-(F16 a, float b) { return a - all(b); }
inline F16 operator*(F16 a, float b) { return a * all(b); }
inline F16 operator-(float a, F16 b) { return all(a) - b; }
inline F16 operator*(float a, F16 b) { return all(a) * b; }
inline F16 operator/(float a, F16 b) { return all(a) / b; }
inline F16& operator+=(F16& a, F16 b) { return a = a + b; }
inline F16& operator*=(F16& a, F16 b) { return a = a * b; }

template <class W>
inline F16 load(const W* at) {
    F16 x;
    for (int p = 0; p < PARTS; p++) x.part[p] = load_native(at + p * NATIVE);
    return x;
}

template <class W>
inline void store(W* at, F16 x) {
    for (int p = 0; p < PARTS; p++) store_native(at + p * NATIVE, x.part[p]);
}

inline F16 exp(F16 x) {
    return each([](Native x) { return exp(x); }, x);
}

inline F16 reciprocal(F16 x) {
    return each([](Native x) { return reciprocal(x); }, x);
}

inline F16 larger(F16 a, F16 b) {
    return each([](Native a, Native b) { return larger(a, b); }, a, b);
}

inline F16 where_positive(F16 sign, F16 x) {
    return each([](Native sign, Native x) { return where_positive(sign, x); }, sign, x);
}

inline F16 within(F16 x, int64_t i, int64_t first, int64_t end, F16 other) {
    for (int p = 0; p < PARTS; p++)
        x.part[p] = within(x.part[p], i + p * NATIVE, first, end, other.part[p]);
    return x;
}

// Halves are added, then quarters, and so on: the same order, however much a register holds.
inline float sum(F16 x) {
    typedef float F8 __attribute__((vector_size(8 * sizeof(float))));
    typedef float F4 __attribute__((vector_size(4 * sizeof(float))));
    F8 half[2];
    std::memcpy(half, &x, sizeof half);
    half[0] += half[1];
    F4 quarter[2];
    std::memcpy(quarter, half, sizeof quarter);
    F4 rest = quarter[0] + quarter[1];
    return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}

inline float largest(F16 x) {
    float lanes[LANES];
    store(lanes, x);
    return *std::max_element(lanes, lanes + LANES);
}

}  // namespace
