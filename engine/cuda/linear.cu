/* linear.cu - matrix products and norms: a few rows against weights as they are stored, many
 * through cuBLASLt. */
#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

#define FEW_WARPS 8

/* A warp computes one output of up to R rows. Each row's sum runs in the same order whatever R. */
template <typename T, typename O, int R>
static __global__ void __launch_bounds__(FEW_WARPS *CUDA_WARP)
    few_rows(const T *w, const T *x, const float *bias, O *out, uint32_t n, uint32_t k,
             uint32_t row_count, bool add)
{
    constexpr uint32_t vector = 16 / sizeof(T);
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    const uint32_t o = blockIdx.x * FEW_WARPS + threadIdx.x / CUDA_WARP;
    const uint32_t first = blockIdx.y * R;
    if (o >= n)
        return;
    const T *weights = w + (size_t)o * k;
    float sums[R];
#pragma unroll
    for (int r = 0; r < R; r++)
        sums[r] = 0;
    if (k % vector == 0) {
        for (uint32_t i = lane * vector; i < k; i += CUDA_WARP * vector) {
            float a[vector], b[vector];
            cuda_load16(weights + i, a);
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (first + r >= row_count)
                    break;
                cuda_load16(x + (size_t)(first + r) * k + i, b);
#pragma unroll
                for (uint32_t j = 0; j < vector; j++)
                    sums[r] = fmaf(a[j], b[j], sums[r]);
            }
        }
    } else {
        for (uint32_t i = lane; i < k; i += CUDA_WARP) {
            const float a = cuda_float(weights[i]);
#pragma unroll
            for (int r = 0; r < R; r++)
                if (first + r < row_count)
                    sums[r] = fmaf(a, cuda_float(x[(size_t)(first + r) * k + i]), sums[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        float sum = cuda_warp_sum(sums[r]);
        if (lane == 0 && first + r < row_count) {
            const size_t at = (size_t)(first + r) * n + o;
            if (bias)
                sum += bias[o];
            cuda_store(out + at, add ? cuda_float(out[at]) + sum : sum);
        }
    }
}

template <typename O>
static __global__ void add_bias(O *out, const float *bias, uint32_t n, size_t count)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        cuda_store(out + i, cuda_float(out[i]) + bias[i % n]);
}

template <typename T, typename O>
static void launch_few(struct ops_context *x, const T *w, const T *in, const float *bias, O *out,
                       uint32_t n, uint32_t k, uint32_t m, bool add)
{
    const dim3 block(FEW_WARPS * CUDA_WARP);
    if (m == 1)
        CUDA_LAUNCH(x, (few_rows<T, O, 1>), dim3(cuda_ceil(n, FEW_WARPS)), block, 0, w, in, bias,
                    out, n, k, m, add);
    else
        CUDA_LAUNCH(x, (few_rows<T, O, 8>), dim3(cuda_ceil(n, FEW_WARPS), cuda_ceil(m, 8)), block,
                    0, w, in, bias, out, n, k, m, add);
}

/* `m` rows from `in` on: as one product, unless they are few. */
template <typename T, typename O>
static void linear_rows(struct ops_context *x, const struct ops_tensor *weight, const float *bias,
                        const void *in, uint32_t m, bool few, O *out, enum cuda_sum how)
{
    const uint32_t n = weight->rows, k = weight->cols;
    if (few || !cuda_product(x, weight->data, n, k, in, m, out, how)) {
        launch_few<T, O>(x, (const T *)weight->data, (const T *)in, bias, out, n, k, m,
                         how == CUDA_ADD);
    } else if (bias) {
        const size_t count = (size_t)m * n;
        CUDA_LAUNCH(x, add_bias<O>, dim3(cuda_ceil(count, 256)), dim3(256), 0, out, bias, n, count);
    }
}

void cuda_linear(struct ops_context *x, const struct ops_tensor *weight,
                 const struct ops_tensor *bias, const struct ops_rows *rows, const void *in,
                 float *out, bool add)
{
    const size_t element = x->wide ? 4 : 2;
    const float *b = bias ? (const float *)bias->data : NULL;
    const enum cuda_sum how = add ? CUDA_ADD : CUDA_SET;
    ASSERT(weight->dtype == (x->wide ? OPS_FP32 : OPS_BF16));
    for (uint32_t i = 0; i < rows->segment_count;) {
        const struct ops_segment *segment = &rows->segments[i++];
        uint32_t m = segment->count;
        const bool few = m <= CUDA_FEW_ROWS;
        while (few && i < rows->segment_count && rows->segments[i].count <= CUDA_FEW_ROWS)
            m += rows->segments[i++].count;
        const char *from = (const char *)in + (size_t)segment->row * weight->cols * element;
        float *to = out + (size_t)segment->row * weight->rows;
        if (x->wide)
            linear_rows<float>(x, weight, b, from, m, few, to, how);
        else
            linear_rows<bf16>(x, weight, b, from, m, few, to, how);
    }
}

void cuda_linear_narrow(struct ops_context *x, const struct ops_tensor *weight,
                        const struct ops_tensor *bias, const struct ops_segment *segment,
                        const void *in, void *out)
{
    const float *b = bias ? (const float *)bias->data : NULL;
    const size_t from = (size_t)segment->row * weight->cols,
                 to = (size_t)segment->row * weight->rows;
    if (x->wide)
        linear_rows<float>(x, weight, b, (const float *)in + from, segment->count, false,
                           (float *)out + to, CUDA_NARROW);
    else
        linear_rows<bf16>(x, weight, b, (const bf16 *)in + from, segment->count, false,
                          (bf16 *)out + to, CUDA_NARROW);
}

/* ---- norms ---- */

#define NORM_THREADS 256

template <typename T>
static __global__ void __launch_bounds__(NORM_THREADS)
    norm_rows(const float *x, const float *weight, uint32_t n, float epsilon, T *out)
{
    const float *row = x + (size_t)blockIdx.x * n;
    T *to = out + (size_t)blockIdx.x * n;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < n; i += NORM_THREADS)
        sum = fmaf(row[i], row[i], sum);
    const float scale = 1 / sqrtf(cuda_block_sum(sum) / (float)n + epsilon);
    for (uint32_t i = threadIdx.x; i < n; i += NORM_THREADS)
        cuda_store(to + i, row[i] * scale * (weight ? weight[i] : 1));
}

