/* One token from a row of logits: the likeliest, or, of those that the filters keep, the winner of the race that noise.py
 * describes. Filters and their order are sampling.py's.
 */
#include <stdbool.h>
#include <stdlib.h>

#include "vec.h"

static const uint64_t FIRST = 0xBF58476D1CE4E5B9u, SECOND = 0x94D049BB133111EBu;
static const double SMALLEST = 0x1p-53, LARGEST = 36.7368005696771;
enum { TOGETHER = 16 /* as many as in a vec */ };

/* noise.py's uniform number of a place and a token, ends included. */
INLINE double uniform(uint64_t key, uint64_t token) {
  uint64_t bits = mix(token) ^ key;
  bits *= FIRST;
  bits = (bits ^ (uint64_t)((int64_t)bits >> 32)) * SECOND;
  return (double)(int64_t)bits * 0x1p-64 + 0.5;
}

/* When a token of this weight arrives; its noise is noise.py's `exponential`. */
static float speed(float weight, double uniform) {
  float noise = -(float)log(uniform);
  if (!(noise > (float)SMALLEST)) noise = (float)SMALLEST;
  if (noise > (float)LARGEST) noise = (float)LARGEST;
  return weight / noise;
}

/* The largest weight over noise, of weights with room up to a multiple of sixteen. Since -log(u) is at least 1 - u, and
 * at least SMALLEST, few tokens need a logarithm, and where filters left few, few need a number. */
static int race(const float *weights, int count, uint64_t key, int favourite) {
  int winner = favourite;
  float best = speed(weights[favourite], uniform(key, (uint64_t)favourite));
  for (int first = 0; first < count; first += TOGETHER) {
    double numbers[TOGETHER];
    float needed[TOGETHER];
    const vec own = v_load(weights + first);
    if (!v_reaches(own, v_set((float)SMALLEST * best))) continue;
    for (int i = 0; i < TOGETHER; i++) numbers[i] = uniform(key, (uint64_t)(first + i));
    for (int i = 0; i < TOGETHER; i++) needed[i] = 0.9999f * best * (float)(1 - numbers[i]);
    if (!v_reaches(own, v_load(needed))) continue;
    for (int i = 0; i < TOGETHER && first + i < count; i++) {
      float finish = speed(weights[first + i], numbers[i]);
      if (finish > best || (finish == best && first + i < winner)) best = finish, winner = first + i;
    }
  }
  return winner;
}

/* The first place of the largest of x [count], of those in a set where there is one; 0 where that is no number. */
static int first_of(const float *x, const uint8_t *allowed, int count, float largest) {
  for (int i = 0; i < count; i += 16) {
    if (i + 16 <= count && !v_reaches(v_load(x + i), v_set(largest))) continue;
    for (int j = i; j < i + 16 && j < count; j++)
      if (x[j] == largest && (!allowed || may_come(allowed, j))) return j;
  }
  return 0;
}

/* The largest of x [padded], all divided by the temperature first; no number where one of them is none. */
static float scale(float *x, int padded, float temperature) {
  vec largest = v_set(-INFINITY), spoilt = v_set(0);
  for (int i = 0; i < padded; i += 16) {
    vec score = v_load(x + i);
    if (temperature != 1) v_store(x + i, score = v_div(score, v_set(temperature)));
    spoilt = v_add(spoilt, v_nan(score));
    largest = v_max(largest, score);
  }
  return v_largest(largest) + v_sum(spoilt);
}

/* Weights e^(x - top) in place of x [padded]; returns their sum. */
static float weigh(float *x, int padded, float top) {
  vec sum = v_set(0);
  for (int i = 0; i < padded; i += 16) {
    vec weight = v_exp(v_sub(v_load(x + i), v_set(top)));
    v_store(x + i, weight);
    sum = v_add(sum, weight);
  }
  return v_sum(sum);
}

/* The sum of weights e^(x - top) [padded], in doubles. */
static double mass_of(const float *x, int padded, float top) {
  double sums[16] = {0}, mass = 0;
  for (int i = 0; i < padded; i += 16) {
    float weights[16];
    v_store(weights, v_exp(v_sub(v_load(x + i), v_set(top))));
    for (int j = 0; j < 16; j++) sums[j] += (double)weights[j];
  }
  for (int j = 0; j < 16; j++) mass += sums[j];
  return mass;
}

static double weight_of(float x, float top) {
  float weights[16];
  v_store(weights, v_exp(v_set(x - top)));
  return (double)weights[0];
}

