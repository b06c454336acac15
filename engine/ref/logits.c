/* logits.c - the two ends of the model: embeddings in, logits out. */
#include <stdlib.h>

#include "engine/ref/ref.h"

void ref_embed(struct ops_context *context, const struct ops_tensor *table, const int32_t *tokens,
               uint32_t row_count, float *out)
{
    (void)context;
    for (uint32_t row = 0; row < row_count; row++)
        for (uint32_t i = 0; i < table->cols; i++)
            out[(size_t)row * table->cols + i] =
                ref_at(table, (size_t)tokens[row] * table->cols + i);
}

void ref_logits(struct ops_context *context, const struct ops_tensor *norm,
                const struct ops_tensor *head, const struct ops_rows *rows, const float *x,
                float *logits)
{
    const struct model_config *c = &context->config;
    float *y = ref_scratch(c->hidden_size);
    for (uint32_t row = 0; row < rows->row_count; row++) {
        ref_rms_norm(x + (size_t)row * c->hidden_size, norm, c->hidden_size, c->norm_epsilon, y);
        ref_linear(head, NULL, y, logits + (size_t)row * c->vocab_size);
    }
    free(y);
}
