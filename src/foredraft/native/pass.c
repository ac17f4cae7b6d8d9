/* A whole pass: embedding, layers, head. The residual stream and all sums are fp32.
 *
 * Each phase is cut into chunks for whoever is there; between phases everybody has finished.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { ROWS_A_CHUNK = 4, LEAST_UNIT = 32, MOST_UNIT = 128 /* tokens */, ENOUGH_UNITS = 96, SHORT_SPAN = 8, MOST_CHUNKS = 64 };

/* Buffers of all passes, grown to what the largest needed; whoever is in the pool has them. */
static struct {
  char *start;
  size_t bytes, used;
} arena;

typedef struct {
  const model *m;
  const kernels *k;
  const int32_t *tokens;
  int rows, width; /* of the residual stream: hidden, padded */
  float *x, *wide, *mixed;
  char *encoded, *inner; /* inputs of layers; inner: of those that take what attention and gates give */
  unit *units;
  int num_units;
  bool all_short;
  attention attention;
} pass;

EXPORT int foredraft_abi(void) { return ABI; }

/* --- one linear layer over all rows --- */

typedef struct {
  const kernels *k;
  const linear *w;
  const char *x;
  void *y;
  int epilogue, rows, width, chunks;
} product_job;

static void product_chunk(void *arg, int chunk, int onward) {
  const product_job *j = arg;
  const int strips = (j->w->outputs / BLOCK + 3) / 4; /* tiles of one row take four blocks */
  int first = (int)((long)strips * chunk / j->chunks) * 4, last = (int)((long)strips * (chunk + 1) / j->chunks) * 4;
  if (last > j->w->outputs / BLOCK) last = j->w->outputs / BLOCK;
  j->k->product(j->w, j->epilogue, first, last, onward, j->x, j->rows, j->y, j->width);
}

/* Chunks of some ten microseconds: small enough that an absent worker costs little. */
static int chunks_for(const linear *w, int rows) {
  long work = (long)w->outputs * w->inputs * (rows < 4 ? 4 : rows) >> 18;
  long most = (w->outputs / BLOCK + 3) / 4;
  long chunks = work < 2 ? 2 : work < MOST_CHUNKS ? work : MOST_CHUNKS;
  return (int)(chunks < most ? chunks : most);
}

static void product(const kernels *k, const linear *w, int epilogue, const char *x, int rows, void *y, int width) {
  product_job job = {k, w, x, y, epilogue, rows, width, chunks_for(w, rows)};
  pool_run(product_chunk, &job, job.chunks);
}

/* --- rows from floats to a layer's input --- */

typedef struct {
  const pass *p;
  const linear *to;
  const float *x, *norm;
  const int32_t *which; /* rows, or none for all */
  char *out;
  int rows, stride, count;
} encode_job;

static void encode_chunk(void *arg, int chunk, int onward) {
  (void)onward;
  const encode_job *j = arg;
  const int first = chunk * ROWS_A_CHUNK, end = first + ROWS_A_CHUNK < j->rows ? first + ROWS_A_CHUNK : j->rows;
  for (int r = first; r < end; r++) {
    const float *x = j->x + (size_t)(j->which ? j->which[r] : r) * j->stride;
    j->p->k->encode(j->to, x, j->count, j->norm, j->p->m->hidden, j->p->m->eps, j->out + r * encoded_bytes(j->to));
  }
}

static void encode(encode_job job) { pool_run(encode_chunk, &job, (job.rows + ROWS_A_CHUNK - 1) / ROWS_A_CHUNK); }

static void encode_normed(pass *p, const linear *to, const float *norm) {
  encode((encode_job){p, to, p->x, norm, NULL, p->encoded, p->rows, p->width, p->m->hidden});
}

/* Rows that attention or gates write, for a layer that takes them. */
typedef struct {
  void *at; /* [rows][width] */
  int width, format;
} rows_for;

/* As the layer takes them, where elements are rounded one by one; else as floats, for `encode_inner`. */
static rows_for inner_rows(const pass *p, const linear *to, float *floats, int count) {
  if (to->format >= INT8) return (rows_for){floats, count, F32};
  const int format = to->format == BF16 && p->k->pairs ? BF16 : F32, size = format == BF16 ? 2 : 4;
  const size_t bytes = encoded_bytes(to);
  for (int r = 0; r < p->rows && count < to->inputs; r++) /* what nobody writes */
    memset(p->inner + r * bytes + (size_t)count * size, 0, (size_t)(to->inputs - count) * size);
  return (rows_for){p->inner, (int)(bytes / size), format};
}

