/* Intel's tile registers (AMX): a product of up to sixteen rows with sixteen outputs in one instruction, 64 bytes of inputs
 * at a time. It costs nearly the same for one row as for sixteen.
 *
 * The processor sums each element of a product by itself and in a fixed order: of 32 inputs in bf16 the even and the odd
 * ones, each by fused multiply-adds, then both are added to what was there. So rows that share a tile never meet.
 */
#ifndef FOREDRAFT_AMX_H
#define FOREDRAFT_AMX_H

#include "tile.h"

#if defined(__AMX_BF16__)
enum { AMX = 1, TILE_ROWS = 16, TILE_BYTES = 64 };

/* As the processor takes it. */
typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tile_shapes;

/* What has been computed is in memory, where tiles look for it: gcc's intrinsics do not say that they read it. */
INLINE void settle(void) { __asm__ volatile("" ::: "memory"); }

/* Tiles 0 to 3 are sums, 4 and 5 rows of inputs, 6 and 7 weights. 0, 1 and 4 have `rows` rows, 2, 3 and 5 `others`, and
 * 5 and 7 take `bytes` bytes of inputs, the rest of them TILE_BYTES. */
INLINE void shape_tiles(int rows, int others, int bytes) {
  tile_shapes s = {.palette = 1};
  for (int t = 0; t < 8; t++) s.bytes[t] = t == 5 ? bytes : TILE_BYTES;
  s.rows[0] = s.rows[1] = s.rows[4] = (uint8_t)rows;
  s.rows[2] = s.rows[3] = s.rows[5] = (uint8_t)others;
  s.rows[6] = TILE_ROWS;
  s.rows[7] = (uint8_t)(bytes / LANE);
  settle();
  _tile_loadconfig(&s);
}

INLINE void zero_sums(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
#else
enum { AMX = 0, TILE_ROWS = 1 };
#endif

#endif