/* Let what stands at a place of a heap [n], the largest first, sink to where it belongs. */
static void sink(float *heap, int n, int at) {
  const float value = heap[at];
  for (int child; (child = 2 * at + 1) < n; at = child) {
    child += child + 1 < n && heap[child + 1] > heap[child];
    if (heap[child] <= value) break;
    heap[at] = heap[child];
  }
  heap[at] = value;
}

/* Take the largest out of a heap [n]: it stands behind the others from now on. */
static void pop(float *heap, int n) {
  const float largest = heap[0];
  heap[0] = heap[n - 1];
  heap[n - 1] = largest;
  sink(heap, n - 1, 0);
}

/* A heap of the scores of at least `bound`. */
static int gather(const float *x, int count, float bound, float *heap) {
  int n = 0;
  for (int i = 0; i < count; i += 16)
    for (int j = i; j < i + 16 && j < count && v_reaches(v_load(x + i), v_set(bound)); j++)
      if (x[j] >= bound) heap[n++] = x[j];
  for (int at = n / 2 - 1; at >= 0; at--) sink(heap, n, at);
  return n;
}

/* The lowest score that top_k and top_p keep; `mass` is that of all scores. Infinity where a heap [n] holds too few of
 * them, and is not the whole. */
static float lowest(float *heap, int n, bool whole, float top, double mass, const filters *f) {
  int left = n, end = 0; /* behind `left` stand those taken out, the largest last */
  if (f->top_k) {
    if (n < f->top_k && !whole) return INFINITY;
    for (mass = 0; left && (n - left < f->top_k || heap[0] == heap[left]); mass += weight_of(heap[left], top))
      pop(heap, left--);
    end = left;
    if (f->top_p == 1) return heap[end];
  }
  double reached = 0;
  for (int i = n - 1; i >= end; i--) {
    if (i < left) pop(heap, left--);
    reached += weight_of(heap[i], top);
    if (!(reached < f->top_p * mass)) return heap[i];
  }
  return whole || f->top_k ? heap[end] : INFINITY;
}

/* The lowest of scores x [count], with room as above, that the filters keep; looks at the likeliest, and at more where
 * these do not suffice. */
static float floor_of(const float *x, int count, float top, const filters *f, float *heap) {
  const float least = top + f->least;
  if (!isfinite(top) || (f->top_k == 0 && f->top_p == 1)) return least;
  const double mass = f->top_k ? 0 : mass_of(x, round_up(count, 16), top);
  for (float reach = 4;; reach = reach < 64 ? 2 * reach : INFINITY) {
    int n = gather(x, count, top - reach, heap);
    float floor = lowest(heap, n, n == count || isinf(reach), top, mass, f);
    if (floor < INFINITY) return floor > least ? floor : least;
  }
}

static void drop_below(float *x, int padded, float floor) {
  for (int i = 0; i < padded; i++) x[i] = x[i] < floor ? -INFINITY : x[i];
}

/* `logits` are written over. Temperature 0 takes the likeliest. `spare` has as much room as they. */
drawn ISA(draw)(float *logits, int count, const filters *f, uint64_t key, float *spare) {
  const int padded = round_up(count, 16);
  for (int i = count; i < padded; i++) logits[i] = -INFINITY;
  const float top = scale(logits, padded, f->temperature == 0 ? 1 : f->temperature);
  drawn d = {.token = first_of(logits, NULL, padded, top), .peak = top};
  if (f->temperature != 0 && filtering(f)) drop_below(logits, padded, floor_of(logits, count, top, f, spare));
  const float sum = weigh(logits, padded, top);
  if (f->temperature != 0) d.token = race(logits, count, key, d.token);
  d.confidence = logits[d.token] / sum;
  return d;
}

/* The likeliest of logits [count], of those in a set where there is one. */
drawn ISA(likeliest)(const float *logits, const uint8_t *allowed, int count) {
  const int whole = count / 16 * 16;
  vec most = v_set(-INFINITY), spoilt = v_set(0);
  for (int i = 0; i < whole; i += 16) {
    vec x = v_load(logits + i);
    if (allowed) x = v_where(allowed + i / 8, x);
    spoilt = v_add(spoilt, v_nan(x));
    most = v_max(most, x);
  }
  float top = v_largest(most) + v_sum(spoilt);
  for (int i = whole; i < count; i++)
    if (!allowed || may_come(allowed, i) || logits[i] != logits[i])
      top = top >= logits[i] || top != top ? top : logits[i];
  return (drawn){.token = first_of(logits, allowed, count, top), .confidence = 1, .peak = top};
}
