/* The threads of the process: a caller publishes a phase of chunks, whoever is present claims them.
 *
 * Nobody waits for a worker that is absent, because another process has its core or because it sleeps: the caller then
 * does all chunks itself. Workers stay awake for a millisecond after the last chunk, yielding the while, and sleep
 * after that. They stand on other cores than the caller, within the caller's affinity mask: on the same core time
 * doubles. Who computes a chunk never changes its bits.
 */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "native.h"

enum { MAX_WORKERS = 255, SPINS = 64, MOST_CHUNKS = 0xffff /* of a ticket */ };
static const int64_t AWAKE_NS = 1000000;

static struct {
  /* phase number << 32 | first chunk that nobody has claimed << 16 | the one after the last */
  _Alignas(64) _Atomic uint64_t ticket;
  _Atomic(task) run;
  _Atomic(void *) arg;
  _Atomic int first; /* added to a chunk's number: long phases are run in parts */
  _Atomic int members; /* workers that may take part */
  _Alignas(64) _Atomic int done;
  _Alignas(64) _Atomic int asleep; /* workers that wait to be woken */
  unsigned wakes;                  /* under `sleep` */
  pthread_mutex_t sleep;
  pthread_cond_t wake;
  pthread_mutex_t pass; /* held from enter to leave; what follows belongs to its holder */
  int workers;
  int threads; /* of this pass */
  pthread_t worker[MAX_WORKERS];
  int placed_for, caller_cpu; /* how the workers stand now */
} pool = {
    .sleep = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .pass = PTHREAD_MUTEX_INITIALIZER,
    .caller_cpu = -1,
};

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool has_chunks(uint64_t ticket) { return ((ticket >> 16) & 0xffff) < (ticket & 0xffff); }

/* Run one chunk if there is one. The caller takes them from the front and workers from the back, so that in pass after
 * pass the same core finds the same weights in its cache. What is read of a phase that has ended is never used: the
 * ticket has changed by then, and the exchange fails. */
static bool claim(bool from_back) {
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
  while (has_chunks(ticket)) {
    task run = atomic_load_explicit(&pool.run, memory_order_relaxed);
    void *arg = atomic_load_explicit(&pool.arg, memory_order_relaxed);
    int first = atomic_load_explicit(&pool.first, memory_order_relaxed);
    uint64_t left = from_back ? ticket - 1 : ticket + (1 << 16);
    if (atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, left, memory_order_acq_rel,
                                              memory_order_acquire)) {
      int chunk = (int)(from_back ? (ticket & 0xffff) - 1 : (ticket >> 16) & 0xffff);
      run(arg, first + chunk, from_back ? -1 : 1);
      atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
      return true;
    }
  }
  return false;
}

/* Until the caller says otherwise. It looks for sleepers after each ticket, and a sleeper for tickets after it has said
 * that it sleeps, so that one of them sees the other. */
static void sleep_until_woken(void) {
  pthread_mutex_lock(&pool.sleep);
  unsigned seen = pool.wakes;
  atomic_fetch_add(&pool.asleep, 1);
  if (!has_chunks(atomic_load(&pool.ticket)))
    while (pool.wakes == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
  pthread_mutex_unlock(&pool.sleep);
}

static void *work(void *index) {
  int self = (int)(intptr_t)index;
  int64_t idle_since = now();
  for (unsigned spins = 1;; spins++) {
    if (self < atomic_load_explicit(&pool.members, memory_order_relaxed) && claim(true)) {
      spins = 0;
      idle_since = 0;
      continue;
    }
    pause_briefly();
    if (spins % SPINS) continue;
    sched_yield();
    if (!idle_since) idle_since = now();
    if (now() - idle_since > AWAKE_NS) {
      sleep_until_woken();
      idle_since = now();
    }
  }
  return NULL;
}

static void wake_sleepers(void) {
  if (!atomic_load(&pool.asleep) || !atomic_exchange(&pool.asleep, 0)) return;
  pthread_mutex_lock(&pool.sleep);
  pool.wakes++;
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.sleep);
}

#if defined(__linux__)
static cpu_set_t placed_in; /* the caller's mask when the workers were placed; under `pass` */

/* A core of its own for each worker, none of them the caller's, where the mask has so many; else the whole mask. The
 * mask may change at any time, and workers do not follow by themselves: it was theirs when they were made. */
static void place(int workers) {
  int cpu = sched_getcpu();
  cpu_set_t mask, own;
  if (sched_getaffinity(0, sizeof mask, &mask)) return;
  if (cpu == pool.caller_cpu && workers == pool.placed_for && CPU_EQUAL(&mask, &placed_in)) return;
  bool enough = CPU_COUNT(&mask) > workers;
  for (int worker = 0, next = 0; worker < workers; worker++) {
    own = mask;
    if (enough) {
      while (!CPU_ISSET(next, &mask) || next == cpu) next++;
      CPU_ZERO(&own);
      CPU_SET(next, &own);
      next++;
    }
    pthread_setaffinity_np(pool.worker[worker], sizeof own, &own);
  }
  pool.caller_cpu = cpu;
  pool.placed_for = workers;
  placed_in = mask;
}
#else
static void place(int workers) { (void)workers; }
#endif

/* Workers take no signals: those are for the threads of Python. */
static void start_workers(int wanted) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.workers < wanted && pool.workers < MAX_WORKERS) {
    if (pthread_create(&pool.worker[pool.workers], NULL, work, (void *)(intptr_t)pool.workers)) break;
    pool.workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void pool_enter(int threads) {
  pthread_mutex_lock(&pool.pass);
  if (threads - 1 > pool.workers) start_workers(threads - 1);
  pool.threads = threads - 1 < pool.workers ? threads : pool.workers + 1;
  if (pool.threads > 1) place(pool.threads - 1);
  atomic_store_explicit(&pool.members, pool.threads - 1, memory_order_relaxed);
}

void pool_leave(void) { pthread_mutex_unlock(&pool.pass); }

static void run_part(task run, void *arg, int first, int chunks) {
  atomic_store_explicit(&pool.run, run, memory_order_relaxed);
  atomic_store_explicit(&pool.arg, arg, memory_order_relaxed);
  atomic_store_explicit(&pool.first, first, memory_order_relaxed);
  atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
  uint64_t phase = (atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 32) + 1;
  atomic_store(&pool.ticket, phase << 32 | (uint64_t)chunks);
  wake_sleepers();
  while (claim(false)) {}
  for (int spins = 1; atomic_load_explicit(&pool.done, memory_order_acquire) != chunks; spins++) {
    pause_briefly();
    if (spins % SPINS == 0) sched_yield();
  }
}

/* run(arg, 0), ..., run(arg, chunks - 1), in any order, on any thread. */
void pool_run(task run, void *arg, int chunks) {
  if (pool.threads == 1 || chunks == 1) {
    for (int chunk = 0; chunk < chunks; chunk++) run(arg, chunk, 1);
    return;
  }
  for (int first = 0; first < chunks; first += MOST_CHUNKS)
    run_part(run, arg, first, chunks - first < MOST_CHUNKS ? chunks - first : MOST_CHUNKS);
}

/* A child has none of its parent's workers, and may find the locks held by threads that it has not. */
static void forget_workers(void) {
  pthread_mutex_init(&pool.sleep, NULL);
  pthread_mutex_init(&pool.pass, NULL);
  pthread_cond_init(&pool.wake, NULL);
  atomic_store(&pool.ticket, 0);
  atomic_store(&pool.asleep, 0);
  pool.workers = pool.placed_for = 0;
  pool.caller_cpu = -1;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }
