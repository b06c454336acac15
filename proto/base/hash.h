/* hash.h - XXH64, the one hash of the project: record checksums, fingerprints, hash tables.
 * Thread: any (pure functions). Owns nothing.
 * Source: the xxHash specification, "XXH64 algorithm description". Not for secrets. */
#ifndef PROTO_BASE_HASH_H
#define PROTO_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

/* Equal on every machine for equal bytes and seed. */
uint64_t hash64(const void *bytes, size_t size, uint64_t seed);

#endif
