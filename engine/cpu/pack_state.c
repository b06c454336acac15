/* pack_state.c - rounds a state to its packed form, and back: see packed.h. Bound by memory: loops
 * without branches, for the compiler to make vectors of, and 60 bits of four numbers at a time. */
#include <math.h>
#include <string.h>

#include "engine/cpu/cpu.h"
#include "engine/packed.h"

#define TASK_BLOCKS 4096 /* of one task: 1 MiB of floats */
#define EIGHT 8          /* numbers that are whole bytes together */

struct pack {
    float *state;
    size_t count;
    unsigned char *packed;
    bool back;
};

static int scale_of(const float x[PACKED_BLOCK])
{
    uint32_t bits[PACKED_BLOCK], largest = 0;
    float number;
    memcpy(bits, x, sizeof bits);
    for (size_t i = 0; i < PACKED_BLOCK; i++) {
        const uint32_t magnitude = bits[i] & 0x7fffffffu; /* in the order of the numbers */
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000u)
        return PACKED_NOT_FINITE;
    int e = (int)(largest >> 23) - 127 - (PACKED_BITS - 2);
    if (e < PACKED_LEAST_E)
        return PACKED_LEAST_E;
    memcpy(&number, &largest, sizeof number);
    if (rintf(number * packed_power(-e)) > PACKED_MOST)
        e++;
    return e > PACKED_MOST_E ? PACKED_NOT_FINITE : e;
}

static void pack_block(float x[PACKED_BLOCK], unsigned char *words, signed char *scale)
{
    const float magic = 12582912; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    int32_t q[PACKED_BLOCK];
    const int e = scale_of(x);
    *scale = (signed char)e;
    if (e == PACKED_NOT_FINITE) {
        for (size_t i = 0; i < PACKED_BLOCK; i++)
            x[i] = NAN;
        memset(words, 0, PACKED_WORD_BYTES);
        return;
    }
    const float up = packed_power(-e), down = packed_power(e);
    for (size_t i = 0; i < PACKED_BLOCK; i++)
        q[i] = (int32_t)((x[i] * up + magic) - magic);
    for (size_t i = 0; i < PACKED_BLOCK; i++)
        x[i] = (float)q[i] * down;
    for (size_t i = 0; i < PACKED_BLOCK; i += EIGHT, words += PACKED_BITS) {
        uint64_t four[2];
        for (size_t j = 0; j < 2; j++) {
            const uint32_t mask = (1u << PACKED_BITS) - 1;
            const int32_t *at = q + i + 4 * j;
            four[j] = ((uint64_t)at[0] & mask) | ((uint64_t)at[1] & mask) << 15 |
                      ((uint64_t)at[2] & mask) << 30 | ((uint64_t)at[3] & mask) << 45;
        }
        const uint64_t low = four[0] | four[1] << 60, high = four[1] >> 4;
        memcpy(words, &low, 8);
        memcpy(words + 8, &high, 7);
    }
}

static void unpack_block(float x[PACKED_BLOCK], const unsigned char *words, int e)
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
            x[i + j] = (float)q * scale;
        }
    }
}

static void pack_task(void *argument, uint32_t index, uint32_t worker)
{
    const struct pack *pack = argument;
    (void)worker;
    const size_t blocks = packed_blocks(pack->count), first = (size_t)index * TASK_BLOCKS;
    const size_t end = blocks - first < TASK_BLOCKS ? blocks : first + TASK_BLOCKS;
    signed char *scales = (signed char *)pack->packed + blocks * PACKED_WORD_BYTES;
    for (size_t block = first; block < end; block++) {
        float *x = pack->state + block * PACKED_BLOCK, last[PACKED_BLOCK] = {0};
        const size_t left = pack->count - block * PACKED_BLOCK;
        unsigned char *words = pack->packed + block * PACKED_WORD_BYTES;
        const bool whole = left >= PACKED_BLOCK;
        if (!whole)
            memcpy(last, x, left * sizeof *x);
        if (pack->back)
            unpack_block(whole ? x : last, words, scales[block]);
        else
            pack_block(whole ? x : last, words, &scales[block]);
        if (!whole)
            memcpy(x, last, left * sizeof *x);
    }
}

static void run(struct ops_context *context, struct pack *pack)
{
    const size_t blocks = packed_blocks(pack->count);
    pool_run(context->pool, (uint32_t)((blocks + TASK_BLOCKS - 1) / TASK_BLOCKS), pack_task, pack);
}

void cpu_pack_state(struct ops_context *context, float *state, size_t count, void *packed)
{
    struct pack pack = {.state = state, .count = count, .packed = packed};
    run(context, &pack);
}

void cpu_unpack_state(struct ops_context *context, const void *packed, size_t count, float *state)
{
    struct pack pack = {
        .state = state, .count = count, .packed = (void *)(uintptr_t)packed, .back = true};
    run(context, &pack);
}
