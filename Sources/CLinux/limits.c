#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "limits.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

long apus_read_text(const char *path, char *text, size_t capacity) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return -1;
  size_t length = 0;
  while (length + 1 < capacity) {
    ssize_t count = read(file, text + length, capacity - 1 - length);
    if (count <= 0) break;
    length += (size_t)count;
  }
  close(file);
  text[length] = 0;
  return (long)length;
}

// The directory of this process's cgroup for a controller: version 2 when `controller` is NULL. 0 when there is none.
static int cgroup_path(const char *controller, char *path, size_t capacity) {
  char text[4096];
  if (apus_read_text("/proc/self/cgroup", text, sizeof text) <= 0) return 0;
  char *state = NULL;
  for (char *line = strtok_r(text, "\n", &state); line; line = strtok_r(NULL, "\n", &state)) {
    char *first = strchr(line, ':');
    char *second = first ? strchr(first + 1, ':') : NULL;
    if (!second) continue;
    *second = 0;
    const char *controllers = first + 1;
    if (controller == NULL) {
      if (*controllers != 0) continue;
      snprintf(path, capacity, "/sys/fs/cgroup%s", second + 1);
      return 1;
    }
    size_t length = strlen(controller);
    for (const char *name = controllers; name; name = strchr(name, ',') ? strchr(name, ',') + 1 : NULL) {
      if (strncmp(name, controller, length) == 0 && (name[length] == 0 || name[length] == ',')) {
        snprintf(path, capacity, "/sys/fs/cgroup/%s%s", controller, second + 1);
        return 1;
      }
    }
  }
  return 0;
}

// Cuts the last component off. 0 when the top of the hierarchy was reached.
static int parent(char *path) {
  char *slash = strrchr(path, '/');
  if (!slash || slash - path <= (long)strlen("/sys/fs")) return 0;
  *slash = 0;
  return 1;
}

static long read_in(const char *directory, const char *name, char *text, size_t capacity) {
  char path[4608];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  return apus_read_text(path, text, capacity);
}

double apus_cgroup_processor_quota(void) {
  double least = 0;
  char path[4096], text[256];
  // Version 2: "max 100000" or "quota period". A container may see its own group as the root, so every level is
  // asked, those that do not exist say nothing.
  if (cgroup_path(NULL, path, sizeof path)) {
    do {
      double quota, period;
      if (read_in(path, "cpu.max", text, sizeof text) > 0 && sscanf(text, "%lf %lf", &quota, &period) == 2
          && quota > 0 && period > 0 && (least == 0 || quota / period < least)) {
        least = quota / period;
      }
    } while (parent(path));
  }
  if (cgroup_path("cpu", path, sizeof path)) {
    do {
      char period_text[64];
      if (read_in(path, "cpu.cfs_quota_us", text, sizeof text) > 0
          && read_in(path, "cpu.cfs_period_us", period_text, sizeof period_text) > 0) {
        double quota = atof(text), period = atof(period_text);
        if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
      }
    } while (parent(path));
  }
  return least;
}

// A line "name value" of a memory.stat file.
static uint64_t statistic(const char *text, const char *name) {
  size_t length = strlen(name);
  for (const char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
    if (strncmp(line, name, length) == 0 && line[length] == ' ') return strtoull(line + length + 1, NULL, 10);
  }
  return 0;
}

static void memory_of_hierarchy(
    const char *controller, const char *limit_name, const char *usage_name, const char *cache_name, uint64_t *limit,
    uint64_t *remaining) {
  char path[4096], text[256], statistics[8192];
  if (!cgroup_path(controller, path, sizeof path)) return;
  do {
    if (read_in(path, limit_name, text, sizeof text) <= 0 || strncmp(text, "max", 3) == 0) continue;
    uint64_t most = strtoull(text, NULL, 10);
    if (most == 0 || most >= (uint64_t)1 << 60) continue;
    if (most < *limit) *limit = most;
    if (read_in(path, usage_name, text, sizeof text) <= 0) continue;
    uint64_t used = strtoull(text, NULL, 10);
    if (read_in(path, "memory.stat", statistics, sizeof statistics) > 0) {
      // Page cache that nobody has touched lately is given back under pressure.
      uint64_t cache = statistic(statistics, cache_name);
      used = used > cache ? used - cache : 0;
    }
    uint64_t rest = most > used ? most - used : 0;
    if (rest < *remaining) *remaining = rest;
  } while (parent(path));
}

static void memory_of_cgroups(uint64_t *limit, uint64_t *remaining) {
  *limit = UINT64_MAX;
  *remaining = UINT64_MAX;
  memory_of_hierarchy(NULL, "memory.max", "memory.current", "inactive_file", limit, remaining);
  memory_of_hierarchy(
      "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", limit, remaining);
}

uint64_t apus_cgroup_memory_limit(void) {
  uint64_t limit, remaining;
  memory_of_cgroups(&limit, &remaining);
  return limit;
}

uint64_t apus_cgroup_memory_remaining(void) {
  uint64_t limit, remaining;
  memory_of_cgroups(&limit, &remaining);
  return remaining;
}
