/* hsa.c - hierarchical sparse attention: each picked chunk its own softmax, then their mix. */
#include <math.h>
#include <string.h>

#include "engine/cpu/cpu.h"

struct hsa {
    struct ops_context *context;
    const float *q, *weights, *q_norm;
    const void *const *pages;
    float *o, *query;
};

static void norm_task(void *argument, uint32_t row, uint32_t worker)
{
    (void)worker;
    const struct hsa *t = argument;
    const struct model_config *c = &t->context->config;
    for (uint32_t h = 0; h < c->heads; h++) {
        float *head = t->query + (size_t)row * c->hidden_size + (size_t)h * c->head_dim;
        t->context->kernels->rms_norm(head, t->q_norm, c->head_dim, MODEL_MEMORY_EPSILON, head);
    }
}

void cpu_hsa_query(struct ops_context *x, const struct ops_hsa_weights *weights,
                   const struct ops_rows *rows, const float *hidden, float *q)
{
    const struct model_config *c = &x->config;
    cpu_begin(x);
    cpu_norm_rows(x, hidden, cpu_vector(x, &weights->pre_norm), c->hidden_size,
                  MODEL_MEMORY_EPSILON, rows->row_count, x->normed);
    cpu_linear(x, &weights->query, NULL, rows, x->normed, q, false);
    struct hsa t = {.context = x, .query = q, .q_norm = cpu_vector(x, &weights->q_norm)};
    if (c->qk_norm)
        pool_run(x->pool, rows->row_count, norm_task, &t);
}

/* One row: its query heads by kv head, each against that head's picks. */
static void attend_task(void *argument, uint32_t row, uint32_t worker)
{
    const struct hsa *t = argument;
    const struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t heads = c->heads / c->kv_heads, hd = c->head_dim, n = c->kv_heads * hd;
    const size_t element = x->memory_dtype == OPS_FP32 ? 4 : 2;
    const float scale = 1 / sqrtf((float)hd);
    memset(t->o + (size_t)row * c->hidden_size, 0, c->hidden_size * sizeof *t->o);
    for (uint32_t g = 0; g < c->kv_heads; g++) {
        const uint32_t r = c->retrieval_heads == 1 ? 0 : g;
        const size_t at = (size_t)row * c->hidden_size + (size_t)g * heads * hd;
        for (uint32_t j = 0; j < c->topk; j++) {
            const size_t pick = ((size_t)row * c->retrieval_heads + r) * c->topk + j;
            if (!t->pages[pick])
                continue;
            const char *base = (const char *)t->pages[pick] + (size_t)g * hd * element;
            const struct cpu_page page = {.keys = base,
                                          .values = base + (size_t)c->chunk_tokens * n * element,
                                          .dtype = x->memory_dtype,
                                          .stride = n,
                                          .tokens = c->chunk_tokens,
                                          .width = hd};
            x->kernels->attend(&page, t->q + at, heads, scale, t->weights[pick], c->softmax1,
                               cpu_scratch(x, worker), t->o + at);
        }
    }
}

void cpu_hsa_attend(struct ops_context *context, uint32_t row_count, const float *q,
                    const float *weights, const void *const *pages, float *o)
{
    struct hsa t = {.context = context, .q = q, .weights = weights, .pages = pages, .o = o};
    pool_run(context->pool, row_count, attend_task, &t);
}

void cpu_hsa_out(struct ops_context *context, const struct ops_hsa_weights *weights,
                 const struct ops_rows *rows, const float *o, float *x)
{
    cpu_linear(context, &weights->out, NULL, rows, o, x, true);
}
