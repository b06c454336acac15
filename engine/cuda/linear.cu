/* linear.cu - matrix products and norms: a few rows against weights as they are stored, many
 * through cuBLASLt. */
#include "engine/cuda/linear_rows.cuh"

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

static __global__ void add_bias(float *out, const float *bias, uint32_t n, size_t count)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        out[i] += bias[i % n];
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

/* `m` rows from `in` on: as one product, unless they are few; then, `bias` is added. */
template <typename T, typename O>
static bool as_product(struct ops_context *x, const struct ops_tensor *weight, const float *bias,
                       const void *in, uint32_t m, bool few, O *out, enum cuda_sum how)
{
    const uint32_t n = weight->rows, k = weight->cols;
    if (!few && cuda_product(x, weight->data, n, k, in, m, out, how))
        return true;
    launch_few<T, O>(x, (const T *)weight->data, (const T *)in, bias, out, n, k, m,
                     how == CUDA_ADD);
    return false;
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
        const bool bare = x->wide ? as_product<float>(x, weight, b, from, m, few, to, how)
                                  : as_product<bf16>(x, weight, b, from, m, few, to, how);
        const size_t count = (size_t)m * weight->rows;
        if (bare && b)
            CUDA_LAUNCH(x, add_bias, dim3(cuda_ceil(count, 256)), dim3(256), 0, to, b, weight->rows,
                        count);
    }
}

void cuda_linear_narrow(struct ops_context *x, const struct ops_tensor *weight,
                        const struct ops_segment *segment, const void *in, void *out)
{
    const size_t from = (size_t)segment->row * weight->cols,
                 to = (size_t)segment->row * weight->rows;
    if (x->wide)
        as_product<float>(x, weight, NULL, (const float *)in + from, segment->count, false,
                          (float *)out + to, CUDA_NARROW);
    else
        as_product<bf16>(x, weight, NULL, (const bf16 *)in + from, segment->count, false,
                         (bf16 *)out + to, CUDA_NARROW);
}

/* ---- norms ---- */

#define NORM_WARPS 8

/* Neighbours of a row. */
template <int V> struct values {
    float at[V];
};

template <int V> static __device__ __forceinline__ struct values<V> load_values(const float *from) {
    struct values<V> v;
    if constexpr (V == 4)
        cuda_load16(from, v.at);
    else
        v.at[0] = *from;
    return v;
}

template <int V>
static __device__ __forceinline__ void store_values(float *to, const struct values<V> &v)
{
    if constexpr (V == 4)
        *reinterpret_cast<float4 *>(to) = float4{v.at[0], v.at[1], v.at[2], v.at[3]};
    else
        *to = v.at[0];
}

template <int V>
static __device__ __forceinline__ void store_values(bf16 *to, const struct values<V> &v)
{
    if constexpr (V == 4)
        *reinterpret_cast<uint2 *>(to) =
            uint2{cuda_pack(v.at[0], v.at[1]), cuda_pack(v.at[2], v.at[3])};
    else
        *to = cuda_bf16(v.at[0]);
}

/* A warp a row, V neighbours a lane at a time. */
template <typename T, int V>
static __global__ void __launch_bounds__(NORM_WARPS *CUDA_WARP)
    norm_rows(const float *x, const float *weight, uint32_t n, float epsilon, uint32_t row_count,
              T *out)
{
    const uint32_t row = blockIdx.x * NORM_WARPS + threadIdx.x / CUDA_WARP;
    const uint32_t first = threadIdx.x % CUDA_WARP * V;
    cuda_depend_wait();
    cuda_depend_release();
    if (row >= row_count)
        return;
    const float *from = x + (size_t)row * n;
    T *to = out + (size_t)row * n;
    float sum = 0;
#pragma unroll 8
    for (uint32_t i = first; i < n; i += CUDA_WARP * V) {
        const struct values<V> v = load_values<V>(from + i);
#pragma unroll
        for (int k = 0; k < V; k++)
            sum = fmaf(v.at[k], v.at[k], sum);
    }
    const float scale = 1 / sqrtf(cuda_warp_sum(sum) / (float)n + epsilon);
#pragma unroll 4
    for (uint32_t i = first; i < n; i += CUDA_WARP * V) {
        struct values<V> v = load_values<V>(from + i);
#pragma unroll
        for (int k = 0; k < V; k++)
            v.at[k] *= scale * (weight ? weight[i + k] : 1);
        store_values(to + i, v);
    }
}

