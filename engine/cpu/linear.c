/* linear.c - matrix products: a few rows against weights as they are stored, many through sgemm. */
#include <cblas.h>
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

void cpu_gemm(bool transpose_a, bool transpose_b, uint32_t m, uint32_t n, uint32_t k, float alpha,
              const float *a, size_t lda, const float *b, size_t ldb, float beta, float *c,
              size_t ldc)
{
    cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans,
                transpose_b ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n, (blasint)k, alpha,
                a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
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

static void linear_task(void *argument, uint32_t index, uint32_t worker)
{
    const struct linear *l = argument;
    const struct ops_tensor *w = l->weight;
    const uint32_t first = index * CPU_TILE;
    const uint32_t count = w->rows - first < CPU_TILE ? w->rows - first : CPU_TILE;
    const float *wide = NULL; /* this tile of the weight as floats, once it is needed */
    for (uint32_t i = 0; i < l->rows->segment_count;) {
        const struct ops_segment *segment = &l->rows->segments[i];
        uint32_t m = segment->count;
        i++;
        if (m <= CPU_FEW_ROWS) {
            while (i < l->rows->segment_count && l->rows->segments[i].count <= CPU_FEW_ROWS)
                m += l->rows->segments[i++].count;
            few_rows(l, first, count, segment->row, m);
            continue;
        }
        if (!wide && w->dtype == OPS_FP32) {
            wide = (const float *)w->data + (size_t)first * w->cols;
        } else if (!wide) {
            float *scratch = cpu_scratch(l->context, worker);
            l->context->kernels->widen((const uint16_t *)w->data + (size_t)first * w->cols, scratch,
                                       (size_t)count * w->cols);
            wide = scratch;
        }
        cpu_gemm(false, true, m, count, w->cols, 1, l->x + (size_t)segment->row * w->cols, w->cols,
                 wide, w->cols, l->add ? 1 : 0, l->out + (size_t)segment->row * w->rows + first,
                 w->rows);
    }
    for (uint32_t row = 0; l->bias && row < l->rows->row_count; row++)
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
