/* encode_chunks.cu - hidden states of whole chunks become their memory. Products run over the rows
 * of CUDA_CHUNKS chunks, so that what a chunk becomes does not depend on how many others came with
 * it: cuBLASLt chooses its kernels by the row count. Such products leave most of a large GPU idle,
 * so groups of chunks go beside each other, each in a lane: a stream and scratch. Where there are
 * CUDA_MANY_CHUNKS, one group has them all, if products over so many rows give the same bits, which
 * they do where each sum runs in the order of its terms; the first time, that is tried. */
#include <stdlib.h>

#include "engine/cuda/device.cuh"
#include "engine/cuda/encode.cuh"

#define ATTENTION_WARPS 8
#define HEAD_WARPS 8
#define LANDMARK_THREADS 256

/* Rows of the chunks one after another, each with an empty row for its summary; chunks from `count`
 * on are zeros. Grid: rows of CUDA_CHUNKS chunks. */
static __global__ void gather(const float *const *chunks, const float *cls, uint32_t count,
                              uint32_t tokens, uint32_t d, float *x)
{
    const uint32_t chunk = blockIdx.x / (tokens + 1), t = blockIdx.x % (tokens + 1);
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) {
        float value = 0;
        if (chunk < count && t < tokens)
            value = chunks[chunk][(size_t)t * d + i];
        else if (chunk < count && cls)
            value = cls[i];
        x[(size_t)blockIdx.x * d + i] = value;
    }
}

/* Per-head RMSNorm, then rotary embedding of the row's position (half-rotation layout, theta
 * 10,000). A warp a head; each lane owns whole pairs, so nothing is read after it is written. */
static __global__ void norm_rotate(float *x, const float *weight, uint32_t heads, uint32_t width,
                                   uint32_t positions, size_t count)
{
    const size_t head = (size_t)blockIdx.x * HEAD_WARPS + threadIdx.x / CUDA_WARP;
    const uint32_t lane = threadIdx.x % CUDA_WARP, half = width / 2;
    if (head >= count)
        return;
    const uint32_t position = (uint32_t)(head / heads % positions);
    float *row = x + head * width, sum = 0;
    for (uint32_t i = lane; i < width; i += CUDA_WARP)
        sum = fmaf(row[i], row[i], sum);
    const float scale = 1 / sqrtf(cuda_warp_sum(sum) / (float)width + MODEL_MEMORY_EPSILON);
    for (uint32_t i = lane; i < half; i += CUDA_WARP) {
        const float angle = (float)position * powf(10000.0f, -(float)(2 * i) / (float)width);
        const float cosine = cosf(angle), sine = sinf(angle);
        const float a = row[i] * scale * weight[i];
        const float b = row[half + i] * scale * weight[half + i];
        row[i] = a * cosine - b * sine;
        row[half + i] = b * cosine + a * sine;
    }
}

/* out = softmax(Q K^T / sqrt(hd)) V, every position of a chunk seeing every other. A warp a query.
 * Grid: chunks x heads x queries / ATTENTION_WARPS. */
template <typename T>
static __global__ void __launch_bounds__(ATTENTION_WARPS *CUDA_WARP)
    attend_chunk(struct encoder_heads s, float scale, const float *q, const float *k,
                 const float *v, T *out)
{
    CUDA_SHARED(float, shared);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t h = blockIdx.y, n = s.positions, kv = s.kv_heads * s.width;
    const uint32_t t = blockIdx.z * ATTENTION_WARPS + warp;
    if (t >= n)
        return;
    const size_t row = (size_t)blockIdx.x * n;
    const size_t at = ((row + t) * s.heads + h) * s.width;
    const uint32_t from = h / (s.heads / s.kv_heads) * s.width;
    const float *keys = k + row * kv + from, *values = v + row * kv + from;
    float *scores = shared + warp * n, top = -INFINITY, sum = 0;
    for (uint32_t u = lane; u < n; u += CUDA_WARP) {
        float score = 0;
        for (uint32_t i = 0; i < s.width; i++)
            score = fmaf(q[at + i], keys[(size_t)u * kv + i], score);
        scores[u] = score * scale;
        top = fmaxf(top, scores[u]);
    }
    top = cuda_warp_max(top);
    for (uint32_t u = lane; u < n; u += CUDA_WARP) {
        scores[u] = expf(scores[u] - top);
        sum += scores[u];
    }
    sum = cuda_warp_sum(sum);
    __syncwarp();
    for (uint32_t i = lane; i < s.width; i += CUDA_WARP) {
        float value = 0;
        for (uint32_t u = 0; u < n; u++)
            value = fmaf(scores[u], values[(size_t)u * kv + i], value);
        cuda_store(out + at + i, value / sum);
    }
}

/* out = SiLU(gate) * up, as an input of the next product. */
template <typename T>
static __global__ void gate_up(const float *gate, const float *up, size_t count, T *out)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        cuda_store(out + i, cuda_silu(gate[i]) * up[i]);
}

/* Without an encoder the summary is the mean of the chunk's rows. Grid: chunks. */
static __global__ void average(float *x, uint32_t tokens, uint32_t d)
{
    float *chunk = x + (size_t)blockIdx.x * (tokens + 1) * d;
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) {
        float sum = 0;
        for (uint32_t t = 0; t < tokens; t++)
            sum += chunk[(size_t)t * d + i];
        chunk[(size_t)tokens * d + i] = sum / (float)tokens;
    }
}

/* Summaries one after another. Grid: chunks. */
template <typename T>
static __global__ void gather_summaries(const T *y, uint32_t tokens, uint32_t d, T *out)
{
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x)
        out[(size_t)blockIdx.x * d + i] = y[((size_t)blockIdx.x * (tokens + 1) + tokens) * d + i];
}

/* One head of one token's key and value into the chunk's page, the device's copy and the host's;
 * keys through `norm`, if any. A warp a head. Grid: chunks x tokens * kv heads / HEAD_WARPS. */
template <typename T>
static __global__ void write_pages(const float *k, const float *v, const float *norm,
                                   uint32_t tokens, uint32_t heads, uint32_t width, T *const *pages,
                                   T *const *host_pages)
{
    const uint32_t head = blockIdx.y * HEAD_WARPS + threadIdx.x / CUDA_WARP;
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    if (head >= tokens * heads)
        return;
    const size_t row = (size_t)blockIdx.x * (tokens + 1) + head / heads;
    const size_t from = (row * heads + head % heads) * width, to = (size_t)head * width;
    const size_t values = (size_t)tokens * heads * width;
    T *page = pages[blockIdx.x], *host_page = host_pages[blockIdx.x];
    float scale = 1;
    if (norm) {
        float sum = 0;
        for (uint32_t i = lane; i < width; i += CUDA_WARP)
            sum = fmaf(k[from + i], k[from + i], sum);
        scale = 1 / sqrtf(cuda_warp_sum(sum) / (float)width + MODEL_MEMORY_EPSILON);
    }
    for (uint32_t i = lane; i < width; i += CUDA_WARP) {
        const float key = norm ? k[from + i] * scale * norm[i] : k[from + i];
        cuda_store(page + to + i, key);
        cuda_store(host_page + to + i, key);
        cuda_store(page + values + to + i, v[from + i]);
        cuda_store(host_page + values + to + i, v[from + i]);
    }
}

/* One head of one chunk's landmark, divided by its root mean square when `normed`. Grid: chunks x
 * retrieval heads. */
template <typename T>
static __global__ void __launch_bounds__(LANDMARK_THREADS)
    write_landmarks(const float *m, bool normed, uint32_t width, T *const *landmarks)
{
    const size_t at = (size_t)blockIdx.y * width;
    const float *from = m + (size_t)blockIdx.x * gridDim.y * width + at;
    float scale = 1;
    if (normed) {
        float sum = 0;
        for (uint32_t i = threadIdx.x; i < width; i += LANDMARK_THREADS)
            sum = fmaf(from[i], from[i], sum);
        scale = 1 / sqrtf(cuda_block_sum(sum) / (float)width + MODEL_MEMORY_EPSILON);
    }
    for (uint32_t i = threadIdx.x; i < width; i += LANDMARK_THREADS)
        cuda_store(landmarks[blockIdx.x] + at + i, from[i] * scale);
}

/* Chunks encoded together; arrays on the device. */
struct group {
    uint32_t count, rows; /* chunks; rows of all chunks that there is room for */
    const float *const *chunks;
    void *const *pages, *const *host_pages, *const *landmarks;
};

/* Of `chunks` chunks. */
static uint32_t rows_of(const struct ops_context *x, uint32_t chunks)
{
    return chunks * (x->config.chunk_tokens + 1);
}

