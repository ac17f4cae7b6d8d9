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
  const char *next; /* where to read ahead meanwhile, for each pair and step `fetch` bytes; or none */
  size_t fetch;
} weights;

enum { CACHE_LINE = 64 };

/* Into the second-level cache. */
INLINE void fetch_lines(const char *at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch(at + i, 0, 2);
}

INLINE void read_ahead(const weights *w, const int vecs, int step) {
  UNROLL for (int v = 0; v < vecs; v += 2) {
    const char *at = w->next + v / 2 * w->pair + step * w->fetch;
    if (w->fetch > CACHE_LINE) { /* soon: into the first-level cache */
      __builtin_prefetch(at, 0, 3);
      __builtin_prefetch(at + CACHE_LINE, 0, 3);
    } else {
      __builtin_prefetch(at, 0, 2);
    }
  }
}

/* out [rows][out_stride] = x w, or out + x w, from the first input to the last. */
INLINE void tile(const int format, const int rows, const int vecs, const int add, weights w, const char *x,
                 size_t x_stride, float *out, size_t out_stride) {
  vec sum[MOST_TILE_ROWS][MOST_TILE_VECS];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = add ? v_load(out + r * out_stride + v * 16) : v_set(0);
  const int widen = format == BF16 && !PAIRS;
  for (int k = 0; k < w.steps; k++, x += (widen ? 2 : 1) * LANE) {
    const char *at = w.start + k * w.step;
    if (w.next) read_ahead(&w, vecs, k);
    lanes weight[MOST_TILE_VECS], second[MOST_TILE_VECS];
    UNROLL for (int v = 0; v < vecs; v++) {
      weight[v] = l_load(at + v / 2 * w.pair + v % 2 * w.single);
      if (widen) second[v] = l_second(weight[v]), weight[v] = l_first(weight[v]);
    }
    UNROLL for (int r = 0; r < rows; r++) {
      lanes input = l_repeat(x + r * x_stride);
      UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = v_dot(format, sum[r][v], weight[v], input);
      if (!widen) continue;
      input = l_repeat(x + r * x_stride + LANE);
      UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = v_dot(format, sum[r][v], second[v], input);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) v_store(out + r * out_stride + v * 16, sum[r][v]);
}

#endif
