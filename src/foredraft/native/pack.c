/* Weights as they lie in a tensor, into the order in which the kernels read them, and to four bits; all threads at once. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sys/mman.h>
#endif
#include <string.h>

#include "native.h"

typedef struct {
  const char *const *rows; /* [outputs], none for zeros */
  char *out;
  int format, outputs, inputs, padded;
} pack_job;

/* Four bits: the first four of eight codes in the low halves of a lane's bytes, the others in the high ones. */
static uint32_t pack_nibbles(const uint8_t *codes) {
  uint32_t lane = 0;
  for (int i = 0; i < 8; i++) lane |= (uint32_t)(codes[i] & 15) << (8 * (i % 4) + 4 * (i / 4));
  return lane;
}

static uint32_t lane_of(const pack_job *j, const char *row, int first) {
  const size_t size = j->format == F32 ? 4 : j->format == BF16 ? 2 : 1;
  const int wanted = inputs_per_lane(j->format), left = j->inputs - first;
  uint8_t bytes[8] = {0};
  if (left > 0) memcpy(bytes, row + first * size, (left < wanted ? left : wanted) * size);
  if (j->format == INT4) return pack_nibbles(bytes);
  uint32_t lane;
  memcpy(&lane, bytes, sizeof lane);
  return lane;
}

/* One block, sixteen lanes of each row at a time, so that what is written stays in the cache. */
static void pack_block(void *arg, int block, int onward) {
  (void)onward;
  const pack_job *j = arg;
  const int n = inputs_per_lane(j->format), steps = j->padded / n;
  uint32_t *out = (uint32_t *)j->out + (size_t)block * steps * BLOCK;
  for (int step = 0; step < steps; step += 16)
    for (int row = 0; row < BLOCK; row++) {
      const char *from = j->rows[block * BLOCK + row];
      for (int k = step; k < steps && k < step + 16; k++)
        out[(size_t)k * BLOCK + row] = from ? lane_of(j, from, k * n) : 0;
    }
}

/* rows [outputs]: where each output's `inputs` elements begin (fp32, bf16, or codes of one byte), 0 for padding. */
EXPORT void foredraft_pack(int format, const char *const *rows, int outputs, int inputs, int padded, char *out, int threads) {
  pack_job job = {rows, out, format, outputs, inputs, padded};
#if defined(__linux__)
  size_t bytes = (size_t)outputs * padded / inputs_per_lane(format) * sizeof(uint32_t), start = ((size_t)out + 4095) & ~(size_t)4095;
  if (bytes > (1 << 22)) madvise((void *)start, bytes - 4096, MADV_HUGEPAGE); /* fewer pages to look up: 3 to 10 % */
#endif
  enum { MOST_BLOCKS = 32768 };
  pool_enter(threads);
  for (int first = 0; first < outputs / BLOCK; first += MOST_BLOCKS) {
    pack_job part = job;
    part.rows += (size_t)first * BLOCK;
    part.out += (size_t)first * BLOCK * padded / inputs_per_lane(format) * sizeof(uint32_t);
    int left = outputs / BLOCK - first;
    pool_run(pack_block, &part, left < MOST_BLOCKS ? left : MOST_BLOCKS);
  }
  pool_leave();
}

typedef struct {
  const kernels *k;
  const float *x;
  uint8_t *codes;
  bf16 *grid;
  int groups, size;
} round_job;

enum { GROUPS_A_CHUNK = 256 };

static void round_chunk(void *arg, int chunk, int onward) {
  (void)onward;
  const round_job *j = arg;
  for (int g = chunk * GROUPS_A_CHUNK; g < j->groups && g < (chunk + 1) * GROUPS_A_CHUNK; g++)
    j->k->round4(j->x + (size_t)g * j->size, j->size, j->codes + (size_t)g * j->size, j->grid + 2 * (size_t)g);
}

/* codes and grid [groups][2] of x [groups][size], a multiple of sixteen. */
EXPORT void foredraft_round(int isa, const float *x, int groups, int size, uint8_t *codes, bf16 *grid, int threads) {
  round_job job = {kernels_of(isa), x, codes, grid, groups, size};
  pool_enter(threads);
  pool_run(round_chunk, &job, (groups + GROUPS_A_CHUNK - 1) / GROUPS_A_CHUNK);
  pool_leave();
}
