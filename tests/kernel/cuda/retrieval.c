/* Retrieval: no pick may be worse than one that rounding explains. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bf16.h"
#include "proto/base/assert.h"
#include "proto/limits.h"
#include "tests/kernel/cuda/checks.h"

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
        else
            to_dtype(b, row, r, to);
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

/* It is the twins that are scanned: a pick whose twin is turned to its opposite, which has a low
 * score, is not found again. (One of zeros may be: zero can be among the best of few chunks.) */
static bool opposite_is_missed(struct bed *b, const struct ops_retrieval_weights *w,
                               const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                               const float *x, uint32_t segment, const struct ops_picks *picks)
{
    const size_t r = b->config.retrieval_dim, topk = b->config.topk;
    const size_t row = rows->segments[segment].row + rows->segments[segment].count - 1;
    uint64_t *own = picks->chunks + row * b->config.retrieval_heads * topk;
    const uint64_t chunk = own[0];
    char *twin = (char *)(uintptr_t)landmarks[segment].narrow[chunk / OPS_LANDMARK_BLOCK] +
                 chunk % OPS_LANDMARK_BLOCK * r;
    float *words = to_host(b, twin, r / sizeof *words);
    uint8_t *codes = (uint8_t *)words;
    for (size_t i = 0; i < r; i++)
        codes[i] ^= 0x80; /* e4m3's sign */
    b->cuda->copy(b->cuda_context, twin, codes, r);
    b->cuda->retrieve(b->cuda_context, w, rows, landmarks, x, (struct ops_picks *)(uintptr_t)picks);
    free(words);
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

#define MARKED_PAGES 12

/* What the retrieval marked is what it picked, and attention over the pages of the marked chunks is
 * to the bit that over the pages of all picks. */
static void check_marks(struct bed *b, const struct ops_rows *rows,
                        const struct ops_landmarks *landmarks, const struct ops_picks *picks)
{
    const struct model_config *c = &b->config;
    const size_t per_row = (size_t)c->retrieval_heads * c->topk, count = rows->row_count * per_row;
    const size_t kv = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim;
    const size_t bytes = kv * (b->wide ? 4 : 2), floats = (size_t)rows->row_count * c->hidden_size;
    char *pages = b->cuda->alloc_host(b->cuda_context, MARKED_PAGES * bytes);
    const void **named = calloc(count, sizeof *named), **marked = calloc(count, sizeof *marked);
    ASSERT(pages && named && marked);
    float *elements = random_floats(MARKED_PAGES * kv, 1);
    to_dtype(b, elements, MARKED_PAGES * kv, pages);
    free(elements);
    size_t marks = 0, wrong = 0;
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        const uint64_t *words = b->cuda->picked(b->cuda_context, i);
        const size_t from = segment->row * per_row, end = from + segment->count * per_row;
        for (uint64_t chunk = 0; chunk < landmarks[i].count; chunk++) {
            /* As where a sequence's chunks could not be read: the page of one in seven is NULL. */
            const size_t at = (chunk * 5 + i) % (MARKED_PAGES + 2);
            const void *page = at < MARKED_PAGES ? pages + at * bytes : NULL;
            bool picked = false;
            for (size_t j = from; j < end; j++)
                if (picks->weights[j] > 0 && picks->chunks[j] == chunk) {
                    picked = true;
                    named[j] = page;
                }
            const bool is_marked = words && words[chunk / 64] >> chunk % 64 & 1;
            wrong += picked != is_marked;
            if (is_marked && marks < count)
                marked[marks++] = page;
        }
    }
    verdict(b, "picked", !wrong, "%zu of %zu marks wrong", wrong, marks);
    float *q = random_floats(floats, 1);
    float *gq = to_device(b, q, floats * sizeof *q), *go = to_device(b, NULL, floats * sizeof *q);
    b->cuda->hsa_attend(b->cuda_context, rows->row_count, gq, picks->weights, named, go);
    float *want = to_host(b, go, floats);
    const bool room = !wrong && b->cuda->name_picked(b->cuda_context, marked, marks);
    for (int layer = 0; layer < 2 && room; layer++) {
        b->cuda->copy(b->cuda_context, go, q, floats * sizeof *q);
        b->cuda->hsa_attend(b->cuda_context, rows->row_count, gq, NULL, NULL, go);
        float *got = to_host(b, go, floats);
        same(b, "hsa_attend of marked chunks", got, want, floats * sizeof *got);
        free(got);
    }
    verdict(b, "name_picked", room, "%zu pages", marks);
    free(want);
    free(q);
    release(b, gq);
    release(b, go);
    b->cuda->release_host(b->cuda_context, pages);
    free(named);
    free(marked);
}

void check_retrieve(struct bed *b, const uint32_t *counts, const uint64_t *chunks, uint32_t n)
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
    struct scan scans[CHECK_SEGMENTS];
    struct ops_segment segments[CHECK_SEGMENTS];
    struct ops_landmarks landmarks[CHECK_SEGMENTS];
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
    check_marks(b, &rows, landmarks, &picks);
    for (uint32_t i = 0; b->fp8 && i < 2; i++) /* a short segment and a long one */
        verdict(b, "retrieve, a twin negated",
                opposite_is_missed(b, &device, &rows, landmarks, gx, i, &picks),
                "segment of %u rows", counts[i]);
    for (uint32_t i = 0; i < n; i++)
        drop_scan(b, &scans[i]);
    release(b, gx);
    free(x);
    free(picks.chunks);
    free(picks.weights);
    free(scores);
}
