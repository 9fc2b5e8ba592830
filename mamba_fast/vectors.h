// Vectors of W numbers, which the compiler makes of whatever the CPU has. W comes from cpp.py.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef float vec_in_memory __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t whole_numbers __attribute__((vector_size(4 * W)));

// Before a loop with a known number of steps: written out, its arrays are in registers.
#define EACH _Pragma("GCC unroll 16")

static inline vec load(const float *from) { return *(const vec_in_memory *)from; }
static inline void store(float *to, vec v) { *(vec_in_memory *)to = v; }

// By halves: first lane i and lane i + W / 2 are added, then those W / 4 apart, and so on.
static inline float sum(vec v)
{
    EACH for (int half = W / 2; half > 0; half /= 2) {
        vec other = v;
        EACH for (int i = 0; i < W; i++) other[i] = v[i ^ half];
        v += other;
    }
    return v[0];
}

// 2^x, exactly 1 at 0, and 0 below -126: 2^whole, made of its bits, times a polynomial for what is
// left of x, which lies between -1/2 and 1/2.
static inline vec exp2_of(vec x)
{
    const vec least = vec{} - 126.f, most = vec{} + 128.f;
    vec within = x < least ? least : x;     // NaN stays
    within = within > most ? most : within;
    vec shifted = within + 12582912.f;      // 1.5 * 2^23: here floats are the whole numbers
    vec rest = within - (shifted - 12582912.f);
    vec p = 1.5353362e-4f * rest + 1.3398875e-3f;
    p = p * rest + 9.6184369e-3f;
    p = p * rest + 5.5503324e-2f;
    p = p * rest + 2.4022648e-1f;
    p = p * rest + 6.9314718e-1f;
    p = p * rest + 1.f;
    vec result = (vec)((whole_numbers)p + ((whole_numbers)shifted << 23));
    return x < least ? vec{} : result;
}

// While one exists, numbers too small to be normal are 0 on x86, where each operation with them
// takes a hundred times as long.
struct NoTinyNumbers {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    NoTinyNumbers() { _mm_setcsr(before | 0x8040); }
    ~NoTinyNumbers() { _mm_setcsr(before); }
#else
    NoTinyNumbers() {}
#endif
};

static inline vec sigmoid(vec x) { return 1.f / (1.f + exp2_of(x * -1.44269504f)); }

// log(1 + e^x) = max(x, 0) + log(1 + w) with w = e^-|x|, and log(1 + w) = 2 artanh(w / (2 + w)), of
// which this is the series: exact to float32 for small w too.
static inline vec softplus(vec x)
{
    vec positive = x < 0 ? vec{} : x, w = exp2_of((x < 0 ? x : -x) * 1.44269504f);
    vec s = w / (2.f + w), s2 = s * s;
    vec p = 7.6923077e-2f + s2 * 6.6666667e-2f;
    p = p * s2 + 9.0909091e-2f;
    p = p * s2 + 1.1111111e-1f;
    p = p * s2 + 1.4285714e-1f;
    p = p * s2 + 0.2f;
    p = p * s2 + 3.3333333e-1f;
    p = p * s2 + 1.f;
    return positive + 2.f * s * p;
}
