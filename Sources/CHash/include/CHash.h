// SHA-256 and SHA-1 (FIPS 180-4), for checking files against the checksums that model hubs publish. SHA-1 because git
// names contents by it; it protects against damage, not against an attacker.
#ifndef APUS_CHASH_H
#define APUS_CHASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  uint32_t state[8];
  uint64_t length;  // bytes so far
  uint8_t pending[64];
} apus_sha256;

typedef struct {
  uint32_t state[5];
  uint64_t length;
  uint8_t pending[64];
} apus_sha1;

void apus_sha256_begin(apus_sha256 *hash);
void apus_sha256_update(apus_sha256 *hash, const void *bytes, size_t count);
void apus_sha256_end(apus_sha256 *hash, uint8_t digest[32]);

void apus_sha1_begin(apus_sha1 *hash);
void apus_sha1_update(apus_sha1 *hash, const void *bytes, size_t count);
void apus_sha1_end(apus_sha1 *hash, uint8_t digest[20]);

// Whether the processor has instructions for SHA-256, and a switch for tests that turns their use off.
int apus_sha256_is_accelerated(void);
void apus_sha256_set_portable(int is_portable);

#endif
