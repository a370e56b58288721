// A persistent pool of threads with one operation: run a task for each of n chunks.
//
// Chunks are claimed, not assigned: a worker that comes late (it was parked, or another process holds its core)
// takes what is left and nobody waits for it. All the state that claiming needs is one word: generation | n | next.
// A worker changes it only by compare-and-swap, so a claim succeeds only for the region the word was read in, and
// while a claimed chunk is unfinished the caller does not leave the region; `task` and `argument` are therefore
// those of the claim. Both sides spin for a short while and then sleep on a futex, so that an idle pool costs
// nothing and a busy machine loses no more than the spin.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "internal.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { index_bits = 20 };
static const uint64_t index_mask = ((uint64_t)1 << index_bits) - 1;
static const int64_t spin_ns = 30000;

struct apus_pool {
  _Alignas(64) _Atomic uint64_t word;
  // Chunks of the current region that have finished; the caller sleeps on it.
  _Alignas(64) _Atomic uint32_t done;
  _Atomic uint32_t caller_sleeps;
  // Changes when sleeping workers should look again; they sleep on it.
  _Alignas(64) _Atomic uint32_t alarm;
  _Atomic uint32_t sleepers;
  _Atomic uint32_t stopping;
  // Held by the region that runs. A caller that finds it held does its region alone.
  _Atomic uint32_t busy;
  apus_task task;
  void *argument;
  int threads;
  int started;
  struct apus_worker *workers;
};

struct apus_worker {
  apus_pool *pool;
  int index;
  int processor;
  pthread_t thread;
};

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void futex_wait(_Atomic uint32_t *address, uint32_t expected) {
  syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *address, int count) {
  syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static int has_chunks(uint64_t word) { return (word & index_mask) < ((word >> index_bits) & index_mask); }

// Claims and runs chunks until none is left.
static void work(apus_pool *pool, int thread) {
  uint64_t word = atomic_load_explicit(&pool->word, memory_order_acquire);
  while (has_chunks(word)) {
    if (!atomic_compare_exchange_weak_explicit(
            &pool->word, &word, word + 1, memory_order_acq_rel, memory_order_acquire)) {
      continue;
    }
    pool->task(pool->argument, (int)(word & index_mask), thread);
    uint32_t total = (uint32_t)((word >> index_bits) & index_mask);
    if (atomic_fetch_add(&pool->done, 1) + 1 == total && atomic_load(&pool->caller_sleeps)) {
      futex_wake(&pool->done, 1);
    }
    word = atomic_load_explicit(&pool->word, memory_order_acquire);
  }
}

static void *worker_main(void *argument) {
  struct apus_worker *worker = argument;
  apus_pool *pool = worker->pool;
  char name[16];
  snprintf(name, sizeof name, "apus-cpu-%d", worker->index % 100000);
  pthread_setname_np(pthread_self(), name);
  if (worker->processor >= 0 && worker->processor < CPU_SETSIZE) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)worker->processor, &set);
    // Best effort: a processor that is not allowed leaves the thread where the kernel puts it.
    sched_setaffinity(0, sizeof set, &set);
  }
  for (;;) {
    work(pool, worker->index);
    int64_t begin = now_ns();
    int found = 0;
    do {
      for (int i = 0; i < 16 && !found; i++) {
        found = has_chunks(atomic_load_explicit(&pool->word, memory_order_relaxed));
        if (!found) pause_briefly();
      }
    } while (!found && now_ns() - begin < spin_ns);
    if (found) continue;
    // The order matters: announce the sleep, then look once more. The caller publishes the word, then looks for
    // sleepers.
    uint32_t alarm = atomic_load(&pool->alarm);
    atomic_fetch_add(&pool->sleepers, 1);
    if (!has_chunks(atomic_load(&pool->word)) && !atomic_load(&pool->stopping)) futex_wait(&pool->alarm, alarm);
    atomic_fetch_sub(&pool->sleepers, 1);
    if (atomic_load(&pool->stopping)) return NULL;
  }
}

apus_pool *apus_pool_create(int threads, const int32_t *processors) {
  apus_pool *pool = NULL;
  if (posix_memalign((void **)&pool, 64, sizeof *pool) != 0) return NULL;
  memset(pool, 0, sizeof *pool);
  pool->threads = threads;
  pool->workers = calloc((size_t)threads, sizeof *pool->workers);
  if (!pool->workers) {
    free(pool);
    return NULL;
  }
  for (int i = 1; i < threads; i++) {
    pool->workers[i] = (struct apus_worker){.pool = pool, .index = i, .processor = processors ? processors[i] : -1};
    if (pthread_create(&pool->workers[i].thread, NULL, worker_main, &pool->workers[i]) != 0) {
      apus_pool_free(pool);
      return NULL;
    }
    pool->started = i;
  }
  return pool;
}

void apus_pool_free(apus_pool *pool) {
  if (!pool) return;
  atomic_store(&pool->stopping, 1);
  atomic_fetch_add(&pool->alarm, 1);
  futex_wake(&pool->alarm, INT32_MAX);
  for (int i = 1; i <= pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
  free(pool->workers);
  free(pool);
}

void apus_pool_run(apus_pool *pool, int chunks, apus_task task, void *argument) {
  if (chunks <= 0) return;
  if (chunks == 1 || pool->threads == 1 || atomic_exchange(&pool->busy, 1)) {
    for (int i = 0; i < chunks; i++) task(argument, i, 0);
    return;
  }
  pool->task = task;
  pool->argument = argument;
  atomic_store(&pool->done, 0);
  uint64_t generation = (atomic_load(&pool->word) >> (2 * index_bits)) + 1;
  atomic_store(&pool->word, generation << (2 * index_bits) | (uint64_t)chunks << index_bits);
  if (atomic_load(&pool->sleepers) > 0) {
    atomic_fetch_add(&pool->alarm, 1);
    futex_wake(&pool->alarm, chunks - 1);
  }
  work(pool, 0);
  int64_t begin = now_ns();
  for (;;) {
    uint32_t done = atomic_load(&pool->done);
    if (done == (uint32_t)chunks) break;
    if (now_ns() - begin < spin_ns) {
      for (int i = 0; i < 16; i++) pause_briefly();
      continue;
    }
    atomic_store(&pool->caller_sleeps, 1);
    done = atomic_load(&pool->done);
    if (done != (uint32_t)chunks) futex_wait(&pool->done, done);
    atomic_store(&pool->caller_sleeps, 0);
  }
  atomic_store(&pool->busy, 0);
}