template <typename T> static __global__ void narrow(const float *x, size_t count, T *out)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        cuda_store(out + i, x[i]);
}

void cuda_norm_floats(struct ops_context *x, const float *in, const struct ops_tensor *weight,
                      uint32_t n, float epsilon, uint32_t row_count, float *out)
{
    CUDA_LAUNCH(x, norm_rows<float>, dim3(row_count), dim3(NORM_THREADS), 0, in,
                (const float *)weight->data, n, epsilon, out);
}

void cuda_norm(struct ops_context *x, const float *in, const struct ops_tensor *weight, uint32_t n,
               float epsilon, uint32_t row_count, void *out)
{
    if (x->wide)
        cuda_norm_floats(x, in, weight, n, epsilon, row_count, (float *)out);
    else
        CUDA_LAUNCH(x, norm_rows<bf16>, dim3(row_count), dim3(NORM_THREADS), 0, in,
                    (const float *)weight->data, n, epsilon, (bf16 *)out);
}

void cuda_narrow(struct ops_context *x, const float *in, size_t count, void *out)
{
    if (x->wide)
        CUDA_LAUNCH(x, narrow<float>, dim3(cuda_ceil(count, 256)), dim3(256), 0, in, count,
                    (float *)out);
    else
        CUDA_LAUNCH(x, narrow<bf16>, dim3(cuda_ceil(count, 256)), dim3(256), 0, in, count,
                    (bf16 *)out);
}
