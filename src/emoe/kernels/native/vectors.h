/* Vectors of 16 floats and 32 weights at a time, in GCC's and clang's vector extensions: one source for AVX-512, AVX2
 * and others. bfloat16 is the upper half of a float32, so reading it is a shift. */

#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(64), aligned(1), may_alias));
typedef int8_t v16s8 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t v16u8 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t v16u16 __attribute__((vector_size(32), aligned(2), may_alias));

enum { F32 = 0, BF16 = 1 };                              /* types of activations, biases and gates */
enum { ROWS = 0, COLUMNS = 1, INT8 = 2, INT4 = 3 };      /* formats of a matrix: [out, in], [in, out], quantised */

#define LANES 16
#define STEP 32 /* columns that one step of a product takes */

INLINE long align_up(long n, long to) { return (n + to - 1) / to * to; }
INLINE long type_bytes(int type) { return type == BF16 ? 2 : 4; }
INLINE vf splat(float x) { return x - (vf){0}; }

/* Round to bfloat16 (to nearest, ties to even; NaN stays NaN) and keep it in a float. */
INLINE vf to_bf16(vf v)
{
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    vu nan = (vu)(v != v);
    return (vf)((rounded & ~nan) | (0x7fc00000u & nan));
}

INLINE vf rounded(int type, vf v) { return type == BF16 ? to_bf16(v) : v; }

INLINE vf load16(int type, const char *p)
{
    if (type == F32) return *(const vf_any *)p;
    return (vf)(__builtin_convertvector(*(const v16u16 *)p, vu) << 16);
}

/* 16 bytes as 16 integers: convertvector does so too, but GCC 12 takes the bytes one by one, ten times as slow. */
INLINE vi widen_signed(const char *p)
{
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    union { __m256i half[2]; vi whole; } v;
    v.half[0] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
    v.half[1] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)));
    return v.whole;
#else
    return __builtin_convertvector(*(const v16s8 *)p, vi);
#endif
}

INLINE vi widen_unsigned(const char *p)
{
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    union { __m256i half[2]; vi whole; } v;
    v.half[0] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    v.half[1] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)));
    return v.whole;
#else
    return __builtin_convertvector(*(const v16u8 *)p, vi);
#endif
}

/* Store 16 values that `rounded` has rounded. */
INLINE void store16(int type, char *p, vf v)
{
    if (type == F32) *(vf_any *)p = v;
    else *(v16u16 *)p = __builtin_convertvector((vu)v >> 16, v16u16);
}

INLINE float load1(int type, const char *p)
{
    float f;
    uint32_t bits;
    uint16_t half;
    if (type == F32) {
        memcpy(&f, p, 4);
        return f;
    }
    memcpy(&half, p, 2);
    bits = (uint32_t)half << 16;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE void store1(int type, char *p, float f)
{
    uint32_t bits;
    uint16_t half;
    if (type == F32) {
        memcpy(p, &f, 4);
        return;
    }
    memcpy(&bits, &f, 4);
    half = f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    memcpy(p, &half, 2);
}

/* Add the lanes, always in the same order. */
INLINE float sum16(vf v)
{
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    union { vf whole; v8 half[2]; } a = {v};
    union { v8 whole; v4 half[2]; } b = {a.half[0] + a.half[1]};
    v4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* e^x within 2 units in the last place; x is kept within -87..88. */
INLINE vf exp16(vf x)
{
    vi low = x < splat(-87.0f), high = x > splat(88.0f);
    x = (vf)(((vi)x & ~low & ~high) | ((vi)splat(-87.0f) & low) | ((vi)splat(88.0f) & high));
    vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
}
