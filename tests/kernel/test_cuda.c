/* Every op of the CUDA backend against ref, on ragged shapes with random numbers: one line for each
 * check with its seed, so that a failure can be run again alone (--seed N --only NAME). Exits with
 * 77 where there is no GPU. Also: nothing in a batch changes another sequence's bits, a small pool
 * of device pages changes nothing, and an injected failure is reported, never computed around.
 *
 * Tolerances. Wide (fp32) differs from ref by the order of its sums: a relative error of a few
 * units of 2^-24 times the square root of their length, so 2e-5 of the norm leaves room for
 * thousands of terms. With bf16, each input of a product is rounded by at most 2^-9 of itself; a
 * naive computation with the same roundings errs by about sqrt(stages) 2^-9, and twice that is
 * allowed, doubled again where a nonlinearity (softmax, gated norm) stands behind it. Of a Mamba
 * block's states each number has its own bound, too (tests/lib/mamba_bounds.h). */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/bf16.h"
#include "engine/ops.h"
#include "engine/packed.h"
#include "engine/sampler_weight.h"
#include "proto/base/assert.h"
#include "proto/limits.h"
#include "tests/lib/mamba_bounds.h"

/* ---- random numbers ---- */

static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % n);
}

/* About normal: the sum of four uniform numbers. */
static float random_normal(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (float)random_below(1u << 20) / (1 << 20) - 0.5f;
    return sum * 1.7320508f;
}

static float *random_floats(size_t count, float scale)
{
    float *out = malloc((count + 1) * sizeof *out);
    ASSERT(out);
    for (size_t i = 0; i < count; i++)
        out[i] = random_normal() * scale;
    return out;
}

/* ---- one shape on two backends ---- */

struct bed {
    struct model_config config;
    bool wide, fp8; /* fp8: landmarks */
    const struct ops *ref, *cuda;
    struct ops_context *ref_context, *cuda_context;
    void *owned[256]; /* host memory of weights */
    size_t owned_count;
};

static int failures, checks;
static const char *only;

static struct model_config make_config(uint32_t d, uint32_t heads, uint32_t kv_heads, uint32_t n,
                                       uint32_t groups, uint32_t chunk, uint32_t topk)
{
    struct model_config c = {.hidden_size = d,
                             .vocab_size = 517,
                             .inner_size = 2 * d,
                             .mamba_head_dim = d >= 256 ? 64 : 32,
                             .state_size = n,
                             .state_groups = groups,
                             .conv_kernel = 4,
                             .norm_epsilon = 1e-5f,
                             .dt_max = INFINITY,
                             .use_conv_bias = true,
                             .chunk_tokens = chunk,
                             .topk = topk,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = d / heads,
                             .retrieval_dim = d,
                             .retrieval_heads = kv_heads,
                             .encoder_layers = 1,
                             .encoder_kv_heads = kv_heads,
                             .encoder_mlp_size = (uint32_t)((uint64_t)d * 8 / 3) / 64 * 64};
    c.mamba_heads = c.inner_size / c.mamba_head_dim;
    c.conv_size = c.inner_size + 2 * groups * n;
    c.proj_size = c.inner_size + c.conv_size + c.mamba_heads;
    return c;
}

static enum status bed_open(struct bed *b, const struct model_config *config, bool wide, bool fp8,
                            uint32_t max_rows, size_t device_bytes, struct error *err)
{
    *b = (struct bed){
        .config = *config, .wide = wide, .fp8 = fp8, .ref = ops_ref(), .cuda = ops_cuda()};
    struct ops_options options = {.config = &b->config,
                                  .threads = 1,
                                  .max_rows = max_rows,
                                  .memory_dtype = wide ? OPS_FP32 : OPS_BF16,
                                  .device_memory_bytes = device_bytes};
    ASSERT(!b->ref->open(&options, &b->ref_context, err));
    options.landmarks_fp8 = fp8;
    const enum status status = b->cuda->open(&options, &b->cuda_context, err);
    if (status)
        b->ref->close(b->ref_context);
    return status;
}

static void bed_close(struct bed *b)
{
    b->cuda->close(b->cuda_context);
    b->ref->close(b->ref_context);
    for (size_t i = 0; i < b->owned_count; i++)
        free(b->owned[i]);
}

/* A bf16 weight in both worlds: what bf16 holds is the same number in both precisions. */
static struct ops_tensor weight(struct bed *b, uint32_t rows, uint32_t cols, float mean,
                                float scale, struct ops_tensor *device)
{
    const size_t count = (size_t)rows * cols;
    uint16_t *data = malloc(count * sizeof *data + 1);
    ASSERT(data && b->owned_count < sizeof b->owned / sizeof *b->owned);
    for (size_t i = 0; i < count; i++)
        data[i] = bf16_from_float(mean + scale * random_normal());
    b->owned[b->owned_count++] = data;
    const struct ops_tensor host = {.data = data, .dtype = OPS_BF16, .rows = rows, .cols = cols};
    *device = host;
    struct error err;
    if (b->cuda->place(b->cuda_context, device, &err)) {
        printf("placing a weight failed: %s\n", err.message);
        exit(1);
    }
    return host;
}

#define WEIGHT(host, device, rows, cols, mean, scale) \
    (host) = weight(b, rows, cols, mean, scale, &(device))
#define MATRIX(host, device, rows, cols) \
    WEIGHT(host, device, rows, cols, 0, 1 / sqrtf((float)(cols)))

static void *to_device(struct bed *b, const void *data, size_t bytes)
{
    void *memory = b->cuda->alloc(b->cuda_context, bytes);
    ASSERT(memory);
    if (data)
        b->cuda->copy(b->cuda_context, memory, data, bytes);
    return memory;
}

static float *to_host(struct bed *b, const void *memory, size_t count)
{
    float *out = malloc((count + 1) * sizeof *out);
    ASSERT(out);
    for (size_t i = 0; i < count; i++)
        out[i] = NAN;
    b->cuda->copy(b->cuda_context, out, memory, count * sizeof *out);
    return out;
}

static void release(struct bed *b, void *memory)
{
    b->cuda->release(b->cuda_context, memory);
}

/* ---- verdicts ---- */

static char current[96];
static uint64_t current_seed;

static void verdict(const struct bed *b, const char *what, bool passed, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static void verdict(const struct bed *b, const char *what, bool passed, const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    struct error err = {0};
    const bool broken = b->cuda->check(b->cuda_context, &err) != STATUS_OK;
    checks++;
    failures += !passed || broken;
    printf("%-4s %-4s %-30s %-22s seed %-6llu %s%s%s\n", passed && !broken ? "ok" : "FAIL",
           b->wide  ? "fp32"
           : b->fp8 ? "fp8"
                    : "bf16",
           current, what, (unsigned long long)current_seed, text, broken ? "; BROKEN: " : "",
           broken ? err.message : "");
    fflush(stdout);
}

/* ||got - want|| / ||want|| against `bound`; NaN and infinity never pass. No element may be far off
 * either: by more than 16 times what a typical one may be, and `bound` of its own size, since what
 * is rounded are products as large as itself (the largest of a state are many times a typical
 * one). */
static void compare(const struct bed *b, const char *what, const float *got, const float *want,
                    size_t count, double bound)
{
    double off = 0, norm = 0, worst = 0;
    size_t worst_at = 0, bad = 0, first_bad = count;
    for (size_t i = 0; i < count; i++) {
        const double difference = fabs((double)got[i] - (double)want[i]);
        off += difference * difference;
        norm += (double)want[i] * (double)want[i];
        if (!(difference <= worst)) {
            worst = difference;
            worst_at = i;
        }
    }
    const double typical = sqrt(norm / (double)(count ? count : 1));
    for (size_t i = 0; i < count; i++) {
        const double allowed = bound * (16 * typical + fabs((double)want[i]));
        if (!(fabs((double)got[i] - (double)want[i]) <= allowed)) {
            first_bad = first_bad == count ? i : first_bad;
            bad++;
        }
    }
    const double relative = norm > 0 ? sqrt(off / norm) : off;
    const bool passed = relative <= bound && !bad;
    if (passed)
        verdict(b, what, true, "error %.1e (allowed %.1e), worst %.1e", relative, bound, worst);
    else
        verdict(b, what, false,
                "error %.2e (allowed %.1e), worst %.2e at %zu (got %g, want %g), %zu of %zu far "
                "off, the first at %zu",
                relative, bound, worst, worst_at, (double)got[worst_at], (double)want[worst_at],
                bad, count, first_bad);
}

/* ||got - want|| / ||want|| against `bound`, and each number against its own of `bounds`. */
static void compare_within(const struct bed *b, const char *what, const float *got,
                           const float *want, size_t count, double bound, const float *bounds)
{
    double off = 0, norm = 0, share = 0;
    size_t at = 0, bad = 0;
    for (size_t i = 0; i < count; i++) {
        const double difference = fabs((double)got[i] - (double)want[i]);
        off += difference * difference;
        norm += (double)want[i] * (double)want[i];
        bad += !(difference <= bounds[i]);
        if (!(difference <= share * bounds[i])) {
            share = difference / bounds[i];
            at = i;
        }
    }
    const double relative = norm > 0 ? sqrt(off / norm) : off;
    verdict(b, what, relative <= bound && !bad,
            "error %.1e (allowed %.1e), worst %.2f of its own bound (%zu: got %g, want %g), %zu of "
            "%zu far off",
            relative, bound, share, at, (double)got[at], (double)want[at], bad, count);
}

/* Bit for bit. */
static void same(const struct bed *b, const char *what, const void *got, const void *want,
                 size_t bytes)
{
    size_t at = 0;
    while (at < bytes && ((const char *)got)[at] == ((const char *)want)[at])
        at++;
    verdict(b, what, at == bytes, at == bytes ? "same bits" : "byte %zu of %zu differs", at, bytes);
}

static double bound(const struct bed *b, double stages)
{
    return b->wide ? 2e-5 : 4 * sqrt(stages) / 512;
}

/* ---- the ops ---- */

static struct ops_rows make_rows(const uint32_t *counts, uint32_t n, uint64_t position,
                                 struct ops_segment *segments)
{
    uint32_t row = 0;
    for (uint32_t i = 0; i < n; i++) {
        segments[i] = (struct ops_segment){.row = row, .count = counts[i], .position = position};
        row += counts[i];
        position += 7;
    }
    return (struct ops_rows){.segments = segments, .segment_count = n, .row_count = row};
}

static void check_ends(struct bed *b)
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
    compare(b, "logits", got, logits, n * v, bound(b, 1));
    free(got);
    release(b, device_x);
    release(b, device_logits);
    free(x);
    free(logits);
}

/* Numbers of all sizes; a block of zeros, one of no number, one that rounds up to the next power of
 * two, a last one that is not full. */
static void check_pack(struct bed *b)
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

#define SEGMENTS 40

