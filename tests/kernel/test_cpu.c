/* Every op of the CPU backend, at every level this processor has, against the reference: on ragged
 * shapes, with fixed seeds. The truth is the reference in double precision (tests/lib/ref64.h); the
 * tolerance is twice the error of the plain fp32 reference on the same numbers, and where that
 * error happens to be next to nothing, a few roundings of the largest number. NaN fails. Picks must
 * be the same, ties included. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/bf16.h"
#include "engine/ops.h"
#include "engine/packed.h"
#include "tests/lib/ref64.h"

#define SEED 411u
#define ROWS 300 /* most of a step */

/* ---- shapes ---- */

struct shape {
    const char *name;
    struct model_config config;
};

/* What follows from the free numbers. */
static struct model_config complete(struct model_config c)
{
    c.inner_size = c.mamba_heads * c.mamba_head_dim;
    c.conv_size = c.inner_size + 2 * c.state_groups * c.state_size;
    c.proj_size = c.inner_size + c.conv_size + c.mamba_heads;
    c.hidden_size = c.heads * c.head_dim;
    c.norm_epsilon = 1e-5f;
    c.dt_max = INFINITY;
    c.vocab_size = 77;
    return c;
}

static struct shape shapes[] = {
    {"published",
     {.mamba_heads = 8,
      .mamba_head_dim = 16,
      .state_size = 32,
      .state_groups = 1,
      .conv_kernel = 4,
      .use_conv_bias = true,
      .chunk_tokens = 16,
      .topk = 8,
      .heads = 4,
      .kv_heads = 1,
      .head_dim = 16,
      .retrieval_dim = 64,
      .retrieval_heads = 1,
      .encoder_layers = 1,
      .encoder_kv_heads = 4,
      .encoder_mlp_size = 128}},
    {"ragged, every head its own, two groups",
     {.mamba_heads = 10,
      .mamba_head_dim = 12,
      .state_size = 9,
      .state_groups = 2,
      .conv_kernel = 3,
      .use_bias = true,
      .use_conv_bias = true,
      .chunk_tokens = 7,
      .topk = 3,
      .heads = 5,
      .kv_heads = 5,
      .head_dim = 6,
      .retrieval_dim = 35,
      .retrieval_heads = 5,
      .encoder_layers = 2,
      .encoder_kv_heads = 5,
      .encoder_mlp_size = 71,
      .encoder_prenorm = true,
      .qk_norm = true,
      .landmark_norm = true,
      .softmax1 = true}},
    {"grouped queries, softmax, slide window, no encoder",
     {.mamba_heads = 3,
      .mamba_head_dim = 40,
      .state_size = 17,
      .state_groups = 1,
      .conv_kernel = 4,
      .chunk_tokens = 10,
      .topk = 5,
      .heads = 6,
      .kv_heads = 2,
      .head_dim = 18,
      .retrieval_dim = 42,
      .retrieval_heads = 2,
      .softmax_weights = true,
      .mask_slide_window = true,
      .slide_window = 35}},
    {"single retrieval head, decay by place, shared encoder keys",
     {.mamba_heads = 4,
      .mamba_head_dim = 64,
      .state_size = 64,
      .state_groups = 1,
      .conv_kernel = 4,
      .use_conv_bias = true,
      .chunk_tokens = 64,
      .topk = 8,
      .heads = 8,
      .kv_heads = 4,
      .head_dim = 16,
      .retrieval_dim = 128,
      .retrieval_heads = 1,
      .encoder_layers = 1,
      .encoder_kv_heads = 2,
      .encoder_mlp_size = 320,
      .softmax_weights = true,
      .pos_decay = true,
      .landmark_norm = true}},
};

/* ---- numbers that exist as floats and as doubles ---- */

struct bed {
    struct model_config config;
    enum ops_dtype weights, memory;
    const struct ops *cpu, *ref, *truth;
    struct ops_context *cpu_context, *ref_context, *truth_context;
    void *kept[4096];
    size_t kept_count;
    uint64_t random;
    double worst; /* error over tolerance */
};

static void *take(struct bed *bed, size_t bytes)
{
    assert_true(bed->kept_count < sizeof bed->kept / sizeof *bed->kept);
    void *memory = calloc(1, bytes + 64);
    assert_non_null(memory);
    return bed->kept[bed->kept_count++] = memory;
}

/* Uniform in [-1, 1). */
static float uniform(struct bed *bed)
{
    bed->random = bed->random * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(bed->random >> 11) / 4503599627370496.0 - 1);
}

static float *numbers(struct bed *bed, size_t count, float scale)
{
    float *out = take(bed, count * sizeof *out);
    for (size_t i = 0; i < count; i++)
        out[i] = scale * uniform(bed);
    return out;
}

static double *widened(struct bed *bed, const float *from, size_t count)
{
    double *out = take(bed, count * sizeof *out);
    for (size_t i = 0; i < count; i++)
        out[i] = (double)from[i];
    return out;
}

static float *copied(struct bed *bed, const float *from, size_t count)
{
    return memcpy(take(bed, count * sizeof *from), from, count * sizeof *from);
}

/* A tensor for the backends and the same one for the truth. */
static void tensor(struct bed *bed, uint32_t rows, uint32_t cols, float offset, float scale,
                   struct ops_tensor *narrow, struct ops_tensor *wide)
{
    const size_t count = (size_t)rows * cols;
    float *values = numbers(bed, count, scale);
    for (size_t i = 0; i < count; i++)
        values[i] += offset;
    *narrow = *wide = (struct ops_tensor){values, bed->weights, rows, cols};
    if (bed->weights == OPS_FP32) {
        wide->data = widened(bed, values, count);
    } else {
        uint16_t *half = take(bed, count * sizeof *half);
        for (size_t i = 0; i < count; i++)
            half[i] = bf16_from_float(values[i]);
        narrow->data = wide->data = half;
    }
}

#define MATRIX(rows, cols, to) \
    tensor(bed, rows, cols, 0, 1.5f / sqrtf((float)(cols)), &narrow.to, &wide.to)
#define NORM(n, to) tensor(bed, 1, n, 1, 0.3f, &narrow.to, &wide.to)
#define VECTOR(n, offset, scale, to) tensor(bed, 1, n, offset, scale, &narrow.to, &wide.to)

/* The CPU's numbers against the truth, and the plain ones' error as the measure. */
static void close_enough(struct bed *bed, const char *what, const float *cpu, const float *ref,
                         const double *truth, size_t count)
{
    double off = 0, plain = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        const double a = fabs((double)cpu[i] - truth[i]), b = fabs((double)ref[i] - truth[i]);
        if (!(a <= off)) /* NaN stays */
            off = a;
        plain = fmax(plain, b);
        largest = fmax(largest, fabs(truth[i]));
    }
    const double tolerance = fmax(2 * plain, 4 * (double)FLT_EPSILON * largest);
    if (!(off <= tolerance))
        fail_msg("%s: off by %.3e of %.3e, the plain fp32 reference by %.3e", what, off, largest,
                 plain);
    if (tolerance > 0)
        bed->worst = fmax(bed->worst, off / tolerance);
}

/* ---- the ops ---- */

/* Few, as many as few may be, one more; a block, one more, several. */
static const uint32_t counts[] = {1, 8, 9, 2, 64, 65, 130, 3};

static struct ops_rows lay_out(struct ops_segment *segments)
{
    struct ops_rows rows = {.segments = segments};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        segments[i] = (struct ops_segment){.row = rows.row_count, .count = counts[i]};
        rows.row_count += counts[i];
    }
    rows.segment_count = sizeof counts / sizeof *counts;
    return rows;
}

static void check_mamba(struct bed *bed)
{
    const struct model_config *c = &bed->config;
    const uint32_t d = c->hidden_size;
    struct ops_mamba_weights narrow = {0}, wide = {0};
    NORM(d, norm);
    MATRIX(c->proj_size, d, in_proj);
    if (c->use_bias) {
        VECTOR(c->proj_size, 0, 0.3f, in_proj_bias);
        VECTOR(d, 0, 0.3f, out_proj_bias);
    }
    MATRIX(c->conv_size, c->conv_kernel, conv_weight);
    if (c->use_conv_bias)
        VECTOR(c->conv_size, 0, 0.3f, conv_bias);
    VECTOR(c->mamba_heads, -3, 1.5f, dt_bias);
    VECTOR(c->mamba_heads, 1, 1, a_log);
    VECTOR(c->mamba_heads, 1, 0.5f, d);
    NORM(c->inner_size, gate_norm);
    MATRIX(d, c->inner_size, out_proj);
    struct ops_segment segments[16];
    const struct ops_rows rows = lay_out(segments);
    const size_t ssm = (size_t)c->inner_size * c->state_size;
    const size_t conv = (size_t)(c->conv_kernel - 1) * c->conv_size;
    const float *x = numbers(bed, (size_t)rows.row_count * d, 1);
    struct ops_mamba_state state[3][16]; /* cpu, ref, truth */
    for (uint32_t i = 0; i < rows.segment_count; i++) {
        state[0][i] = (struct ops_mamba_state){numbers(bed, ssm, 1), numbers(bed, conv, 1)};
        state[1][i] = (struct ops_mamba_state){copied(bed, state[0][i].ssm, ssm),
                                               copied(bed, state[0][i].conv, conv)};
        state[2][i] =
            (struct ops_mamba_state){(float *)(void *)widened(bed, state[0][i].ssm, ssm),
                                     (float *)(void *)widened(bed, state[0][i].conv, conv)};
    }
    const size_t count = (size_t)rows.row_count * d;
    float *a = copied(bed, x, count), *b = copied(bed, x, count);
    double *t = widened(bed, x, count);
    /* The last segment once more by itself, to see whether its neighbours matter. */
    const struct ops_segment own = {.count = segments[rows.segment_count - 2].count};
    const struct ops_rows one = {&own, 1, own.count};
    const size_t from = (size_t)segments[rows.segment_count - 2].row * d;
    float *alone = copied(bed, x + from, (size_t)own.count * d);
    const struct ops_mamba_state kept = {copied(bed, state[0][rows.segment_count - 2].ssm, ssm),
                                         copied(bed, state[0][rows.segment_count - 2].conv, conv)};
    bed->cpu->mamba(bed->cpu_context, &narrow, &rows, state[0], a);
    bed->ref->mamba(bed->ref_context, &narrow, &rows, state[1], b);
    bed->truth->mamba(bed->truth_context, &wide, &rows, state[2], (float *)(void *)t);
    bed->cpu->mamba(bed->cpu_context, &narrow, &one, &kept, alone);
    assert_memory_equal(alone, a + from, (size_t)own.count * d * sizeof *a);
    assert_memory_equal(kept.ssm, state[0][rows.segment_count - 2].ssm, ssm * sizeof *a);
    close_enough(bed, "mamba", a, b, t, count);
    for (uint32_t i = 0; i < rows.segment_count; i++) {
        close_enough(bed, "mamba's state", state[0][i].ssm, state[1][i].ssm,
                     (const double *)(const void *)state[2][i].ssm, ssm);
        close_enough(bed, "mamba's tail", state[0][i].conv, state[1][i].conv,
                     (const double *)(const void *)state[2][i].conv, conv);
    }
}

static void encoder_weights(struct bed *bed, struct ops_encoder_layer *to,
                            struct ops_encoder_layer *to_wide)
{
    const struct model_config *c = &bed->config;
    const uint32_t d = c->hidden_size, kv = c->encoder_kv_heads * c->head_dim;
    struct ops_encoder_layer narrow = {0}, wide = {0};
    NORM(d, input_norm);
    MATRIX(d, d, q);
    VECTOR(d, 0, 0.3f, q_bias);
    MATRIX(kv, d, k);
    VECTOR(kv, 0, 0.3f, k_bias);
    MATRIX(kv, d, v);
    VECTOR(kv, 0, 0.3f, v_bias);
    MATRIX(d, d, o);
    NORM(c->head_dim, q_norm);
    NORM(c->head_dim, k_norm);
    NORM(d, post_norm);
    MATRIX(c->encoder_mlp_size, d, gate);
    MATRIX(c->encoder_mlp_size, d, up);
    MATRIX(d, c->encoder_mlp_size, down);
    *to = narrow;
    *to_wide = wide;
}

static void check_encode(struct bed *bed)
{
    const struct model_config *c = &bed->config;
    const uint32_t d = c->hidden_size, n = c->kv_heads * c->head_dim, many = 9;
    struct ops_chunking_weights narrow = {0}, wide = {0};
    struct ops_encoder_layer layers[2], wide_layers[2];
    VECTOR(d, 0, 1, cls);
    NORM(d, enc_prenorm);
    NORM(d, encoder_norm);
    NORM(d, norm);
    MATRIX(n, d, proj_k);
    MATRIX(n, d, proj_v);
    MATRIX(c->retrieval_dim, d, landmark);
    if (c->qk_norm)
        NORM(c->head_dim, k_norm);
    for (uint32_t i = 0; i < c->encoder_layers; i++)
        encoder_weights(bed, &layers[i], &wide_layers[i]);
    narrow.encoder = layers;
    wide.encoder = wide_layers;
    const size_t size = (size_t)c->chunk_tokens * d, kv = (size_t)2 * c->chunk_tokens * n;
    const float *chunks[9], *wide_chunks[9];
    void *pages[3][9], *landmarks[3][9];
    for (uint32_t i = 0; i < many; i++) {
        chunks[i] = numbers(bed, size, 1);
        wide_chunks[i] = (const float *)(const void *)widened(bed, chunks[i], size);
        for (size_t j = 0; j < 3; j++) {
            pages[j][i] = take(bed, kv * sizeof(double));
            landmarks[j][i] = take(bed, c->retrieval_dim * sizeof(double));
        }
    }
    bed->cpu->encode_chunks(bed->cpu_context, &narrow, many, chunks, pages[0], landmarks[0]);
    bed->ref->encode_chunks(bed->ref_context, &narrow, many, chunks, pages[1], landmarks[1]);
    bed->truth->encode_chunks(bed->truth_context, &wide, many, wide_chunks, pages[2], landmarks[2]);
    for (uint32_t i = 0; i < many; i++) {
        if (bed->memory == OPS_FP32) {
            close_enough(bed, "a page", pages[0][i], pages[1][i], pages[2][i], kv);
            close_enough(bed, "a landmark", landmarks[0][i], landmarks[1][i], landmarks[2][i],
                         c->retrieval_dim);
            continue;
        }
        /* A bf16 next to the truth's: a number between two may round either way. */
        for (size_t j = 0; j < kv + c->retrieval_dim; j++) {
            const uint16_t *a = j < kv ? pages[0][i] : landmarks[0][i];
            const uint16_t *t = j < kv ? pages[2][i] : landmarks[2][i];
            const size_t at = j < kv ? j : j - kv;
            const float off = fabsf(bf16_to_float(a[at]) - bf16_to_float(t[at]));
            assert_true(off <= fmaxf(fabsf(bf16_to_float(t[at])) / 128, 1e-6f));
        }
    }
}

#define LANDMARKS 700

/* Landmarks in blocks, for the backends and for the truth; every fifth repeats an earlier one. */
static void make_landmarks(struct bed *bed, const void **narrow, const void **wide)
{
    const size_t r = bed->config.retrieval_dim;
    float *all = numbers(bed, LANDMARKS * r, 1);
    for (size_t i = 5; i < LANDMARKS; i += 5)
        memcpy(all + i * r, all + i * 7 % i * r, r * sizeof *all);
    for (size_t first = 0, at = 0; first < LANDMARKS; first += OPS_LANDMARK_BLOCK, at++) {
        const size_t count =
            (LANDMARKS - first < OPS_LANDMARK_BLOCK ? LANDMARKS - first : OPS_LANDMARK_BLOCK) * r;
        narrow[at] = all + first * r;
        wide[at] = widened(bed, all + first * r, count);
        if (bed->memory == OPS_FP32)
            continue;
        uint16_t *half = take(bed, count * sizeof *half);
        for (size_t i = 0; i < count; i++)
            half[i] = bf16_from_float(all[first * r + i]);
        narrow[at] = wide[at] = half;
    }
}

static void check_retrieve(struct bed *bed)
{
    const struct model_config *c = &bed->config;
    const uint32_t d = c->hidden_size, r = c->retrieval_dim, s = c->chunk_tokens;
    struct ops_retrieval_weights narrow = {0};
    struct ref64_retrieval wide = {0};
    NORM(d, pre_norm);
    tensor(bed, r, d, 0, 6 / sqrtf((float)d), &narrow.query, &wide.query);
    if (c->landmark_norm) {
        NORM(r / c->retrieval_heads, q_norm);
        NORM(r / c->retrieval_heads, k_norm);
    }
    if (c->pos_decay)
        wide.pos_decay = (double)(narrow.pos_decay = -0.25f);
    const void *blocks[4], *wide_blocks[4];
    make_landmarks(bed, blocks, wide_blocks);
    struct ops_segment segments[16];
    const struct ops_rows rows = lay_out(segments);
    struct ops_landmarks landmarks[16], wide_landmarks[16];
    /* No chunk, one, fewer than K, K + 1; up to a block's end, one over, the rest. */
    const uint64_t chunks[] = {0, 1, 2, c->topk + 1u, 255, 256, 257, LANDMARKS};
    for (uint32_t i = 0; i < rows.segment_count; i++) {
        /* The chunks that the segment's own rows complete are there already, and not visible. */
        segments[i].position = chunks[i] * s + i % s;
        segments[i].position -= segments[i].position > segments[i].count ? segments[i].count : 0;
        landmarks[i] = (struct ops_landmarks){.blocks = blocks, .count = chunks[i]};
        wide_landmarks[i] = (struct ops_landmarks){.blocks = wide_blocks, .count = chunks[i]};
    }
    const size_t count = (size_t)rows.row_count * c->retrieval_heads * c->topk;
    const float *x = numbers(bed, (size_t)rows.row_count * d, 1);
    struct ops_picks picks[3];
    for (size_t i = 0; i < 3; i++) {
        picks[i].chunks = take(bed, count * sizeof *picks[i].chunks);
        picks[i].weights = take(bed, count * sizeof(double));
    }
    bed->cpu->retrieve(bed->cpu_context, &narrow, &rows, landmarks, x, &picks[0]);
    bed->ref->retrieve(bed->ref_context, &narrow, &rows, landmarks, x, &picks[1]);
    bed->truth->retrieve(bed->truth_context, (const void *)&wide, &rows, wide_landmarks,
                         (const void *)widened(bed, x, (size_t)rows.row_count * d), &picks[2]);
    for (size_t i = 0; i < count; i++)
        if (picks[0].chunks[i] != picks[2].chunks[i])
            fail_msg("pick %zu of %zu is chunk %llu, not %llu", i, count,
                     (unsigned long long)picks[0].chunks[i],
                     (unsigned long long)picks[2].chunks[i]);
    close_enough(bed, "weights of picks", picks[0].weights, picks[1].weights,
                 (const double *)(const void *)picks[2].weights, count);
}

static void check_hsa(struct bed *bed)
{
    const struct model_config *c = &bed->config;
    const uint32_t d = c->hidden_size, n = c->kv_heads * c->head_dim;
    struct ops_hsa_weights narrow = {0}, wide = {0};
    NORM(d, pre_norm);
    MATRIX(d, d, query);
    MATRIX(d, d, out);
    if (c->qk_norm)
        NORM(c->head_dim, q_norm);
    struct ops_segment segments[16];
    const struct ops_rows rows = lay_out(segments);
    const size_t count = (size_t)rows.row_count * d, kv = (size_t)2 * c->chunk_tokens * n;
    const size_t picks = (size_t)rows.row_count * c->retrieval_heads * c->topk;
    const void *pages[16], *wide_pages[16];
    for (size_t i = 0; i < 16; i++) {
        const float *values = numbers(bed, kv, 2);
        uint16_t *half = take(bed, kv * sizeof *half);
        for (size_t j = 0; j < kv; j++)
            half[j] = bf16_from_float(values[j]);
        pages[i] = bed->memory == OPS_FP32 ? (const void *)values : half;
        wide_pages[i] = bed->memory == OPS_FP32 ? (const void *)widened(bed, values, kv) : half;
    }
    const void **read = take(bed, picks * sizeof *read),
               **wide_read = take(bed, picks * sizeof *read);
    float *weights = take(bed, picks * sizeof *weights);
    for (size_t i = 0; i < picks; i++) {
        const size_t page = i * 2654435761u >> 3 & 31; /* half of them read nothing */
        read[i] = page < 16 ? pages[page] : NULL;
        wide_read[i] = page < 16 ? wide_pages[page] : NULL;
        weights[i] = page < 16 ? fabsf(uniform(bed)) : 0;
    }
    const float *x = numbers(bed, count, 3);
    float *q[2], *o[2], *y[2] = {copied(bed, x, count), copied(bed, x, count)};
    double *wide_q = take(bed, count * sizeof *wide_q), *wide_o = take(bed, count * sizeof *wide_q);
    double *wide_y = widened(bed, x, count);
    const struct ops *backends[] = {bed->cpu, bed->ref};
    struct ops_context *contexts[] = {bed->cpu_context, bed->ref_context};
    for (size_t i = 0; i < 2; i++) {
        q[i] = take(bed, count * sizeof *x);
        o[i] = numbers(bed, count, 1); /* overwritten, not added to */
        backends[i]->hsa_query(contexts[i], &narrow, &rows, x, q[i]);
        backends[i]->hsa_attend(contexts[i], rows.row_count, q[i], weights, read, o[i]);
        backends[i]->hsa_out(contexts[i], &narrow, &rows, o[i], y[i]);
    }
    float *truth_q = (float *)(void *)wide_q, *truth_o = (float *)(void *)wide_o;
    bed->truth->hsa_query(bed->truth_context, &wide, &rows, (const void *)widened(bed, x, count),
                          truth_q);
    bed->truth->hsa_attend(bed->truth_context, rows.row_count, truth_q,
                           (const void *)widened(bed, weights, picks), wide_read, truth_o);
    bed->truth->hsa_out(bed->truth_context, &wide, &rows, truth_o, (float *)(void *)wide_y);
    close_enough(bed, "queries", q[0], q[1], wide_q, count);
    close_enough(bed, "attention", o[0], o[1], wide_o, count);
    close_enough(bed, "hsa", y[0], y[1], wide_y, count);
}

static void check_ends(struct bed *bed)
{
    const struct model_config *c = &bed->config;
    const uint32_t d = c->hidden_size, v = c->vocab_size;
    struct {
        struct ops_tensor norm, head;
    } narrow, wide;
    NORM(d, norm);
    MATRIX(v, d, head);
    struct ops_segment segments[16];
    const struct ops_rows rows = lay_out(segments);
    const float *x = numbers(bed, (size_t)rows.row_count * d, 1);
    const size_t count = (size_t)rows.row_count * v;
    float *a = take(bed, count * sizeof *a), *b = take(bed, count * sizeof *b);
    double *t = take(bed, count * sizeof *t);
    bed->cpu->logits(bed->cpu_context, &narrow.norm, &narrow.head, &rows, x, a);
    bed->ref->logits(bed->ref_context, &narrow.norm, &narrow.head, &rows, x, b);
    bed->truth->logits(bed->truth_context, &wide.norm, &wide.head, &rows,
                       (const void *)widened(bed, x, (size_t)rows.row_count * d),
                       (float *)(void *)t);
    close_enough(bed, "logits", a, b, t, count);
    const int32_t tokens[] = {0, 76, 5, 5};
    bed->cpu->embed(bed->cpu_context, &narrow.head, tokens, 4, a);
    bed->ref->embed(bed->ref_context, &narrow.head, tokens, 4, b);
    assert_memory_equal(a, b, (size_t)4 * d * sizeof *a);
}

/* Numbers of all sizes, and what lies at the edges: what rounds up to the next power of two, zeros,
 * the smallest and largest floats, no numbers. */
static void check_pack(struct bed *bed)
{
    static const float odd[] = {0,       -0.0f,   16383.5f, -16383.5f, 16383.49f, 8191.75f,
                                FLT_MIN, FLT_MAX, 1e-45f,   -1e-40f,   FLT_MAX,   INFINITY,
                                NAN,     1.5f,    2.5f,     -0.5f};
    const size_t odds = sizeof odd / sizeof *odd;
    static const size_t lengths[] = {1, 63, 64, 65, 16 * 64, 4097 * 64 + 5};
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        const size_t count = lengths[k], bytes = packed_bytes(count);
        float *a = numbers(bed, count, 1), *b, *c = take(bed, count * sizeof *c);
        for (size_t i = 0; i < count; i++) /* blocks of zeros, of one odd number, of many sizes */
            a[i] = i / 64 % 7 == 1   ? 0
                   : i / 64 % 7 == 2 ? odd[i / 448 % odds] * (float)(i % 64 == i / 448 % 64)
                                     : ldexpf(a[i], (int)(i * 2654435761u >> 20 & 63) - 32);
        if (count == 1)
            a[0] = 16383.5f;
        b = copied(bed, a, count);
        unsigned char *x = take(bed, bytes), *y = take(bed, bytes);
        bed->cpu->pack_state(bed->cpu_context, a, count, x);
        bed->ref->pack_state(bed->ref_context, b, count, y);
        assert_memory_equal(x, y, bytes);
        assert_memory_equal(a, b, count * sizeof *a);
        bed->cpu->unpack_state(bed->cpu_context, x, count, c);
        assert_memory_equal(a, c, count * sizeof *a);
        memset(c, 0, count * sizeof *c);
        bed->ref->unpack_state(bed->ref_context, x, count, c);
        assert_memory_equal(a, c, count * sizeof *a);
        /* Once is enough. */
        bed->cpu->pack_state(bed->cpu_context, a, count, y);
        assert_memory_equal(x, y, bytes);
        assert_memory_equal(a, b, count * sizeof *a);
    }
    /* The error that the format promises. */
    float *a = numbers(bed, 64, 3), *b = copied(bed, a, 64), largest = 0;
    for (size_t i = 0; i < 64; i++)
        largest = fmaxf(largest, fabsf(a[i]));
    bed->cpu->pack_state(bed->cpu_context, a, 64, take(bed, packed_bytes(64)));
    for (size_t i = 0; i < 64; i++)
        assert_true(fabsf(a[i] - b[i]) <= largest / (1 << 14));
}

/* ---- all of it ---- */

static struct ops_context *open_backend(const struct bed *bed, const struct ops *ops)
{
    const struct ops_options options = {
        .config = &bed->config, .threads = 3, .max_rows = ROWS, .memory_dtype = bed->memory};
    struct ops_context *context;
    struct error err = {0};
    if (ops->open(&options, &context, &err))
        fail_msg("%s", err.message);
    return context;
}

static void check_all(const struct shape *shape, enum ops_dtype weights, enum ops_dtype memory)
{
    static struct bed bed;
    bed = (struct bed){.config = complete(shape->config),
                       .weights = weights,
                       .memory = memory,
                       .cpu = ops_cpu(),
                       .ref = ops_ref(),
                       .truth = ops_ref64(),
                       .random = SEED};
    bed.cpu_context = open_backend(&bed, bed.cpu);
    bed.ref_context = open_backend(&bed, bed.ref);
    bed.truth_context = open_backend(&bed, bed.truth);
    check_mamba(&bed);
    check_encode(&bed);
    check_retrieve(&bed);
    check_hsa(&bed);
    check_ends(&bed);
    check_pack(&bed);
    printf("%s, %s; weights %s, memory %s, seed %u: at most %.2f of the tolerance\n",
           bed.cpu->describe(bed.cpu_context), shape->name, weights == OPS_BF16 ? "bf16" : "fp32",
           memory == OPS_BF16 ? "bf16" : "fp32", SEED, bed.worst);
    bed.cpu->close(bed.cpu_context);
    bed.ref->close(bed.ref_context);
    bed.truth->close(bed.truth_context);
    for (size_t i = 0; i < bed.kept_count; i++)
        free(bed.kept[i]);
}

static void check_level(const char *level)
{
    setenv("RAMBAD_CPU", level, 1); /* where the processor lacks it, a lesser one is repeated */
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        check_all(&shapes[i], OPS_FP32, OPS_FP32);
        check_all(&shapes[i], OPS_BF16, OPS_BF16);
    }
    unsetenv("RAMBAD_CPU");
}

static void portable_matches_the_reference(void **state)
{
    (void)state;
    check_level("portable");
}

static void avx2_matches_the_reference(void **state)
{
    (void)state;
    check_level("avx2");
}

static void avx512_matches_the_reference(void **state)
{
    (void)state;
    check_level("avx512");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(portable_matches_the_reference),
        cmocka_unit_test(avx2_matches_the_reference),
        cmocka_unit_test(avx512_matches_the_reference),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