template <typename T>
static void launch_norm(struct ops_context *x, const float *in, const float *weight, uint32_t n,
                        float epsilon, uint32_t row_count, T *out)
{
    const dim3 grid(cuda_ceil(row_count, NORM_WARPS)), block(NORM_WARPS * CUDA_WARP);
    if (n % 4 == 0)
        CUDA_LAUNCH_EARLY(x, (norm_rows<T, 4>), grid, block, 0, in, weight, n, epsilon, row_count,
                          out);
    else
        CUDA_LAUNCH_EARLY(x, (norm_rows<T, 1>), grid, block, 0, in, weight, n, epsilon, row_count,
                          out);
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
    launch_norm(x, in, (const float *)weight->data, n, epsilon, row_count, out);
}

void cuda_norm(struct ops_context *x, const float *in, const struct ops_tensor *weight, uint32_t n,
               float epsilon, uint32_t row_count, void *out)
{
    if (x->wide)
        cuda_norm_floats(x, in, weight, n, epsilon, row_count, (float *)out);
    else
        launch_norm(x, in, (const float *)weight->data, n, epsilon, row_count, (bf16 *)out);
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

/* ---- norm, product and residual ---- */

/* Segments that linear_rows.cu does not take. */
static void multiply_others(struct ops_context *x, const struct cuda_input *in,
                            const struct ops_tensor *weight, const struct ops_tensor *bias,
                            const struct ops_rows *rows, float *out, bool add)
{
    const size_t first = rows->segments[0].row, k = weight->cols;
    char *scratch = (char *)cuda_prepared(x, (uint32_t)k).rows;
    const float *from = in->x + first * k;
    char *to = scratch + first * k * (x->wide ? 4 : 2);
    const void *ready = scratch;
    if (in->ready && rows->segments[0].count > CUDA_FEW_ROWS)
        ready = in->ready;
    else if (in->norm)
        cuda_norm(x, from, in->norm, weight->cols, in->epsilon, rows->row_count, to);
    else
        cuda_narrow(x, from, rows->row_count * k, to);
    cuda_linear(x, weight, bias, rows, ready, out, add);
}

void cuda_norm_linear(struct ops_context *x, const struct cuda_input *in,
                      const struct ops_tensor *weight, const struct ops_tensor *bias,
                      const struct ops_rows *rows, float *out, bool add)
{
    const uint32_t n = weight->rows, k = weight->cols;
    for (uint32_t i = 0; i < rows->segment_count;) {
        struct ops_rows part = {&rows->segments[i], 1, rows->segments[i].count};
        const bool few = part.row_count <= CUDA_FEW_ROWS;
        for (i++; few && i < rows->segment_count && rows->segments[i].count <= CUDA_FEW_ROWS; i++) {
            part.segment_count++;
            part.row_count += rows->segments[i].count;
        }
        if (!few && in->short_only)
            continue;
        if (!few || x->wide || !cuda_takes_rows(x, k)) {
            multiply_others(x, in, weight, bias, &part, out, add);
            continue;
        }
        const size_t row = part.segments[0].row;
        struct few f = {};
        f.weight = (const bf16 *)weight->data;
        f.n = n;
        f.k = k;
        f.row_count = part.row_count;
        f.x = in->x + row * k;
        f.normed = in->norm;
        f.norm = in->norm ? (const float *)in->norm->data : NULL;
        f.epsilon = in->epsilon;
        const struct cuda_prepared_rows prepared = cuda_prepared(x, k), next = cuda_prepared(x, n);
        f.ready = (bf16 *)prepared.rows + row * k;
        f.scales = x->scales + row;
        f.bias = bias ? (const float *)bias->data : NULL;
        f.out = out + row * n;
        f.add = add;
        f.squares = in->prepared ? prepared.squares + row * (k / 4) : NULL;
        if (in->next_norm) {
            f.next.ready = (bf16 *)next.rows + row * n;
            f.next.squares = next.squares + row * (n / 4);
            f.next.norm = (const float *)in->next_norm->data;
        }
        if (in->soon)
            f.soon = *in->soon;
        if (in->conv)
            f.conv = *in->conv;
        cuda_multiply_rows(x, f);
    }
}
