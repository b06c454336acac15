/* Doors to single kernels of engine/cuda for tests/bench/compare.py, as a shared library: what it
 * is given lies on the device already, and the work goes to the caller's stream. */
#include <stdlib.h>

#include "engine/cuda/hsa.cuh"
#include "engine/cuda/retrieve.cuh"

extern "C" {

/* NULL: out of memory. Never freed. */
struct ops_context *bench_kernels_open(void *stream, uint32_t heads, uint32_t kv_heads,
                                       uint32_t head_dim, uint32_t tokens, uint32_t topk)
{
    struct ops_context *x = (struct ops_context *)calloc(1, sizeof *x);
    cudaDeviceProp device;
    if (!x || cuda_know_device(x, &device) != cudaSuccess)
        return NULL;
    x->config.heads = heads;
    x->config.kv_heads = x->config.retrieval_heads = kv_heads;
    x->config.head_dim = head_dim;
    x->config.chunk_tokens = tokens;
    x->config.topk = topk;
    x->config.retrieval_dim = heads * head_dim;
    x->stream = (cudaStream_t)stream;
    return x;
}

/* 0, or the status of the failure. */
int bench_kernels_attend(struct ops_context *x, uint32_t row_count, const float *q,
                         const float *weights, const void *const *pages, float *o)
{
    const struct model_config *c = &x->config;
    struct hsa_shape s = {};
    s.heads = c->heads;
    s.kv_heads = s.retrieval_heads = c->kv_heads;
    s.topk = c->topk;
    s.tokens = c->chunk_tokens;
    s.width = c->head_dim;
    s.scale = 1 / sqrtf((float)c->head_dim);
    return cuda_attend_pages(x, s, row_count, q, weights, pages, o) ? x->failed
                                                                    : STATUS_UNSUPPORTED;
}

/* A segment for bench_kernels_retrieve, on the device; NULL after a failure. */
struct cuda_segment *bench_kernels_segment(uint64_t position, uint32_t count, uint64_t chunk_count,
                                           const void *const *blocks)
{
    struct cuda_segment host = {}, *device = NULL;
    host.position = position;
    host.count = count;
    host.chunk_count = chunk_count;
    host.blocks = blocks;
    if (cudaMalloc(&device, sizeof host) != cudaSuccess ||
        cudaMemcpy(device, &host, sizeof host, cudaMemcpyHostToDevice) != cudaSuccess)
        return NULL;
    return device;
}

/* How many candidates the scan leaves for all rows. */
size_t bench_kernels_room(const struct ops_context *x, uint32_t row_count, uint64_t seen)
{
    return (size_t)row_count * x->config.retrieval_heads * cuda_scan_lists(x, row_count, seen) *
           CUDA_SCAN_LIST;
}

/* Picks of all rows of the segment, of which the last sees `seen` chunks; q: bf16, scaled. */
int bench_kernels_retrieve(struct ops_context *x, const struct cuda_segment *segment,
                           uint32_t row_count, uint64_t seen, void *q, void *candidates,
                           uint64_t *chunks, float *weights)
{
    const struct ops_segment host = {0, row_count, 0};
    const struct ops_retrieval_weights none = {};
    const uint32_t lists = cuda_scan_lists(x, row_count, seen);
    x->query_narrow = q;
    x->candidates = (struct cuda_candidate *)candidates;
    x->pick_chunks = chunks;
    x->pick_weights = weights;
    if (!cuda_scans_rows(x))
        return STATUS_UNSUPPORTED;
    cuda_scan_rows(x, segment, &host, lists, x->candidates);
    cuda_merge_rows(x, &none, x->candidates, 0, row_count, lists * CUDA_SCAN_LIST);
    return x->failed;
}
}
