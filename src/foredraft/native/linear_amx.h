/* Linear layers by tile registers. A part of linear.c; needs <amx.h>'s instructions. */
#ifndef FOREDRAFT_LINEAR_AMX_H
#define FOREDRAFT_LINEAR_AMX_H

/* Few rows are quicker by vectors, more by tiles; the sums are the same. */
enum { MOST_VECTOR_ROWS = 2 /* in bf16 */, LEAST_TILE_ROWS = 6 /* in few bits */ };

/* Of more than sixteen rows, those of the first tile. */
INLINE int first_rows(int rows) { return (rows + 1) / 2; }

/* Sums [rows][blocks * BLOCK] as tiles compute them, but by vectors: for few rows quicker, as the weights come in as fast as
 * memory gives them. To be called where numbers below the least normal one count as zero. */
INLINE void vector_product(const int rows, const int blocks, const char *w, size_t block_bytes, int steps, const char *x,
                           size_t x_stride, float *sums) {
  const int vecs = 2 * blocks;
  vec sum[MOST_VECTOR_ROWS][MOST_TILE_VECS];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = v_set(0);
  for (int k = 0; k < steps; k++) {
    vec even[MOST_VECTOR_ROWS][MOST_TILE_VECS], odd[MOST_VECTOR_ROWS][MOST_TILE_VECS];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vecs; v++) even[r][v] = odd[r][v] = v_set(0);
    for (int i = 0; i < TILE_ROWS; i++, w += 2 * VEC, x += LANE) {
      lanes first[MOST_VECTOR_ROWS], second[MOST_VECTOR_ROWS];
      UNROLL for (int r = 0; r < rows; r++) {
        const lanes input = l_repeat(x + r * x_stride);
        first[r] = l_first(input), second[r] = l_second(input);
      }
      UNROLL for (int v = 0; v < vecs; v++) {
        const char *at = w + v / 2 * block_bytes + v % 2 * VEC;
        const lanes weight = l_load(at);
        __builtin_prefetch(at + NEAR, 0, 3);
        UNROLL for (int r = 0; r < rows; r++) {
          even[r][v] = v_dot(F32, even[r][v], l_first(weight), first[r]);
          odd[r][v] = v_dot(F32, odd[r][v], l_second(weight), second[r]);
        }
      }
    }
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = v_add(sum[r][v], v_add(even[r][v], odd[r][v]));
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) v_store(sums + (r * vecs + v) * 16, sum[r][v]);
}

typedef void (*vector_product_fn)(const char *w, size_t block_bytes, int steps, const char *x, size_t x_stride, float *sums);

/* Functions of their own, lest the compiler moves sums to where small numbers count. */
#define DEFINE_VECTOR(rows, blocks) \
  static __attribute__((noinline)) void vector_##rows##_##blocks(const char *w, size_t block_bytes, int steps, \
                                                                 const char *x, size_t x_stride, float *sums) { \
    vector_product(rows, blocks, w, block_bytes, steps, x, x_stride, sums); \
  }
DEFINE_VECTOR(1, 1)
DEFINE_VECTOR(1, 4)
DEFINE_VECTOR(2, 1)
DEFINE_VECTOR(2, 2)

/* Of so many rows: over as many blocks as the registers hold, and over one. */
static const struct {
  int blocks;
  vector_product_fn many, one;
} vector_products[MOST_VECTOR_ROWS + 1] = {[1] = {4, vector_1_4, vector_1_1}, [2] = {2, vector_2_2, vector_2_1}};

static void few_rows_product(const linear *w, int epilogue, int first, int last, const char *x, int rows, void *y, int width) {
  const unsigned usual = _mm_getcsr(), small_are_zero = _MM_FLUSH_ZERO_ON | 0x40; /* results; inputs */
  const int most = vector_products[rows].blocks, steps = w->inputs / BLOCK;
  const size_t bytes = block_bytes(w), stride = encoded_bytes(w);
  float sums[4 * BLOCK];
  for (int block = first, taken; block < last; block += taken) {
    const char *start = (const char *)w->weights + block * bytes;
    taken = last - block < most ? 1 : most;
    _mm_setcsr(usual | small_are_zero);
    (taken == 1 ? vector_products[rows].one : vector_products[rows].many)(start, bytes, steps, x, stride, sums);
    _mm_setcsr(usual);
    finish(w, epilogue, block, taken, sums, rows, y, width);
  }
}

