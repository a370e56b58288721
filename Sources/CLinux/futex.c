#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t apus_monotonic_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int apus_futex_wait(const uint32_t *address, uint32_t expected, int64_t timeout_ns) {
  struct timespec limit;
  struct timespec *limit_pointer = NULL;
  if (timeout_ns >= 0) {
    limit.tv_sec = (time_t)(timeout_ns / 1000000000);
    limit.tv_nsec = (long)(timeout_ns % 1000000000);
    limit_pointer = &limit;
  }
  long result = syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, expected, limit_pointer, NULL, 0);
  return !(result == -1 && errno == ETIMEDOUT);
}

int apus_futex_wake(const uint32_t *address, int count) {
  return (int)syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

// 0: quiet; 1: rung; 2: quiet and somebody sleeps.
struct apus_doorbell {
  _Atomic uint32_t state;
};

apus_doorbell *apus_doorbell_create(void) {
  apus_doorbell *bell = malloc(sizeof *bell);
  if (bell) atomic_init(&bell->state, 0);
  return bell;
}

void apus_doorbell_free(apus_doorbell *bell) { free(bell); }

void apus_doorbell_ring(apus_doorbell *bell) {
  if (atomic_exchange(&bell->state, 1) == 2) apus_futex_wake((const uint32_t *)&bell->state, 1);
}

int apus_doorbell_wait(apus_doorbell *bell, int64_t timeout_ns) {
  uint64_t begin = timeout_ns > 0 ? apus_monotonic_ns() : 0;
  for (;;) {
    uint32_t rung = 1;
    if (atomic_compare_exchange_strong(&bell->state, &rung, 0)) return 1;
    int64_t remaining = timeout_ns;
    if (timeout_ns == 0) return 0;
    if (timeout_ns > 0) {
      uint64_t elapsed = apus_monotonic_ns() - begin;
      if (elapsed >= (uint64_t)timeout_ns) {
        // Whatever stood there, a ring included, is taken together with the mark that somebody sleeps.
        return atomic_exchange(&bell->state, 0) == 1;
      }
      remaining = timeout_ns - (int64_t)elapsed;
    }
    uint32_t quiet = 0;
    if (!atomic_compare_exchange_strong(&bell->state, &quiet, 2) && quiet == 1) continue;
    apus_futex_wait((const uint32_t *)&bell->state, 2, remaining);
  }
}
