/* mamba.cu - one Mamba-2 block: its entry. Segments of few rows go token by token (mamba_step.cu),
 * longer ones in blocks (mamba_blocks.cu). The state is carried in place. */
#include <stdlib.h>

#include "engine/cuda/mamba.cuh"

/* The segments of a call on the device. */
static const struct cuda_segment *stage_segments(struct ops_context *x, const struct ops_rows *rows,
                                                 const struct ops_mamba_state *states)
{
    struct cuda_segment *own = cuda_segments(x, rows);
    for (uint32_t i = 0; own && i < rows->segment_count; i++) {
        own[i].ssm = (float *)states[i].ssm;
        own[i].conv = states[i].conv;
        own[i].position = 0; /* unused here, and so the table is the same in the next step */
    }
    const struct cuda_segment *staged =
        own ? (const struct cuda_segment *)cuda_stage(x, own, sizeof *own * rows->segment_count)
            : NULL;
    free(own);
    return staged;
}

static void norm_long(struct ops_context *x, const struct ops_mamba_weights *w,
                      const struct ops_rows *rows, const float *hidden)
{
    const uint32_t d = x->config.hidden_size;
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        if (segment->count > CUDA_FEW_ROWS)
            cuda_norm(x, hidden + (size_t)segment->row * d, &w->norm, d, x->config.norm_epsilon,
                      segment->count,
                      (char *)x->normed + (size_t)segment->row * d * (x->wide ? 4 : 2));
    }
}

/* The norm of the block behind, for which a step's rows are left prepared; or NULL. Of more rows,
 * every block of its in_proj would take longer to add up their squares than a kernel of its own. */
static const struct ops_tensor *left_for(const struct ops_context *x,
                                         const struct ops_mamba_weights *w, uint32_t count)
{
    const bool apart = x->config.hidden_size < x->config.inner_size; /* see cuda_prepared */
    const bool pays = count >= CUDA_LEFT_FROM && count <= CUDA_LEFT_ROWS;
    return x->recording && pays && apart ? w->next_norm : NULL;
}

/* Segments of one row each: `count` of them from `first` on, and nothing else. */
static void mamba_singles(struct ops_context *x, const struct ops_mamba_weights *w,
                          const struct ops_rows *rows, uint32_t first, uint32_t count,
                          const struct cuda_segment *segments, size_t ssm, size_t conv,
                          float *hidden)
{
    const struct ops_rows own = {rows->segments + first, count, count};
    const struct cuda_soon soon = cuda_mamba_soon(x, segments + first, count, ssm);
    const struct cuda_convolution convolution =
        cuda_mamba_convolution(x, w, segments + first, conv);
    struct cuda_input in = {hidden, &w->norm, x->config.norm_epsilon, NULL, false};
    in.soon = x->recording ? &soon : NULL;
    in.conv = &convolution;
    in.prepared = x->recording && x->left == w->norm.data;
    cuda_norm_linear(x, &in, &w->in_proj, &w->in_proj_bias, &own, x->projected, false);
    cuda_mamba_singles(x, w, segments + first, own.segments->row, count, ssm);
    struct cuda_input out = {NULL, &w->gate_norm, x->config.norm_epsilon, NULL, false};
    out.prepared = true;
    out.next_norm = left_for(x, w, count);
    x->left = out.next_norm ? out.next_norm->data : NULL;
    cuda_norm_linear(x, &out, &w->out_proj, &w->out_proj_bias, &own, hidden, true);
}

/* While the states of one half of many rows are read, the other's products have the tensor cores. */
static void mamba_halves(struct ops_context *x, const struct ops_mamba_weights *w,
                         const struct ops_rows *rows, const struct cuda_segment *segments,
                         size_t ssm, size_t conv, float *hidden)
{
    const cudaStream_t own = x->stream, aside = x->recording ? cuda_step_aside(x) : NULL;
    const uint32_t all = rows->segment_count, half = aside ? all / 2 : all;
    if (aside) {
        x->stream = aside;
        mamba_singles(x, w, rows, half, all - half, segments, ssm, conv, hidden);
        x->stream = own;
    }
    mamba_singles(x, w, rows, 0, half, segments, ssm, conv, hidden);
}

extern "C" void cuda_mamba(struct ops_context *x, const struct ops_mamba_weights *w,
                           const struct ops_rows *rows, const struct ops_mamba_state *states,
                           float *hidden)
{
    const float epsilon = x->config.norm_epsilon;
    size_t ssm = 0, conv = 0; /* from where the segments' states are said to lie */
    uint32_t short_count = 0;
    bool done = false; /* out_proj of the long segments */
    for (uint32_t i = 0; i < rows->segment_count; i++)
        short_count += rows->segments[i].count <= CUDA_FEW_ROWS;
    if (x->recording && cuda_step_mamba(x, w, states, hidden))
        return;
    if (!x->recording)
        cuda_begin(x);
    const struct cuda_segment *segments =
        x->recording ? cuda_step_states(x, states, &ssm, &conv) : stage_segments(x, rows, states);
    if (x->failed)
        return;
    if (cuda_mamba_takes_singles(x, rows)) {
        mamba_halves(x, w, rows, segments, ssm, conv, hidden);
        return;
    }
    if (short_count < rows->segment_count) { /* first: what lies in between overlaps */
        norm_long(x, w, rows, hidden);
        done = cuda_mamba_blocks(x, w, rows, segments, hidden);
    }
    if (short_count) {
        const struct cuda_input in = {hidden, &w->norm, epsilon, NULL, true};
        cuda_norm_linear(x, &in, &w->in_proj, &w->in_proj_bias, rows, x->projected, false);
        cuda_mamba_step(x, w, segments, rows->segment_count, ssm, conv);
    }
    const struct cuda_input out = {x->scanned, &w->gate_norm, epsilon, x->mixed, done};
    cuda_norm_linear(x, &out, &w->out_proj, &w->out_proj_bias, rows, hidden, true);
}
