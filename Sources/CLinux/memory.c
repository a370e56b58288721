#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include "limits.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t huge_page = (size_t)2 << 20;

// A line "Name:   123 kB" of /proc/meminfo or /proc/self/status, in bytes; 0 when it is not there.
static uint64_t field(const char *path, const char *name) {
  char text[8192];
  if (apus_read_text(path, text, sizeof text) <= 0) return 0;
  size_t length = strlen(name);
  for (const char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
    if (strncmp(line, name, length) == 0 && line[length] == ':') return strtoull(line + length + 1, NULL, 10) * 1024;
  }
  return 0;
}

uint64_t apus_memory_total(void) {
  uint64_t machine = field("/proc/meminfo", "MemTotal");
  uint64_t limit = apus_cgroup_memory_limit();
  return limit < machine ? limit : machine;
}

uint64_t apus_memory_available(void) {
  uint64_t machine = field("/proc/meminfo", "MemAvailable");
  uint64_t remaining = apus_cgroup_memory_remaining();
  return remaining < machine ? remaining : machine;
}

uint64_t apus_memory_resident(void) { return field("/proc/self/status", "VmRSS"); }

uint64_t apus_memory_resident_peak(void) { return field("/proc/self/status", "VmHWM"); }

void *apus_memory_map(size_t byte_count) {
  if (byte_count == 0) return NULL;
  int protection = PROT_READ | PROT_WRITE;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (byte_count < huge_page) {
    void *address = mmap(NULL, byte_count, protection, flags, -1, 0);
    return address == MAP_FAILED ? NULL : address;
  }
  if (byte_count > SIZE_MAX - 2 * huge_page) return NULL;
  // Map a huge page more than needed and give the ends back, so that the first byte begins a huge page.
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t wanted = (byte_count + page - 1) / page * page;
  char *address = mmap(NULL, wanted + huge_page, protection, flags, -1, 0);
  if (address == MAP_FAILED) return NULL;
  size_t before = (huge_page - (size_t)((uintptr_t)address % huge_page)) % huge_page;
  if (before > 0) munmap(address, before);
  if (huge_page > before) munmap(address + before + wanted, huge_page - before);
  madvise(address + before, wanted, MADV_HUGEPAGE);
  return address + before;
}

void apus_memory_unmap(void *address, size_t byte_count) {
  if (address == NULL) return;
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  munmap(address, (byte_count + page - 1) / page * page);
}

// The pages that lie in a range at least in part.
static int advise(const void *address, size_t byte_count, int advice) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  uintptr_t first = (uintptr_t)address / page * page;
  return madvise((void *)first, byte_count + ((uintptr_t)address - first), advice);
}

int apus_memory_advise_huge(void *address, size_t byte_count) { return advise(address, byte_count, MADV_HUGEPAGE); }

int apus_memory_advise_will_need(const void *address, size_t byte_count) {
  return advise(address, byte_count, MADV_WILLNEED);
}

int apus_memory_advise_dont_need(void *address, size_t byte_count) {
  return advise(address, byte_count, MADV_DONTNEED);
}

int apus_memory_advise_sequential(void *address, size_t byte_count) {
  return advise(address, byte_count, MADV_SEQUENTIAL);
}

int apus_memory_file_create(const char *name, size_t byte_count) {
  int file = memfd_create(name, MFD_CLOEXEC);
  if (file < 0) return -1;
  if (ftruncate(file, (off_t)byte_count) != 0) {
    int reason = errno;
    close(file);
    errno = reason;
    return -1;
  }
  return file;
}