static void check_mamba(struct bed *b, const uint32_t *counts, uint32_t n)
{
    const struct model_config *c = &b->config;
    struct ops_mamba_weights host, device;
    make_mamba(b, &host, &device);
    struct ops_segment segments[SEGMENTS];
    const struct ops_rows rows = make_rows(counts, n, 0, segments);
    const size_t d = c->hidden_size, ssm = (size_t)c->inner_size * c->state_size,
                 conv = (size_t)(c->conv_kernel - 1) * c->conv_size, state = ssm + conv;
    float *x = random_floats(rows.row_count * d, 1);
    float *states = random_floats(n * state, 0.5f), *before = malloc(n * state * sizeof *before);
    memcpy(before, states, n * state * sizeof *states);
    float *gx = to_device(b, x, rows.row_count * d * sizeof *x);
    float *gs = to_device(b, states, n * state * sizeof *x);
    struct ops_mamba_state hs[SEGMENTS], ds[SEGMENTS];
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
    compare(b, "mamba", got, x, rows.row_count * d, bound(b, 2));
    if (bounds)
        compare_within(b, "mamba states", got_states, states, n * state, bound(b, 1), bounds);
    else
        compare(b, "mamba states", got_states, states, n * state, bound(b, 1));
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

static void make_encoder(struct bed *b, struct ops_encoder_layer *h, struct ops_encoder_layer *g)
{
    const struct model_config *c = &b->config;
    const uint32_t d = c->hidden_size, kv = c->encoder_kv_heads * c->head_dim,
                   m = c->encoder_mlp_size;
    WEIGHT(h->input_norm, g->input_norm, 1, d, 1, 0.2f);
    MATRIX(h->q, g->q, d, d);
    WEIGHT(h->q_bias, g->q_bias, 1, d, 0, 0.2f);
    MATRIX(h->k, g->k, kv, d);
    WEIGHT(h->k_bias, g->k_bias, 1, kv, 0, 0.2f);
    MATRIX(h->v, g->v, kv, d);
    WEIGHT(h->v_bias, g->v_bias, 1, kv, 0, 0.2f);
    MATRIX(h->o, g->o, d, d);
    WEIGHT(h->q_norm, g->q_norm, 1, c->head_dim, 1, 0.2f);
    WEIGHT(h->k_norm, g->k_norm, 1, c->head_dim, 1, 0.2f);
    WEIGHT(h->post_norm, g->post_norm, 1, d, 1, 0.2f);
    MATRIX(h->gate, g->gate, m, d);
    MATRIX(h->up, g->up, m, d);
    MATRIX(h->down, g->down, d, m);
}

static void make_chunking(struct bed *b, struct ops_chunking_weights *h,
                          struct ops_chunking_weights *g, struct ops_encoder_layer *hl,
                          struct ops_encoder_layer *gl)
{
    const struct model_config *c = &b->config;
    const uint32_t d = c->hidden_size, kv = c->kv_heads * c->head_dim;
    *h = *g = (struct ops_chunking_weights){0};
    if (c->encoder_layers) {
        WEIGHT(h->cls, g->cls, 1, d, 0, 0.5f);
        if (c->encoder_prenorm)
            WEIGHT(h->enc_prenorm, g->enc_prenorm, 1, d, 1, 0.2f);
        for (uint32_t i = 0; i < c->encoder_layers; i++)
            make_encoder(b, &hl[i], &gl[i]);
        h->encoder = hl;
        g->encoder = gl;
        WEIGHT(h->encoder_norm, g->encoder_norm, 1, d, 1, 0.2f);
    } else {
        WEIGHT(h->norm, g->norm, 1, d, 1, 0.2f);
    }
    MATRIX(h->proj_k, g->proj_k, kv, d);
    MATRIX(h->proj_v, g->proj_v, kv, d);
    MATRIX(h->landmark, g->landmark, c->retrieval_dim, d);
    if (c->qk_norm)
        WEIGHT(h->k_norm, g->k_norm, 1, c->head_dim, 1, 0.2f);
}

/* Memory of the bed's dtype as floats. */
static float *widen(const struct bed *b, const void *memory, size_t count)
{
    float *out = malloc((count + 1) * sizeof *out);
    ASSERT(out);
    for (size_t i = 0; i < count; i++)
        out[i] =
            b->wide ? ((const float *)memory)[i] : bf16_to_float(((const uint16_t *)memory)[i]);
    return out;
}

#define CHUNKS 19

static void check_encode(struct bed *b, uint32_t count)
{
    const struct model_config *c = &b->config;
    const size_t d = c->hidden_size, s = c->chunk_tokens, element = b->wide ? 4 : 2;
    const size_t kv = 2 * s * c->kv_heads * c->head_dim, r = c->retrieval_dim;
    struct ops_chunking_weights host, device;
    struct ops_encoder_layer host_layers[2] = {0}, device_layers[2] = {0};
    ASSERT(count <= CHUNKS && c->encoder_layers <= 2);
    make_chunking(b, &host, &device, host_layers, device_layers);
    float *x = random_floats(count * s * d, 1);
    float *gx = to_device(b, x, count * s * d * sizeof *x);
    char *pages = calloc(count, kv * element), *marks = calloc(count, r * element);
    char *cuda_pages = b->cuda->alloc_host(b->cuda_context, count * kv * element);
    char *cuda_marks = to_device(b, NULL, count * r * element);
    ASSERT(pages && marks && cuda_pages);
    memset(cuda_pages, 0xff, count * kv * element);
    const float *from[CHUNKS], *device_from[CHUNKS];
    void *to[CHUNKS], *device_to[CHUNKS], *landmark[CHUNKS], *device_landmark[CHUNKS];
    for (size_t i = 0; i < count; i++) {
        from[i] = x + i * s * d;
        device_from[i] = gx + i * s * d;
        to[i] = pages + i * kv * element;
        device_to[i] = cuda_pages + i * kv * element;
        landmark[i] = marks + i * r * element;
        device_landmark[i] = cuda_marks + i * r * element;
    }
    b->ref->encode_chunks(b->ref_context, &host, count, from, to, landmark);
    b->cuda->encode_chunks(b->cuda_context, &device, count, device_from, device_to,
                           device_landmark);
    const double stages = 2 + 5.0 * c->encoder_layers;
    float *want = widen(b, pages, count * kv), *got = widen(b, cuda_pages, count * kv);
    compare(b, "encode_chunks pages", got, want, count * kv, bound(b, stages));
    free(want);
    free(got);
    char *host_marks = malloc(count * r * element);
    b->cuda->copy(b->cuda_context, host_marks, cuda_marks, count * r * element);
    want = widen(b, marks, count * r);
    got = widen(b, host_marks, count * r);
    compare(b, "encode_chunks landmarks", got, want, count * r, bound(b, stages));
    free(want);
    free(got);
    /* The last chunk alone. */
    char *lone = malloc(kv * element);
    memcpy(lone, device_to[count - 1], kv * element);
    memset(device_to[count - 1], 0xff, kv * element);
    b->cuda->host_wrote(b->cuda_context, device_to[count - 1]);
    b->cuda->encode_chunks(b->cuda_context, &device, 1, device_from + count - 1,
                           device_to + count - 1, device_landmark + count - 1);
    same(b, "encode_chunks alone", device_to[count - 1], lone, kv * element);
    free(lone);
    free(host_marks);
    free(pages);
    free(marks);
    free(x);
    b->cuda->release_host(b->cuda_context, cuda_pages);
    release(b, cuda_marks);
    release(b, gx);
}

/* ---- retrieval ---- */

struct scan { /* one sequence's landmarks, in both worlds */
    uint64_t count;
    char *host;
    void *device, *twins; /* with fp8 `device` is the host's memory too */
    const void *blocks[64], *device_blocks[64], *narrow[64];
};

/* Every seventh landmark repeats the one three before it, so that there are exact ties. */
static void make_scan(struct bed *b, struct scan *scan, uint64_t count)
{
    const size_t r = b->config.retrieval_dim, element = b->wide ? 4 : 2;
    const size_t width = r / b->config.retrieval_heads, block = OPS_LANDMARK_BLOCK * r * element;
    const size_t blocks = (size_t)(count + OPS_LANDMARK_BLOCK - 1) / OPS_LANDMARK_BLOCK;
    *scan = (struct scan){.count = count, .host = calloc(blocks + 1, block)};
    ASSERT(scan->host && blocks <= 64);
    for (uint64_t i = 0; i < count; i++) {
        float *row = random_floats(r, 1);
        for (size_t h = 0; b->config.landmark_norm && h < b->config.retrieval_heads; h++) {
            double sum = 0;
            for (size_t e = 0; e < width; e++)
                sum += (double)row[h * width + e] * (double)row[h * width + e];
            for (size_t e = 0; e < width; e++)
                row[h * width + e] /= (float)sqrt(sum / (double)width + 1e-6);
        }
        char *to = scan->host + i * r * element;
        if (i % 7 == 6)
            memcpy(to, to - 3 * r * element, r * element);
        for (size_t e = 0; i % 7 != 6 && e < r; e++) {
            if (b->wide)
                ((float *)(void *)to)[e] = row[e];
            else
                ((uint16_t *)(void *)to)[e] = bf16_from_float(row[e]);
        }
        free(row);
    }
    const size_t narrow = b->fp8 ? b->cuda->narrow_bytes(b->cuda_context) : 0;
    if (b->fp8) {
        scan->device = b->cuda->alloc_host(b->cuda_context, (blocks + 1) * block);
        ASSERT(scan->device);
        memcpy(scan->device, scan->host, (blocks + 1) * block);
        scan->twins = to_device(b, NULL, (blocks + 1) * narrow);
    } else {
        scan->device = to_device(b, scan->host, (blocks + 1) * block);
    }
    for (size_t i = 0; i < blocks; i++) {
        scan->blocks[i] = scan->host + i * block;
        scan->device_blocks[i] = (char *)scan->device + i * block;
        scan->narrow[i] = (char *)scan->twins + i * narrow;
        const size_t left = (size_t)count - i * OPS_LANDMARK_BLOCK, first = left < 3 ? left : 3;
        for (size_t at = 0; b->fp8 && at < 2; at++) /* in two parts */
            b->cuda->narrow_landmarks(
                b->cuda_context, scan->device_blocks[i], (uint32_t)(at ? first : 0),
                (uint32_t)(at ? (left < OPS_LANDMARK_BLOCK ? left : OPS_LANDMARK_BLOCK) - first
                              : first),
                (void *)(uintptr_t)scan->narrow[i]);
    }
}

static void drop_scan(struct bed *b, struct scan *scan)
{
    free(scan->host);
    if (b->fp8)
        b->cuda->release_host(b->cuda_context, scan->device);
    else
        release(b, scan->device);
    if (scan->twins)
        release(b, scan->twins);
}

/* It is the twins that are scanned: a pick whose twin is wiped out is not found again. */
static bool wiped_is_missed(struct bed *b, const struct ops_retrieval_weights *w,
                            const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                            const float *x, uint32_t segment, const struct ops_picks *picks)
{
    const size_t r = b->config.retrieval_dim, topk = b->config.topk;
    const size_t row = rows->segments[segment].row + rows->segments[segment].count - 1;
    uint64_t *own = picks->chunks + row * b->config.retrieval_heads * topk;
    const uint64_t chunk = own[0];
    void *zeros = calloc(1, r);
    ASSERT(zeros);
    b->cuda->copy(b->cuda_context,
                  (char *)(uintptr_t)landmarks[segment].narrow[chunk / OPS_LANDMARK_BLOCK] +
                      chunk % OPS_LANDMARK_BLOCK * r,
                  zeros, r);
    b->cuda->retrieve(b->cuda_context, w, rows, landmarks, x, (struct ops_picks *)(uintptr_t)picks);
    free(zeros);
    for (size_t i = 0; i < topk; i++)
        if (own[i] == chunk)
            return false;
    return true;
}

static uint64_t visible(const struct model_config *c, uint64_t position, uint64_t count)
{
    uint64_t at = position;
    if (c->mask_slide_window)
        at -= at < c->slide_window - c->chunk_tokens ? at : c->slide_window - c->chunk_tokens;
    at /= c->chunk_tokens;
    return at < count ? at : count;
}

/* Scores of one row and head over all visible chunks, in double. */
static void score_row(const struct bed *b, const struct ops_retrieval_weights *w, const float *x,
                      uint32_t head, const struct scan *scan, uint64_t seen, double *scores)
{
    const struct model_config *c = &b->config;
    const size_t d = c->hidden_size, width = c->retrieval_dim / c->retrieval_heads;
    const uint16_t *pre = w->pre_norm.data, *query = w->query.data;
    double sum = 0, *q = malloc(width * sizeof *q);
    for (size_t i = 0; i < d; i++)
        sum += (double)x[i] * (double)x[i];
    const double scale = 1 / sqrt(sum / (double)d + 1e-6);
    double square = 0;
    for (size_t e = 0; e < width; e++) {
        q[e] = 0;
        for (size_t i = 0; i < d; i++)
            q[e] += (double)x[i] * scale * (double)bf16_to_float(pre[i]) *
                    (double)bf16_to_float(query[(head * width + e) * d + i]);
        square += q[e] * q[e];
    }
    for (size_t e = 0; c->landmark_norm && e < width; e++)
        q[e] *= (double)bf16_to_float(((const uint16_t *)w->q_norm.data)[e]) *
                (double)bf16_to_float(((const uint16_t *)w->k_norm.data)[e]) /
                sqrt(square / (double)width + 1e-6);
    for (uint64_t i = 0; i < seen; i++) {
        scores[i] = 0;
        for (size_t e = 0; e < width; e++) {
            const size_t at = i * c->retrieval_dim + head * width + e;
            scores[i] +=
                q[e] * (b->wide
                            ? (double)((const float *)(void *)scan->host)[at]
                            : (double)bf16_to_float(((const uint16_t *)(void *)scan->host)[at]));
        }
        scores[i] /= sqrt((double)width);
    }
    free(q);
}

/* The weights that the picks' exact scores give. */
static void weigh(const struct model_config *c, double decay, const double *scores, uint32_t n,
                  double *out)
{
    double spent = 0, top = -INFINITY;
    for (uint32_t j = 0; j < n; j++)
        top = fmax(top, scores[j] + decay * j);
    for (uint32_t j = 0; j < n; j++) {
        if (c->softmax_weights)
            spent += out[j] = exp(scores[j] + decay * j - top);
        else
            out[j] = exp(scores[j] - (spent += log1p(exp(scores[j]))));
    }
    for (uint32_t j = 0; c->softmax_weights && j < n; j++)
        out[j] /= spent;
}

struct pick_errors {
    size_t wrong; /* picks that no rounding explains */
    double worst_gap, worst_weight;
    char first[128];
};

static void wrong_pick(struct pick_errors *e, const char *why, size_t row, uint32_t head)
{
    if (!e->wrong++)
        snprintf(e->first, sizeof e->first, "%s, first in row %zu, head %u", why, row, head);
}

/* What fp8 landmarks make of a score, four times its usual size: an e4m3 number is off by at most
 * 2^-4, by 0.026 of itself in the mean square, so a sum of products with independent numbers is off
 * by 0.026 of what such sums usually are. So far a chunk that was not looked at again may be better
 * than one that was. */
static double coarse_error(const double *scores, uint64_t count)
{
    double sum = 0;
    for (uint64_t i = 0; i < count; i++)
        sum += scores[i] * scores[i];
    return count ? 4 * 0.026 * sqrt(sum / (double)count) : 0;
}

static void check_row(const struct bed *b, double decay, const double *scores, uint64_t seen,
                      const uint64_t *chunks, const float *weights, size_t row, uint32_t head,
                      double slack, struct pick_errors *e)
{
    const struct model_config *c = &b->config;
    const uint32_t want = seen < c->topk ? (uint32_t)seen : c->topk;
    const double gap = slack + (b->fp8 ? coarse_error(scores, seen) : 0);
    double own[LIMITS_TOPK], expected[LIMITS_TOPK], lowest = INFINITY;
    for (uint32_t j = 0; j < want; j++) {
        if (chunks[j] >= seen || (j && chunks[j] >= chunks[j - 1])) {
            wrong_pick(e, "invisible, repeated or out of order", row, head);
            return;
        }
        own[j] = scores[chunks[j]];
        lowest = fmin(lowest, own[j]);
    }
    for (uint64_t i = 0; i < seen; i++) {
        bool picked = false, twin = false;
        for (uint32_t j = 0; j < want; j++) {
            picked |= chunks[j] == i;
            twin |= chunks[j] == i + 3 && (i + 3) % 7 == 6;
        }
        if (!picked && scores[i] > lowest + gap)
            wrong_pick(e, "a better chunk was left out", row, head);
        if (!picked && scores[i] > lowest && scores[i] - lowest > e->worst_gap)
            e->worst_gap = scores[i] - lowest;
        if (!picked && twin)
            wrong_pick(e, "of two equal chunks the later one was taken", row, head);
    }
    weigh(c, decay, own, want, expected);
    for (uint32_t j = 0; j < c->topk; j++) {
        const double off = fabs((double)weights[j] - (j < want ? expected[j] : 0));
        if (!(off <= e->worst_weight))
            e->worst_weight = off;
        if (!(off <= slack) || (j >= want && (chunks[j] || weights[j] != 0)))
            wrong_pick(e, "wrong weight", row, head);
    }
}

static void check_retrieve(struct bed *b, const uint32_t *counts, const uint64_t *chunks,
                           uint32_t n)
{
    const struct model_config *c = &b->config;
    const size_t d = c->hidden_size, per_row = (size_t)c->retrieval_heads * c->topk;
    struct ops_retrieval_weights host = {0}, device = {0};
    WEIGHT(host.pre_norm, device.pre_norm, 1, c->hidden_size, 1, 0.2f);
    MATRIX(host.query, device.query, c->retrieval_dim, c->hidden_size);
    if (c->landmark_norm) {
        const uint32_t width = c->retrieval_dim / c->retrieval_heads;
        WEIGHT(host.q_norm, device.q_norm, 1, width, 1, 0.2f);
        WEIGHT(host.k_norm, device.k_norm, 1, width, 1, 0.2f);
    }
    host.pos_decay = device.pos_decay = c->pos_decay ? 0.3f : 0;
    struct scan scans[SEGMENTS];
    struct ops_segment segments[SEGMENTS];
    struct ops_landmarks landmarks[SEGMENTS];
    struct ops_rows rows = make_rows(counts, n, 0, segments);
    uint64_t most = 0;
    for (uint32_t i = 0; i < n; i++) {
        make_scan(b, &scans[i], chunks[i]);
        landmarks[i] = (struct ops_landmarks){scans[i].device_blocks, chunks[i], scans[i].narrow};
        /* The last rows see everything, or all but a part of it. */
        segments[i].position = chunks[i] * c->chunk_tokens + random_below(c->chunk_tokens);
        segments[i].position -= segments[i].position < counts[i] ? segments[i].position : counts[i];
        most = chunks[i] > most ? chunks[i] : most;
    }
    float *x = random_floats(rows.row_count * d, 1);
    float *gx = to_device(b, x, rows.row_count * d * sizeof *x);
    struct ops_picks picks = {malloc(rows.row_count * per_row * sizeof *picks.chunks),
                              malloc(rows.row_count * per_row * sizeof *picks.weights)};
    double *scores = malloc((most + 1) * sizeof *scores);
    ASSERT(picks.chunks && picks.weights && scores);
    memset(picks.chunks, 0xff, rows.row_count * per_row * sizeof *picks.chunks);
    memset(picks.weights, 0xff, rows.row_count * per_row * sizeof *picks.weights);
    b->cuda->retrieve(b->cuda_context, &device, &rows, landmarks, gx, &picks);
    struct pick_errors e = {0};
    const double slack = b->wide ? 1e-4 : 0.05;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t t = 0; t < counts[i]; t++)
            for (uint32_t h = 0; h < c->retrieval_heads; h++) {
                const size_t row = segments[i].row + t, at = row * per_row + h * c->topk;
                const uint64_t seen = visible(c, segments[i].position + t, chunks[i]);
                score_row(b, &host, x + row * d, h, &scans[i], seen, scores);
                check_row(b, (double)host.pos_decay, scores, seen, picks.chunks + at,
                          picks.weights + at, row, h, slack, &e);
            }
    verdict(b, "retrieve", !e.wrong, "%zu wrong, gap %.1e, weights within %.1e (allowed %.0e) %s",
            e.wrong, e.worst_gap, e.worst_weight, slack, e.first);
    for (uint32_t i = 0; b->fp8 && i < 2; i++) /* a short segment and a long one */
        verdict(b, "retrieve, a twin wiped",
                wiped_is_missed(b, &device, &rows, landmarks, gx, i, &picks), "segment of %u rows",
                counts[i]);
    for (uint32_t i = 0; i < n; i++)
        drop_scan(b, &scans[i]);
    release(b, gx);
    free(x);
    free(picks.chunks);
    free(picks.weights);
    free(scores);
}