/* A product of all rows of a group. */
static void product(struct ops_context *x, const struct ops_tensor *weight,
                    const struct ops_tensor *bias, uint32_t row_count, const void *in, float *out,
                    bool add)
{
    const struct ops_segment segment = {0, row_count, 0};
    const struct ops_rows rows = {&segment, 1, row_count};
    cuda_linear(x, weight, bias, &rows, in, out, add);
}

/* The lane's y from the normed rows in it. */
template <typename T>
static void attend(struct ops_context *x, const struct ops_encoder_layer *w, const struct group &g)
{
    const struct model_config *c = &x->config;
    const struct cuda_encoder &e = x->encoders[x->lane];
    const uint32_t n = c->chunk_tokens + 1, rows = g.rows;
    const struct encoder_heads s = {c->heads, c->encoder_kv_heads, c->head_dim, n};
    const struct encoder_inputs in = {e.q,
                                      e.k,
                                      e.v,
                                      (const float *)w->q_bias.data,
                                      (const float *)w->k_bias.data,
                                      (const float *)w->v_bias.data,
                                      (const float *)w->q_norm.data,
                                      (const float *)w->k_norm.data};
    const bool tiles = cuda_encodes_tiles(x, s); /* which add the biases themselves */
    product(x, &w->q, tiles ? NULL : &w->q_bias, rows, e.y, e.q, false);
    product(x, &w->k, tiles ? NULL : &w->k_bias, rows, e.y, e.k, false);
    product(x, &w->v, tiles ? NULL : &w->v_bias, rows, e.y, e.v, false);
    if (tiles) {
        cuda_encode_attention(x, s, g.count, in);
        return;
    }
    const size_t q_heads = (size_t)rows * c->heads, k_heads = (size_t)rows * c->encoder_kv_heads;
    const dim3 head_block(HEAD_WARPS * CUDA_WARP);
    CUDA_LAUNCH(x, norm_rotate, dim3(cuda_ceil(q_heads, HEAD_WARPS)), head_block, 0, e.q, in.q_norm,
                c->heads, c->head_dim, n, q_heads);
    CUDA_LAUNCH(x, norm_rotate, dim3(cuda_ceil(k_heads, HEAD_WARPS)), head_block, 0, e.k, in.k_norm,
                c->encoder_kv_heads, c->head_dim, n, k_heads);
    CUDA_LAUNCH(x, attend_chunk<T>, dim3(g.count, c->heads, cuda_ceil(n, ATTENTION_WARPS)),
                dim3(ATTENTION_WARPS * CUDA_WARP), ATTENTION_WARPS * n * sizeof(float), s,
                1 / sqrtf((float)c->head_dim), e.q, e.k, e.v, (T *)e.y);
}

template <typename T>
static void encoder_layer(struct ops_context *x, const struct ops_encoder_layer *w,
                          const struct group &g)
{
    const struct model_config *c = &x->config;
    const struct cuda_encoder &e = x->encoders[x->lane];
    const uint32_t rows = g.rows;
    T *y = (T *)e.y;
    cuda_norm(x, e.x, &w->input_norm, c->hidden_size, MODEL_MEMORY_EPSILON, rows, y);
    attend<T>(x, w, g);
    product(x, &w->o, NULL, rows, y, e.x, true);
    cuda_norm(x, e.x, &w->post_norm, c->hidden_size, MODEL_MEMORY_EPSILON, rows, y);
    product(x, &w->gate, NULL, rows, y, e.q, false);
    product(x, &w->up, NULL, rows, y, e.up, false);
    const size_t elements = (size_t)rows * c->encoder_mlp_size;
    CUDA_LAUNCH(x, gate_up<T>, dim3(cuda_ceil(elements, 256)), dim3(256), 0, e.q, e.up, elements,
                y);
    product(x, &w->down, NULL, rows, y, e.x, true);
}

