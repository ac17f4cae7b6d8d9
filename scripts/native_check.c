/* A program around the native library, for where Python is not: other processors, and the thread sanitizer.
 *
 * For every instruction set and format a small model of random weights: rows in one pass and one by one, beside another
 * text, on one to three threads, must have the same bits, and a chain must be what passes and draws give. Prints some
 * logits of each, by which another build can be compared.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { LAYERS = 2, HIDDEN = 64, HEADS = 4, KV = 2, DIM = 48, MLP = 96, VOCAB = 157, ROWS = 70, GROUP = 32, PAGES = 4, SLOTS = 2 };
enum { QKV = (HEADS + 2 * KV) * DIM, BYTES = 2 * LAYERS * KV * PAGE * DIM * 4 };

int foredraft_isas(void);
int foredraft_pass(const model *, const int32_t *, int, int, int, const unsigned char *const *, int, float *, int);
bool foredraft_choose(int, const float *, int, int, const filters *, const uint64_t *, const int32_t *, int, int32_t *,
                      float *, float *);
int foredraft_follow(int, const filters *, uint64_t, int, const float *, int, int, int, const int32_t *, const uint8_t *,
                     int32_t *, float *);
void foredraft_pack(int, const char *const *, int, int, int, char *, int);

static uint64_t state;

static float number(void) { /* in [-1, 1) */
  state++;
  return (float)(int32_t)(mix(state) >> 32) * 0x1p-31f;
}

static bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bf16)(bits >> 16);
}

static void *room(size_t bytes) {
  void *found;
  if (posix_memalign(&found, 64, bytes)) exit(3);
  memset(found, 0, bytes);
  return found;
}

/* A layer of random weights, about 1 / sqrt(inputs) each. */
static linear random_linear(int format, int outputs, int inputs) {
  const int size = format == F32 ? 4 : format == BF16 ? 2 : 1, groups = inputs / GROUP;
  const float scale = 1.7f / sqrtf((float)inputs);
  outputs = round_up(outputs, BLOCK);
  char *plain = room((size_t)outputs * inputs * size);
  const char **rows = room(sizeof *rows * outputs);
  for (int i = 0; i < outputs * inputs; i++) {
    float w = number();
    if (format == F32) ((float *)plain)[i] = w * scale;
    else if (format == BF16) ((bf16 *)plain)[i] = to_bf16(w * scale);
    else plain[i] = (char)(format == INT8 ? (int)(w * 127) + 128 : (int)(w * 8) + 8);
  }
  for (int i = 0; i < outputs; i++) rows[i] = plain + (size_t)i * inputs * size;
  linear made = {.format = format, .outputs = outputs, .inputs = inputs, .group = format >= INT8 ? GROUP : 1};
  char *weights = room((size_t)outputs * inputs * 4);
  foredraft_pack(format, rows, outputs, inputs, inputs, weights, 1);
  bf16 *grid = room(sizeof *grid * outputs * groups * 2);
  for (int i = 0; i < outputs * groups * 2; i++) {
    bool offset = format == INT4 && i / BLOCK % 2;
    grid[i] = to_bf16(offset ? 0.1f * scale * number() : scale / (format == INT8 ? 127 : 8) * (1.5f + number()));
  }
  made.weights = weights;
  made.grid = format >= INT8 ? grid : NULL;
  return made;
}

static float *ones(int count) {
  float *made = room(sizeof *made * count);
  for (int i = 0; i < count; i++) made[i] = 1;
  return made;
}

static model random_model(int format, int isa) {
  layer *layers = room(sizeof *layers * LAYERS);
  state = 1;
  for (int i = 0; i < LAYERS; i++)
    layers[i] = (layer){.attention_norm = ones(HIDDEN), .mlp_norm = ones(HIDDEN), .qkv = random_linear(format, QKV, HIDDEN),
                        .out = random_linear(format, HIDDEN, HEADS * DIM), .gate_up = random_linear(format, 2 * MLP, HIDDEN),
                        .down = random_linear(format, HIDDEN, MLP), .window = i ? 9 : 0, .index = i};
  float *table = room(sizeof *table * VOCAB * HIDDEN), *cosines = room(4 * PAGES * PAGE * DIM), *sines = room(4 * PAGES * PAGE * DIM);
  for (int i = 0; i < VOCAB * HIDDEN; i++) table[i] = number();
  for (int i = 0; i < PAGES * PAGE * DIM / 2; i++) {
    float angle = (float)(i / (DIM / 2)) / powf(100, (float)(i % (DIM / 2)) / (DIM / 2));
    cosines[i] = cosf(angle), sines[i] = sinf(angle);
  }
  if (format != F32)
    for (int i = 0; i < VOCAB * HIDDEN; i++) ((bf16 *)table)[i] = to_bf16(table[i]);
  return (model){.layers = LAYERS, .hidden = HIDDEN, .vocab = VOCAB, .heads = HEADS, .kv_heads = KV, .head_dim = DIM,
                 .dim = DIM, .format = format == F32 ? F32 : BF16, .isa = isa, .eps = 1e-5f, .embedding = table,
                 .layer = layers, .norm = ones(HIDDEN), .head = random_linear(format, VOCAB, HIDDEN), .cos = cosines, .sin = sines};
}