static void encode_inner(pass *p, const linear *to, const float *floats, int count) {
  if (to->format >= INT8) encode((encode_job){p, to, floats, NULL, NULL, p->inner, p->rows, count, count});
}

/* --- the phases of a pass --- */

static void embed_chunk(void *arg, int chunk, int onward) {
  (void)onward;
  const pass *p = arg;
  for (int r = chunk * ROWS_A_CHUNK; r < p->rows && r < (chunk + 1) * ROWS_A_CHUNK; r++)
    p->k->embed(p->m, p->tokens[r], p->x + (size_t)r * p->width, p->width);
}

static void unit_chunk(void *arg, int chunk, int onward) {
  (void)onward;
  const pass *p = arg;
  if (p->all_short) p->k->write(&p->attention, p->units + chunk);
  p->k->attend(&p->attention, p->units + chunk);
}

static void write_chunk(void *arg, int chunk, int onward) {
  (void)onward;
  const pass *p = arg;
  p->k->write(&p->attention, p->units + chunk);
}

static void attend(pass *p, const layer *l) {
  const model *m = p->m;
  encode_normed(p, &l->qkv, l->attention_norm);
  product(p->k, &l->qkv, STORE, p->encoded, p->rows, p->wide, l->qkv.outputs);
  const int count = m->heads * m->dim;
  const rows_for mixed = inner_rows(p, &l->out, p->mixed, count);
  p->attention.l = l, p->attention.out = mixed.at, p->attention.width = mixed.width, p->attention.out_format = mixed.format;
  if (!p->all_short) pool_run(write_chunk, p, p->num_units);
  pool_run(unit_chunk, p, p->num_units);
  encode_inner(p, &l->out, p->mixed, count);
  product(p->k, &l->out, ADD, p->inner, p->rows, p->x, p->width);
}

static void feed_forward(pass *p, const layer *l) {
  encode_normed(p, &l->gate_up, l->mlp_norm);
  const int count = l->gate_up.outputs / 2;
  const rows_for gated = inner_rows(p, &l->down, p->wide, count);
  product(p->k, &l->gate_up, gated.format == BF16 ? SILU_BF16 : SILU, p->encoded, p->rows, gated.at, gated.width);
  encode_inner(p, &l->down, p->wide, count);
  product(p->k, &l->down, ADD, p->inner, p->rows, p->x, p->width);
}

/* --- laying out a pass --- */

static void *take(size_t bytes) {
  void *found = arena.start ? arena.start + arena.used : NULL;
  arena.used += (bytes + 63) / 64 * 64;
  return found;
}

static size_t larger(size_t most, const linear *w, int rows) {
  return w->weights && rows * encoded_bytes(w) > most ? rows * encoded_bytes(w) : most;
}

static int widest(const model *m) {
  int most = 0;
  for (int i = 0; i < m->layers; i++) {
    if (m->layer[i].qkv.outputs > most) most = m->layer[i].qkv.outputs;
    if (m->layer[i].gate_up.outputs / 2 > most) most = m->layer[i].gate_up.outputs / 2;
  }
  return most;
}

static void lay_out(pass *p, int32_t **first_row, int spans, int wanted) {
  const model *m = p->m;
  arena.used = 0;
  *first_row = take(sizeof(int32_t) * spans);
  p->units = take(sizeof(unit) * ((size_t)p->rows / LEAST_UNIT + spans) * m->kv_heads);
  p->x = take(sizeof(float) * p->rows * p->width);
  p->wide = take(sizeof(float) * p->rows * widest(m));
  p->mixed = take(sizeof(float) * p->rows * m->heads * m->dim);
  size_t normed = larger(0, &m->head, wanted), inner = 0;
  for (int i = 0; i < m->layers; i++) {
    normed = larger(larger(normed, &m->layer[i].qkv, p->rows), &m->layer[i].gate_up, p->rows);
    inner = larger(larger(inner, &m->layer[i].out, p->rows), &m->layer[i].down, p->rows);
  }
  p->encoded = take(normed);
  p->inner = take(inner);
}

static bool reserve(pass *p, int32_t **first_row, int spans, int wanted) {
  lay_out(p, first_row, spans, wanted);
  if (arena.used <= arena.bytes) return true;
  void *old = arena.start, *fresh;
  size_t bytes = (arena.used + 4095) / 4096 * 4096;
  arena.bytes = 0; /* first, and last: a process forked amid this finds an arena that is empty or whole */
  arena.start = NULL;
  free(old);
  if (posix_memalign(&fresh, 4096, bytes)) return false;
  arena.start = fresh;
  arena.bytes = bytes;
  lay_out(p, first_row, spans, wanted);
  return true;
}

