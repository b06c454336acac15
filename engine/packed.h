/* packed.h - a recurrent state in 15 bits a number: what it looks like.
 * Thread: any (pure functions). Owns nothing. Private to engine/.
 *
 * Numbers go by blocks of PACKED_BLOCK that share a power of two: number = q * 2^e, |q| < 2^14,
 * with the least e that holds the block's largest. The error is at most 2^-14 of that (a float's
 * own is 2^-24 of the number). Packing what was unpacked gives the same bytes, so a state can be
 * rounded once and then be written and read as often as one likes.
 *
 * Layout: for each block PACKED_WORD_BYTES, q of number i in bits [15 i, 15 i + 15), two's
 * complement, little-endian; then for each block its e, one signed byte. The last block is filled
 * up with zeros. A block that holds no number, an infinity or next to it comes back as no numbers.
 */
#ifndef ENGINE_PACKED_H
#define ENGINE_PACKED_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PACKED_BLOCK 64
#define PACKED_BITS 15
#define PACKED_WORD_BYTES (PACKED_BLOCK * PACKED_BITS / 8)
#define PACKED_MOST ((1 << (PACKED_BITS - 1)) - 1) /* of |q| */
#define PACKED_LEAST_E (-126) /* below, 2^e and its inverse are no normal floats */
#define PACKED_MOST_E 114     /* above, what is rounded up may be no float */
#define PACKED_NOT_FINITE 127 /* in place of e */

static inline size_t packed_blocks(size_t count)
{
    return (count + PACKED_BLOCK - 1) / PACKED_BLOCK;
}
/* Bytes of `count` packed numbers. */
static inline size_t packed_bytes(size_t count)
{
    return packed_blocks(count) * (PACKED_WORD_BYTES + 1);
}
/* 2^e, for e that the layout may hold and their opposites. */
static inline float packed_power(int e)
{
    const uint32_t bits = (uint32_t)(e + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

#endif
