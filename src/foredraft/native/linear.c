/* Linear layers: rows of encoded input against packed weights, in tiles that fit the registers.
 *
 * How many rows and outputs a tile has depends on the rows of the pass; what it computes for each element does not.
 */
#include "amx.h"

/* Rows of a tile at most, and how many vectors of outputs it takes for so many rows: with few rows many, or the sums
 * would wait for each other. */
#if defined(__AVX512F__)
enum { FLOAT_ROWS = 8, INT_ROWS = 8 };
#define ALL_FLOAT_TILES(T) T(1, 8) T(1, 2) T(2, 4) T(2, 2) T(3, 4) T(3, 2) T(4, 4) T(4, 2) T(5, 4) T(5, 2) T(6, 2) T(7, 2) T(8, 2)
#define INT_TILES(T) T(1, 4) T(1, 2) T(2, 4) T(2, 2) T(3, 4) T(3, 2) T(4, 2) T(5, 2) T(6, 2) T(7, 1) T(8, 1)
static const int int_vecs[] = {0, 4, 4, 4, 2, 2, 2, 1, 1};
#if defined(__AVX512BF16__)
#define FLOAT_TILES(T) ALL_FLOAT_TILES(T) T(2, 8) T(6, 4)
static const int float_vecs[] = {0, 8, 8, 4, 4, 4, 4, 2, 2};
#else /* a widened weight takes two registers */
#define FLOAT_TILES ALL_FLOAT_TILES
static const int float_vecs[] = {0, 8, 4, 4, 4, 4, 2, 2, 2};
#endif
#elif defined(__AVX2__) || defined(__aarch64__)
enum { FLOAT_ROWS = 4, INT_ROWS = 4 };
#define FLOAT_TILES(T) T(1, 4) T(1, 2) T(2, 2) T(3, 1) T(4, 1)
#define INT_TILES(T) T(1, 2) T(2, 1) T(3, 1) T(4, 1)
static const int float_vecs[] = {0, 4, 2, 1, 1}, int_vecs[] = {0, 2, 1, 1, 1};
#else
enum { FLOAT_ROWS = 2, INT_ROWS = 2 };
#define FLOAT_TILES(T) T(1, 2) T(2, 1)
#define INT_TILES(T) T(1, 1) T(2, 1)
static const int float_vecs[] = {0, 2, 1}, int_vecs[] = {0, 1, 1};
#endif

/* What an unsigned code of a weight means: code - zero. AVX2 takes eight bits signed. */
#if defined(__AVX2__) && !defined(__AVX512F__)
enum { ZERO8 = 0, ZERO4 = 8 };
#else
enum { ZERO8 = 128, ZERO4 = 8 };
#endif

enum { OF_ROW = 2 * sizeof(float) /* bytes that a row has for each group */ };
enum { NEAR = 4096 /* bytes that a tile reads ahead of itself where it is the only one over its strip */ };

/* Weights that come next, to be read ahead: `fetch` bytes of each block a step. */
typedef struct {
  const char *start;
  size_t fetch;
} upcoming;

typedef void (*product_fn)(const linear *w, upcoming next, int block, int half, const char *x, float *out, size_t stride);

INLINE size_t block_bytes(const linear *w) { return (size_t)w->inputs / inputs_per_lane(w->format) * 2 * VEC; }

INLINE void float_product(const int format, const int rows, const int vecs, const linear *w, upcoming next, int block,
                          int half, const char *x, float *out, size_t out_stride) {
  size_t bytes = block_bytes(w);
  const char *start = (const char *)w->weights + block * bytes + half * VEC;
  weights at = {start, bytes, VEC, 2 * VEC, w->inputs / inputs_per_lane(format), next.start, next.fetch};
  tile(format, rows, vecs, 0, at, x, encoded_bytes(w), out, out_stride);
}

/* sum + the four products of bytes in each lane; of weights unsigned (AVX2, eight bits: with the top bit turned). */
INLINE lanes bytes_dot(const int format, lanes sum, lanes w, lanes x) {
  EACH_PART {
#if defined(__AVX512VNNI__)
    (void)format;
    sum.p[i] = (upart)_mm512_dpbusd_epi32((__m512i)sum.p[i], (__m512i)w.p[i], (__m512i)x.p[i]);
#elif defined(__AVX2__)
    __m256i a = (__m256i)w.p[i], b = (__m256i)x.p[i];
    if (format == INT8) {
      __m256i code = _mm256_xor_si256(a, _mm256_set1_epi8(-128));
      a = _mm256_abs_epi8(code);
      b = _mm256_sign_epi8(b, code);
    }
    sum.p[i] += (upart)_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#else
    (void)format;
    UNROLL for (int byte = 0; byte < 32; byte += 8)
      sum.p[i] += (w.p[i] >> byte & 255u) * (upart)((ipart)(x.p[i] << (24 - byte)) >> 24);
#endif
  }
  return sum;
}

