/* One token from a row of logits: the likeliest, or the winner of the race that noise.py describes. */
#include "vec.h"

static const uint64_t FIRST = 0xBF58476D1CE4E5B9u, SECOND = 0x94D049BB133111EBu;
static const double SMALLEST = 0x1p-53, LARGEST = 36.7368005696771;
enum { TOGETHER = 16 };

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

/* The largest weight over noise. Since -log(u) is at least 1 - u, few tokens need a logarithm. */
static int race(const float *weights, int count, uint64_t key, int favourite) {
  int winner = favourite;
  float best = speed(weights[favourite], uniform(key, (uint64_t)favourite));
  for (int first = 0; first < count; first += TOGETHER) {
    double numbers[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) numbers[i] = uniform(key, (uint64_t)(first + i));
    for (int i = 0; i < TOGETHER && first + i < count; i++) {
      if (weights[first + i] < 0.99999 * best * (1 - numbers[i])) continue;
      float own = speed(weights[first + i], numbers[i]);
      if (own > best || (own == best && first + i < winner)) best = own, winner = first + i;
    }
  }
  return winner;
}

/* The first place of a value; 0 where it is nowhere. */
static int first_of(const float *x, int padded, float value) {
  for (int i = 0; i < padded; i += 16) {
    int found = 0;
    for (int j = 0; j < 16; j++) found |= x[i + j] == value;
    for (int j = 0; found; j++)
      if (x[i + j] == value) return i + j;
  }
  return 0;
}

/* x [count], with room up to a multiple of sixteen, becomes weights e^(x / temperature - the largest of these); returns
 * their sum, no number where one of them is none. */
static float weigh(float *x, int count, float temperature, int *favourite) {
  const int padded = round_up(count, 16);
  for (int i = count; i < padded; i++) x[i] = -INFINITY;
  vec largest = v_set(-INFINITY), sum = v_set(0);
  for (int i = 0; i < padded; i += 16) {
    vec score = v_load(x + i);
    if (temperature != 1) v_store(x + i, score = v_div(score, v_set(temperature)));
    largest = v_max(largest, score);
  }
  const float top = v_largest(largest);
  *favourite = first_of(x, padded, top);
  for (int i = 0; i < padded; i += 16) {
    vec weight = v_exp(v_sub(v_load(x + i), v_set(top)));
    v_store(x + i, weight);
    sum = v_add(sum, weight);
  }
  return v_sum(sum);
}

/* Temperature 0 takes the likeliest. `logits` are written over. */
int32_t ISA(draw)(float *logits, int count, float temperature, uint64_t key, float *confidence) {
  int token;
  float sum = weigh(logits, count, temperature == 0 ? 1 : temperature, &token);
  if (temperature != 0) token = race(logits, count, key, token);
  *confidence = logits[token] / sum;
  return token;
}