/* The lane's y: the encoded rows of each chunk and of its summary, as inputs of products. */
template <typename T>
static void encode(struct ops_context *x, const struct ops_chunking_weights *w,
                   const struct group &g)
{
    const struct model_config *c = &x->config;
    const struct cuda_encoder &e = x->encoders[x->lane];
    const uint32_t d = c->hidden_size, rows = g.rows;
    if (!c->encoder_layers) {
        cuda_norm_floats(x, e.x, &w->norm, d, MODEL_MEMORY_EPSILON, rows, e.x);
        CUDA_LAUNCH(x, average, dim3(g.count), dim3(256), 0, e.x, c->chunk_tokens, d);
        cuda_narrow(x, e.x, (size_t)rows * d, e.y);
        return;
    }
    if (c->encoder_prenorm)
        cuda_norm_floats(x, e.x, &w->enc_prenorm, d, MODEL_MEMORY_EPSILON, rows, e.x);
    for (uint32_t j = 0; j < c->encoder_layers; j++)
        encoder_layer<T>(x, &w->encoder[j], g);
    cuda_norm(x, e.x, &w->encoder_norm, d, MODEL_MEMORY_EPSILON, rows, e.y);
}

/* Keys, values and landmarks of the encoded chunks into pages and landmark blocks. */
template <typename T>
static void write_memory(struct ops_context *x, const struct ops_chunking_weights *w,
                         const struct group &g)
{
    const struct model_config *c = &x->config;
    const struct cuda_encoder &e = x->encoders[x->lane];
    const uint32_t s = c->chunk_tokens, width = c->retrieval_dim / c->retrieval_heads;
    product(x, &w->proj_k, NULL, g.rows, e.y, e.k, false);
    product(x, &w->proj_v, NULL, g.rows, e.y, e.v, false);
    CUDA_LAUNCH(x, write_pages<T>, dim3(g.count, cuda_ceil((uint64_t)s * c->kv_heads, HEAD_WARPS)),
                dim3(HEAD_WARPS * CUDA_WARP), 0, e.k, e.v,
                c->qk_norm ? (const float *)w->k_norm.data : NULL, s, c->kv_heads, c->head_dim,
                (T *const *)g.pages, (T *const *)g.host_pages);
    T *summaries = (T *)e.summary;
    const uint32_t chunks = g.rows / (s + 1);
    CUDA_LAUNCH(x, gather_summaries<T>, dim3(chunks), dim3(256), 0, (const T *)e.y, s,
                c->hidden_size, summaries);
    struct ops_segment single[CUDA_MANY_CHUNKS];
    for (uint32_t i = 0; i < chunks; i++)
        single[i] = (struct ops_segment){i, 1, 0};
    const struct ops_rows rows = {single, chunks, chunks};
    cuda_linear(x, &w->landmark, NULL, &rows, summaries, e.q, false);
    CUDA_LAUNCH(x, write_landmarks<T>, dim3(g.count, c->retrieval_heads), dim3(LANDMARK_THREADS), 0,
                e.q, c->landmark_norm, width, (T *const *)g.landmarks);
}

template <typename T>
static void run_group(struct ops_context *x, const struct ops_chunking_weights *w,
                      const struct group &g)
{
    const struct model_config *c = &x->config;
    const struct cuda_encoder &e = x->encoders[x->lane];
    CUDA_LAUNCH(x, gather, dim3(g.rows), dim3(256), 0, g.chunks,
                c->encoder_layers ? (const float *)w->cls.data : NULL, g.count, c->chunk_tokens,
                c->hidden_size, e.x);
    encode<T>(x, w, g);
    write_memory<T>(x, w, g);
}

/* ---- many chunks together ---- */

template <typename T> static __global__ void write_noise(T *to, size_t count)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        cuda_store(to + i, (float)((uint32_t)i * 2654435761u >> 16) / 32768.0f - 1);
}

template <typename T> static void fill_noise(struct ops_context *x, T *to, size_t count)
{
    CUDA_LAUNCH(x, write_noise<T>, dim3(cuda_ceil(count, 256)), dim3(256), 0, to, count);
}

static __global__ void find_difference(const float *a, const float *b, size_t count,
                                       uint32_t *found)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && __float_as_uint(a[i]) != __float_as_uint(b[i]))
        *found = 1;
}

/* Notes in `found` whether a product over the rows of many chunks, written or added to what is
 * there, and those over the rows of each CUDA_CHUNKS of them differ. */