INLINE vec v_from_ints(lanes a) {
  vec r;
  EACH_PART r.p[i] = __builtin_convertvector((ipart)a.p[i], part);
  return r;
}

INLINE lanes nibbles(lanes a, const int shift) {
  EACH_PART a.p[i] = a.p[i] >> shift & 0x0f0f0f0fu;
  return a;
}

/* What a group of weights adds: (codes x - zero sum(x)) * scale + offset * sum(x), the codes summed in whole numbers. */
typedef struct {
  vec scale, low;
} grid_of;

INLINE grid_of grid_at(const int format, const bf16 *grid) {
  grid_of g = {.scale = v_from_bf16(grid)};
  g.low = v_mul(g.scale, v_set(format == INT4 ? -ZERO4 : -ZERO8));
  if (format == INT4) g.low = v_add(g.low, v_from_bf16(grid + BLOCK));
  return g;
}

/* of_row: the scale of a row's group, and its scaled sum. */
INLINE vec add_group(vec sum, lanes whole, grid_of g, const char *of_row) {
  float scales[2];
  memcpy(scales, of_row, sizeof scales);
  sum = v_fma(v_from_ints(whole), v_mul(g.scale, v_set(scales[0])), sum);
  return v_fma(g.low, v_set(scales[1]), sum);
}

INLINE void int_product(const int format, const int rows, const int vecs, const linear *w, upcoming next, int block, int half,
                        const char *x, float *out, size_t out_stride) {
  const int groups = groups_of(w), steps = w->group / inputs_per_lane(format), grids = format == INT4 ? 2 : 1;
  const size_t bytes = block_bytes(w), stride = encoded_bytes(w);
  const char *start = (const char *)w->weights + block * bytes + half * VEC;
  const bf16 *grid = w->grid + (size_t)block * groups * grids * BLOCK + half * 16;
  const weights ahead = {.pair = bytes, .next = next.start, .fetch = next.fetch};
  vec sum[MOST_TILE_ROWS][4];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = v_set(0);
  for (int g = 0; g < groups; g++) {
    lanes whole[MOST_TILE_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vecs; v++) whole[r][v] = l_set(0);
    for (int k = 0; k < steps; k++) {
      lanes code[4];
      if (next.start) read_ahead(&ahead, vecs, g * steps + k);
      UNROLL for (int v = 0; v < vecs; v++)
        code[v] = l_load(start + v / 2 * bytes + v % 2 * VEC + (size_t)(g * steps + k) * 2 * VEC);
      UNROLL for (int r = 0; r < rows; r++) {
        const char *input = x + r * stride + (size_t)(g * steps + k) * inputs_per_lane(format);
        UNROLL for (int v = 0; v < vecs; v++) {
          if (format == INT8) {
            whole[r][v] = bytes_dot(format, whole[r][v], code[v], l_repeat(input));
          } else {
            whole[r][v] = bytes_dot(format, whole[r][v], nibbles(code[v], 0), l_repeat(input));
            whole[r][v] = bytes_dot(format, whole[r][v], nibbles(code[v], 4), l_repeat(input + 4));
          }
        }
      }
    }
    grid_of own[4];
    UNROLL for (int v = 0; v < vecs; v++)
      own[v] = grid_at(format, grid + ((size_t)v / 2 * groups + g) * grids * BLOCK + v % 2 * 16);
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vecs; v++)
        sum[r][v] = add_group(sum[r][v], whole[r][v], own[v], x + r * stride + w->inputs + g * OF_ROW);
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vecs; v++) v_store(out + r * out_stride + v * 16, sum[r][v]);
}

#define DEFINE(kind, format, rows, vecs) \
  static void format##_##rows##_##vecs(const linear *w, upcoming next, int block, int half, const char *x, float *out, \
                                       size_t stride) { \
    kind##_product(format, rows, vecs, w, next, block, half, x, out, stride); \
  }
#define DEFINE_FLOAT(rows, vecs) DEFINE(float, F32, rows, vecs) DEFINE(float, BF16, rows, vecs)
#define DEFINE_INT(rows, vecs) DEFINE(int, INT8, rows, vecs) DEFINE(int, INT4, rows, vecs)
FLOAT_TILES(DEFINE_FLOAT)
INT_TILES(DEFINE_INT)

#define NAME_F32(rows, vecs) [F32][rows][vecs] = F32_##rows##_##vecs,
#define NAME_BF16(rows, vecs) [BF16][rows][vecs] = BF16_##rows##_##vecs,
#define NAME_INT8(rows, vecs) [INT8][rows][vecs] = INT8_##rows##_##vecs,
#define NAME_INT4(rows, vecs) [INT4][rows][vecs] = INT4_##rows##_##vecs,
static const product_fn products[4][MOST_TILE_ROWS + 1][MOST_TILE_VECS + 1] = {
    FLOAT_TILES(NAME_F32) FLOAT_TILES(NAME_BF16) INT_TILES(NAME_INT8) INT_TILES(NAME_INT4)};

