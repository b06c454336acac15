/* logits.cu - the two ends of the model: embeddings in, logits out. */
#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

template <typename T>
static __global__ void gather_rows(const T *table, const int32_t *tokens, uint32_t d, float *out)
{
    cuda_depend_release();
    const T *from = table + (size_t)tokens[blockIdx.x] * d;
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x)
        out[(size_t)blockIdx.x * d + i] = cuda_float(from[i]);
}

extern "C" void cuda_embed(struct ops_context *x, const struct ops_tensor *table,
                           const int32_t *tokens, uint32_t row_count, float *out)
{
    const int32_t *staged = x->recording ? cuda_step_tokens(x) : NULL;
    if (!x->recording) {
        cuda_begin(x);
        staged = (const int32_t *)cuda_stage(x, tokens, row_count * sizeof *tokens);
    }
    if (x->wide)
        CUDA_LAUNCH(x, gather_rows<float>, dim3(row_count), dim3(256), 0,
                    (const float *)table->data, staged, table->cols, out);
    else
        CUDA_LAUNCH(x, gather_rows<bf16>, dim3(row_count), dim3(256), 0, (const bf16 *)table->data,
                    staged, table->cols, out);
}

extern "C" void cuda_logits(struct ops_context *x, const struct ops_tensor *norm,
                            const struct ops_tensor *head, const struct ops_rows *rows,
                            const float *hidden, float *logits)
{
    const struct cuda_input in = {hidden, norm, x->config.norm_epsilon, NULL, false};
    cuda_step_flush(x);
    cuda_norm_linear(x, &in, head, NULL, rows, logits, false);
    if (x->recording)
        cuda_step_logits(x, logits);
}
