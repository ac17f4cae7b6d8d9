/* Sixteen floats, and what the kernels do with them, for the instruction set that a file is compiled for.
 *
 * A `vec` is made of `parts` as wide as the processor's registers. Only what the vector extensions of gcc and clang
 * cannot say is written with intrinsics.
 */
#ifndef FOREDRAFT_VEC_H
#define FOREDRAFT_VEC_H

#include <math.h>
#include <string.h>

#include "native.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#define ISA(name) name##_amx
#define ISA_NAME "amx"
enum { PARTS = 1, WIDTH = 16 };
#elif defined(__AVX512BF16__)
#include <immintrin.h>
#define ISA(name) name##_avx512_bf16
#define ISA_NAME "avx512_bf16"
enum { PARTS = 1, WIDTH = 16 };
#elif defined(__AVX512F__)
#include <immintrin.h>
#define ISA(name) name##_avx512
#define ISA_NAME "avx512"
enum { PARTS = 1, WIDTH = 16 };
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ISA(name) name##_avx2
#define ISA_NAME "avx2"
enum { PARTS = 2, WIDTH = 8 };
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define ISA(name) name##_portable
#define ISA_NAME "portable"
enum { PARTS = 4, WIDTH = 4 };
#endif

/* Whether bf16 meets bf16, two pairs at a time; elsewhere inputs stay floats, and weights are widened to meet them. */
#if defined(__AVX512BF16__)
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
#endif

typedef float part __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ipart __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t upart __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t halves __attribute__((vector_size(WIDTH * 2)));

typedef struct {
  part p[PARTS];
} vec;

typedef struct {
  upart p[PARTS];
} lanes; /* sixteen times 32 bits, of whatever */

#define EACH_PART UNROLL for (int i = 0; i < PARTS; i++)