INLINE vec silu(vec x) { return v_div(x, v_add(v_set(1), v_exp(v_sub(v_set(0), x)))); }

INLINE void put(float *y, int column, int width, vec value) {
  if (column + 16 <= width) {
    v_store(y + column, value);
  } else if (column < width) { /* padding is not stored */
    float all[16];
    v_store(all, value);
    memcpy(y + column, all, (size_t)(width - column) * sizeof *all);
  }
}

/* Sixteen outputs of a row, with their bias. */
INLINE vec biased(const linear *w, const float *sums, int column) {
  return w->bias ? v_add(v_load(sums), v_load(w->bias + column)) : v_load(sums);
}

INLINE size_t row_bytes(int epilogue, int width) {
  return (size_t)width * (epilogue == SILU_BF16 ? sizeof(bf16) : sizeof(float));
}

static void finish(const linear *w, int epilogue, int block, int blocks, const float *sums, int rows, char *out, int width) {
  for (int r = 0; r < rows; r++, out += row_bytes(epilogue, width), sums += blocks * BLOCK) {
    float *y = (float *)out;
    for (int b = 0; b < blocks; b++) {
      int column = (block + b) * BLOCK;
      vec one = biased(w, sums + b * BLOCK, column), two = biased(w, sums + b * BLOCK + 16, column + 16);
      if (epilogue == SILU) {
        put(y, column / 2, width, v_mul(silu(one), two));
      } else if (epilogue == SILU_BF16) {
        v_to_bf16((bf16 *)out + column / 2, v_mul(silu(one), two));
      } else if (epilogue == ADD) {
        put(y, column, width, v_add(v_load(y + column), one));
        put(y, column + 16, width, v_add(v_load(y + column + 16), two));
      } else {
        put(y, column, width, one);
        put(y, column + 16, width, two);
      }
    }
  }
}

#if defined(__AMX_BF16__)
#include "linear_amx.h"
#endif

/* As many rows as fit a tile, and `blocks` blocks. */
static void strip(const linear *w, upcoming next, int epilogue, int block, int blocks, const char *x, int rows, char *out,
                  int width) {
  float sums[MOST_TILE_ROWS * MOST_TILE_VECS * 16];
  const int wide = w->format >= INT8 ? int_vecs[rows] : float_vecs[rows];
  for (int vecs; blocks > 0; block += (vecs + 1) / 2, blocks -= (vecs + 1) / 2) {
    vecs = wide <= 2 * blocks ? wide : 2;
    product_fn product = products[w->format][rows][vecs];
    int taken = (vecs + 1) / 2;
    product(w, next, block, 0, x, sums, (size_t)taken * BLOCK);
    if (vecs == 1) product(w, (upcoming){0}, block, 1, x, sums + 16, (size_t)taken * BLOCK);
    finish(w, epilogue, block, taken, sums, rows, out, width);
    if (next.start) next.start += taken * block_bytes(w);
  }
}

/* A strip of weights serves all rows while it is in the cache; rows are shared out evenly among tiles, each of which reads
 * a part of the next strip ahead. */
void ISA(product)(const linear *w, int epilogue, int first, int last, int onward, const char *x, int rows, void *y,
                  int width) {
#if defined(__AMX_BF16__)
  if (w->format == BF16 || (w->format >= INT8 && rows >= LEAST_TILE_ROWS)) {
    amx_product(w, epilogue, first, last, x, rows, y, width);
    return;
  }
#endif
  const int most = w->format >= INT8 ? INT_ROWS : FLOAT_ROWS, tiles = (rows + most - 1) / most;
  const int blocks = tiles == 1 ? 4 : 2, strips = (last - first + blocks - 1) / blocks;
  const size_t bytes = block_bytes(w);
  for (int i = 0; i < strips; i++) {
    const int block = first + (onward > 0 ? i : strips - 1 - i) * blocks, ahead = block + onward * blocks;
    const int taken = last - block < blocks ? last - block : blocks;
    const bool more = ahead >= 0 && ahead + taken <= w->outputs / BLOCK;
    const char *own = (const char *)w->weights + block * bytes, *after = (const char *)w->weights + ahead * bytes;
    for (int t = 0; t < tiles; t++) {
      int from = (int)((long)rows * t / tiles), to = (int)((long)rows * (t + 1) / tiles);
      upcoming next = {tiles == 1 ? own + NEAR : more ? after + bytes * t / tiles : NULL, 2 * VEC / tiles};
      char *out = (char *)y + from * row_bytes(epilogue, width);
      strip(w, next, epilogue, block, taken, x + from * encoded_bytes(w), to - from, out, width);
    }
  }
}
