/* Instruction sets: which this processor has, which of them is the fastest, and the kernels of each.
 *
 * The processor is asked itself: not every compiler's __builtin_cpu_supports knows all sets, or works at all (zig's).
 */
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <string.h>

#include "native.h"

/* As native/library.py numbers them. */
enum { PORTABLE, AVX2, AVX512, AVX512_BF16, TILES, SETS };

/* Parts of a processor's state that the system saves, by their bits in XCR0. */
#define SAVES_AVX 1, 2
#define SAVES_AVX512 5, 6, 7
#define SAVES_TILES 17, 18

const kernels *kernels_of(int isa) {
#if defined(__x86_64__)
  static const kernels *const of[SETS] = {
      &kernels_portable, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16,
#if !defined(NO_AMX)
      &kernels_amx,
#endif
  };
  if (isa > PORTABLE && isa < SETS && of[isa]) return of[isa];
#endif
  (void)isa;
  return &kernels_portable;
}

#if defined(__x86_64__)
/* All of `wanted`, bits by their number. */
static bool has(unsigned bits, const int *wanted, int count) {
  for (int i = 0; i < count; i++)
    if (!(bits >> wanted[i] & 1)) return false;
  return true;
}
#define HAS(bits, ...) has(bits, (const int[]){__VA_ARGS__}, sizeof((const int[]){__VA_ARGS__}) / sizeof(int))

/* Whether Linux lets this process use tiles, which it wants to be asked. */
static bool may_use_tiles(void) {
#if defined(__linux__) && !defined(NO_AMX)
  enum { REQUEST = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

/* As bits, 1 << the number of each. */
EXPORT int foredraft_isas(void) {
  int found = 1 << PORTABLE;
#if defined(__x86_64__)
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !HAS(c, 12 /* FMA */, 27 /* state is saved */, 28 /* AVX */)) return found;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!HAS(saved, SAVES_AVX) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !HAS(b, 5 /* AVX2 */)) return found;
  found |= 1 << AVX2;
#if !defined(__APPLE__) /* macOS saves AVX-512 from a thread's first use on, and does not say so before */
  if (!HAS(saved, SAVES_AVX512)) return found;
#endif
  if (!HAS(b, 16 /* F */, 17 /* DQ */, 30 /* BW */, 31 /* VL */) || !HAS(c, 11 /* VNNI */)) return found;
  found |= 1 << AVX512;
  const bool tiles = HAS(d, 22 /* of bf16 */, 24 /* at all */, 25 /* of int8 */) && HAS(saved, SAVES_TILES);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !HAS(a, 5 /* bf16 */)) return found;
  found |= 1 << AVX512_BF16;
  if (tiles && may_use_tiles()) found |= 1 << TILES;
#endif
  return found;
}

#if defined(__x86_64__)
static bool of_intel(void) {
  unsigned a, name[3];
  return __get_cpuid(0, &a, name, name + 2, name + 1) && !memcmp(name, "GenuineIntel", sizeof name);
}
#endif

/* Its number. Intel's product of two pairs of bf16 takes as long as four of floats (Sapphire Rapids: 85 against 172
 * GFLOP/s a core), so there it is only in the way; tiles are not. */
EXPORT int foredraft_fastest_isa(void) {
  int found = foredraft_isas(), fastest = 0;
#if defined(__x86_64__)
  if (of_intel() && !(found >> TILES & 1)) found &= ~(1 << AVX512_BF16);
#endif
  while (found >> (fastest + 1)) fastest++;
  return fastest;
}
