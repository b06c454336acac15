/* linear.cu - matrix products and norms: a few rows against weights as they are stored, many
 * through cuBLASLt. */
#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

#define FEW_WARPS 8
#define SHARED_PLAIN ((size_t)48 << 10) /* of a block that asked for no more */

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

/* ---- few rows on tensor cores ----
 * Rows of short segments against a weight in bf16. Weight rows are columns of the tensor cores'
 * tiles, the rows themselves their rows. A block has 8 N weight rows; its warps share out the
 * depth, 32 at a time, and add up in the end, in an order that depends on nothing but the depth. A
 * lane takes 16 bytes of a row where the tensor cores would have it take four times 4: the columns
 * of both factors are permuted alike. The norm's scale goes to the sums: rows are rounded to bf16
 * after its weight and before its scale. */

#define TILE_ROWS 16  /* of a tile of x */
#define TILE_OUT 8    /* weight rows of a tile */
#define TILE_DEPTH 32 /* what a lane's 16 bytes reach to */
#define FUSED_ROWS 8  /* up to here each block prepares the rows by itself */
#define SHARED_PAD 32 /* elements behind a row in shared memory: off the banks */

struct few {
    const bf16 *weight;
    uint32_t n, k, row_count;
    const float *x, *norm; /* norm NULL: ones */
    bool normed;           /* a norm stands before it */
    float epsilon;
    bf16 *ready; /* rows prepared by prepare_rows, and their scales */
    float *scales, *out;
    const float *bias;
    bool add;
};

/* Prepares four elements of a row; returns the sum of their squares. */
static __device__ __forceinline__ float prepare4(const float4 v, const float *norm, uint32_t i,
                                                 bf16 *to)
{
    float4 w = {1, 1, 1, 1};
    if (norm)
        w = *reinterpret_cast<const float4 *>(norm + i);
    uint2 packed;
    packed.x = cuda_pack(v.x * w.x, v.y * w.y);
    packed.y = cuda_pack(v.z * w.z, v.w * w.w);
    *reinterpret_cast<uint2 *>(to + i) = packed;
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
}

static __device__ __forceinline__ float scale_of(const float *parts, const struct few &f)
{
    float sum = 0;
    for (uint32_t i = 0; i < FEW_WARPS; i++)
        sum += parts[i];
    return f.normed ? 1 / sqrtf(sum / (float)f.k + f.epsilon) : 1;
}

/* ready[row] and scales[row]. Grid: rows. */
static __global__ void __launch_bounds__(FEW_WARPS *CUDA_WARP) prepare_rows(struct few f)
{
    __shared__ float parts[FEW_WARPS];
    cuda_depend_release();
    cuda_depend_wait();
    const float *row = f.x + (size_t)blockIdx.x * f.k;
    float sum = 0;
    for (uint32_t i = 4 * threadIdx.x; i < f.k; i += 4 * FEW_WARPS * CUDA_WARP)
        sum += prepare4(*reinterpret_cast<const float4 *>(row + i), f.norm, i,
                        f.ready + (size_t)blockIdx.x * f.k);
    sum = cuda_warp_sum(sum);
    if (threadIdx.x % CUDA_WARP == 0)
        parts[threadIdx.x / CUDA_WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
        f.scales[blockIdx.x] = scale_of(parts, f);
}

/* The block's rows into shared memory; parts[row] [FEW_WARPS]: their squares. */
static __device__ __forceinline__ void prepare_shared(const struct few &f, bf16 *rows,
                                                      float (*parts)[FEW_WARPS])
{
    float sums[FUSED_ROWS] = {};
    for (uint32_t i = 4 * threadIdx.x; i < f.k; i += 4 * FEW_WARPS * CUDA_WARP) {
        float4 v[FUSED_ROWS];
#pragma unroll
        for (uint32_t r = 0; r < FUSED_ROWS; r++)
            if (r < f.row_count)
                v[r] = *reinterpret_cast<const float4 *>(f.x + (size_t)r * f.k + i);
#pragma unroll
        for (uint32_t r = 0; r < FUSED_ROWS; r++)
            if (r < f.row_count)
                sums[r] += prepare4(v[r], f.norm, i, rows + r * (f.k + SHARED_PAD));
    }
#pragma unroll
    for (uint32_t r = 0; r < FUSED_ROWS; r++) {
        if (r >= f.row_count)
            break;
        const float sum = cuda_warp_sum(sums[r]);
        if (threadIdx.x % CUDA_WARP == 0)
            parts[r][threadIdx.x / CUDA_WARP] = sum;
    }
}

/* N tiles of weight rows, M tiles of rows, AHEAD steps of depth on their way. Grid: weight rows x
 * tiles of rows. */
template <int N, int M, int AHEAD, bool FUSED>
static __global__ void __launch_bounds__(FEW_WARPS *CUDA_WARP) product_of_few(struct few f)
{
    CUDA_SHARED(float, sums); /* [FEW_WARPS][M * N * 4][CUDA_WARP]; behind them rows, when FUSED */
    __shared__ float parts[FUSED_ROWS][FEW_WARPS];
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t group = lane / 4, pair = lane % 4, first = blockIdx.x * N * TILE_OUT;
    const uint32_t top = blockIdx.y * M * TILE_ROWS, depth = f.k / TILE_DEPTH;
    bf16 *rows = reinterpret_cast<bf16 *>(sums + FEW_WARPS * M * N * 4 * CUDA_WARP);
    const bf16 *weight[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        const uint32_t o = first + n * TILE_OUT + group;
        weight[n] = f.weight + (size_t)(o < f.n ? o : f.n - 1) * f.k + 8 * pair;
    }
    uint4 ahead[AHEAD][N];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
            if (warp + i * FEW_WARPS < depth)
                ahead[i][n] = cuda_stream16(weight[n] + (warp + i * FEW_WARPS) * TILE_DEPTH);
    cuda_depend_release();
    cuda_depend_wait();
    if (FUSED) {
        prepare_shared(f, rows, parts);
        __syncthreads();
    }
    float acc[M][N][4] = {};
    for (uint32_t from = warp; from < depth; from += AHEAD * FEW_WARPS) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const uint32_t at = from + i * FEW_WARPS;
            if (at >= depth)
                break;
            uint4 a[M][2];
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint32_t row = top + m * TILE_ROWS + half * 8 + group;
                    const bf16 *source =
                        FUSED ? rows + (row < f.row_count ? row : 0) * (f.k + SHARED_PAD)
                              : f.ready + (size_t)(row < f.row_count ? row : 0) * f.k;
                    a[m][half] = uint4{0, 0, 0, 0};
                    if (!FUSED || half == 0) /* FUSED: there is no second half */
                        a[m][half] =
                            *reinterpret_cast<const uint4 *>(source + at * TILE_DEPTH + 8 * pair);
                }
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint32_t low[2] = {ahead[i][n].x, ahead[i][n].y},
                               high[2] = {ahead[i][n].z, ahead[i][n].w};
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const uint32_t left[4] = {a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y},
                                   right[4] = {a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w};
                    cuda_mma(acc[m][n], left, low);
                    cuda_mma(acc[m][n], right, high);
                }
                if (at + AHEAD * FEW_WARPS < depth)
                    ahead[i][n] = cuda_stream16(weight[n] + (at + AHEAD * FEW_WARPS) * TILE_DEPTH);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < (FUSED ? 2 : 4); e++)
                sums[((warp * M * N + m * N + n) * 4 + e) * CUDA_WARP + lane] = acc[m][n][e];
    __syncthreads();
    constexpr uint32_t results = M * N * 4 * CUDA_WARP;
    for (uint32_t i = threadIdx.x; i < results; i += FEW_WARPS * CUDA_WARP) {
        const uint32_t e = i / CUDA_WARP % 4, tile = i / CUDA_WARP / 4, from = i % CUDA_WARP;
        const uint32_t row = top + tile / N * TILE_ROWS + e / 2 * 8 + from / 4;
        const uint32_t o = first + tile % N * TILE_OUT + from % 4 * 2 + e % 2;
        if (row >= f.row_count || o >= f.n)
            continue;
        float sum = 0;
        for (uint32_t w = 0; w < FEW_WARPS; w++)
            sum += sums[w * results + i];
        sum *= FUSED ? scale_of(parts[row], f) : f.scales[row];
        if (f.bias)
            sum += f.bias[o];
        float *to = f.out + (size_t)row * f.n + o;
        *to = f.add ? *to + sum : sum;
    }
}

