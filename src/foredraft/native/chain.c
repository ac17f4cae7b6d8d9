/* Chains of guesses: pass after pass of a draft model, each text's next token drawn from its logits, until its chain is
 * long enough or another guess would not pay.
 */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* One text's chain. */
typedef struct {
  double survival; /* how likely all guesses so far are accepted; negative: the rule does not end this chain */
  uint64_t seed;   /* of the noise, with its stream */
  filters filters;
  int32_t slot, position; /* of the next guess */
  int32_t limit;
} chain;

/* A guess pays while the chain's survival exceeds shared[depth] / how many texts go so far + own[depth]. */
typedef struct {
  const double *chances;      /* [bins] of acceptance, by confidence */
  const double *shared, *own; /* [most] tokens that a guess costs: all texts that make it, and each of them */
  int32_t bins, sharing;
} stop_rule;

typedef struct {
  const model *m;
  const kernels *k;
  const chain *chains;
  const int32_t *active;
  float *logits;
  int count, stride, depth, most;
  size_t spare;
  int32_t *tokens;
  float *confidences;
} draw_job;

static void draw_chunk(void *arg, int row, int onward) {
  (void)onward;
  const draw_job *j = arg;
  const chain *c = j->chains + j->active[row];
  size_t at = (size_t)j->active[row] * j->most + j->depth;
  float *logits = j->logits + (size_t)row * j->stride;
  const drawn d = j->k->draw(logits, j->count, &c->filters, mix(c->seed + (uint64_t)c->position), logits + j->spare);
  j->tokens[at] = d.token;
  j->confidences[at] = d.confidence;
}

/* Whether a chain goes on after its guess number `depth`, counted from 1. */
static bool goes_on(chain *c, const stop_rule *rule, int depth, float confidence, int sharing, int *open) {
  if (isnan(confidence) || depth >= c->limit) return false;
  if (c->survival < 0) return true;
  int bin = (int)((double)confidence * rule->bins);
  c->survival *= rule->chances[bin < 0 ? 0 : bin < rule->bins ? bin : rule->bins - 1];
  bool pays = c->survival > rule->shared[depth] / (sharing > 1 ? sharing : 1) + rule->own[depth];
  *open += pays;
  return pays;
}

/* ints: tokens [rows], spans [spans][3], the last row of each span [spans], all written over; active [spans];
 * tokens below `count`, confidences [spans][most]; lengths [spans]. A confidence that is no number ends its chain, and
 * that guess means nothing. Returns as a pass. */
EXPORT int foredraft_chain(const model *m, int32_t *ints, int rows, int spans, const unsigned char *const *pages,
                           int max_pages, chain *chains, const stop_rule *rule, int32_t *active, int count, int most,
                           int32_t *tokens, float *confidences, int32_t *lengths, int threads) {
  const int stride = round_up(m->vocab, 16);
  float *logits = malloc(2 * sizeof *logits * (size_t)spans * stride); /* and as much to spare for filters */
  if (!logits) return 1;
  draw_job job = {m, kernels_of(m->isa), chains, active, logits, count, stride, 0, most, (size_t)spans * stride,
                  tokens, confidences};
  int status = 0, left = spans, sharing = rule->sharing;
  for (int i = 0; i < spans; i++) active[i] = i;
  pool_enter(threads);
  while (left && !(status = run_pass(m, ints, rows, left, left, pages, max_pages, logits, stride))) {
    pool_run(draw_chunk, &job, left);
    int kept = 0, open = 0;
    for (int row = 0; row < left; row++) {
      const int i = active[row];
      lengths[i] = job.depth + 1;
      chains[i].position++;
      if (goes_on(chains + i, rule, job.depth + 1, confidences[(size_t)i * most + job.depth], sharing, &open))
        active[kept++] = i;
    }
    rows = left = kept;
    sharing = open;
    for (int row = 0; row < left; row++) {
      const int i = active[row];
      int32_t *own = ints + left + 3 * row;
      ints[row] = tokens[(size_t)i * most + job.depth];
      own[0] = chains[i].slot, own[1] = chains[i].position - 1, own[2] = 1;
      ints[4 * left + row] = row;
    }
    job.depth++;
  }
  pool_leave();
  free(logits);
  return status;
}
