#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include "limits.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Room for 4096 processors, more than a kernel is built for.
enum { processor_limit = 4096 };

typedef union {
  cpu_set_t set;
  unsigned char bytes[processor_limit / 8];
  unsigned long words[processor_limit / 8 / sizeof(unsigned long)];
} processor_mask;

static int mask_has(const processor_mask *mask, int processor) {
  return CPU_ISSET_S((size_t)processor, sizeof mask->bytes, &mask->set);
}

void apus_thread_set_name(const char *name) {
  char kept[16];
  strncpy(kept, name, 15);
  kept[15] = 0;
  pthread_setname_np(pthread_self(), kept);
}

int apus_thread_set_affinity(const int32_t *processors, int count) {
  processor_mask mask;
  memset(&mask, 0, sizeof mask);
  for (int i = 0; i < count; i++) {
    if (processors[i] < 0 || processors[i] >= processor_limit) {
      errno = EINVAL;
      return -1;
    }
    CPU_SET_S((size_t)processors[i], sizeof mask.bytes, &mask.set);
  }
  return sched_setaffinity(0, sizeof mask.bytes, &mask.set);
}

int apus_thread_pin(int processor) {
  int32_t one = processor;
  return apus_thread_set_affinity(&one, 1);
}

int apus_processors(int32_t *processors, int capacity) {
  processor_mask mask;
  memset(&mask, 0, sizeof mask);
  if (sched_getaffinity(0, sizeof mask.bytes, &mask.set) != 0) {
    if (capacity > 0) processors[0] = 0;
    return 1;
  }
  int count = 0;
  for (int i = 0; i < processor_limit; i++) {
    if (!mask_has(&mask, i)) continue;
    if (count < capacity) processors[count] = i;
    count++;
  }
  return count;
}

// Whether an allowed processor below `processor` is a hardware thread of the same core. The kernel lists the
// siblings as ranges, such as "0,64" or "0-1".
static int has_earlier_sibling(const processor_mask *mask, int processor) {
  char path[96];
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", processor);
  char text[512];
  if (apus_read_text(path, text, sizeof text) <= 0) return 0;
  const char *cursor = text;
  while (*cursor) {
    char *end;
    long first = strtol(cursor, &end, 10);
    if (end == cursor) break;
    long last = first;
    if (*end == '-') {
      cursor = end + 1;
      last = strtol(cursor, &end, 10);
    }
    for (long i = first; i <= last && i < processor; i++) {
      if (i >= 0 && i < processor_limit && mask_has(mask, (int)i)) return 1;
    }
    if (*end != ',') break;
    cursor = end + 1;
  }
  return 0;
}

int apus_physical_cores(int32_t *processors, int capacity) {
  processor_mask mask;
  memset(&mask, 0, sizeof mask);
  if (sched_getaffinity(0, sizeof mask.bytes, &mask.set) != 0) {
    if (capacity > 0) processors[0] = 0;
    return 1;
  }
  int count = 0;
  for (int i = 0; i < processor_limit; i++) {
    if (!mask_has(&mask, i) || has_earlier_sibling(&mask, i)) continue;
    if (count < capacity) processors[count] = i;
    count++;
  }
  return count;
}

int apus_usable_core_count(void) {
  int cores = apus_physical_cores(NULL, 0);
  double quota = apus_cgroup_processor_quota();
  if (quota > 0 && quota < cores) cores = (int)quota;
  return cores < 1 ? 1 : cores;
}
