/* Attention over a text's own pages, from its first visible key on, by online softmax: a row's bits depend on the keys
 * that it sees and on nothing else.
 *
 * A page holds for each layer and key-value head its keys [dim / n][PAGE] and its values [dim / 16][PAGE / n][16], in
 * lanes of n = 1 (F32) or 2 (BF16) elements: products of neighbours in `dim`, and of neighbouring tokens.
 */
#include "amx.h"

/* ROWS and VECS: a tile's rows, and its vectors of keys or values. MOST_ROWS: rows that go through the pages together. */
#if defined(__AVX512F__)
#define ROW_COUNTS(R) R(1) R(2) R(3) R(4) R(5) R(6)
enum { ROWS = 6, VECS = PAIRS ? 4 : 2, MOST_ROWS = AMX ? TILE_ROWS : ROWS };
#elif defined(__AVX2__) || defined(__aarch64__)
#define ROW_COUNTS(R) R(1) R(2) R(3) R(4)
enum { ROWS = 4, VECS = 1, MOST_ROWS = ROWS };
#else
#define ROW_COUNTS(R) R(1) R(2)
enum { ROWS = 2, VECS = 1, MOST_ROWS = ROWS };
#endif

/* Rows on their way through the pages. */
typedef struct {
  int first[MOST_ROWS], end[MOST_ROWS];           /* the keys that each sees */
  float top[MOST_ROWS], total[MOST_ROWS];         /* largest score so far, sum of e^(score - top) */
  float sum[MOST_ROWS][MAX_DIM];                  /* of values, weighted */
  float score[MOST_ROWS][PAGE];
  char query[MOST_ROWS][MAX_DIM * sizeof(float)]; /* encoded */
  char weight[MOST_ROWS][PAGE * sizeof(float)];   /* encoded */
  int tile_rows;                                  /* for which tiles are shaped; 0: not yet */
} bundle;

INLINE void convert(const int format, const float *x, int count, char *out) {
  for (int i = 0; i < count; i += 16) v_put(format, out, i, v_load(x + i));
}

/* What meets keys or values of this format. */
INLINE void encode_row(const int format, const float *x, int count, char *out) {
  convert(PAIRS ? format : F32, x, count, out);
}

/* One row's scores of a page become weights; what it has summed so far is scaled to its new top. `whole`: the row sees
 * all keys of the page. */
INLINE void soften(const int format, const int whole, bundle *b, int r, int base, float scale, int dim) {
  const int first = b->first[r] - base, end = b->end[r] - base;
  vec score[PAGE / 16], largest = v_set(-INFINITY), total = v_set(0);
  UNROLL for (int v = 0; v < PAGE / 16; v++) {
    score[v] = v_mul(v_load(b->score[r] + v * 16), v_set(scale));
    if (!whole) score[v] = v_between(v * 16, first, end, score[v], v_set(-INFINITY));
    largest = v_max(largest, score[v]);
  }
  float top = v_largest(largest), before = b->top[r];
  if (top > before) {
    b->top[r] = top;
    if (before > -INFINITY) {
      vec shrink = v_exp(v_set(before - top));
      float factor[16];
      v_store(factor, shrink);
      b->total[r] *= factor[0];
      for (int i = 0; i < dim; i += 16) v_store(b->sum[r] + i, v_mul(v_load(b->sum[r] + i), shrink));
    }
  }
  UNROLL for (int v = 0; v < PAGE / 16; v++) {
    vec weight = v_exp(v_sub(score[v], v_set(b->top[r])));
    if (!whole) weight = v_between(v * 16, first, end, weight, v_set(0));
    total = v_add(total, weight);
    v_put(PAIRS ? format : F32, b->weight[r], v * 16, weight);
  }
  b->total[r] += v_sum(total);
}

/* Of the keys of a page, how many are before the last that any of the rows sees; the scores of those behind it are left
 * as they are, and masked. */
INLINE int seen(const bundle *b, int from, int rows, int base) {
  int end = 0;
  for (int r = from; r < from + rows; r++) end = b->end[r] - base > end ? b->end[r] - base : end;
  return end < PAGE ? end : PAGE;
}

INLINE void soften_all(const int format, const model *m, bundle *b, int from, int rows, int base) {
  const float scale = 1 / sqrtf((float)m->head_dim);
  for (int r = from; r < from + rows; r++) {
    if (b->first[r] <= base && b->end[r] >= base + PAGE) soften(format, 1, b, r, base, scale, m->dim);
    else soften(format, 0, b, r, base, scale, m->dim);
  }
}

