/* logits.c - the two ends of the model: embeddings in, logits out. */
#include <string.h>

#include "engine/cpu/cpu.h"

void cpu_embed(struct ops_context *context, const struct ops_tensor *table, const int32_t *tokens,
               uint32_t row_count, float *out)
{
    const size_t d = table->cols;
    for (uint32_t row = 0; row < row_count; row++) {
        const size_t from = (size_t)tokens[row] * d;
        if (table->dtype == OPS_FP32)
            memcpy(out + row * d, (const float *)table->data + from, d * sizeof *out);
        else
            context->kernels->widen((const uint16_t *)table->data + from, out + row * d, d);
    }
}

void cpu_logits(struct ops_context *context, const struct ops_tensor *norm,
                const struct ops_tensor *head, const struct ops_rows *rows, const float *x,
                float *logits)
{
    const struct model_config *c = &context->config;
    cpu_begin(context);
    cpu_norm_rows(context, x, cpu_vector(context, norm), c->hidden_size, c->norm_epsilon,
                  rows->row_count, context->normed);
    cpu_linear(context, head, NULL, rows, context->normed, logits, false);
}
