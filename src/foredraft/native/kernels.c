/* The kernels of one instruction set, under one name; compiled once for each set. */
#include "vec.h"

void ISA(embed)(const model *m, int32_t token, float *x, int width);
void ISA(encode)(const linear *to, const float *x, int count, const float *norm, int size, float eps, char *out);
void ISA(product)(const linear *w, int epilogue, int first, int last, int onward, const char *x, int rows, void *y,
                  int width);
void ISA(write)(const attention *a, const unit *u);
void ISA(attend)(const attention *a, const unit *u);
drawn ISA(draw)(float *logits, int count, const filters *f, uint64_t key, float *spare);
drawn ISA(likeliest)(const float *logits, const uint8_t *allowed, int count);
void ISA(round4)(const float *x, int size, uint8_t *codes, bf16 *grid);
void ISA(mask)(const float *x, const uint8_t *allowed, int count, float *out);

const kernels ISA(kernels) = {ISA_NAME,    PAIRS,     ISA(embed),     ISA(encode), ISA(product), ISA(write),
                              ISA(attend), ISA(draw), ISA(likeliest), ISA(round4), ISA(mask)};