/* Rows from `from` on through one page. */
INLINE void through(const int format, const int rows, const model *m, bundle *b, int from, const char *page, int base) {
  const int n = inputs_per_lane(format), dim = m->dim, end = seen(b, from, rows, base);
  weights keys = {page, 2 * VEC, VEC, PAGE * LANE, dim / n, NULL, 0};
  if (VECS == 4 && end <= 32)
    tile(format, rows, 2, 0, keys, b->query[from], sizeof b->query[0], b->score[from], PAGE);
  else
    UNROLL for (int v = 0; v < PAGE / 16; v += VECS, keys.start += VECS * VEC)
      if (v * 16 < end)
        tile(format, rows, VECS, 0, keys, b->query[from], sizeof b->query[0], b->score[from] + v * 16, PAGE);
  soften_all(format, m, b, from, rows, base);
  const size_t column = PAGE / n * VEC; /* bytes of sixteen values of all tokens */
  weights values = {page + half_page_bytes(m), 2 * column, column, VEC, (end + n - 1) / n, NULL, 0};
  int d = 0;
  for (; d + VECS * 16 <= dim; d += VECS * 16, values.start += VECS * column)
    tile(format, rows, VECS, 1, values, b->weight[from], sizeof b->weight[0], b->sum[from] + d, MAX_DIM);
  for (; d < dim; d += 16, values.start += column)
    tile(format, rows, 1, 1, values, b->weight[from], sizeof b->weight[0], b->sum[from] + d, MAX_DIM);
}

#if defined(__AMX_BF16__)
/* A tile of inputs and, one after another, up to four of weights, `next` bytes apart: added to the first `count` sums. */
#define ADD_PRODUCTS(count, inputs, x, x_stride, weights, w, stride, next) \
  do { \
    _tile_loadd(inputs, x, x_stride); \
    _tile_loadd(weights, w, stride); \
    _tile_dpbf16ps(0, inputs, weights); \
    if (count < 2) break; \
    _tile_loadd(weights, w + next, stride); \
    _tile_dpbf16ps(1, inputs, weights); \
    if (count < 3) break; \
    _tile_loadd(weights, w + 2 * next, stride); \
    _tile_dpbf16ps(2, inputs, weights); \
    if (count < 4) break; \
    _tile_loadd(weights, w + 3 * next, stride); \
    _tile_dpbf16ps(3, inputs, weights); \
  } while (0)

/* Load or store the first `count` sums, `next` floats apart. */
#define FOR_EACH_SUM(count, DO, at, next, stride) \
  do { \
    DO(0, at, stride); \
    if (count > 1) DO(1, at + next, stride); \
    if (count > 2) DO(2, at + 2 * next, stride); \
    if (count > 3) DO(3, at + 3 * next, stride); \
  } while (0)

/* As `through`, in bf16 and by tiles. A key's sums are made of 32 dimensions at a time, of which the last may be 16; a
 * value's of 32 tokens, whose weights are zero where a row does not see them (pages are zero at first, and hold no NaN:
 * pages.py). */
static void through_tiles(const model *m, bundle *b, int from, int rows, const char *page, int base) {
  if (rows != b->tile_rows) {
    shape_tiles(rows, rows, m->dim % 32 ? TILE_BYTES / 2 : TILE_BYTES);
    b->tile_rows = rows;
  }
  const int dim = m->dim, end = seen(b, from, rows, base), keys = (end + 15) / 16;
  const size_t query = sizeof b->query[0], score = sizeof b->score[0], weight = sizeof b->weight[0], sum = sizeof b->sum[0];
  const char *x = b->query[from], *w = page;
  settle();
  zero_sums();
  int d = 0;
  for (; d + 32 <= dim; d += 32, x += TILE_BYTES, w += TILE_ROWS * PAGE * LANE)
    ADD_PRODUCTS(keys, 4, x, query, 6, w, PAGE * LANE, VEC);
  if (d < dim) ADD_PRODUCTS(keys, 5, x, query, 7, w, PAGE * LANE, VEC);
  FOR_EACH_SUM(keys, _tile_stored, b->score[from], 16, score);
  soften_all(BF16, m, b, from, rows, base);
  settle();
  const size_t column = PAGE / 2 * VEC; /* bytes of sixteen values of all tokens */
  w = page + half_page_bytes(m);
  for (d = 0; d < dim; d += 64, w += 4 * column) {
    const int count = (dim - d) / 16;
    float *out = b->sum[from] + d;
    FOR_EACH_SUM(count, _tile_loadd, out, 16, sum);
    ADD_PRODUCTS(count, 4, b->weight[from], weight, 6, w, VEC, column);
    if (end > 32) ADD_PRODUCTS(count, 4, b->weight[from] + TILE_BYTES, weight, 6, w + column / 2, VEC, column);
    FOR_EACH_SUM(count, _tile_stored, out, 16, sum);
  }
}
#endif

