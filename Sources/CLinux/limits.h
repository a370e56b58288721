// Shared by the files of this target: reading small files of /proc and /sys, and what the cgroups allow.

#ifndef APUS_LIMITS_H
#define APUS_LIMITS_H

#include <stddef.h>
#include <stdint.h>

// Reads a small file into `text` and ends it with a zero. Returns the bytes read, or -1.
long apus_read_text(const char *path, char *text, size_t capacity);

// Processors that the cgroups allow, as a fraction; 0 when there is no limit.
double apus_cgroup_processor_quota(void);

// The smallest memory limit of the cgroups, or UINT64_MAX.
uint64_t apus_cgroup_memory_limit(void);

// The least memory that remains below a limit of the cgroups, or UINT64_MAX.
uint64_t apus_cgroup_memory_remaining(void);

#endif
