// Sixteen-lane vectors on GCC vector extensions, with one fused multiply-add and one bf16 dot product per ISA.
//
// Compiled with -ffp-contract=off: a product and a sum are fused only where fma() says so. Every function of the engine
// therefore rounds in one order whatever the number of tokens, threads or rows in a call. That order is what makes
// speculative output bit-identical to plain decoding.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prism {

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t bf16;

constexpr int kLanes = 16;

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vu load_u(const uint32_t* p) {
    vu v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vf splat(float x) { return x - vf{}; }  // x - 0 is x for every x; x + 0 would not be
static inline vu splat_u(uint32_t x) { return vu{} + x; }

// GCC 12 splits 512-bit conversions between 16 and 32 bits into halves, hence the intrinsics.
static inline vu widen(vh h) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#else
    return __builtin_convertvector(h, vu);
#endif
}
static inline vh narrow(vu v) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return __builtin_convertvector(v, vh);
#endif
}

static inline vf load_bf16(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(widen(h) << 16);
}

static inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Round to nearest even. Inputs are finite.
static inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void store_bf16(bf16* p, vf x) {
    const vu bits = (vu)x;
    const vh h = narrow((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    std::memcpy(p, &h, sizeof h);
}

static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    union Halves {
        vf v;
        __m256 h[2];
    } x{a}, y{b}, z{c};
    z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
    z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
    return z.v;
#else
    return a * b + c;
#endif
}

// acc[l] += w[l].low * x[l].low + w[l].high * x[l].high, bf16 pairs in 32-bit lanes.
static inline vf dot2(vf acc, vu w, vu x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
    acc = fma((vf)(w << 16), (vf)(x << 16), acc);
    return fma((vf)(w & 0xffff0000u), (vf)(x & 0xffff0000u), acc);
#endif
}

static inline vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return (vf)((a > b) ? (vi)a : (vi)b);
#endif
}

static inline float reduce_max(vf v) {
    float m = v[0];
    for (int l = 1; l < kLanes; ++l) m = v[l] > m ? v[l] : m;
    return m;
}
static inline float reduce_sum(vf v) {
    float s = v[0];
    for (int l = 1; l < kLanes; ++l) s += v[l];
    return s;
}

// exp(x) for x <= 88; below -87 it stays at exp(-87). Cody-Waite reduction and a degree-6 polynomial, error < 2 ulp.
static inline vf exp_approx(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    x = maximum(x, splat(-87.0f));
    const vf shifted = fma(x, splat(1.44269504088896341f), magic);
    const vf n = shifted - magic;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.3981999507e-3f);
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const vi exponent = ((vi)shifted - (vi)magic) << 23;
    return (vf)((vi)p + exponent);
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache
static inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

static inline void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace prism