/* ---- drawing ---- */

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
static void check_draw(struct bed *b)
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
        params.seed = current_seed * 100 + i;
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

/* ---- attention over pages ---- */

#define PAGES 40

static void check_hsa(struct bed *b, uint32_t row_count)
{
    const struct model_config *c = &b->config;
    const size_t d = c->hidden_size, picks = (size_t)c->retrieval_heads * c->topk;
    const size_t kv = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim;
    const size_t bytes = kv * (b->wide ? 4 : 2);
    struct ops_hsa_weights host = {0}, device = {0};
    WEIGHT(host.pre_norm, device.pre_norm, 1, c->hidden_size, 1, 0.2f);
    MATRIX(host.query, device.query, c->hidden_size, c->hidden_size);
    MATRIX(host.out, device.out, c->hidden_size, c->hidden_size);
    if (c->qk_norm)
        WEIGHT(host.q_norm, device.q_norm, 1, c->head_dim, 1, 0.2f);
    char *pages = b->cuda->alloc_host(b->cuda_context, PAGES * bytes);
    ASSERT(pages);
    for (size_t i = 0; i < PAGES * kv; i++) {
        if (b->wide)
            ((float *)(void *)pages)[i] = random_normal();
        else
            ((uint16_t *)(void *)pages)[i] = bf16_from_float(random_normal());
    }
    const void **named = calloc(row_count * picks, sizeof *named);
    float *weights = calloc(row_count * picks, sizeof *weights);
    for (size_t i = 0; i < row_count * picks; i++)
        if (random_below(8)) { /* mostly what the row before reads */
            const bool kept = i >= picks && random_below(8) && named[i - picks];
            named[i] = kept ? named[i - picks] : pages + random_below(PAGES) * bytes;
            weights[i] = (float)random_below(1000) / 4000;
        }
    const uint32_t first = row_count > 3 ? row_count - 3 : row_count;
    const uint32_t counts[] = {first, 1, 1, 1};
    struct ops_segment segments[4];
    const struct ops_rows rows = make_rows(counts, row_count > 3 ? 4 : 1, 0, segments);
    const size_t floats = row_count * d;
    float *x = random_floats(floats, 1), *q = malloc(floats * 4), *o = malloc(floats * 4);
    float *gx = to_device(b, x, floats * 4), *gq = to_device(b, NULL, floats * 4),
          *go = to_device(b, NULL, floats * 4);
    b->ref->hsa_query(b->ref_context, &host, &rows, x, q);
    b->cuda->hsa_query(b->cuda_context, &device, &rows, gx, gq);
    float *got = to_host(b, gq, floats);
    compare(b, "hsa_query", got, q, floats, bound(b, 1));
    free(got);
    b->cuda->copy(b->cuda_context, gq, q, floats * 4); /* the next op alone */
    b->ref->hsa_attend(b->ref_context, row_count, q, weights, named, o);
    b->cuda->hsa_attend(b->cuda_context, row_count, gq, weights, named, go);
    got = to_host(b, go, floats);
    compare(b, "hsa_attend", got, o, floats, bound(b, 1));
    /* As where not all pages fit: the rows behind come in a call of their own. */
    const uint32_t cuts[] = {row_count / 3, row_count - 1};
    for (int i = 0; i < 2; i++) {
        b->cuda->hsa_attend(b->cuda_context, row_count - cuts[i], gq + cuts[i] * d,
                            weights + cuts[i] * picks, named + cuts[i] * picks, go + cuts[i] * d);
        float *parts = to_host(b, go, floats);
        same(b, "hsa_attend in parts", parts, got, floats * sizeof *got);
        free(parts);
    }
    /* The host writes other bytes to a page: the device must not remember the old ones. */
    memcpy(pages, pages + (PAGES - 1) * bytes, bytes);
    b->cuda->host_wrote(b->cuda_context, pages);
    b->ref->hsa_attend(b->ref_context, row_count, q, weights, named, o);
    b->cuda->hsa_attend(b->cuda_context, row_count, gq, weights, named, go);
    free(got);
    got = to_host(b, go, floats);
    compare(b, "hsa_attend, new page", got, o, floats, bound(b, 1));
    free(got);
    b->cuda->copy(b->cuda_context, go, o, floats * 4);
    b->ref->hsa_out(b->ref_context, &host, &rows, o, x);
    b->cuda->hsa_out(b->cuda_context, &device, &rows, go, gx);
    got = to_host(b, gx, floats);
    compare(b, "hsa_out", got, x, floats, bound(b, 1));
    free(got);
    b->cuda->release_host(b->cuda_context, pages);
    release(b, gx);
    release(b, gq);
    release(b, go);
    free(named);
    free(weights);
    free(x);
    free(q);
    free(o);
}

