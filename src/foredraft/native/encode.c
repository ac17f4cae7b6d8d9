/* From a row of floats to what a linear layer takes: bf16, or codes of eight bits with a scale for each group. */
#include "vec.h"

enum { MOST = 127 };

void ISA(embed)(const model *m, int32_t token, float *x, int width) {
  for (int i = 0; i < m->hidden; i++) {
    size_t at = (size_t)token * m->hidden + i;
    if (m->format == F32) {
      x[i] = ((const float *)m->embedding)[at];
    } else {
      uint32_t bits = (uint32_t)((const bf16 *)m->embedding)[at] << 16;
      memcpy(x + i, &bits, sizeof bits);
    }
  }
  memset(x + m->hidden, 0, (size_t)(width - m->hidden) * sizeof *x);
}

/* 1 / sqrt(mean(x^2) + eps) over `size` values; zeros follow up to a multiple of sixteen. */
INLINE float rms_factor(const float *x, int size, float eps) {
  vec sum = v_set(0);
  for (int i = 0; i < size; i += 16) {
    vec v = v_load(x + i);
    sum = v_fma(v, v, sum);
  }
  return 1 / sqrtf(v_sum(sum) / (float)size + eps);
}

typedef struct {
  const float *x, *norm;
  int count;
  float factor;
} row;

INLINE vec value_at(const row *r, int i) {
  if (i >= r->count) return v_set(0);
  vec v = v_load(r->x + i);
  return r->norm ? v_mul(v_mul(v, v_set(r->factor)), v_load(r->norm + i)) : v;
}

/* Codes of one group, and its scale; no number among them makes the scale none, so that it shows. */
static void encode_group(const row *r, int first, int size, int8_t *codes, float *of_row) {
  float values[MAX_GROUP];
  vec largest = v_set(0), total = v_set(0);
  for (int i = 0; i < size; i += 16) {
    vec v = value_at(r, first + i);
    v_store(values + i, v);
    largest = v_max(largest, v_abs(v));
    total = v_add(total, v_abs(v));
  }
  float most = v_largest(largest);
  vec inverse = v_set(most > 0 ? MOST / most : 0), magic = v_set(12582912.0f), sum = v_set(0);
  for (int i = 0; i < size; i += 16) {
    float rounded[16];
    vec whole = v_sub(v_add(v_mul(v_load(values + i), inverse), magic), magic);
    sum = v_add(sum, whole);
    v_store(rounded, whole);
    for (int j = 0; j < 16; j++) codes[i + j] = (int8_t)(int32_t)rounded[j];
  }
  of_row[0] = most / MOST + 0 * v_sum(total);
  of_row[1] = of_row[0] * v_sum(sum);
}

void ISA(encode)(const linear *to, const float *x, int count, const float *norm, int size, float eps, char *out) {
  row r = {x, norm, count, norm ? rms_factor(x, size, eps) : 1};
  if (to->format >= INT8) {
    float *scales = (float *)(out + to->inputs);
    for (int g = 0; g < groups_of(to); g++)
      encode_group(&r, g * to->group, to->group, (int8_t *)out + g * to->group, scales + 2 * g);
  } else if (to->format == BF16 && PAIRS) {
    for (int i = 0; i < to->inputs; i += 16) v_to_bf16((bf16 *)out + i, value_at(&r, i));
  } else {
    for (int i = 0; i < to->inputs; i += 16) v_store((float *)out + i, value_at(&r, i));
  }
}
