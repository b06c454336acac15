/* mamba.cu - one Mamba-2 block: its entry, and segments of few rows, which go token by token. The
 * state is fp32 and carried in place. */
#include <stdlib.h>

#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba.cuh"

/* ---- convolution ---- */

/* conv[j] = SiLU(sum_i w[j][i] xBC[t - taps + 1 + i][j] + bias), columns before the segment from
 * its tail; behind the columns, the time steps of the heads. Grid: rows x tiles of columns. */
template <typename T>
static __global__ void convolve(struct mamba_shape s, const struct cuda_segment *segments,
                                const uint32_t *row_segment, const float *projected,
                                const T *weight, const float *bias, const float *dt_bias,
                                float *conv, float *dt)
{
    const uint32_t row = blockIdx.x, j = blockIdx.y * blockDim.x + threadIdx.x;
    const float *column = projected + (size_t)row * s.proj + s.inner + j;
    const struct cuda_segment *segment = &segments[row_segment[row]];
    if (segment->count > CUDA_FEW_ROWS)
        return;
    if (j < s.conv) {
        const uint32_t at = row - segment->row;
        float sum = bias ? bias[j] : 0;
        for (uint32_t i = 0; i < s.taps; i++) {
            const uint32_t back = s.taps - 1 - i;
            const float in = back <= at
                                 ? *(column - (size_t)back * s.proj)
                                 : segment->conv[(size_t)(s.taps - 1 + at - back) * s.conv + j];
            sum = fmaf(cuda_float(weight[(size_t)j * s.taps + i]), in, sum);
        }
        conv[(size_t)row * s.conv + j] = cuda_silu(sum);
    } else if (j < s.conv + s.heads) {
        const uint32_t h = j - s.conv;
        const float step = cuda_softplus(*column + dt_bias[h]);
        dt[(size_t)row * s.heads + h] = fminf(fmaxf(step, s.dt_min), s.dt_max);
    }
}

/* The last columns of xBC become the tail. Grid: tiles of columns x segments. */
static __global__ void keep_tails(struct mamba_shape s, const struct cuda_segment *segments,
                                  const float *projected)
{
    const uint32_t j = blockIdx.x * blockDim.x + threadIdx.x, keep = s.taps - 1;
    const struct cuda_segment *segment = &segments[blockIdx.y];
    if (j >= s.conv || segment->count > CUDA_FEW_ROWS)
        return;
    float *tail = segment->conv + j;
    const uint32_t fresh = segment->count < keep ? segment->count : keep;
    for (uint32_t i = 0; i + fresh < keep; i++)
        tail[(size_t)i * s.conv] = tail[(size_t)(i + fresh) * s.conv];
    for (uint32_t i = keep - fresh; i < keep; i++)
        tail[(size_t)i * s.conv] =
            projected[(size_t)(segment->row + segment->count - keep + i) * s.proj + s.inner + j];
}

/* ---- token by token ---- */

#define STEP_WARPS 8

/* One head of one short segment: a warp has every STEP_WARPS-th row of the state. Grid: heads x
 * segments. */
static __global__ void __launch_bounds__(STEP_WARPS *CUDA_WARP)
    step(struct mamba_shape s, const struct cuda_segment *segments, const float *conv,
         const float *dt, const float *a_log, const float *skip, float *y)
{
    const uint32_t h = blockIdx.x, group = h / (s.heads / s.groups);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const struct cuda_segment *segment = &segments[blockIdx.y];
    if (segment->count > CUDA_FEW_ROWS)
        return;
    const float rate = -expf(a_log[h]), through = skip[h];
    for (uint32_t p = warp; p < s.width; p += STEP_WARPS) {
        float *state = segment->ssm + ((size_t)h * s.width + p) * s.n;
        for (uint32_t row = segment->row; row < segment->row + segment->count; row++) {
            const float *b = conv + (size_t)row * s.conv + s.inner + (size_t)group * s.n;
            const float *c = b + (size_t)s.groups * s.n;
            const float u = conv[(size_t)row * s.conv + h * s.width + p];
            const float time = dt[(size_t)row * s.heads + h], decay = expf(time * rate);
            float sum = 0;
            for (uint32_t i = lane; i < s.n; i += CUDA_WARP) {
                const float next = fmaf(decay, state[i], time * u * b[i]);
                state[i] = next;
                sum = fmaf(next, c[i], sum);
            }
            sum = cuda_warp_sum(sum);
            if (lane == 0)
                y[(size_t)row * s.inner + h * s.width + p] = fmaf(through, u, sum);
        }
    }
}

/* ---- the gate ---- */

