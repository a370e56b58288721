// What Linux offers and Swift cannot call directly: futexes, thread placement, memory advice, limits of the machine.
//
// Every function is safe to call from any thread unless it says otherwise. None allocates unless it says so, and only
// apus_interrupts_begin installs a signal handler.
// Functions that can fail return -1 (or 0 for a size) and leave errno as the system call set it.

#ifndef CLINUX_H
#define CLINUX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// MARK: Futex

/// Sleeps while `*address == expected`, at most `timeout_ns` nanoseconds (negative: without limit).
/// Returns 1 when woken or when the value already differed, 0 when the time ran out. Wake-ups may be spurious.
int apus_futex_wait(const uint32_t *address, uint32_t expected, int64_t timeout_ns);

/// Wakes at most `count` threads of this process that sleep on `address`. Returns how many were woken.
int apus_futex_wake(const uint32_t *address, int count);

// MARK: Doorbell

/// A bell that many threads may ring and one thread waits for. A ring before the wait is not lost; rings that nobody
/// has heard yet count once. It costs no processor time while nobody rings.
typedef struct apus_doorbell apus_doorbell;

/// Makes a bell, or returns NULL when there is no memory.
apus_doorbell *apus_doorbell_create(void);

/// Frees a bell that nobody uses any more.
void apus_doorbell_free(apus_doorbell *bell);

/// Rings. A system call is made only when someone sleeps.
void apus_doorbell_ring(apus_doorbell *bell);

/// Waits until the bell was rung since the last wait that returned 1, at most `timeout_ns` nanoseconds (negative:
/// without limit; 0: only look). Returns 1 when it was rung, 0 when the time ran out.
int apus_doorbell_wait(apus_doorbell *bell, int64_t timeout_ns);

// MARK: Threads and processors

/// Names the calling thread for debuggers and `top`; the kernel keeps 15 bytes.
void apus_thread_set_name(const char *name);

/// Lets the calling thread run only on one processor. Returns 0, or -1 with errno set.
int apus_thread_pin(int processor);

/// Lets the calling thread run on all the processors given. Returns 0, or -1 with errno set.
int apus_thread_set_affinity(const int32_t *processors, int count);

/// Writes the numbers of the processors on which this thread may run, in rising order, at most `capacity` of them.
/// Returns how many there are.
int apus_processors(int32_t *processors, int capacity);

/// Writes one processor for each physical core on which this thread may run (the first of its hardware threads that
/// is allowed), in rising order, at most `capacity` of them. Returns how many there are.
int apus_physical_cores(int32_t *processors, int capacity);

/// How many threads can compute at once without sharing a core: physical cores within the affinity mask, lowered to
/// the cgroup's processor quota (rounded down, at least 1) where there is one.
int apus_usable_core_count(void);

// MARK: Memory

/// Bytes of memory that this process may use at most: the machine's, or the smallest limit of its cgroups.
uint64_t apus_memory_total(void);

/// Bytes that can still be allocated without swapping: the kernel's estimate, or what remains below the cgroups'
/// limits (page cache that can be dropped counts as free).
uint64_t apus_memory_available(void);

/// Bytes of this process that are in memory now.
uint64_t apus_memory_resident(void);

/// The largest value that `apus_memory_resident` had since the process began.
uint64_t apus_memory_resident_peak(void);

/// Zeroed memory straight from the kernel, aligned to 2 MiB when it is that large, with huge pages asked for.
/// Returns NULL when there is none. `byte_count` must be above 0. Free it with `apus_memory_unmap` and the same
/// size.
void *apus_memory_map(size_t byte_count);

/// Gives memory of `apus_memory_map` back.
void apus_memory_unmap(void *address, size_t byte_count);

/// Asks for huge pages in a range (a hint). Returns 0, or -1 with errno set.
int apus_memory_advise_huge(void *address, size_t byte_count);

/// Asks the kernel to read a mapped range ahead (a hint). Returns 0, or -1 with errno set.
int apus_memory_advise_will_need(const void *address, size_t byte_count);

/// Says that a mapped range is not needed any more, so that its pages can be dropped (a hint). Only for mappings of
/// files: the content of anonymous memory would be lost. Returns 0, or -1 with errno set.
int apus_memory_advise_dont_need(void *address, size_t byte_count);

/// Says that a mapped range is read from front to back (a hint). Returns 0, or -1 with errno set.
int apus_memory_advise_sequential(void *address, size_t byte_count);

/// An anonymous file in memory of `byte_count` bytes, closed on exec, for sharing between processes. Returns its file
/// descriptor, or -1 with errno set.
int apus_memory_file_create(const char *name, size_t byte_count);

// MARK: Time

/// Nanoseconds of the monotonic clock. Only differences have a meaning.
uint64_t apus_monotonic_ns(void);

// MARK: Interrupts

/// Catches SIGINT until `apus_interrupts_end` is called: each signal becomes a byte to read from the descriptor returned,
/// which does not block and stays open. A signal that was ignored stays ignored. Returns -1 with errno set on failure.
/// Neither nests nor may be called from two threads at once.
int apus_interrupts_begin(void);

/// Gives SIGINT back to whoever had it before.
void apus_interrupts_end(void);

#ifdef __cplusplus
}
#endif

#endif
