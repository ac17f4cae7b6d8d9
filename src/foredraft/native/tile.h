/* The one product under linear layers and attention: a few rows of input against a few vectors of sixteen outputs. */
#ifndef FOREDRAFT_TILE_H
#define FOREDRAFT_TILE_H

#include "vec.h"

enum { MOST_TILE_ROWS = 8, MOST_TILE_VECS = 8, LANE = 4, VEC = 16 * LANE /* bytes */ };

/* Where the lanes of a tile lie: vectors in pairs, `pair` bytes between pairs and `single` within one; the next inputs
 * of all of them `step` bytes further on. */
typedef struct {
  const char *start;
  size_t pair, single, step;
  int steps;
} weights;

/* out [rows][out_stride] = x w, or out + x w; inputs one by one (F32) or in pairs (BF16), from the first to the last. */
INLINE void tile(const int format, const int rows, const int vecs, const int add, weights w, const char *x,
                 size_t x_stride, float *out, size_t out_stride) {
  vec sum[MOST_TILE_ROWS][MOST_TILE_VECS];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = add ? v_load(out + r * out_stride + v * 16) : v_set(0);
  for (int k = 0; k < w.steps; k++) {
    const char *at = w.start + k * w.step;
    lanes weight[MOST_TILE_VECS];
    UNROLL for (int v = 0; v < vecs; v++) weight[v] = l_load(at + v / 2 * w.pair + v % 2 * w.single);
    UNROLL for (int r = 0; r < rows; r++) {
      lanes input = l_repeat(x + r * x_stride + (size_t)k * LANE);
      UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = v_dot(format, sum[r][v], weight[v], input);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) v_store(out + r * out_stride + v * 16, sum[r][v]);
}

#endif