/* ---- what is run ---- */

struct job {
    const char *name;
    struct model_config config;
    uint32_t max_rows;
    bool small_pool; /* a device pool of just what one row reads */
};

static const uint32_t scan_rows[] = {1, 37, 10, 9, 150, 1, 3};

static void check_scans(struct bed *b)
{
    const uint64_t chunks[] = {300, 700, 0, 1, 520, 2049, b->config.topk};
    check_retrieve(b, scan_rows, chunks, b->config.hidden_size >= 1024 ? 3 : 7);
}

/* Retrieval with landmarks in fp8, which is all that differs then. */
static void run_fp8(const struct job *job, uint64_t seed)
{
    struct bed b;
    struct error err = {0};
    snprintf(current, sizeof current, "%s", job->name);
    current_seed = seed;
    random_state = seed * 0x9e3779b97f4a7c15u + 2;
    if (bed_open(&b, &job->config, false, true, job->max_rows, 0, &err)) {
        printf("FAIL %s: cannot open: %s\n", job->name, err.message);
        failures++;
        return;
    }
    check_scans(&b);
    bed_close(&b);
}

static void run_job(const struct job *job, bool wide, uint64_t seed)
{
    struct bed b;
    struct error err = {0};
    snprintf(current, sizeof current, "%s", job->name);
    current_seed = seed;
    random_state = seed * 0x9e3779b97f4a7c15u + wide;
    const struct model_config *c = &job->config;
    const size_t page = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim * (wide ? 4 : 2);
    const size_t least = c->retrieval_heads * c->topk > 16 ? c->retrieval_heads * c->topk : 16;
    const size_t budget = job->small_pool ? least * ((page + 255) / 256 * 256) : 0;
    const enum status status = bed_open(&b, c, wide, false, job->max_rows, budget, &err);
    if (status) {
        printf("FAIL %s: cannot open: %s\n", job->name, err.message);
        failures++;
        return;
    }
    const bool large = c->hidden_size >= 1024;
    check_ends(&b);
    check_pack(&b);
    const uint32_t few[] = {1, 1, 5, 1, 3};
    const uint32_t many[] = {1, 64, 7, 9, 300, 1, 65, 2, 63};
    check_mamba(&b, few, 5);
    uint32_t single[SEGMENTS];
    for (uint32_t i = 0; i < SEGMENTS; i++)
        single[i] = 1;
    check_mamba(&b, single, large ? 11 : SEGMENTS);
    check_mamba(&b, large ? many + 1 : many, large ? 3 : 9);
    const uint32_t longest[] = {job->max_rows - 70, 70};
    if (job->max_rows > 512)
        check_mamba(&b, longest, 2);
    check_encode(&b, large ? 2 : 18);
    check_scans(&b);
    if (!wide)
        check_draw(&b);
    check_hsa(&b, large ? 45 : 33);
    if (large && !wide && !strstr(b.cuda->describe(b.cuda_context), "emulated"))
        check_hsa(&b, 541); /* the form of many rows, on a device of many multiprocessors */
    check_hsa(&b, 1);
    bed_close(&b);
}

/* The N-th launch, or allocation, fails: the op must say so and later ops must stay silent. */
static void check_fault(const struct model_config *c, const char *fault)
{
    struct bed b;
    struct error err = {0};
    snprintf(current, sizeof current, "fault %s", fault);
    setenv("RAMBAD_CUDA_FAULT", fault, 1);
    const enum status status = bed_open(&b, c, false, false, 64, 0, &err);
    unsetenv("RAMBAD_CUDA_FAULT");
    if (status) { /* an allocation of the opening itself */
        const bool passed = status == STATUS_NO_MEMORY && err.message[0];
        checks++;
        failures += !passed;
        printf("%-4s bf16 %-30s open refused: %s\n", passed ? "ok" : "FAIL", current, err.message);
        return;
    }
    struct ops_tensor table_device;
    weight(&b, c->vocab_size, c->hidden_size, 0, 1, &table_device);
    const int32_t tokens[3] = {1, 2, 3};
    float *x = to_device(&b, NULL, 3 * c->hidden_size * sizeof *x);
    for (int i = 0; i < 3; i++)
        b.cuda->embed(b.cuda_context, &table_device, tokens, 3, x);
    const bool passed = b.cuda->check(b.cuda_context, &err) != STATUS_OK && err.message[0];
    checks++;
    failures += !passed;
    printf("%-4s bf16 %-30s reported: %s\n", passed ? "ok" : "FAIL", current, err.message);
    bed_close(&b);
}

static struct job jobs[8];
static size_t job_count;

static struct model_config *add_job(const char *name, struct model_config config, bool small_pool)
{
    jobs[job_count] = (struct job){name, config, 512, small_pool};
    return &jobs[job_count++].config;
}

static void make_jobs(void)
{
    add_job("d64, 4 heads, 1 kv", make_config(64, 4, 1, 16, 1, 16, 4), false);
    struct model_config *c =
        add_job("d96, norms, softmax1, 2 kv", make_config(96, 6, 2, 24, 2, 20, 5), true);
    c->qk_norm = c->softmax1 = c->landmark_norm = c->encoder_prenorm = c->use_bias = true;
    c->encoder_layers = 2;
    c = add_job("d128, no encoder, softmax", make_config(128, 4, 4, 17, 1, 13, 3), true);
    c->vocab_size = 5003;
    c->encoder_layers = 0;
    c->softmax_weights = c->pos_decay = c->mask_slide_window = true;
    c->slide_window = 5 * c->chunk_tokens;
    c->dt_min = 0.01f;
    c->dt_max = 0.2f;
    c = add_job("d256, one head picks, k 64", make_config(256, 4, 2, 128, 1, 64, 64), false);
    c->retrieval_heads = 1;
    jobs[job_count - 1].max_rows = 4500; /* a segment of more blocks than a round carries */
    add_job("d512, heads of 128, 2 kv", make_config(512, 4, 2, 64, 1, 64, 8), false);
    add_job("370M", make_config(1024, 16, 1, 128, 1, 64, 8), false);
}

