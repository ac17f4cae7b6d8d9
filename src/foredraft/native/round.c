/* Groups of weights to four bits: each with the scale and offset, of three clips of its range, that err least. The steps
 * are those of weights/rounding.py.
 */
#include "vec.h"

static const float CLIPS[] = {(float)(1.0 / 15), (float)(0.92 / 15), (float)(0.84 / 15)};
enum { NUM_CLIPS = sizeof CLIPS / sizeof *CLIPS };

static float to_bf16_and_back(float x, bf16 *rounded) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  *rounded = (bf16)(bits >> 16);
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* The nearest of -8 to 7 for x on a grid, ties to even. */
INLINE vec code_of(vec x, float offset, float scale) {
  const vec magic = v_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to whole numbers */
  vec code = v_div(v_sub(x, v_set(offset)), v_set(scale));
  code = v_max(v_set(-8), v_sub(v_set(0), v_max(v_set(-7), v_sub(v_set(0), code))));
  return v_sub(v_add(code, magic), magic);
}

static float error_of(const float *x, int size, float offset, float scale) {
  vec sum = v_set(0);
  for (int i = 0; i < size; i += 16) {
    vec value = v_load(x + i);
    vec off = v_sub(v_add(v_set(offset), v_mul(code_of(value, offset, scale), v_set(scale))), value);
    sum = v_add(sum, v_mul(off, off));
  }
  return v_sum(sum);
}

/* x [size], a multiple of sixteen, to codes 0 to 15 and grid [2], scale and offset. */
void ISA(round4)(const float *x, int size, uint8_t *codes, bf16 *grid) {
  vec most = v_load(x), least = v_sub(v_set(0), most);
  for (int i = 16; i < size; i += 16) {
    most = v_max(most, v_load(x + i));
    least = v_max(least, v_sub(v_set(0), v_load(x + i)));
  }
  const float high = v_largest(most), low = -v_largest(least);
  float best = INFINITY, best_scale = 1, best_offset = 0;
  for (int clip = 0; clip < NUM_CLIPS; clip++) {
    bf16 rounded[2];
    float scale = (high - low) * CLIPS[clip];
    scale = to_bf16_and_back(scale > 1e-8f ? scale : 1e-8f, rounded);
    float offset = to_bf16_and_back((high + low + scale) / 2, rounded + 1), error = error_of(x, size, offset, scale);
    if (error < best) {
      best = error, best_scale = scale, best_offset = offset;
      memcpy(grid, rounded, sizeof rounded);
    }
  }
  for (int i = 0; i < size; i += 16) {
    float found[16];
    v_store(found, code_of(v_load(x + i), best_offset, best_scale));
    for (int j = 0; j < 16; j++) codes[i + j] = (uint8_t)((int)found[j] + 8);
  }
}
