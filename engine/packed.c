/* packed.c - see packed.h. */
#include "engine/packed.h"

#include <math.h>

#include "proto/base/assert.h"

#define EIGHT 8 /* numbers that are whole bytes together */

static void unpack_block(const unsigned char *words, int e, float out[PACKED_BLOCK])
{
    const float scale = e == PACKED_NOT_FINITE ? NAN : packed_power(e);
    for (size_t i = 0; i < PACKED_BLOCK; i += EIGHT, words += PACKED_BITS) {
        uint64_t four[2] = {0, 0};
        memcpy(&four[0], words, 8);
        memcpy(&four[1], words + 8, PACKED_BITS - 8);
        four[1] = four[1] << 4 | four[0] >> 60;
        for (size_t j = 0; j < EIGHT; j++) {
            const uint32_t bits = (uint32_t)(four[j / 4] >> j % 4 * PACKED_BITS);
            const int32_t q = (int32_t)(bits << (32 - PACKED_BITS)) >> (32 - PACKED_BITS);
            out[i + j] = (float)q * scale;
        }
    }
}

void packed_unpack(const void *packed, size_t count, size_t from, size_t n, float *out)
{
    ASSERT(from % PACKED_BLOCK == 0 && from <= count && n <= count - from);
    const unsigned char *words = packed;
    const signed char *scales =
        (const signed char *)words + packed_blocks(count) * PACKED_WORD_BYTES;
    for (size_t done = 0; done < n; done += PACKED_BLOCK) {
        const size_t block = (from + done) / PACKED_BLOCK;
        float last[PACKED_BLOCK];
        if (n - done >= PACKED_BLOCK) {
            unpack_block(words + block * PACKED_WORD_BYTES, scales[block], out + done);
        } else {
            unpack_block(words + block * PACKED_WORD_BYTES, scales[block], last);
            memcpy(out + done, last, (n - done) * sizeof *out);
        }
    }
}