template <int N, int M, int AHEAD, bool FUSED>
static void launch_product(struct ops_context *x, const struct few &f)
{
    const size_t shared = (size_t)FEW_WARPS * M * N * 4 * CUDA_WARP * sizeof(float) +
                          (FUSED ? (size_t)f.row_count * (f.k + SHARED_PAD) * sizeof(bf16) : 0);
    if (shared > SHARED_PLAIN)
        CUDA_ALLOW_SHARED(x, (product_of_few<N, M, AHEAD, FUSED>), shared);
    CUDA_LAUNCH_EARLY(x, (product_of_few<N, M, AHEAD, FUSED>),
                      dim3(cuda_ceil(f.n, N * TILE_OUT), cuda_ceil(f.row_count, M * TILE_ROWS)),
                      dim3(FEW_WARPS * CUDA_WARP), shared, f);
}

template <int N> static void choose_rows(struct ops_context *x, const struct few &f)
{
    constexpr int ahead = N == 1 ? 8 : 4;
    if (f.row_count <= FUSED_ROWS)
        launch_product<N, 1, ahead, true>(x, f);
    else if (f.row_count <= TILE_ROWS)
        launch_product<N, 1, ahead, false>(x, f);
    else if (f.row_count <= 2 * TILE_ROWS)
        launch_product<N, 2, 4, false>(x, f);
    else
        launch_product<N, 4, 2, false>(x, f);
}

/* Wide outputs have enough weight rows for every multiprocessor to take several tiles. */
static void multiply_few(struct ops_context *x, const struct few &f)
{
    if (f.row_count > FUSED_ROWS)
        CUDA_LAUNCH_EARLY(x, prepare_rows, dim3(f.row_count), dim3(FEW_WARPS * CUDA_WARP), 0, f);
    if (f.n >= 128 * 4 * TILE_OUT)
        choose_rows<4>(x, f);
    else if (f.n >= 128 * 2 * TILE_OUT)
        choose_rows<2>(x, f);
    else
        choose_rows<1>(x, f);
}

/* Segments that the tensor cores' kernel above does not take. */
static void multiply_others(struct ops_context *x, const struct cuda_input *in,
                            const struct ops_tensor *weight, const struct ops_tensor *bias,
                            const struct ops_rows *rows, float *out, bool add)
{
    const size_t first = rows->segments[0].row, k = weight->cols;
    char *scratch = (char *)(k <= x->config.hidden_size ? x->normed : x->mixed);
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
        if (!few || x->wide || k % TILE_DEPTH) {
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
        f.ready = (bf16 *)(k <= x->config.hidden_size ? x->normed : x->mixed) + row * k;
        f.scales = x->scales + row;
        f.bias = bias ? (const float *)bias->data : NULL;
        f.out = out + row * n;
        f.add = add;
        multiply_few(x, f);
    }
}