/* Units of some tokens, more where there are many: each unit reads all pages of its text. A span of few tokens is one unit
 * for each head, which writes its keys itself. */
static void cut_into_units(pass *p, const span *spans, int count, int32_t *first_row) {
  int most = LEAST_UNIT;
  while (most < MOST_UNIT && (long)p->rows * p->m->kv_heads > (long)ENOUGH_UNITS * most) most *= 2;
  p->all_short = true;
  for (int s = 0, row = 0; s < count; row += spans[s++].count) {
    first_row[s] = row;
    p->all_short = p->all_short && spans[s].count <= SHORT_SPAN;
    for (int first = 0; first < spans[s].count; first += most) {
      int tokens = spans[s].count - first < most ? spans[s].count - first : most;
      for (int head = 0; head < p->m->kv_heads; head++) p->units[p->num_units++] = (unit){s, head, first, tokens};
    }
  }
}

static void run(pass *p, const int32_t *wanted, int num_wanted, float *logits, int width) {
  const model *m = p->m;
  pool_run(embed_chunk, p, (p->rows + ROWS_A_CHUNK - 1) / ROWS_A_CHUNK);
  for (int i = 0; i < m->layers; i++) {
    if (!m->layer[i].skip_attention) attend(p, m->layer + i);
    if (!m->layer[i].skip_mlp) feed_forward(p, m->layer + i);
  }
  if (!num_wanted) return;
  encode((encode_job){p, &m->head, p->x, m->norm, wanted, p->encoded, num_wanted, p->width, m->hidden});
  product(p->k, &m->head, STORE, p->encoded, num_wanted, logits, width);
}

static bool all_known(const model *m, const int32_t *tokens, int rows) {
  for (int r = 0; r < rows; r++)
    if (tokens[r] < 0 || tokens[r] >= m->vocab) return false;
  return true;
}

int run_pass(const model *m, const int32_t *ints, int rows, int spans, int wanted, const unsigned char *const *pages,
             int max_pages, float *logits, int width) {
  const span *all = (const span *)(ints + rows);
  pass p = {.m = m, .k = kernels_of(m->isa), .tokens = ints, .rows = rows, .width = round_up(m->hidden, BLOCK)};
  int32_t *first_row;
  if (!all_known(m, ints, rows)) return 2;
  if (!reserve(&p, &first_row, spans, wanted)) return 1;
  cut_into_units(&p, all, spans, first_row);
  p.attention = (attention){.m = m, .spans = all, .first_row = first_row, .pages = pages, .max_pages = max_pages, .qkv = p.wide};
  run(&p, ints + rows + 3 * spans, wanted, logits, width);
  return 0;
}

/* ints: tokens [rows], spans [spans][3], wanted rows [wanted]; pages [slots][max_pages]; logits [wanted][vocab].
 * Returns 0; 1 where there is no memory for it; 2 where a token is none of the vocabulary. */
EXPORT int foredraft_pass(const model *m, const int32_t *ints, int rows, int spans, int wanted,
                          const unsigned char *const *pages, int max_pages, float *logits, int threads) {
  pool_enter(threads);
  int status = run_pass(m, ints, rows, spans, wanted, pages, max_pages, logits, m->vocab);
  pool_leave();
  return status;
}

/* out [rows][count] has x, and -infinity where the bit of a token is not set in `allowed` [rows][(count + 7) / 8]. */
EXPORT void foredraft_mask(int isa, const float *x, const uint8_t *allowed, int rows, int count, float *out) {
  const kernels *k = kernels_of(isa);
  for (size_t r = 0; r < (size_t)rows; r++)
    k->mask(x + r * count, allowed + r * ((count + 7) / 8), count, out + r * count);
}

/* y [rows][width] = x [rows][count] W^T + b alone, for tests and measurements. x is padded to a multiple of sixteen. */
EXPORT int foredraft_linear(const linear *w, int isa, const float *x, int rows, int count, float *y, int width, int threads) {
  char *encoded;
  if (posix_memalign((void **)&encoded, 64, rows * encoded_bytes(w) + 64)) return 1;
  const kernels *k = kernels_of(isa);
  pool_enter(threads);
  for (int r = 0; r < rows; r++)
    k->encode(w, x + (size_t)r * round_up(count, 16), count, NULL, count, 0, encoded + r * encoded_bytes(w));
  product(k, w, STORE, encoded, rows, y, width);
  pool_leave();
  free(encoded);
  return 0;
}