static void compare_products(struct ops_context *x, const struct ops_tensor *weight, bool add,
                             uint32_t *found)
{
    const struct cuda_encoder &e = x->encoders[0];
    const uint32_t rows = rows_of(x, CUDA_CHUNKS), many = rows_of(x, CUDA_MANY_CHUNKS);
    const size_t in = (size_t)many * weight->cols, out = (size_t)many * weight->rows;
    const size_t row_bytes = (size_t)weight->cols * (x->wide ? 4 : 2);
    if (x->wide)
        fill_noise(x, (float *)e.y, in);
    else
        fill_noise(x, (bf16 *)e.y, in);
    fill_noise(x, e.q, out);
    fill_noise(x, e.up, out);
    product(x, weight, NULL, many, e.y, e.q, add);
    for (size_t first = 0; first < many; first += rows)
        product(x, weight, NULL, rows, (const char *)e.y + first * row_bytes,
                e.up + first * weight->rows, add);
    CUDA_LAUNCH(x, find_difference, dim3(cuda_ceil(out, 256)), dim3(256), 0, e.q, e.up, out, found);
}

/* Whether many chunks may be one group: products of all shapes give the same bits. */
static bool encodes_many(struct ops_context *x, const struct ops_chunking_weights *w)
{
    uint32_t *found = (uint32_t *)x->encoders[0].summary, differ = 0;
    if (x->many_tried)
        return x->encodes_many;
    cuda_check(x, cudaMemsetAsync(found, 0, sizeof *found, x->stream), "cudaMemset");
    compare_products(x, &w->proj_k, false, found);
    if (x->config.encoder_layers) {
        const struct ops_encoder_layer *layer = w->encoder;
        compare_products(x, &layer->q, false, found);
        compare_products(x, &layer->k, false, found);
        compare_products(x, &layer->gate, false, found);
        compare_products(x, &layer->o, true, found);
        compare_products(x, &layer->down, true, found);
    }
    cuda_copy_out(x, &differ, found, sizeof differ);
    cuda_wait(x);
    x->many_tried = true;
    x->encodes_many = !differ && !x->failed;
    return x->encodes_many;
}

/* Makes ready what a group of at most `most` chunks reads. False: there is no room for its pages
 * beside those that were taken since cuda_pages_begin. */
static bool stage_group(struct ops_context *x, uint32_t most, uint32_t count,
                        const float *const *chunks, void *const *kv, void *const *landmarks,
                        struct group *out)
{
    const void *all[4 * CUDA_MANY_CHUNKS]; /* the four arrays, in one copy */
    const uint32_t n = count < most ? count : most;
    for (uint32_t i = 0; i < n; i++) {
        if (!(all[i] = cuda_pages_create(x, kv[i])))
            return false;
        all[n + i] = kv[i];
        all[2 * n + i] = landmarks[i];
        all[3 * n + i] = chunks[i];
    }
    void *const *staged = (void *const *)cuda_stage(x, all, sizeof *all * 4 * n);
    out->count = n;
    out->rows = rows_of(x, most);
    out->pages = staged;
    out->host_pages = staged + n;
    out->landmarks = staged + 2 * n;
    out->chunks = (const float *const *)(staged + 3 * n);
    return !x->failed;
}

/* The next groups that go beside each other, of `count` chunks; `*taken`: how many they have. */
static uint32_t next_groups(struct ops_context *x, const struct ops_chunking_weights *w,
                            uint32_t count, const float *const *chunks, void *const *kv,
                            void *const *landmarks, struct group groups[CUDA_LANES],
                            uint32_t *taken)
{
    uint32_t n = 0;
    *taken = 0;
    if (count >= CUDA_MANY_CHUNKS && encodes_many(x, w)) {
        cuda_pages_begin(x);
        if (stage_group(x, CUDA_MANY_CHUNKS, count, chunks, kv, landmarks, groups)) {
            *taken = groups[0].count;
            return 1;
        }
    }
    cuda_pages_begin(x);
    while (n < CUDA_LANES && *taken < count &&
           stage_group(x, CUDA_CHUNKS, count - *taken, chunks + *taken, kv + *taken,
                       landmarks + *taken, &groups[n]))
        *taken += groups[n++].count;
    return n;
}

/* Each in its lane; the first one's stream is the context's own, which is behind all of them when
 * this returns. */