/* Rows' next 32 inputs (tile 4) times a block (6 and 7), added to the first two sums. */
INLINE void add_block(const char *x, size_t x_stride, const char *w) {
  _tile_loadd(4, x, x_stride);
  _tile_loadd(6, w, 2 * VEC);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, w + VEC, 2 * VEC);
  _tile_dpbf16ps(1, 4, 7);
}

/* Sums of up to sixteen rows and of one block or two, [rows][blocks * BLOCK]. */
INLINE void narrow_product(const int blocks, const char *w, size_t block_bytes, int steps, const char *x, size_t x_stride,
                           float *sums) {
  const size_t stride = (size_t)blocks * BLOCK * sizeof *sums;
  zero_sums();
  for (int k = 0; k < steps; k++, w += TILE_ROWS * 2 * VEC) {
    fetch_lines(w + NEAR, TILE_ROWS * 2 * VEC);
    if (blocks > 1) fetch_lines(w + block_bytes + NEAR, TILE_ROWS * 2 * VEC);
    add_block(x + k * TILE_BYTES, x_stride, w);
    if (blocks == 1) continue;
    _tile_loadd(6, w + block_bytes, 2 * VEC);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, w + block_bytes + VEC, 2 * VEC);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  if (blocks == 1) return;
  _tile_stored(2, sums + 32, stride);
  _tile_stored(3, sums + 48, stride);
}