typedef void (*through_fn)(const model *m, bundle *b, int from, const char *page, int base);
#define DEFINE(rows) \
  static void f32_##rows(const model *m, bundle *b, int from, const char *page, int base) { \
    through(F32, rows, m, b, from, page, base); \
  } \
  static void bf16_##rows(const model *m, bundle *b, int from, const char *page, int base) { \
    through(BF16, rows, m, b, from, page, base); \
  }
ROW_COUNTS(DEFINE)
#define NAME_F32(rows) [F32][rows] = f32_##rows,
#define NAME_BF16(rows) [BF16][rows] = bf16_##rows,
static const through_fn throughs[2][ROWS + 1] = {ROW_COUNTS(NAME_F32) ROW_COUNTS(NAME_BF16)};

/* A head's query or key, normalised where the model does that, turned by its position; padding stays zero. */
INLINE void turn(const model *m, const float *x, const float *norm, int position, float *out) {
  const int half = m->head_dim / 2, dim = m->dim;
  const float *cos = m->cos + (size_t)position * half, *sin = m->sin + (size_t)position * half;
  float own[MAX_DIM];
  memcpy(own, x, (size_t)dim * sizeof *own);
  if (norm) {
    vec squares = v_set(0);
    for (int i = 0; i < dim; i += 16) squares = v_fma(v_load(own + i), v_load(own + i), squares);
    vec factor = v_set(1 / sqrtf(v_sum(squares) / (float)m->head_dim + m->eps));
    for (int i = 0; i < dim; i += 16) v_store(own + i, v_mul(v_mul(v_load(own + i), factor), v_load(norm + i)));
  }
  for (int i = 0; i < half; i++) {
    out[i] = own[i] * cos[i] - own[i + half] * sin[i];
    out[i + half] = own[i + half] * cos[i] + own[i] * sin[i];
  }
  memset(out + 2 * half, 0, (size_t)(dim - 2 * half) * sizeof *out);
}

/* The first key that a token sees. */
INLINE int first_key(const attention *a, int position) {
  const int window = a->l->window;
  return window && position >= window ? position + 1 - window : 0;
}

/* Have what a head's page holds of a text brought to the second-level cache meanwhile. */
INLINE void fetch(const attention *a, const unit *u, int page) {
  const span *s = a->spans + u->span;
  const int tokens = s->start + s->count - page * PAGE;
  const size_t half = half_page_bytes(a->m), key_row = PAGE * LANE, column = half / (a->m->dim / 16);
  const char *at = (const char *)page_of(a, u, page);
  if (tokens > PAGE / 2) {
    fetch_lines(at, 2 * half);
    return;
  }
  for (size_t row = 0; row < half; row += key_row) fetch_lines(at + row, (size_t)tokens * LANE);
  for (size_t start = half; start < 2 * half; start += column) fetch_lines(at + start, column * tokens / PAGE);
}

/* A token's key and value at their place in a page. */
INLINE void put(const int format, const model *m, const float *key, const float *value, unsigned char *page, int token) {
  const int n = inputs_per_lane(format), dim = m->dim;
  const size_t bytes = LANE / n;
  char codes[2][MAX_DIM * sizeof(float)];
  convert(format, key, dim, codes[0]);
  convert(format, value, dim, codes[1]);
  for (int i = 0; i < dim / n; i++) memcpy(page + ((size_t)i * PAGE + token) * LANE, codes[0] + i * LANE, LANE);
  unsigned char *values = page + half_page_bytes(m);
  for (int i = 0; i < dim; i++) {
    size_t lane = ((size_t)i / 16 * (PAGE / n) + token / n) * 16 + i % 16;
    memcpy(values + lane * LANE + token % n * bytes, codes[1] + i * bytes, bytes);
  }
}

