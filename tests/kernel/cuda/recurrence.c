/* Mamba-2 blocks, and the packed form of their state. */
#include <stdlib.h>
#include <string.h>

#include "engine/bf16.h"
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

/* How a bed keeps states: ssm of so many words, and conv behind it. */
struct layout {
    size_t numbers, words, conv; /* of ssm; the last two in floats */
};

static struct layout layout_of(const struct bed *b)
{
    const struct model_config *c = &b->config;
    const size_t numbers = (size_t)c->inner_size * c->state_size;
    return (struct layout){numbers, b->states_bf16 ? numbers / 2 : numbers,
                           (size_t)(c->conv_kernel - 1) * c->conv_size};
}

static float *random_states(const struct bed *b, uint32_t n)
{
    const struct layout l = layout_of(b);
    const size_t state = l.words + l.conv;
    float *kept = random_floats(n * state, 0.5f);
    for (uint32_t i = 0; b->states_bf16 && i < n; i++)
        for (size_t j = 0; j < l.numbers; j++)
            ((uint16_t *)(void *)(kept + i * state))[j] = bf16_from_float(0.5f * random_normal());
    return kept;
}

/* `n` states as the bed keeps them, in floats: [n, numbers + conv]. */
static float *widen_states(const struct bed *b, const float *kept, uint32_t n)
{
    const struct layout l = layout_of(b);
    float *out = malloc(n * (l.numbers + l.conv) * sizeof *out), *to = out;
    ASSERT(out);
    for (uint32_t i = 0; i < n; i++, kept += l.words + l.conv, to += l.conv) {
        for (size_t j = 0; j < l.numbers; j++)
            *to++ =
                b->states_bf16 ? bf16_to_float(((const uint16_t *)(const void *)kept)[j]) : kept[j];
        memcpy(to, kept + l.words, l.conv * sizeof *to);
    }
    return out;
}

/* The bounds of each number behind the segments (see mamba_bounds.h), from `states` before. */
static float *state_bounds(const struct bed *b, const struct ops_mamba_weights *weights,
                           const struct ops_rows *rows, const float *x, const float *states)
{
    const struct layout l = layout_of(b);
    const size_t state = l.numbers + l.conv;
    float *before = widen_states(b, states, rows->segment_count);
    float *bounds = malloc(rows->segment_count * state * sizeof *bounds);
    ASSERT(bounds);
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        const struct ops_mamba_state own = {before + i * state, before + i * state + l.numbers};
        mamba_state_bounds(&b->config, weights, x + (size_t)segment->row * b->config.hidden_size,
                           segment->count, &own, bounds + i * state);
    }
    free(before);
    return bounds;
}

/* `n` states against ref's. In bf16 both round each number of ssm once, by at most 2^-8 of itself,
 * so that they may be 2^-7 of it further apart; in fp32 few can be at all, since a number must lie
 * close to the middle between two of bf16 to be rounded to another. */
static void compare_states(const struct bed *b, const float *got_kept, const float *want_kept,
                           uint32_t n, float *bounds)
{
    const struct layout l = layout_of(b);
    const size_t state = l.numbers + l.conv;
    const double allowed = error_bound(b, 1) + (b->states_bf16 ? 1.0 / 128 : 0);
    float *got = widen_states(b, got_kept, n), *want = widen_states(b, want_kept, n);
    size_t others = 0;
    for (size_t i = 0; i < n * state && b->states_bf16; i++) {
        if (i % state >= l.numbers)
            continue;
        others += memcmp(&got[i], &want[i], sizeof *got) != 0;
        if (bounds)
            bounds[i] = 1.01f * (bounds[i] + fabsf(want[i]) / 128);
    }
    const char *what = b->states_bf16 ? "mamba bf16 states" : "mamba states";
    if (bounds)
        compare_within(b, what, got, want, n * state, allowed, bounds);
    else
        compare(b, what, got, want, n * state, allowed);
    if (b->states_bf16 && b->wide)
        verdict(b, "bf16 states, rounding", others <= n * l.numbers / 20,
                "%zu of %zu rounded otherwise", others, n * l.numbers);
    free(got);
    free(want);
}

void check_mamba(struct bed *b, const uint32_t *counts, uint32_t n)
{
    const struct model_config *c = &b->config;
    struct ops_mamba_weights host, device;
    make_mamba(b, &host, &device);
    struct ops_segment segments[CHECK_SEGMENTS];
    const struct ops_rows rows = make_rows(counts, n, 0, segments);
    const struct layout l = layout_of(b);
    const size_t d = c->hidden_size, ssm = l.words, state = ssm + l.conv;
    float *x = random_floats(rows.row_count * d, 1);
    float *states = random_states(b, n), *before = malloc(n * state * sizeof *before);
    memcpy(before, states, n * state * sizeof *states);
    float *gx = to_device(b, x, rows.row_count * d * sizeof *x);
    float *gs = to_device(b, states, n * state * sizeof *x);
    struct ops_mamba_state hs[CHECK_SEGMENTS], ds[CHECK_SEGMENTS];
    for (uint32_t i = 0; i < n; i++) {
        hs[i] = (struct ops_mamba_state){states + i * state, states + i * state + ssm};
        ds[i] = (struct ops_mamba_state){gs + i * state, gs + i * state + ssm};
    }
    float *start = to_host(b, gx, rows.row_count * d);
    float *bounds = b->wide ? NULL : state_bounds(b, &host, &rows, x, states);
    b->ref->mamba(b->ref_context, &host, &rows, hs, x);
    b->cuda->mamba(b->cuda_context, &device, &rows, ds, gx);
    float *got = to_host(b, gx, rows.row_count * d);
    float *got_states = to_host(b, gs, n * state);
    compare(b, b->states_bf16 ? "mamba of bf16 states" : "mamba", got, x, rows.row_count * d,
            error_bound(b, 2));
    compare_states(b, got_states, states, n, bounds);
    free(bounds);
    /* Each segment alone must give the same bits. */
    const char *alone_what = b->states_bf16 ? "bf16 states alone" : "mamba alone";
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
            verdict(b, alone_what, false, "segment %u of %u rows differs", i, counts[i]);
        different += !equal;
        free(lone);
        free(lone_state);
    }
    if (!different)
        verdict(b, alone_what, true, "same bits, %u segments", n);
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