INLINE part part_fma(part a, part b, part c) { /* a b + c, rounded once where the processor can */
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

INLINE part part_choose(ipart mask, part a, part b) {
  return (part)(((ipart)a & mask) | ((ipart)b & ~mask));
}

INLINE part part_max(part a, part b) { /* b where either is not a number */
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return part_choose(a > b, a, b);
#endif
}

INLINE part part_min(part a, part b) { /* the same */
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return part_choose(a < b, a, b);
#endif
}

INLINE vec v_set(float x) {
  vec r;
  EACH_PART r.p[i] = x - (part){0};
  return r;
}
/* Part by part: gcc copies a whole `vec` by way of the stack, in pieces from which it cannot be forwarded. */
INLINE vec v_load(const float *p) {
  vec r;
  EACH_PART memcpy(&r.p[i], p + i * WIDTH, sizeof r.p[i]);
  return r;
}
INLINE void v_store(float *p, vec a) {
  EACH_PART memcpy(p + i * WIDTH, &a.p[i], sizeof a.p[i]);
}
INLINE vec v_add(vec a, vec b) {
  EACH_PART a.p[i] += b.p[i];
  return a;
}
INLINE vec v_sub(vec a, vec b) {
  EACH_PART a.p[i] -= b.p[i];
  return a;
}
INLINE vec v_mul(vec a, vec b) {
  EACH_PART a.p[i] *= b.p[i];
  return a;
}
INLINE vec v_div(vec a, vec b) {
  EACH_PART a.p[i] /= b.p[i];
  return a;
}
INLINE vec v_fma(vec a, vec b, vec c) {
  EACH_PART c.p[i] = part_fma(a.p[i], b.p[i], c.p[i]);
  return c;
}
INLINE vec v_max(vec a, vec b) {
  EACH_PART a.p[i] = part_max(a.p[i], b.p[i]);
  return a;
}
INLINE vec v_abs(vec a) {
  EACH_PART a.p[i] = (part)((upart)a.p[i] & 0x7fffffffu);
  return a;
}

/* No number where a is none, else 0. */
INLINE vec v_nan(vec a) {
  EACH_PART a.p[i] = (part)((ipart)(a.p[i] != a.p[i]));
  return a;
}

/* a where first <= its place < end, b elsewhere; the places of the sixteen begin at `place`. */
INLINE vec v_between(int place, int first, int end, vec a, vec b) {
  static const int32_t places[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  EACH_PART {
    ipart at;
    memcpy(&at, places + i * WIDTH, sizeof at);
    at += place;
    a.p[i] = part_choose((at >= first) & (at < end), a.p[i], b.p[i]);
  }
  return a;
}

/* Where one of sixteen bits is set, or x is no number, x; -infinity elsewhere. */
INLINE vec v_where(const uint8_t *bits, vec x) {
  static const int32_t powers[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                     1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const int32_t both = bits[0] | bits[1] << 8;
  EACH_PART {
    ipart power;
    memcpy(&power, powers + i * WIDTH, sizeof power);
    x.p[i] = part_choose(((both & power) != 0) | (x.p[i] != x.p[i]), x.p[i], -INFINITY - (part){0});
  }
  return x;
}

/* Whether any of a is at least its counterpart in b. */
INLINE bool v_reaches(vec a, vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a.p[0], b.p[0], _CMP_GE_OQ) != 0;
#else
  uint64_t any = 0, bits[WIDTH / 2];
  EACH_PART {
    ipart reached = a.p[i] >= b.p[i];
    memcpy(bits, &reached, sizeof bits);
    for (int j = 0; j < WIDTH / 2; j++) any |= bits[j];
  }
  return any != 0;
#endif
}

/* Sum and largest of sixteen, as a tree: halves, quarters, ... */
#if defined(__AVX512F__)
#define HALVED(op, a) op(_mm512_castps512_ps256((a).p[0]), _mm512_extractf32x8_ps((a).p[0], 1))
#elif defined(__AVX2__)
#define HALVED(op, a) op((a).p[0], (a).p[1])
#endif
#if defined(__AVX2__)
INLINE float v_sum(vec a) {
  __m256 eight = HALVED(_mm256_add_ps, a);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float v_largest(vec a) {
  __m256 eight = HALVED(_mm256_max_ps, a);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
INLINE float v_sum(vec a) {
  float x[16];
  v_store(x, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
INLINE float v_largest(vec a) {
  float x[16];
  v_store(x, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}
#endif

INLINE part part_whole(part a) { /* the nearest whole number, of even ones where two are */
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const part magic = 12582912.0f - (part){0}; /* 1.5 * 2^23 */
  return (a + magic) - magic;
#endif
}

INLINE part part_times_power(part a, part n) { /* a 2^n, of whole n in [-126, 127] */
#if defined(__AVX512F__)
  return _mm512_scalef_ps(a, n);
#else
  return a * (part)((__builtin_convertvector(n, ipart) + 127) << 23);
#endif
}

/* e^x to within 2 units of the last place, for x in [-87, 88]; outside it is that of the border, and what is no number
 * stays none. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vec v_exp(vec x) {
  EACH_PART {
    part a = part_min(88.0f - (part){0}, part_max(-87.0f - (part){0}, x.p[i]));
    part n = part_whole(a * 1.44269504f);
    part r = part_fma(n, -0.693359375f - (part){0}, a);
    r = part_fma(n, 2.12194440e-4f - (part){0}, r);
    part p = part_fma(1.9875691500e-4f - (part){0}, r, 1.3981999507e-3f - (part){0});
    p = part_fma(p, r, 8.3334519073e-3f - (part){0});
    p = part_fma(p, r, 4.1665795894e-2f - (part){0});
    p = part_fma(p, r, 1.6666665459e-1f - (part){0});
    p = part_fma(p, r, 5.0000001201e-1f - (part){0});
    p = part_fma(p * r, r, r + 1.0f);
    x.p[i] = part_times_power(p, n);
  }
  return x;
}

INLINE vec v_from_bf16(const bf16 *p) {
  vec r;
  EACH_PART {
    halves h;
    memcpy(&h, p + i * WIDTH, sizeof h);
    r.p[i] = (part)(__builtin_convertvector(h, upart) << 16);
  }
  return r;
}

/* Rounded to the nearest, ties to even. */
INLINE void v_to_bf16(bf16 *p, vec a) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh(a.p[0]);
  memcpy(p, &h, sizeof h);
#else
  EACH_PART {
    upart u = (upart)a.p[i], rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    upart bad = (upart)(a.p[i] != a.p[i]);
    halves h = __builtin_convertvector((rounded & ~bad) | (0x7fc0u & bad), halves);
    memcpy(p + i * WIDTH, &h, sizeof h);
  }
#endif
}

/* a at place i of an array of this format: F32 or BF16. */
INLINE void v_put(const int format, void *out, size_t i, vec a) {
  if (format == BF16) v_to_bf16((bf16 *)out + i, a);
  else v_store((float *)out + i, a);
}

INLINE lanes l_load(const void *p) {
  lanes r;
  EACH_PART memcpy(&r.p[i], (const char *)p + i * sizeof r.p[i], sizeof r.p[i]);
  return r;
}
INLINE lanes l_set(uint32_t x) {
  lanes r;
  EACH_PART r.p[i] = x + (upart){0};
  return r;
}
INLINE lanes l_repeat(const void *p) { /* the four bytes there, sixteen times */
  uint32_t x;
  memcpy(&x, p, sizeof x);
  return l_set(x);
}

/* The first and the second bf16 of each lane, as floats. */
INLINE lanes l_first(lanes a) {
  EACH_PART a.p[i] <<= 16;
  return a;
}
INLINE lanes l_second(lanes a) {
  EACH_PART a.p[i] &= 0xffff0000u;
  return a;
}

/* sum + w x, lane by lane: one product of floats, or a pair of bf16. */
INLINE vec v_dot(const int format, vec sum, lanes w, lanes x) {
  EACH_PART {
#if defined(__AVX512BF16__)
    if (format == BF16) {
      sum.p[i] = _mm512_dpbf16_ps(sum.p[i], (__m512bh)w.p[i], (__m512bh)x.p[i]);
      continue;
    }
#endif
    (void)format;
    sum.p[i] = part_fma((part)w.p[i], (part)x.p[i], sum.p[i]);
  }
  return sum;
}

#endif
