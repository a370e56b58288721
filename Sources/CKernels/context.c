// The context: level of instructions, pool, scratch memory.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
// Of <asm/hwcap.h>, which may be older than the processor.
enum { hwcap_asimddp = 1 << 20, hwcap2_i8mm = 1 << 13 };
#endif

int apus_isa_supported(apus_isa isa) {
#if defined(__x86_64__)
  // The compiler's run-time checks the operating system's support for the registers too (XCR0).
  __builtin_cpu_init();
  switch (isa) {
    case APUS_ISA_PORTABLE:
      return 1;
    case APUS_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
          && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("lzcnt")
          && __builtin_cpu_supports("popcnt");
    case APUS_ISA_AVX512:
      return apus_isa_supported(APUS_ISA_AVX2) && __builtin_cpu_supports("avx512f")
          && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
          && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
    case APUS_ISA_AVX512_BF16:
      return apus_isa_supported(APUS_ISA_AVX512) && __builtin_cpu_supports("avx512bf16")
          && __builtin_cpu_supports("avx512vnni");
    default:
      return 0;
  }
#elif defined(__aarch64__) && defined(__linux__)
  // The kernel reports what it and the processor support.
  switch (isa) {
    case APUS_ISA_PORTABLE:
      return 1;
    case APUS_ISA_NEON_DOT:
      return (getauxval(AT_HWCAP) & hwcap_asimddp) != 0;
    case APUS_ISA_NEON_I8MM:
      return apus_isa_supported(APUS_ISA_NEON_DOT) && (getauxval(AT_HWCAP2) & hwcap2_i8mm) != 0;
    default:
      return 0;
  }
#else
  return isa == APUS_ISA_PORTABLE;
#endif
}

apus_isa apus_isa_best(void) {
  for (int isa = APUS_ISAS - 1; isa > APUS_ISA_PORTABLE; isa--) {
    if (apus_isa_supported((apus_isa)isa)) return (apus_isa)isa;
  }
  return APUS_ISA_PORTABLE;
}

static const size_t huge_page = (size_t)2 << 20;

// Small memory comes from the heap; large memory from the kernel, at the start of a huge page.
void *apus_allocate(size_t bytes) {
  if (bytes == 0) bytes = 64;
  if (bytes < huge_page) {
    void *address = NULL;
    if (posix_memalign(&address, 64, (bytes + 63) / 64 * 64) != 0) return NULL;
    memset(address, 0, (bytes + 63) / 64 * 64);
    return address;
  }
  if (bytes > SIZE_MAX / 2) return NULL;
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t wanted = (bytes + page - 1) / page * page;
  char *address = mmap(
      NULL, wanted + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return NULL;
  size_t before = (huge_page - (size_t)((uintptr_t)address % huge_page)) % huge_page;
  if (before > 0) munmap(address, before);
  if (huge_page > before) munmap(address + before + wanted, huge_page - before);
  madvise(address + before, wanted, MADV_HUGEPAGE);
  return address + before;
}

void apus_release(void *address, size_t bytes) {
  if (!address) return;
  if (bytes < huge_page) {
    free(address);
    return;
  }
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  munmap(address, (bytes + page - 1) / page * page);
}

void *apus_scratch_reserve(apus_scratch *scratch, size_t bytes) {
  if (bytes <= scratch->bytes) return scratch->data;
  apus_release(scratch->data, scratch->bytes);
  // A quarter more than asked for, so that a slowly growing need does not end in many small steps.
  size_t wanted = (bytes + bytes / 4 + 4095) / 4096 * 4096;
  scratch->data = apus_allocate(wanted);
  scratch->bytes = wanted;
  if (!scratch->data) {
    fprintf(stderr, "apus: out of memory: an operator needs %zu bytes of scratch memory.\n", wanted);
    abort();
  }
  return scratch->data;
}

apus_context *apus_context_create(int threads, apus_isa isa, const int32_t *processors) {
  if (threads < 1) threads = 1;
  apus_context *context = calloc(1, sizeof *context);
  if (!context) return NULL;
  context->isa = isa;
  context->threads = threads;
  context->local = calloc((size_t)threads, sizeof *context->local);
  context->pool = context->local ? apus_pool_create(threads, processors) : NULL;
  if (!context->pool) {
    free(context->local);
    free(context);
    return NULL;
  }
  return context;
}

void apus_context_free(apus_context *context) {
  if (!context) return;
  apus_pool_free(context->pool);
  for (int i = 0; i < context->threads; i++) apus_release(context->local[i].data, context->local[i].bytes);
  for (size_t i = 0; i < sizeof context->shared / sizeof context->shared[0]; i++) {
    apus_release(context->shared[i].data, context->shared[i].bytes);
  }
  free(context->local);
  free(context);
}

int apus_context_threads(const apus_context *context) { return context->threads; }

apus_isa apus_context_isa(const apus_context *context) { return context->isa; }

size_t apus_context_scratch_bytes(const apus_context *context) {
  size_t total = 0;
  for (int i = 0; i < context->threads; i++) total += context->local[i].bytes;
  for (size_t i = 0; i < sizeof context->shared / sizeof context->shared[0]; i++) total += context->shared[i].bytes;
  return total;
}

void apus_parallel(apus_context *context, int chunks, apus_task task, void *argument) {
  apus_pool_run(context->pool, chunks, task, argument);
}
