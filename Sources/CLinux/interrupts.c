#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

static _Atomic int write_end = -1;
static int read_end = -1;
static struct sigaction previous;

static void on_interrupt(int number) {
  (void)number;
  int saved = errno;
  char byte = 0;
  // A full pipe holds more presses than anyone has to hear of.
  ssize_t written = write(atomic_load(&write_end), &byte, 1);
  (void)written;
  errno = saved;
}

int apus_interrupts_begin(void) {
  if (read_end < 0) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return -1;
    read_end = ends[0];
    atomic_store(&write_end, ends[1]);
  }
  if (sigaction(SIGINT, NULL, &previous) != 0) return -1;
  // Who was started with the signal ignored, as a script's background job is, keeps ignoring it.
  if (!(previous.sa_flags & SA_SIGINFO) && previous.sa_handler == SIG_IGN) return read_end;
  struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  return sigaction(SIGINT, &action, NULL) == 0 ? read_end : -1;
}

void apus_interrupts_end(void) { sigaction(SIGINT, &previous, NULL); }
