/* pack_state.c - rounds a state to its packed form, and takes it from there: see packed.h. */
#include <math.h>
#include <string.h>

#include "engine/packed.h"
#include "engine/ref/ref.h"

/* The least power of two that holds the block's largest number. */
static int scale_of(const float *x, size_t count)
{
    float largest = 0;
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(x[i]))
            return PACKED_NOT_FINITE;
        largest = fmaxf(largest, fabsf(x[i]));
    }
    int e = PACKED_LEAST_E;
    while (rintf(ldexpf(largest, -e)) > PACKED_MOST)
        e++;
    return e > PACKED_MOST_E ? PACKED_NOT_FINITE : e;
}

void ref_pack_state(struct ops_context *context, float *state, size_t count, void *packed)
{
    (void)context;
    unsigned char *words = packed;
    signed char *scales = (signed char *)words + packed_blocks(count) * PACKED_WORD_BYTES;
    memset(words, 0, packed_blocks(count) * PACKED_WORD_BYTES);
    for (size_t block = 0; block < packed_blocks(count); block++) {
        float *x = state + block * PACKED_BLOCK;
        const size_t left = count - block * PACKED_BLOCK;
        const size_t n = left < PACKED_BLOCK ? left : PACKED_BLOCK;
        const int e = scale_of(x, n);
        scales[block] = (signed char)e;
        for (size_t i = 0; i < n; i++) {
            const int q = e == PACKED_NOT_FINITE ? 0 : (int)rintf(ldexpf(x[i], -e));
            x[i] = e == PACKED_NOT_FINITE ? NAN : ldexpf((float)q, e);
            for (size_t bit = 0; bit < PACKED_BITS; bit++) {
                const size_t to = i * PACKED_BITS + bit;
                words[block * PACKED_WORD_BYTES + to / 8] |=
                    (unsigned char)(((unsigned)q >> bit & 1) << to % 8);
            }
        }
    }
}

void ref_unpack_state(struct ops_context *context, const void *packed, size_t count, float *state)
{
    (void)context;
    const unsigned char *words = packed;
    const signed char *scales =
        (const signed char *)words + packed_blocks(count) * PACKED_WORD_BYTES;
    for (size_t i = 0; i < count; i++) {
        const size_t block = i / PACKED_BLOCK;
        int q = 0;
        for (size_t bit = 0; bit < PACKED_BITS; bit++) {
            const size_t from = i % PACKED_BLOCK * PACKED_BITS + bit;
            q |= (words[block * PACKED_WORD_BYTES + from / 8] >> from % 8 & 1) << bit;
        }
        if (q > PACKED_MOST) /* two's complement */
            q -= 1 << PACKED_BITS;
        state[i] = scales[block] == PACKED_NOT_FINITE ? NAN : ldexpf((float)q, scales[block]);
    }
}
