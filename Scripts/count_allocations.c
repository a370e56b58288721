// Counts calls of the allocator by the name of the thread that makes them, and writes the counts when the process ends.
// For LD_PRELOAD; see count_allocations.sh.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

enum { most_threads = 512 };

typedef struct {
  char name[16];
  atomic_long count;
  atomic_long bytes;
} counter;

static counter counters[most_threads];
static atomic_int used;
static __thread counter *own;
// Names are given to threads after their first allocations.
static __thread int calls_until_named;
// With COUNT_TRACE=NAME: a stack of every 97th allocation of that thread goes to standard error.
static const char *traced;
static __thread int is_tracing;

static void count(size_t bytes) {
  if (!own) {
    int index = atomic_fetch_add(&used, 1);
    if (index >= most_threads) return;
    own = &counters[index];
  }
  if (calls_until_named++ % 64 == 0) prctl(PR_GET_NAME, own->name);
  long number = atomic_fetch_add_explicit(&own->count, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&own->bytes, (long)bytes, memory_order_relaxed);
  if (traced && !is_tracing && number % 97 == 0 && strcmp(own->name, traced) == 0) {
    is_tracing = 1;
    void *frames[24];
    int depth = backtrace(frames, 24);
    backtrace_symbols_fd(frames, depth, 2);
    (void)!write(2, "\n", 1);
    is_tracing = 0;
  }
}

void *malloc(size_t bytes) {
  count(bytes);
  return __libc_malloc(bytes);
}

void *calloc(size_t number, size_t bytes) {
  count(number * bytes);
  return __libc_calloc(number, bytes);
}

void *realloc(void *memory, size_t bytes) {
  count(bytes);
  return __libc_realloc(memory, bytes);
}

void *memalign(size_t alignment, size_t bytes) {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void **memory, size_t alignment, size_t bytes) {
  count(bytes);
  void *address = __libc_memalign(alignment, bytes);
  if (!address) return ENOMEM;
  *memory = address;
  return 0;
}

__attribute__((constructor)) static void begin(void) { traced = getenv("COUNT_TRACE"); }

__attribute__((destructor)) static void report(void) {
  const char *path = getenv("COUNT_FILE");
  if (!path) return;
  int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0) return;
  int threads = atomic_load(&used);
  for (int i = 0; i < threads && i < most_threads; i++) {
    dprintf(file, "%ld %ld %s\n", atomic_load(&counters[i].count), atomic_load(&counters[i].bytes), counters[i].name);
  }
  close(file);
}