/* The keys and values of a unit's tokens. */
void ISA(write)(const attention *a, const unit *u) {
  const model *m = a->m;
  const int width = a->l->qkv.outputs;
  fetch(a, u, (a->spans[u->span].start + u->first) / PAGE);
  for (int i = u->first; i < u->first + u->count; i++) {
    const int position = a->spans[u->span].start + i;
    const float *of_row = a->qkv + (size_t)(a->first_row[u->span] + i) * width;
    float key[MAX_DIM];
    turn(m, of_row + (m->heads + u->head) * m->dim, a->l->k_norm, position, key);
    const float *value = of_row + (m->heads + m->kv_heads + u->head) * m->dim;
    unsigned char *page = page_of(a, u, position / PAGE);
    if (m->format == F32) put(F32, m, key, value, page, position % PAGE);
    else put(BF16, m, key, value, page, position % PAGE);
  }
}

/* Where row r of a unit reads its query and writes its output: token r / fold, head r % fold of its group. */
typedef struct {
  int position, row, head;
} place;

INLINE place place_of(const attention *a, const unit *u, int r) {
  const int fold = a->m->heads / a->m->kv_heads, i = u->first + r / fold;
  return (place){a->spans[u->span].start + i, a->first_row[u->span] + i, u->head * fold + r % fold};
}

static void gather(const attention *a, const unit *u, int from, int rows, bundle *b) {
  const model *m = a->m;
  for (int r = 0; r < rows; r++) {
    place p = place_of(a, u, from + r);
    float query[MAX_DIM];
    turn(m, a->qkv + (size_t)p.row * a->l->qkv.outputs + p.head * m->dim, a->l->q_norm, p.position, query);
    encode_row(m->format, query, m->dim, b->query[r]);
    b->end[r] = p.position + 1;
    b->first[r] = first_key(a, p.position);
    b->top[r] = -INFINITY;
    b->total[r] = 0;
    memset(b->sum[r], 0, (size_t)m->dim * sizeof(float));
  }
}

/* Rows of growing position, hence those that see a page are neighbours. Who walks first fetches the next page. */
static void walk(const attention *a, const unit *u, int rows, bundle *b, bool first) {
  const int last = (b->end[rows - 1] - 1) / PAGE;
  for (int page = b->first[0] / PAGE; page <= last; page++) {
    int base = page * PAGE, from = 0, to = rows;
    if (first && page < last) fetch(a, u, page + 1);
    while (b->end[from] <= base) from++;
    while (b->first[to - 1] >= base + PAGE) to--;
    const char *at = (const char *)page_of(a, u, page);
#if defined(__AMX_BF16__)
    if (a->m->format == BF16) {
      through_tiles(a->m, b, from, to - from, at, base);
      continue;
    }
#endif
    throughs[a->m->format][to - from](a->m, b, from, at, base);
  }
}

static void scatter(const attention *a, const unit *u, int from, int rows, const bundle *b) {
  const model *m = a->m;
  for (int r = 0; r < rows; r++) {
    place p = place_of(a, u, from + r);
    const size_t at = (size_t)p.row * a->width + (size_t)p.head * m->dim;
    vec factor = v_set(1 / b->total[r]);
    for (int i = 0; i < m->dim; i += 16) v_put(a->out_format, a->out, at + i, v_mul(v_load(b->sum[r] + i), factor));
  }
}

/* The outputs of a unit's rows; their keys are written. */
void ISA(attend)(const attention *a, const unit *u) {
  const int most = a->m->format == BF16 ? MOST_ROWS : ROWS;
  const int rows = u->count * (a->m->heads / a->m->kv_heads), bundles = (rows + most - 1) / most;
  _Alignas(4096) bundle b; /* wherever the stack is: lines of it that alias those of a page cost a fifth of the time */
  b.tile_rows = 0;
  fetch(a, u, first_key(a, place_of(a, u, 0).position) / PAGE);
  for (int i = 0; i < bundles; i++) {
    int from = (int)((long)rows * i / bundles), to = (int)((long)rows * (i + 1) / bundles);
    gather(a, u, from, to - from, &b);
    walk(a, u, to - from, &b, i == 0);
    scatter(a, u, from, to - from, &b);
  }
#if defined(__AMX_BF16__)
  if (b.tile_rows) _tile_release();
#endif
}
