// Vectors of 16 numbers, in fp32 and bf16, for the C++ of this folder.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef uint32_t U16 __attribute__((vector_size(64)));
constexpr int LANES = 16;

// What a register holds. Compilers keep larger vectors in memory, and an inner loop then waits for
// loads and stores.
#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX2__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
typedef float Native __attribute__((vector_size(NATIVE * sizeof(float))));
constexpr int PARTS = LANES / NATIVE;

struct BFloat16 {
    uint16_t bits;
};

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

inline F16 load(const float* at) {
    F16 x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline F16 load(const BFloat16* at) {
    H16 x;
    std::memcpy(&x, at, sizeof x);
#if defined(__AVX512F__)
    // GCC would widen each half.
    U16 wide = (U16)_mm512_cvtepu16_epi32((__m256i)x) << 16;
#else
    U16 wide = __builtin_convertvector(x, U16) << 16;
#endif
    F16 value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline void store(float* at, F16 x) { std::memcpy(at, &x, sizeof x); }

// Rounds as store() of one number.
inline void store(BFloat16* at, F16 x) {
#if defined(__AVX512BF16__)
    __m512 wide;
    std::memcpy(&wide, &x, sizeof wide);
    __m256bh narrow = _mm512_cvtneps_pbh(wide);
    std::memcpy(at, &narrow, sizeof narrow);
#else
    U16 bits;
    std::memcpy(&bits, &x, sizeof bits);
    U16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    H16 narrow = __builtin_convertvector(x == x ? rounded : U16{} + 0x7fc0, H16);
    std::memcpy(at, &narrow, sizeof narrow);
#endif
}

inline Native load_native(const float* at) {
    Native x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Native load_native(const BFloat16* at) {
    typedef uint16_t Narrow __attribute__((vector_size(NATIVE * sizeof(uint16_t))));
    typedef uint32_t Wide __attribute__((vector_size(NATIVE * sizeof(uint32_t))));
    Narrow x;
    std::memcpy(&x, at, sizeof x);
    Wide wide = __builtin_convertvector(x, Wide) << 16;
    Native value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Halves are added, then quarters, and so on. By copies: without AVX-512 compilers shuffle a vector
// of this size number by number.
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

// x, but at least `least` and at most `most`; NaN stays NaN.
inline F16 clamp(F16 x, float least, float most) {
    F16 low = F16{} + least, high = F16{} + most;
#if defined(__AVX512F__)
    // Of these the second operand is the result if one is NaN.
    return (F16)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
    x = x < low ? low : x;
    return x > high ? high : x;
#endif
}

// x times 2 to the power of n, whole numbers from -126 to 127.
inline F16 scaled(F16 x, F16 n) {
#if defined(__AVX512F__)
    return (F16)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    I16 exponent = (__builtin_convertvector(n, I16) + 127) << 23;
    F16 power;
    std::memcpy(&power, &exponent, sizeof power);
    return x * power;
#endif
}

// e^x within 2 units in the last place: x = n ln 2 + r, and a polynomial of r (Cephes' expf).
inline F16 exp(F16 x) {
    x = clamp(x, -87.3f, 88.3f);
    F16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
    F16 n = shifted - 12582912.0f;
    F16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F16 p = F16{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return scaled(p, n);
}

// 1 / x within 2 units in the last place, for numbers from 1 to 3 x 10^38.
inline F16 reciprocal(F16 x) {
#if defined(__AVX512F__)
    // A division takes as long as ten other operations.
    F16 y = (F16)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

inline float exp(float x) { return exp(F16{} + x)[0]; }

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace
