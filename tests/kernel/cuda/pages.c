/* Pages of chunks: the encoder writes them, sparse attention reads them. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "tests/kernel/cuda/checks.h"

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

#define CHUNKS 19

/* The same chunks over and over in one call become what they became in a call of `count`: pages and
 * landmarks as given. */
static void check_many(struct bed *b, const struct ops_chunking_weights *w, uint32_t count,
                       uint32_t many, const float *const *chunks, const char *want,
                       const char *want_landmarks)
{
    const struct model_config *c = &b->config;
    const size_t element = b->wide ? 4 : 2, r = c->retrieval_dim * element;
    const size_t kv = 2 * (size_t)c->chunk_tokens * c->kv_heads * c->head_dim * element;
    char *pages = b->cuda->alloc_host(b->cuda_context, many * kv);
    char *marks = to_device(b, NULL, many * r);
    const float **from = calloc(many, sizeof *from);
    void **to = calloc(many, sizeof *to), **landmarks = calloc(many, sizeof *landmarks);
    char *all = malloc(many * kv);
    ASSERT(pages && from && to && landmarks && all);
    memset(pages, 0xff, many * kv);
    for (uint32_t i = 0; i < many; i++) {
        from[i] = chunks[i % count];
        to[i] = pages + i * kv;
        landmarks[i] = marks + i * r;
        memcpy(all + i * kv, want + i % count * kv, kv);
    }
    b->cuda->encode_chunks(b->cuda_context, w, many, from, to, landmarks);
    same(b, "encode_chunks, many: pages", pages, all, many * kv);
    char *host = malloc(many * r);
    ASSERT(host);
    b->cuda->copy(b->cuda_context, host, marks, many * r);
    size_t wrong = 0;
    for (uint32_t i = 0; i < many; i++)
        wrong += memcmp(host + i * r, want_landmarks + i % count * r, r) != 0;
    verdict(b, "encode_chunks, many: landmarks", !wrong, "%zu of %u landmarks differ", wrong, many);
    free(host);
    free(all);
    free(from);
    free(to);
    free(landmarks);
    b->cuda->release_host(b->cuda_context, pages);
    release(b, marks);
}

void check_encode(struct bed *b, uint32_t count, uint32_t many)
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
    compare(b, "encode_chunks pages", got, want, count * kv, error_bound(b, stages));
    free(want);
    free(got);
    char *host_marks = malloc(count * r * element);
    b->cuda->copy(b->cuda_context, host_marks, cuda_marks, count * r * element);
    want = widen(b, marks, count * r);
    got = widen(b, host_marks, count * r);
    compare(b, "encode_chunks landmarks", got, want, count * r, error_bound(b, stages));
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
    if (many)
        check_many(b, &device, count, many, device_from, cuda_pages, host_marks);
    free(host_marks);
    free(pages);
    free(marks);
    free(x);
    b->cuda->release_host(b->cuda_context, cuda_pages);
    release(b, cuda_marks);
    release(b, gx);
}

#define PAGES 40

/* The same rows over and over in one call, which then takes the form of many rows: `want` for
 * each. */
static void check_copies(struct bed *b, uint32_t copies, uint32_t row_count, const float *q,
                         const float *weights, const void *const *pages, const float *want)
{
    const size_t floats = (size_t)row_count * b->config.hidden_size;
    const size_t picks = (size_t)row_count * b->config.retrieval_heads * b->config.topk;
    float *all_q = malloc(copies * floats * 4), *all_want = malloc(copies * floats * 4);
    float *all_weights = malloc(copies * picks * sizeof *weights);
    const void **all_pages = malloc(copies * picks * sizeof *pages);
    for (uint32_t i = 0; i < copies; i++) {
        memcpy(all_q + i * floats, q, floats * 4);
        memcpy(all_want + i * floats, want, floats * 4);
        memcpy(all_weights + i * picks, weights, picks * sizeof *weights);
        memcpy(all_pages + i * picks, pages, picks * sizeof *pages);
    }
    float *gq = to_device(b, all_q, copies * floats * 4);
    float *go = to_device(b, NULL, copies * floats * 4);
    b->cuda->hsa_attend(b->cuda_context, copies * row_count, gq, all_weights, all_pages, go);
    float *got = to_host(b, go, copies * floats);
    same(b, "hsa_attend of many rows", got, all_want, copies * floats * 4);
    free(got);
    release(b, gq);
    release(b, go);
    free(all_q);
    free(all_want);
    free(all_weights);
    free(all_pages);
}