/* Of more than sixteen rows, the first tile's and the others, and of one block. */
INLINE void wide_product(int first, const char *w, int steps, const char *x, size_t x_stride, float *sums) {
  const size_t stride = BLOCK * sizeof *sums;
  zero_sums();
  for (int k = 0; k < steps; k++, w += TILE_ROWS * 2 * VEC) {
    add_block(x + k * TILE_BYTES, x_stride, w);
    _tile_loadd(5, x + first * x_stride + k * TILE_BYTES, x_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  _tile_stored(2, sums + first * BLOCK, stride);
  _tile_stored(3, sums + first * BLOCK + 16, stride);
}

/* Codes of four bits of a group and block, a byte each, as tiles take them: [group / 4][BLOCK] lanes. */
INLINE void spread(const char *codes, int group, char *out) {
  for (int i = 0; i < group / 8; i++, codes += 2 * VEC, out += 4 * VEC)
    UNROLL for (int half = 0; half < 2; half++) {
      lanes both = l_load(codes + half * VEC), low = nibbles(both, 0), high = nibbles(both, 4);
      memcpy(out + half * VEC, &low, sizeof low);
      memcpy(out + (2 + half) * VEC, &high, sizeof high);
    }
}

/* Whole sums [rows][BLOCK] of a group's products. The last tile of a group may have half the inputs. */
INLINE void group_product(const char *codes, int group, const char *x, size_t x_stride, int32_t *whole) {
  const size_t stride = BLOCK * sizeof *whole;
  _tile_zero(0);
  _tile_zero(1);
  int i = 0;
  for (; i + TILE_BYTES <= group; i += TILE_BYTES, codes += TILE_ROWS * 2 * VEC) {
    _tile_loadd(4, x + i, x_stride);
    _tile_loadd(6, codes, 2 * VEC);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(6, codes + VEC, 2 * VEC);
    _tile_dpbsud(1, 4, 6);
  }
  if (i < group) {
    _tile_loadd(5, x + i, x_stride);
    _tile_loadd(7, codes, 2 * VEC);
    _tile_dpbsud(0, 5, 7);
    _tile_loadd(7, codes + VEC, 2 * VEC);
    _tile_dpbsud(1, 5, 7);
  }
  _tile_stored(0, whole, stride);
  _tile_stored(1, whole + 16, stride);
}

INLINE void add_groups(const int format, const bf16 *grid, const int32_t *whole, const char *of_row, size_t x_stride,
                       int rows, float *sums) {
  const grid_of one = grid_at(format, grid), two = grid_at(format, grid + 16);
  for (int r = 0; r < rows; r++, whole += BLOCK, sums += BLOCK, of_row += x_stride) {
    v_store(sums, add_group(v_load(sums), l_load(whole), one, of_row));
    v_store(sums + 16, add_group(v_load(sums + 16), l_load(whole + 16), two, of_row));
  }
}

/* Sums [rows][BLOCK] of up to sixteen rows and a block. Double-buffered: while tiles multiply a group, vectors add the one
 * before and, in four bits, spread the one after. */
INLINE void int_tiles(const int format, const linear *w, int block, const char *x, int rows, bool fresh, float *sums) {
  const int groups = groups_of(w), grids = format == INT4 ? 2 : 1;
  const size_t bytes = (size_t)w->group / inputs_per_lane(format) * 2 * VEC, stride = encoded_bytes(w);
  const char *codes = (const char *)w->weights + block * block_bytes(w), *of_row = x + w->inputs;
  const bf16 *grid = w->grid + (size_t)block * groups * grids * BLOCK;
  _Alignas(64) int32_t whole[2][TILE_ROWS * BLOCK];
  _Alignas(64) char spreads[2][MAX_GROUP * BLOCK];
  for (int i = 0; i < rows * BLOCK; i += 16) v_store(sums + i, v_set(0));
  if (format == INT4) spread(codes, w->group, spreads[0]);
  for (int g = 0; g <= groups; g++) {
    if (g < groups) {
      if (fresh) fetch_lines(codes + g * bytes + NEAR, bytes);
      if (format == INT4 && g + 1 < groups) spread(codes + (g + 1) * bytes, w->group, spreads[(g + 1) % 2]);
      settle();
      group_product(format == INT4 ? spreads[g % 2] : codes + g * bytes, w->group, x + g * w->group, stride, whole[g % 2]);
    }
    if (g > 0)
      add_groups(format, grid + (g - 1) * grids * BLOCK, whole[(g - 1) % 2], of_row + (g - 1) * OF_ROW, stride, rows, sums);
  }
}

/* fresh: the weights are not in the cache. */
static void amx_strip(const linear *w, int epilogue, int block, int blocks, const char *x, int rows, bool fresh, char *out,
                      int width) {
  _Alignas(64) float sums[2 * TILE_ROWS * BLOCK];
  const int first = first_rows(rows), steps = w->inputs / BLOCK;
  const size_t bytes = block_bytes(w), stride = encoded_bytes(w);
  for (int taken; blocks > 0; block += taken, blocks -= taken) {
    const char *start = (const char *)w->weights + block * bytes;
    taken = w->format != BF16 || rows > TILE_ROWS || blocks == 1 ? 1 : 2;
    settle();
    if (w->format == INT8) int_tiles(INT8, w, block, x, rows, fresh, sums);
    else if (w->format == INT4) int_tiles(INT4, w, block, x, rows, fresh, sums);
    else if (rows > TILE_ROWS) wide_product(first, start, steps, x, stride, sums);
    else if (taken == 2) narrow_product(2, start, bytes, steps, x, stride, sums);
    else narrow_product(1, start, bytes, steps, x, stride, sums);
    finish(w, epilogue, block, taken, sums, rows, out, width);
  }
}

static void amx_product(const linear *w, int epilogue, int first, int last, const char *x, int rows, void *y, int width) {
  if (w->format == BF16 && rows <= MOST_VECTOR_ROWS) {
    few_rows_product(w, epilogue, first, last, x, rows, y, width);
    return;
  }
  const int most = w->format == BF16 ? 2 * TILE_ROWS : TILE_ROWS, tiles = (rows + most - 1) / most;
  const int tail = w->format == BF16 || w->group % TILE_BYTES == 0 ? TILE_BYTES : TILE_BYTES / 2;
  for (int t = 0, shaped = 0; t < tiles; t++) {
    int from = (int)((long)rows * t / tiles), to = (int)((long)rows * (t + 1) / tiles), count = to - from;
    if (count != shaped) {
      if (count > TILE_ROWS) shape_tiles(first_rows(count), count - first_rows(count), TILE_BYTES);
      else shape_tiles(count, count, tail);
      shaped = count;
    }
    amx_strip(w, epilogue, first, last - first, x + from * encoded_bytes(w), count, t == 0,
              (char *)y + from * row_bytes(epilogue, width), width);
  }
  _tile_release();
}

#endif