#define GATE_THREADS 256

/* out = RMSNorm(y * SiLU(z)). Grid: rows. */
template <typename T>
static __global__ void __launch_bounds__(GATE_THREADS)
    gate_norm(struct mamba_shape s, const struct cuda_segment *segments,
              const uint32_t *row_segment, const float *projected, float *y, const float *weight,
              float epsilon, T *out)
{
    if (segments[row_segment[blockIdx.x]].count > CUDA_FEW_ROWS)
        return;
    const float *z = projected + (size_t)blockIdx.x * s.proj;
    float *row = y + (size_t)blockIdx.x * s.inner;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < s.inner; i += GATE_THREADS) {
        const float gated = row[i] * cuda_silu(z[i]);
        row[i] = gated;
        sum = fmaf(gated, gated, sum);
    }
    const float scale = 1 / sqrtf(cuda_block_sum(sum) / (float)s.inner + epsilon);
    for (uint32_t i = threadIdx.x; i < s.inner; i += GATE_THREADS)
        cuda_store(out + (size_t)blockIdx.x * s.inner + i, row[i] * scale * weight[i]);
}

/* The product of the short segments alone, neighbours together. */
static void project(struct ops_context *x, const struct ops_mamba_weights *w,
                    const struct ops_rows *rows)
{
    for (uint32_t i = 0; i < rows->segment_count;) {
        const uint32_t first = i;
        struct ops_rows run = {&rows->segments[first], 0, 0};
        while (i < rows->segment_count && rows->segments[i].count <= CUDA_FEW_ROWS)
            run.row_count += rows->segments[i++].count;
        run.segment_count = i - first;
        cuda_linear(x, &w->in_proj, &w->in_proj_bias, &run, x->normed, x->projected, false);
        i += run.segment_count == 0;
    }
}

template <typename T>
static void run_steps(struct ops_context *x, const struct ops_mamba_weights *w,
                      const struct ops_rows *rows, const struct cuda_segment *segments,
                      const uint32_t *row_segment)
{
    const struct mamba_shape s = mamba_shape_of(&x->config);
    project(x, w, rows);
    CUDA_LAUNCH(x, convolve<T>, dim3(rows->row_count, cuda_ceil(s.conv + s.heads, 256)), dim3(256),
                0, s, segments, row_segment, x->projected, (const T *)w->conv_weight.data,
                (const float *)w->conv_bias.data, (const float *)w->dt_bias.data, x->conv, x->dt);
    CUDA_LAUNCH(x, keep_tails, dim3(cuda_ceil(s.conv, 256), rows->segment_count), dim3(256), 0, s,
                segments, x->projected);
    CUDA_LAUNCH(x, step, dim3(s.heads, rows->segment_count), dim3(STEP_WARPS * CUDA_WARP), 0, s,
                segments, x->conv, x->dt, (const float *)w->a_log.data, (const float *)w->d.data,
                x->scanned);
    CUDA_LAUNCH(x, gate_norm<T>, dim3(rows->row_count), dim3(GATE_THREADS), 0, s, segments,
                row_segment, x->projected, x->scanned, (const float *)w->gate_norm.data,
                x->config.norm_epsilon, (T *)x->mixed);
}

extern "C" void cuda_mamba(struct ops_context *x, const struct ops_mamba_weights *w,
                           const struct ops_rows *rows, const struct ops_mamba_state *states,
                           float *hidden)
{
    const struct model_config *c = &x->config;
    const struct cuda_segment *segments;
    const uint32_t *row_segment;
    uint32_t short_count = 0;
    cuda_begin(x);
    struct cuda_segment *own = cuda_segments(x, rows);
    for (uint32_t i = 0; own && i < rows->segment_count; i++) {
        own[i].ssm = states[i].ssm;
        own[i].conv = states[i].conv;
        own[i].position = 0; /* unused here, and so the table is the same in the next step */
        short_count += own[i].count <= CUDA_FEW_ROWS;
    }
    if (own && cuda_stage_rows(x, rows, own, &segments, &row_segment)) {
        cuda_norm(x, hidden, &w->norm, c->hidden_size, c->norm_epsilon, rows->row_count, x->normed);
        if (short_count && x->wide)
            run_steps<float>(x, w, rows, segments, row_segment);
        else if (short_count)
            run_steps<bf16>(x, w, rows, segments, row_segment);
        if (short_count < rows->segment_count)
            cuda_mamba_blocks(x, w, rows, segments);
        cuda_linear(x, &w->out_proj, &w->out_proj_bias, rows, x->mixed, hidden, true);
    }
    free(own);
}
