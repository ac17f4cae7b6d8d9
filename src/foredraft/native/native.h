/* What Python and C agree on, and what the files here share.
 *
 * A pass computes every output element by the same code in the same order, whatever else is in the pass: how many rows,
 * which texts, how many threads. So a row's bits are a function of weights and text alone. Three rules keep it so:
 * sums run over their inputs in one fixed order, rows share loads but never arithmetic, and the compiler may not
 * contract (-ffp-contract=off). Blocking, chunks and threads only decide who computes what, and when.
 */
#ifndef FOREDRAFT_NATIVE_H
#define FOREDRAFT_NATIVE_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef uint16_t bf16;

enum { ABI = 6 };         /* raise it with every change that native/library.py must follow */
enum { BLOCK = 32 };      /* outputs that are packed together */
enum { PAGE = 64 };       /* tokens of a page of the cache */
enum { MAX_DIM = 256 };   /* of a head */
enum { MAX_GROUP = 256 }; /* inputs that share a scale */

enum format { F32, BF16, INT8, INT4 };
enum epilogue { STORE, ADD, SILU, SILU_BF16 /* SiLU, as the next layer takes it */ };

/* y = x W^T + b. The weights are [outputs / BLOCK][steps][BLOCK] lanes of 32 bits, a lane being the next 1 (F32), 2
 * (BF16), 4 (INT8) or 8 (INT4) inputs of an output. */
typedef struct {
  const void *weights;
  const bf16 *grid;  /* INT8: scales [outputs / BLOCK][groups][BLOCK]; INT4: [..][groups][2][BLOCK], scales, offsets */
  const float *bias; /* [outputs], or none */
  int32_t format;
  int32_t outputs; /* a multiple of BLOCK, padded with zeros; gate and up alternate by 16 */
  int32_t inputs;  /* a multiple of BLOCK and of the group, padded with zeros */
  int32_t group;
} linear;

typedef struct {
  const float *attention_norm, *mlp_norm; /* [hidden], padded with zeros as all norms */
  const float *q_norm, *k_norm;           /* [dim], or none */
  linear qkv, out, gate_up, down;
  int32_t window;         /* tokens that a row sees, itself included; 0 is all */
  int32_t skip_attention; /* these sub-layers add nothing */
  int32_t skip_mlp;
  int32_t index; /* which layer's part of a page is read and written */
} layer;

typedef struct {
  int32_t layers, hidden, vocab, heads, kv_heads;
  int32_t head_dim; /* as the model has it; in memory heads are padded to `dim`, a multiple of 16 */
  int32_t dim;
  int32_t format; /* F32 or BF16, of the embedding and of keys and values */
  int32_t isa;
  float eps;
  const void *embedding; /* [vocab][hidden] */
  const layer *layer;
  const float *norm;
  linear head;
  const float *cos, *sin; /* [positions][head_dim / 2] */
} model;

/* Consecutive tokens of one text. */
typedef struct {
  int32_t slot, start, count;
} span;

/* The query rows of some tokens of a span, for one key-value head. */
typedef struct {
  int32_t span, head, first, count;
} unit;

/* What a layer's attention works on. */
typedef struct {
  const model *m;
  const layer *l;
  const span *spans;
  const int32_t *first_row;    /* [spans] */
  const unsigned char *const *pages; /* [slots][max_pages] */
  int32_t max_pages;
  const float *qkv; /* [rows][qkv.outputs] */
  void *out;        /* [rows][width], of which heads * dim are written */
  int32_t width;
  int32_t out_format; /* F32 or BF16 */
} attention;

/* How a token is drawn from logits. */
typedef struct {
  double top_p;      /* 1 keeps all */
  float temperature; /* 0 takes the likeliest */
  float least;       /* how much less than the largest score one that is kept may be; -infinity keeps all */
  int32_t top_k;     /* 0 keeps all */
} filters;

/* A token, how sure of it the logits are, and the largest score: no number where one of them is none. */
typedef struct {
  int32_t token;
  float confidence, peak;
} drawn;

/* The kernels of one instruction set. */
typedef struct {
  const char *name;
  bool pairs; /* inputs of bf16 weights are bf16 */
  void (*embed)(const model *m, int32_t token, float *x, int width);
  /* x [count], normalised where there is a norm, as input of a linear layer: codes, scales and all. */
  void (*encode)(const linear *to, const float *x, int count, const float *norm, int size, float eps, char *out);
  /* Blocks first to last of y for rows of encoded x; if onward is -1 the last ones first. */
  void (*product)(const linear *w, int epilogue, int first, int last, int onward, const char *x, int rows, void *y,
                  int width);
  void (*write)(const attention *a, const unit *u);
  void (*attend)(const attention *a, const unit *u);
  drawn (*draw)(float *logits, int count, const filters *f, uint64_t key, float *spare);
  drawn (*likeliest)(const float *logits, const uint8_t *allowed, int count);
  void (*round4)(const float *x, int size, uint8_t *codes, bf16 *grid);
  void (*mask)(const float *x, const uint8_t *allowed, int count, float *out);
} kernels;

extern const kernels kernels_portable;
#if defined(__x86_64__)
extern const kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx;
#endif

INLINE int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

INLINE int inputs_per_lane(int format) { return 1 << format; }

/* Whether a token is in a set. */
INLINE bool may_come(const uint8_t *allowed, int token) { return allowed[token / 8] >> token % 8 & 1; }

INLINE bool filtering(const filters *f) { return f->top_k || f->top_p < 1 || f->least > -INFINITY; }

INLINE int groups_of(const linear *w) { return w->format >= INT8 ? w->inputs / w->group : 0; }

/* Bytes of one row of encoded input: the elements (to bf16 weights in bf16 or, where the kernels have no use for that,
 * in fp32), then for each group its scale and its scaled sum. */
INLINE size_t encoded_bytes(const linear *w) {
  size_t elements = (size_t)w->inputs * (w->format <= BF16 ? 4 : 1);
  return (elements + (size_t)groups_of(w) * 2 * sizeof(float) + 63) / 64 * 64;
}

/* Bytes of one key-value head's keys or values in a page. */
INLINE size_t half_page_bytes(const model *m) { return (size_t)PAGE * m->dim * (m->format == F32 ? 4 : 2); }

INLINE unsigned char *page_of(const attention *a, const unit *u, int page) {
  const span *s = a->spans + u->span;
  size_t head = (size_t)a->l->index * a->m->kv_heads + u->head;
  return (unsigned char *)a->pages[(size_t)s->slot * a->max_pages + page] + head * 2 * half_page_bytes(a->m);
}

/* noise.py's: splitmix64's output function. */
INLINE uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

INLINE uint64_t fold(uint64_t seed, uint64_t value) { return mix(mix(seed) + value); }

/* isa.c */
const kernels *kernels_of(int isa);

/* pass.c */
/* foredraft_pass for who is in the pool already; a row of logits lies every `width`. */
int run_pass(const model *m, const int32_t *ints, int rows, int spans, int wanted, const unsigned char *const *pages,
             int max_pages, float *logits, int width);

/* threads.c */
/* onward: 1 or -1, where the chunk lies that the same thread is likely to run next */
typedef void (*task)(void *arg, int chunk, int onward);
void pool_enter(int threads); /* one pass at a time; up to `threads` threads, the caller among them */
void pool_leave(void);
void pool_run(task run, void *arg, int chunks);

#endif
