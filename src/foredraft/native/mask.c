/* Scores under a set of tokens. */
#include "vec.h"

/* out [count] has x where the bit of a token is set in `allowed` [(count + 7) / 8]. */
void ISA(mask)(const float *x, const uint8_t *allowed, int count, float *out) {
  int at = 0;
  for (; at + 16 <= count; at += 16)
    v_store(out + at, v_where(allowed + at / 8, v_load(x + at)));
  for (; at < count; at++) out[at] = may_come(allowed, at) || x[at] != x[at] ? x[at] : -INFINITY;
}