static const unsigned char **pages(void) {
  const unsigned char **made = room(sizeof *made * SLOTS * PAGES);
  for (int i = 0; i < SLOTS * PAGES; i++) made[i] = room(BYTES);
  return made;
}

static void check(int status) {
  if (status) printf("a pass failed: %d\n", status), exit(1);
}

/* Logits [ROWS][VOCAB] of a text, `step` rows a pass, beside another text or not. */
static float *logits_of(const model *m, int step, bool mate, int threads) {
  const unsigned char **table = pages();
  float *logits = room(sizeof *logits * ROWS * VOCAB), *found = room(sizeof *found * 2 * ROWS * VOCAB);
  for (int start = 0; start < ROWS; start += step) {
    int count = start + step < ROWS ? step : ROWS - start, more = mate ? 3 : 0, rows = count + more, at = 0;
    int32_t ints[4 * ROWS + 16];
    for (int i = 0; i < more; i++) ints[at++] = (start + 5 * i) % VOCAB;
    for (int i = 0; i < count; i++) ints[at++] = (start + i) * 7 % VOCAB;
    if (mate) ints[at++] = 1, ints[at++] = start, ints[at++] = more;
    ints[at++] = 0, ints[at++] = start, ints[at++] = count;
    for (int i = 0; i < count; i++) ints[at++] = more + i;
    check(foredraft_pass(m, ints, rows, mate ? 2 : 1, count, table, PAGES, found, threads));
    memcpy(logits + (size_t)start * VOCAB, found, sizeof *logits * count * VOCAB);
  }
  return logits;
}

static void compare(const float *a, const float *b, const char *what, const char *name, int format) {
  if (memcmp(a, b, sizeof *a * ROWS * VOCAB)) printf("%s, format %d: other bits %s\n", name, format, what), exit(1);
}

static void one_model(int isa, int format, const char *name, int most_threads) {
  const model m = random_model(format, isa);
  const float *alone = logits_of(&m, 1, false, 1);
  for (int threads = 1; threads <= most_threads; threads++) {
    compare(alone, logits_of(&m, ROWS, false, threads), "in one pass", name, format);
    compare(alone, logits_of(&m, 5, false, threads), "five rows a pass", name, format);
    compare(alone, logits_of(&m, 3, true, threads), "beside another text", name, format);
  }
  const filters samplers[] = {{1, 0, -INFINITY, 0}, {1, 0.8f, -INFINITY, 0}, {0.8, 1.2f, -6, 30}};
  uint64_t seeds[ROWS];
  int32_t places[ROWS], tokens[ROWS], again[ROWS];
  float peaks[ROWS], sure[ROWS];
  uint8_t all[ROWS * ((VOCAB + 7) / 8)];
  memset(all, 0xff, sizeof all);
  for (int i = 0; i < ROWS; i++) seeds[i] = 5, places[i] = i;
  printf("%s %d", name, format);
  for (int s = 0; s < 3; s++) {
    if (!foredraft_choose(isa, alone, ROWS, VOCAB, samplers + s, seeds, places, 0, tokens, peaks, sure)) exit(1);
    for (int i = 0; i < ROWS; i++) {
      foredraft_choose(isa, alone + i * VOCAB, 1, VOCAB, samplers + s, seeds, places + i, 0, again, peaks, sure);
      if (again[0] != tokens[i]) printf(": row %d draws another token alone\n", i), exit(1);
    }
    for (int masked = 0; masked < 2; masked++) {
      int found = foredraft_follow(isa, samplers + s, 5, 0, alone, ROWS, VOCAB, 0, tokens, masked ? all : NULL, again, peaks);
      if (found != ROWS || memcmp(again, tokens, sizeof again)) printf(": other tokens along a draft\n"), exit(1);
    }
  }
  for (int i = 0; i < 8; i++) printf(" %.4f", (double)alone[(i * 2 + 5) * VOCAB + i * 19]);
  printf("\n");
}

static void *from_another_thread(void *arg) {
  for (int i = 0; i < 20; i++) logits_of(arg, 7, true, 3);
  return NULL;
}

int main(int count, char **given) { /* the most threads of a pass; on one there are no others at all */
  const int threads = count > 1 ? atoi(given[1]) : 3;
  const char *names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int isa = 0; isa < 5; isa++)
    for (int format = F32; (foredraft_isas() >> isa & 1) && format <= INT4; format++) one_model(isa, format, names[isa], threads);
  if (threads == 1) return 0;
  model mine = random_model(F32, 0), theirs = random_model(BF16, 0);
  pthread_t other; /* two callers share the pool */
  if (pthread_create(&other, NULL, from_another_thread, &theirs)) return 2;
  for (int i = 0; i < 20; i++) logits_of(&mine, 4, false, 2);
  pthread_join(other, NULL);
  return 0;
}