static void run_groups(struct ops_context *x, const struct ops_chunking_weights *w,
                       const struct group *groups, uint32_t n)
{
    const cudaStream_t own = x->stream;
    if (n > 1)
        cuda_check(x, cudaEventRecord(x->encoders[0].reached, own), "an event");
    for (uint32_t i = n; i-- > 0 && !x->failed;) {
        struct cuda_encoder *e = &x->encoders[i];
        x->lane = i;
        x->stream = i ? e->stream : own;
        if (i)
            cuda_check(x, cudaStreamWaitEvent(e->stream, x->encoders[0].reached, 0), "a wait");
        if (x->wide)
            run_group<float>(x, w, groups[i]);
        else
            run_group<bf16>(x, w, groups[i]);
        if (i && !x->failed)
            cuda_check(x, cudaEventRecord(e->reached, e->stream), "an event");
    }
    x->lane = 0;
    x->stream = own;
    for (uint32_t i = 1; i < n && !x->failed; i++)
        cuda_check(x, cudaStreamWaitEvent(own, x->encoders[i].reached, 0), "a wait");
}

extern "C" void cuda_encode_chunks(struct ops_context *x,
                                   const struct ops_chunking_weights *weights, uint32_t count,
                                   const float *const *chunks, void *const *kv,
                                   void *const *landmarks)
{
    cuda_begin(x);
    for (uint32_t first = 0; first < count && !x->failed;) {
        struct group groups[CUDA_LANES];
        uint32_t taken;
        const uint32_t n = next_groups(x, weights, count - first, chunks + first, kv + first,
                                       landmarks + first, groups, &taken);
        ASSERT(n || x->failed); /* the pages of one group always fit: see cuda_pages_open */
        run_groups(x, weights, groups, n);
        first += taken;
    }
    cuda_wait(x); /* the host reads its pages next */
}

/* ---- opening ---- */

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

bool cuda_encode_open(struct ops_context *x)
{
    const struct model_config *c = &x->config;
    const size_t d = c->hidden_size, element = x->wide ? 4 : 2;
    const size_t rows = (size_t)CUDA_CHUNKS * (c->chunk_tokens + 1);
    const size_t kv = (size_t)larger(c->kv_heads, c->encoder_kv_heads) * c->head_dim;
    const size_t widest = larger(larger(d, c->encoder_mlp_size), c->retrieval_dim);
    for (uint32_t i = 0; i < CUDA_LANES; i++) {
        struct cuda_encoder *e = &x->encoders[i];
        if (i)
            cuda_check(x, cudaStreamCreateWithFlags(&e->stream, cudaStreamNonBlocking), "a stream");
        cuda_check(x, cudaEventCreateWithFlags(&e->reached, cudaEventDisableTiming), "an event");
    }
    struct cuda_encoder *const first = &x->encoders[0];
    first->x = (float *)cuda_take(x, CUDA_LANES * rows * d * 4);
    first->q = (float *)cuda_take(x, CUDA_LANES * rows * widest * 4);
    first->k = (float *)cuda_take(x, CUDA_LANES * rows * kv * 4);
    first->v = (float *)cuda_take(x, CUDA_LANES * rows * kv * 4);
    first->up = (float *)cuda_take(x, CUDA_LANES * rows * widest * 4);
    first->y = cuda_take(x, CUDA_LANES * rows * widest * element);
    first->summary = cuda_take(x, CUDA_MANY_CHUNKS * d * element);
    if (!first->x || !first->q || !first->k || !first->v || !first->up || !first->y ||
        !first->summary || x->failed)
        return false;
    for (uint32_t i = 1; i < CUDA_LANES; i++) {
        struct cuda_encoder *e = &x->encoders[i];
        e->x = first->x + i * rows * d;
        e->q = first->q + i * rows * widest;
        e->k = first->k + i * rows * kv;
        e->v = first->v + i * rows * kv;
        e->up = first->up + i * rows * widest;
        e->y = (char *)first->y + i * rows * widest * element;
        e->summary = (char *)first->summary + i * CUDA_CHUNKS * d * element;
    }
    return true;
}

void cuda_encode_close(struct ops_context *x)
{
    for (uint32_t i = 0; i < CUDA_LANES; i++) {
        struct cuda_encoder *e = &x->encoders[i];
        if (e->stream) {
            cudaStreamSynchronize(e->stream);
            cudaStreamDestroy(e->stream);
        }
        if (e->reached)
            cudaEventDestroy(e->reached);
    }
    const struct cuda_encoder *e = &x->encoders[0];
    void *const memory[] = {e->x, e->q, e->k, e->v, e->up, e->y, e->summary};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        if (memory[i])
            cudaFree(memory[i]);
}
