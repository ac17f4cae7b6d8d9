/* Tokens of logits that are there already: of rows that have nothing in common, and of rows along a draft. */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* Where a copy of a row is worked on, with as much to spare for filters; nothing where the likeliest is taken. */
static float *room_for(const filters *f, int count) {
  return f->temperature == 0 ? NULL : malloc(2 * sizeof(float) * (size_t)round_up(count, 16));
}

static drawn one(const kernels *k, const float *logits, const uint8_t *allowed, int count, const filters *f,
                 uint64_t key, float *room) {
  if (f->temperature == 0) return k->likeliest(logits, allowed, count);
  if (allowed)
    k->mask(logits, allowed, count, room);
  else
    memcpy(room, logits, sizeof *room * (size_t)count);
  return k->draw(room, count, f, key, room + round_up(count, 16));
}

static uint64_t key_of(uint64_t seed, int stream, int position) {
  return mix(fold(seed, (uint64_t)stream) + (uint64_t)position);
}

/* Tokens, the largest scores, and how sure of the tokens they are, [rows] each, of rows of logits [rows][count], each
 * with the noise of its own seed and position [rows]. Returns whether there was memory for it. */
EXPORT bool foredraft_choose(int isa, const float *logits, int rows, int count, const filters *f, const uint64_t *seeds,
                             const int32_t *positions, int stream, int32_t *tokens, float *peaks, float *confidences) {
  float *room = room_for(f, count);
  if (!room && f->temperature != 0) return false;
  for (int row = 0; row < rows; row++) {
    const uint64_t key = key_of(seeds[row], stream, positions[row]);
    const drawn d = one(kernels_of(isa), logits + (size_t)row * count, NULL, count, f, key, room);
    tokens[row] = d.token;
    peaks[row] = d.peak;
    confidences[row] = d.confidence;
  }
  free(room);
  return true;
}

/* Tokens [rows] of logits [rows][count] along a draft [rows - 1], up to the first that differs from it or comes from no
 * number, which the largest score of the last row tells. Row 0 decides position `start`. Where there are sets `allowed`
 * [rows][(count + 7) / 8], no other tokens may come. Returns how many; 0 where there is no memory. */
EXPORT int foredraft_follow(int isa, const filters *f, uint64_t seed, int stream, const float *logits, int rows, int count,
                            int start, const int32_t *draft, const uint8_t *allowed, int32_t *tokens, float *peak) {
  float *room = room_for(f, count);
  if (!room && f->temperature != 0) return 0;
  int row = 0;
  for (bool follows = true; follows && row < rows; row++) {
    const uint8_t *set = allowed ? allowed + (size_t)row * (size_t)((count + 7) / 8) : NULL;
    const uint64_t key = key_of(seed, stream, start + row);
    const drawn d = one(kernels_of(isa), logits + (size_t)row * count, set, count, f, key, room);
    tokens[row] = d.token;
    *peak = d.peak;
    follows = row < rows - 1 && d.token == draft[row] && isfinite(d.peak);
  }
  free(room);
  return row;
}
