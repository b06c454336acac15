/* Where a step begins and ends: tokens in, logits and drawn tokens out. */
#include <stdlib.h>

#include "engine/sampler_weight.h"
#include "proto/base/assert.h"
#include "tests/kernel/cuda/checks.h"

void check_ends(struct bed *b)
{
    const struct model_config *c = &b->config;
    struct ops_tensor table, table_device, norm, norm_device;
    MATRIX(table, table_device, c->vocab_size, c->hidden_size);
    WEIGHT(norm, norm_device, 1, c->hidden_size, 1, 0.2f);
    const uint32_t counts[] = {1, 1, 1, 19, 1};
    struct ops_segment segments[5];
    const struct ops_rows rows = make_rows(counts, 5, 0, segments);
    const size_t n = rows.row_count, d = c->hidden_size, v = c->vocab_size;
    int32_t tokens[32];
    for (size_t i = 0; i < n; i++)
        tokens[i] = (int32_t)random_below(c->vocab_size);
    float *x = malloc(n * d * sizeof *x), *logits = malloc(n * v * sizeof *logits);
    ASSERT(x && logits);
    float *device_x = to_device(b, NULL, n * d * sizeof *x);
    float *device_logits = to_device(b, NULL, n * v * sizeof *x);
    b->ref->embed(b->ref_context, &table, tokens, (uint32_t)n, x);
    b->cuda->embed(b->cuda_context, &table_device, tokens, (uint32_t)n, device_x);
    float *got = to_host(b, device_x, n * d);
    same(b, "embed", got, x, n * d * sizeof *x);
    free(got);
    b->ref->logits(b->ref_context, &norm, &table, &rows, x, logits);
    b->cuda->logits(b->cuda_context, &norm_device, &table_device, &rows, device_x, device_logits);
    got = to_host(b, device_logits, n * v);
    compare(b, "logits", got, logits, n * v, error_bound(b, 1));
    free(got);
    release(b, device_x);
    release(b, device_logits);
    free(x);
    free(logits);
}

/* A row's logits do not depend on how many there are. */
void check_many_logits(struct bed *b, uint32_t count)
{
    const struct model_config *c = &b->config;
    const size_t d = c->hidden_size, v = c->vocab_size;
    struct ops_tensor table, norm; /* on the device */
    weight(b, c->vocab_size, c->hidden_size, 0, 1 / sqrtf((float)d), &table);
    weight(b, 1, c->hidden_size, 1, 0.2f, &norm);
    uint32_t counts[CHECK_SEGMENTS];
    struct ops_segment segments[CHECK_SEGMENTS];
    for (uint32_t i = 0; i < count; i++)
        counts[i] = 1;
    float *x = random_floats(count * d, 1);
    float *device_x = to_device(b, x, count * d * sizeof *x);
    float *device_logits = to_device(b, NULL, count * v * sizeof *x);
    struct ops_rows rows = make_rows(counts, count, 0, segments);
    b->cuda->logits(b->cuda_context, &norm, &table, &rows, device_x, device_logits);
    float *all = to_host(b, device_logits, count * v);
    rows = make_rows(counts, 1, 0, segments);
    for (uint32_t i = 0; i < count; i += 1 + count / 4) {
        b->cuda->logits(b->cuda_context, &norm, &table, &rows, device_x + i * d, device_logits);
        float *alone = to_host(b, device_logits, v);
        same(b, "logits of many rows", all + i * v, alone, v * sizeof *alone);
        free(alone);
    }
    free(all);
    free(x);
    release(b, device_x);
    release(b, device_logits);
}

#define DRAW_ROWS 37

/* Logits of every sort: normal, flat with many ties, spread far, with no numbers among them. */
static void make_logits(float *row, uint32_t v, uint32_t sort)
{
    for (uint32_t i = 0; i < v; i++) {
        row[i] = random_normal() * (sort % 4 == 2 ? 40 : 3);
        if (sort % 4 == 1)
            row[i] = (float)random_below(3) / 4;
        if (sort % 4 == 3 && random_below(3) == 0)
            row[i] = random_below(2) ? NAN : -INFINITY;
        if (sort == 7)
            row[i] = NAN;
        if (sort == 11 && i == v / 2)
            row[i] = INFINITY;
    }
}

static int32_t largest_logit(const float *row, uint32_t v)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < v; i++)
        if (sampler_clean(row[i]) > sampler_clean(row[best]))
            best = i;
    return (int32_t)best;
}

/* What the device draws is what the sampler draws, token for token. */
void check_draw(struct bed *b)
{
    const uint32_t v = b->config.vocab_size;
    float *logits = malloc((size_t)DRAW_ROWS * v * sizeof *logits);
    struct sampler *samplers[DRAW_ROWS], *twins[DRAW_ROWS];
    struct ops_draw draws[DRAW_ROWS];
    int32_t got[DRAW_ROWS];
    uint32_t different = 0, distinct = 0;
    ASSERT(logits);
    for (uint32_t i = 0; i < DRAW_ROWS; i++) {
        struct sampler_params params;
        sampler_params_default(&params);
        make_logits(logits + (size_t)i * v, v, i % 12);
        params.temperature = (float)(1 + random_below(20)) / 10;
        params.top_k = random_below(2) ? (int32_t)random_below(v + 20) : 0;
        params.top_p = random_below(2) ? (float)random_below(1001) / 1000 : 1;
        params.min_p = random_below(3) ? 0 : (float)random_below(1001) / 1000;
        params.seed = b->seed * 100 + i;
        ASSERT(!sampler_create(&params, (int32_t)v, &samplers[i]));
        ASSERT(sampler_draws_plainly(samplers[i]));
        ASSERT(!sampler_create(&params, (int32_t)v, &twins[i]));
        draws[i] = (struct ops_draw){.row = i, .largest = largest_logit(logits + (size_t)i * v, v)};
    }
    float *device = to_device(b, logits, (size_t)DRAW_ROWS * v * sizeof *logits);
    for (int round = 0; round < 4; round++) {
        struct sampler_result want;
        for (uint32_t i = 0; i < DRAW_ROWS; i++)
            draws[i].how = sampler_next_draw(twins[i]);
        b->cuda->draw(b->cuda_context, draws, DRAW_ROWS, device, got);
        for (uint32_t i = 0; i < DRAW_ROWS; i++) {
            sampler_sample(samplers[i], logits + (size_t)i * v, &want);
            different += got[i] != want.token;
            distinct += got[i] != draws[i].largest;
        }
    }
    verdict(b, "draw", !different && distinct, "%u of %u tokens differ, %u are not the largest",
            different, 4 * DRAW_ROWS, distinct);
    for (uint32_t i = 0; i < DRAW_ROWS; i++) {
        sampler_destroy(samplers[i]);
        sampler_destroy(twins[i]);
    }
    release(b, device);
    free(logits);
}
