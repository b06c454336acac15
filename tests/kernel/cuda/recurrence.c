/* Mamba-2 blocks, and the packed form of their state. */
#include <stdlib.h>
#include <string.h>

#include "engine/packed.h"
#include "proto/base/assert.h"
#include "tests/kernel/cuda/checks.h"
#include "tests/lib/mamba_bounds.h"

static void make_mamba(struct bed *b, struct ops_mamba_weights *h, struct ops_mamba_weights *g)
{
    const struct model_config *c = &b->config;
    *h = *g = (struct ops_mamba_weights){0};
    WEIGHT(h->norm, g->norm, 1, c->hidden_size, 1, 0.2f);
    MATRIX(h->in_proj, g->in_proj, c->proj_size, c->hidden_size);
    WEIGHT(h->conv_weight, g->conv_weight, c->conv_size, c->conv_kernel, 0, 0.5f);
    WEIGHT(h->conv_bias, g->conv_bias, 1, c->conv_size, 0, 0.2f);
    WEIGHT(h->dt_bias, g->dt_bias, 1, c->mamba_heads, -3, 1);
    WEIGHT(h->a_log, g->a_log, 1, c->mamba_heads, 1, 0.7f);
    WEIGHT(h->d, g->d, 1, c->mamba_heads, 1, 0.2f);
    WEIGHT(h->gate_norm, g->gate_norm, 1, c->inner_size, 1, 0.2f);
    MATRIX(h->out_proj, g->out_proj, c->hidden_size, c->inner_size);
    if (c->use_bias) {
        WEIGHT(h->in_proj_bias, g->in_proj_bias, 1, c->proj_size, 0, 0.2f);
        WEIGHT(h->out_proj_bias, g->out_proj_bias, 1, c->hidden_size, 0, 0.2f);
    }
}

void check_mamba(struct bed *b, const uint32_t *counts, uint32_t n)
{
    const struct model_config *c = &b->config;
    struct ops_mamba_weights host, device;
    make_mamba(b, &host, &device);
    struct ops_segment segments[CHECK_SEGMENTS];
    const struct ops_rows rows = make_rows(counts, n, 0, segments);
    const size_t d = c->hidden_size, ssm = (size_t)c->inner_size * c->state_size,
                 conv = (size_t)(c->conv_kernel - 1) * c->conv_size, state = ssm + conv;
    float *x = random_floats(rows.row_count * d, 1);
    float *states = random_floats(n * state, 0.5f), *before = malloc(n * state * sizeof *before);
    memcpy(before, states, n * state * sizeof *states);
    float *gx = to_device(b, x, rows.row_count * d * sizeof *x);
    float *gs = to_device(b, states, n * state * sizeof *x);
    struct ops_mamba_state hs[CHECK_SEGMENTS], ds[CHECK_SEGMENTS];
    for (uint32_t i = 0; i < n; i++) {
        hs[i] = (struct ops_mamba_state){states + i * state, states + i * state + ssm};
        ds[i] = (struct ops_mamba_state){gs + i * state, gs + i * state + ssm};
    }
    float *start = to_host(b, gx, rows.row_count * d), *bounds = NULL;
    if (!b->wide) {
        bounds = malloc(n * state * sizeof *bounds);
        ASSERT(bounds);
        for (uint32_t i = 0; i < n; i++)
            mamba_state_bounds(c, &host, x + segments[i].row * d, counts[i], &hs[i],
                               bounds + i * state);
    }
    b->ref->mamba(b->ref_context, &host, &rows, hs, x);
    b->cuda->mamba(b->cuda_context, &device, &rows, ds, gx);
    float *got = to_host(b, gx, rows.row_count * d);
    float *got_states = to_host(b, gs, n * state);
    compare(b, "mamba", got, x, rows.row_count * d, error_bound(b, 2));
    if (bounds)
        compare_within(b, "mamba states", got_states, states, n * state, error_bound(b, 1), bounds);
    else
        compare(b, "mamba states", got_states, states, n * state, error_bound(b, 1));
    free(bounds);
    /* Each segment alone must give the same bits. */
    uint32_t different = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct ops_segment alone = {.row = 0, .count = counts[i]};
        const struct ops_rows one = {&alone, 1, counts[i]};
        const size_t bytes = counts[i] * d * sizeof *x;
        b->cuda->copy(b->cuda_context, gx, start + segments[i].row * d, bytes);
        b->cuda->copy(b->cuda_context, gs, before + i * state, state * sizeof *x);
        const struct ops_mamba_state first = {gs, gs + ssm};
        b->cuda->mamba(b->cuda_context, &device, &one, &first, gx);
        float *lone = to_host(b, gx, counts[i] * d), *lone_state = to_host(b, gs, state);
        const bool equal = memcmp(lone, got + segments[i].row * d, bytes) == 0 &&
                           memcmp(lone_state, got_states + i * state, state * sizeof *x) == 0;
        if (!equal)
            verdict(b, "mamba alone", false, "segment %u of %u rows differs", i, counts[i]);
        different += !equal;
        free(lone);
        free(lone_state);
    }
    if (!different)
        verdict(b, "mamba alone", true, "same bits, %u segments", n);
    release(b, gx);
    release(b, gs);
    free(x);
    free(states);
    free(before);
    free(start);
    free(got);
    free(got_states);
}

/* Numbers of all sizes; a block of zeros, one of no number, one that rounds up to the next power of
 * two, a last one that is not full. */
void check_pack(struct bed *b)
{
    const size_t count = (size_t)64 * 1031 + 37, bytes = packed_bytes(count);
    float *x = random_floats(count, 1);
    unsigned char *packed = malloc(bytes);
    ASSERT(packed);
    for (size_t i = 0; i < count; i++)
        x[i] = i / 64 % 9 == 4 ? 0 : ldexpf(x[i], (int)random_below(64) - 32);
    x[64] = INFINITY;
    x[128] = NAN;
    for (size_t i = 192; i < 256; i++)
        x[i] = i == 200 ? -16383.5f : 0.5f * (float)(i - 192);
    x[256] = 1e-45f;
    x[320] = 3.4e38f;
    float *device_x = to_device(b, x, count * sizeof *x);
    unsigned char *device = to_device(b, NULL, bytes);
    b->ref->pack_state(b->ref_context, x, count, packed);
    b->cuda->pack_state(b->cuda_context, device_x, count, device);
    float *got = to_host(b, device_x, count);
    same(b, "pack_state, rounded", got, x, count * sizeof *x);
    free(got);
    unsigned char *words = malloc(bytes);
    ASSERT(words);
    b->cuda->copy(b->cuda_context, words, device, bytes);
    same(b, "pack_state, packed", words, packed, bytes);
    free(words);
    float *again = to_device(b, NULL, count * sizeof *x);
    b->cuda->unpack_state(b->cuda_context, device, count, again);
    got = to_host(b, again, count);
    same(b, "unpack_state", got, x, count * sizeof *x);
    free(got);
    release(b, again);
    free(packed);
    free(x);
    release(b, device);
    release(b, device_x);
}