int main(int argc, char **argv)
{
    uint64_t seed = (uint64_t)time(NULL) % 100000;
    bool large = true, narrow_only = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
            seed = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[++i];
        else if (strcmp(argv[i], "--small") == 0)
            large = false;
        else if (strcmp(argv[i], "--narrow") == 0) /* fp32 left out */
            narrow_only = true;
    }
    make_jobs();
    struct bed b;
    struct error err = {0};
    const enum status status = bed_open(&b, &jobs[0].config, true, false, 16, 0, &err);
    if (status == STATUS_UNSUPPORTED) {
        printf("SKIPPED: %s\n", err.message);
        return 77;
    }
    if (status) {
        printf("FAIL cannot open: %s\n", err.message);
        return 1;
    }
    printf("%s, seed %llu\n", b.cuda->describe(b.cuda_context), (unsigned long long)seed);
    bed_close(&b);
    for (size_t i = 0; i < job_count; i++)
        if ((!only || strstr(jobs[i].name, only)) && (large || jobs[i].config.hidden_size < 256)) {
            if (!narrow_only)
                run_job(&jobs[i], true, seed + i);
            run_job(&jobs[i], false, seed + i);
            run_fp8(&jobs[i], seed + i);
        }
    const char *const faults[] = {"alloc:1", "alloc:7", "launch:1", "launch:3"};
    for (size_t i = 0; !only && i < sizeof faults / sizeof *faults; i++)
        check_fault(&jobs[0].config, faults[i]);
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
