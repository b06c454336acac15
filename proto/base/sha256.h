/* sha256.h - SHA-256 (FIPS 180-4), for keys that are kept as their hash.
 * Thread: any (pure functions). Owns nothing. */
#ifndef PROTO_BASE_SHA256_H
#define PROTO_BASE_SHA256_H

#include <stddef.h>

#define SHA256_BYTES 32

void sha256(const void *data, size_t size, unsigned char out[SHA256_BYTES]);

#endif
