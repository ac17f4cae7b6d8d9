/* Scores under a set of tokens. */
#include "vec.h"

/* Where a bit is set, or x is no number, x; -infinity elsewhere. */
INLINE vec v_where(uint32_t bits, vec x) {
  static const int32_t powers[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                     1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  EACH_PART {
    ipart power;
    memcpy(&power, powers + i * WIDTH, sizeof power);
    x.p[i] = part_choose((((int32_t)bits & power) != 0) | (x.p[i] != x.p[i]), x.p[i], -INFINITY - (part){0});
  }
  return x;
}

/* out [count] has x where the bit of a token is set in `allowed` [(count + 7) / 8]. */
void ISA(mask)(const float *x, const uint8_t *allowed, int count, float *out) {
  int at = 0;
  for (; at + 16 <= count; at += 16)
    v_store(out + at, v_where(allowed[at / 8] | (uint32_t)allowed[at / 8 + 1] << 8, v_load(x + at)));
  for (; at < count; at++) out[at] = (allowed[at / 8] >> at % 8 & 1) || x[at] != x[at] ? x[at] : -INFINITY;
}