void check_hsa(struct bed *b, uint32_t row_count, uint32_t copies)
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
    float *elements = random_floats(PAGES * kv, 1);
    to_dtype(b, elements, PAGES * kv, pages);
    free(elements);
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
    compare(b, "hsa_query", got, q, floats, error_bound(b, 1));
    free(got);
    b->cuda->copy(b->cuda_context, gq, q, floats * 4); /* the next op alone */
    b->ref->hsa_attend(b->ref_context, row_count, q, weights, named, o);
    b->cuda->hsa_attend(b->cuda_context, row_count, gq, weights, named, go);
    got = to_host(b, go, floats);
    compare(b, "hsa_attend", got, o, floats, error_bound(b, 1));
    /* As where not all pages fit: the rows behind come in a call of their own. */
    const uint32_t cuts[] = {row_count / 3, row_count - 1};
    for (int i = 0; i < 2; i++) {
        b->cuda->hsa_attend(b->cuda_context, row_count - cuts[i], gq + cuts[i] * d,
                            weights + cuts[i] * picks, named + cuts[i] * picks, go + cuts[i] * d);
        float *parts = to_host(b, go, floats);
        same(b, "hsa_attend in parts", parts, got, floats * sizeof *got);
        free(parts);
    }
    check_copies(b, copies, row_count, q, weights, named, got);
    /* The host writes other bytes to a page: the device must not remember the old ones. */
    memcpy(pages, pages + (PAGES - 1) * bytes, bytes);
    b->cuda->host_wrote(b->cuda_context, pages);
    b->ref->hsa_attend(b->ref_context, row_count, q, weights, named, o);
    b->cuda->hsa_attend(b->cuda_context, row_count, gq, weights, named, go);
    free(got);
    got = to_host(b, go, floats);
    compare(b, "hsa_attend, new page", got, o, floats, error_bound(b, 1));
    free(got);
    b->cuda->copy(b->cuda_context, go, o, floats * 4);
    b->ref->hsa_out(b->ref_context, &host, &rows, o, x);
    b->cuda->hsa_out(b->cuda_context, &device, &rows, go, gx);
    got = to_host(b, gx, floats);
    compare(b, "hsa_out", got, x, floats, error_bound(b, 1));
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

#define MANY_PAGES 256
#define FEW 128 /* rows that are attended without looking at their neighbours */

/* Picks by falling pages, as retrieval has them; `kept`: how many of 8 stay from row to row. */
static void pick_many(const struct bed *b, uint32_t row_count, uint32_t kept, const char *pages,
                      size_t bytes, const void **named, float *weights)
{
    const uint32_t topk = b->config.topk, share = MANY_PAGES / topk;
    const size_t picks = (size_t)b->config.retrieval_heads * topk;
    for (size_t i = 0; i < row_count * picks; i++) {
        const uint32_t page = (topk - 1 - (uint32_t)(i % topk)) * share + random_below(share);
        const bool stays = i >= picks && random_below(8) < kept;
        named[i] = stays ? named[i - picks] : random_below(50) ? pages + page * bytes : NULL;
        weights[i] = named[i] ? (float)random_below(1000) / 4000 : 0;
    }
}

/* Rows of `want` that a call for all rows gives other bits, in all of `times` calls. */
static size_t count_other_rows(struct bed *b, uint32_t row_count, uint32_t times, const float *gq,
                               const float *weights, const void *const *named, const float *want)
{
    const size_t d = b->config.hidden_size, floats = row_count * d;
    float *go = to_device(b, NULL, floats * sizeof *go);
    size_t others = 0;
    for (uint32_t i = 0; i < times; i++) {
        b->cuda->hsa_attend(b->cuda_context, row_count, gq, weights, named, go);
        float *got = to_host(b, go, floats);
        for (size_t r = 0; r < row_count; r++)
            others += memcmp(got + r * d, want + r * d, d * sizeof *got) != 0;
        free(got);
    }
    release(b, go);
    return others;
}

void check_hsa_often(struct bed *b, uint32_t row_count, uint32_t times)
{
    const struct model_config *c = &b->config;
    const size_t d = c->hidden_size, picks = (size_t)c->retrieval_heads * c->topk;
    const size_t kv = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim;
    const size_t bytes = kv * (b->wide ? 4 : 2), floats = row_count * d;
    char *pages = b->cuda->alloc_host(b->cuda_context, MANY_PAGES * bytes);
    float *elements = random_floats(MANY_PAGES * kv, 1), *q = random_floats(floats, 1);
    const void **named = calloc(row_count * picks, sizeof *named);
    float *weights = calloc(row_count * picks, sizeof *weights);
    ASSERT(pages && named && weights);
    to_dtype(b, elements, MANY_PAGES * kv, pages);
    float *gq = to_device(b, q, floats * sizeof *q);
    float *go = to_device(b, NULL, floats * sizeof *go);
    for (uint32_t kept = 0; kept < 8; kept += 7) {
        pick_many(b, row_count, kept, pages, bytes, named, weights);
        for (uint32_t r = 0; r < row_count; r += FEW)
            b->cuda->hsa_attend(b->cuda_context, row_count - r < FEW ? row_count - r : FEW,
                                gq + r * d, weights + r * picks, named + r * picks, go + r * d);
        float *want = to_host(b, go, floats);
        const size_t others = count_other_rows(b, row_count, times, gq, weights, named, want);
        verdict(b, "hsa_attend, often", !others,
                "%zu rows of %u x %u have other bits than few rows at a time, %u of 8 picks kept",
                others, times, row_count, kept);
        free(want);
    }
    b->cuda->release_host(b->cuda_context, pages);
    release(b, gq);
    release(b, go);
    free(elements);
    free(q);
    free(named);
    free(weights);
}
