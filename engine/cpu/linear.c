/* linear.c - matrix products: a few rows against weights as they are stored, many against tiles
 * of them packed for it. */
#include <math.h>

#include "engine/cpu/cpu.h"
#include "engine/bf16.h"
#include "proto/base/assert.h"

const float *cpu_vector(struct ops_context *context, const struct ops_tensor *tensor)
{
    const size_t n = (size_t)tensor->rows * tensor->cols;
    if (!tensor->data)
        return NULL;
    if (tensor->dtype == OPS_FP32)
        return tensor->data;
    ASSERT(context->vector_used + n <= context->vector_floats);
    float *out = context->vectors + context->vector_used;
    context->vector_used += n;
    context->kernels->widen(tensor->data, out, n);
    return out;
}

float cpu_softplus(float x)
{
    return x > 20 ? x : log1pf(expf(x));
}

struct linear {
    struct ops_context *context;
    const struct ops_tensor *weight;
    const float *bias, *x;
    const struct ops_rows *rows;
    float *out;
    bool add;
};

/* Outputs [first, first + count) of the rows [row, row + m). */
static void few_rows(const struct linear *l, uint32_t first, uint32_t count, uint32_t row,
                     uint32_t m)
{
    const struct ops_tensor *w = l->weight;
    const size_t element = w->dtype == OPS_FP32 ? 4 : 2;
    l->context->kernels->skinny((const char *)w->data + (size_t)first * w->cols * element, w->dtype,
                                w->cols, count, w->cols, l->x + (size_t)row * w->cols, w->cols, m,
                                l->out + (size_t)row * w->rows + first, w->rows, l->add);
}

/* The same of columns [from, from + depth) of the weight, packed in `panels`. */
static void many_rows(const struct linear *l, const float *panels, uint32_t first, uint32_t count,
                      uint32_t from, uint32_t depth, uint32_t row, uint32_t m)
{
    const struct ops_tensor *w = l->weight;
    l->context->kernels->product(l->x + (size_t)row * w->cols + from, w->cols, 1, panels, m, count,
                                 depth, l->add || from ? 1 : 0,
                                 l->out + (size_t)row * w->rows + first, w->rows);
}

/* The next rows from segment *at on that go the same way; false at the end. */
static bool next_run(const struct ops_rows *rows, uint32_t *at, bool few, uint32_t *row,
                     uint32_t *m)
{
    const struct ops_segment *s = rows->segments;
    while (*at < rows->segment_count && (s[*at].count <= CPU_FEW_ROWS) != few)
        ++*at;
    if (*at == rows->segment_count)
        return false;
    *row = s[*at].row;
    *m = 0;
    while (*at < rows->segment_count && (s[*at].count <= CPU_FEW_ROWS) == few)
        *m += s[(*at)++].count;
    return true;
}

static void linear_task(void *argument, uint32_t index, uint32_t worker)
{
    const struct linear *l = argument;
    const struct ops_tensor *w = l->weight;
    const size_t element = w->dtype == OPS_FP32 ? 4 : 2;
    const uint32_t first = index * CPU_TILE;
    const uint32_t count = w->rows - first < CPU_TILE ? w->rows - first : CPU_TILE;
    uint32_t at = 0, row, m;
    while (next_run(l->rows, &at, true, &row, &m))
        few_rows(l, first, count, row, m);
    at = 0;
    const bool many = next_run(l->rows, &at, false, &row, &m);
    for (uint32_t from = 0; many && from < w->cols; from += CPU_DEPTH) {
        const uint32_t depth = w->cols - from < CPU_DEPTH ? w->cols - from : CPU_DEPTH;
        float *panels = cpu_scratch(l->context, worker);
        l->context->kernels->pack_transposed((const char *)w->data +
                                                 ((size_t)first * w->cols + from) * element,
                                             w->dtype, w->cols, count, depth, panels);
        for (at = 0; next_run(l->rows, &at, false, &row, &m);)
            many_rows(l, panels, first, count, from, depth, row, m);
    }
    for (row = 0; l->bias && row < l->rows->row_count; row++)
        for (uint32_t j = first; j < first + count; j++)
            l->out[(size_t)row * w->rows + j] += l->bias[j];
}

void cpu_linear(struct ops_context *context, const struct ops_tensor *weight, const float *bias,
                const struct ops_rows *rows, const float *x, float *out, bool add)
{
    struct linear l = {context, weight, bias, x, rows, out, add};
    pool_run(context->pool, (weight->rows + CPU_TILE - 1) / CPU_TILE, linear_task, &l);
}

struct norm {
    const struct cpu_kernels *kernels;
    const float *x, *weight;
    float *out, epsilon;
    uint32_t n, row_count;
};

#define NORM_ROWS 16

static void norm_task(void *argument, uint32_t index, uint32_t worker)
{
    (void)worker;
    const struct norm *t = argument;
    const uint32_t end = index * NORM_ROWS + NORM_ROWS;
    for (uint32_t row = index * NORM_ROWS; row < t->row_count && row < end; row++)
        t->kernels->rms_norm(t->x + (size_t)row * t->n, t->weight, t->n, t->epsilon,
                             t->out + (size_t)row * t->n);
}

void cpu_norm_rows(struct ops_context *context, const float *x, const float *weight, uint32_t n,
                   float epsilon, uint32_t row_count, float *out)
{
    struct norm t = {context->kernels, x, weight, out, epsilon, n, row_count};
    pool_run(context->pool, (row_count + NORM_ROWS - 1) / NORM_ROWS, norm_task, &t);
}
