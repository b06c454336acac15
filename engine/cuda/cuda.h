/* cuda.h - what the files of cuda/ share: the context, products, norms, staging, device pages.
 * Thread: the engine's; all device work goes to one stream, in order. Owns the device's memory.
 * Private to cuda/.
 *
 * Two precisions, by the memory's dtype: with BF16 memory, weights, the inputs of products and what
 * lies between the products of an op on many rows are bf16, and every sum is fp32; with FP32 memory
 * ("wide") everything is fp32. Activations between ops and logits are fp32 in both, and so are
 * recurrent states unless they are asked for in bf16.
 *
 * A failure of the device is remembered in the context: the first one is logged, everything after
 * it does nothing, and the table's `check` tells the engine before it uses a result. */
#ifndef ENGINE_CUDA_CUDA_H
#define ENGINE_CUDA_CUDA_H

#include <cuda_runtime.h>

extern "C" {
#include "engine/ops.h"
#include "proto/base/assert.h"
#include "proto/limits.h"
}

#define CUDA_FEW_ROWS 8       /* up to here a segment's rows share each weight as it is read */
#define CUDA_LEFT_ROWS 16     /* up to here a product can leave rows prepared for the next one */
#define CUDA_LEFT_FROM 4      /* and from here on that is less work than the next one's own */
#define CUDA_BLOCK_TOKENS 128 /* of a block of the chunked (SSD) form, at most */
#define CUDA_CHUNKS 16        /* chunks encoded together: see encode_chunks.cu */
#define CUDA_LANES 4          /* of these beside each other */
#define CUDA_MANY_CHUNKS (CUDA_CHUNKS * CUDA_LANES)
#define CUDA_DRAWS 32         /* tokens drawn together */
#define CUDA_RETIRED 16       /* staging buffers outgrown within one op */
#define CUDA_STAGED 512       /* staged arrays remembered by their content */

struct cuda_products; /* cuBLASLt and what it chose for each shape */
struct cuda_pages;    /* K/V pages on the device */
struct cuda_step;     /* recorded steps */
struct cuda_marks;    /* what the last retrieval picked */

/* What encodes CUDA_CHUNKS chunks, S + 1 rows each; the scratch of all lanes lies together, so that
 * the first one's encodes CUDA_MANY_CHUNKS: see encode_chunks.cu. */
struct cuda_encoder {
    cudaStream_t stream; /* NULL: the context's */
    cudaEvent_t reached;
    float *x, *q, *k, *v, *up;
    void *y, *summary; /* inputs of products */
};

struct cuda_staged { /* an array that is on the device already */
    uint64_t hash, epoch;
    size_t bytes;
    const char *host;
    char *device;
};

struct ops_context {
    struct model_config config;
    bool wide;
    bool fp8; /* landmarks have twins on the device: see retrieve_fp8.cu */
    bool states_bf16;
    uint32_t max_rows;
    int multiprocessors;
    size_t shared_most; /* bytes of shared memory that a block can have */
    bool recording;     /* a part of a step is being recorded: see step.cu */
    bool idle;          /* nothing was sent to the stream since it was seen to be done */
    bool early;         /* kernels may begin before those in front of them end */
    bool hopper;        /* the code that runs has the instructions of sm_90a alone */
    bool spares;        /* products of one row spare shared memory: mamba_run.cu is behind them */
    bool apart;         /* the next kernel is behind several: it does not begin early */
    const void *left;   /* the norm for whose product the step's rows are left prepared, or NULL */
    cudaStream_t stream;
    char description[160];
    enum status failed; /* sticky */
    char failure[400];
    long fail_alloc, fail_launch, fail_copy; /* tests: the n-th from here on fails; 0: none */
    const char *fail_kernel;                 /* of the launches of this kernel alone, or NULL */
    /* Small arrays on their way to the device: pinned memory and its twin. */
    char *stage_host, *stage_device;
    size_t stage_bytes, stage_used;
    char *retired[2 * CUDA_RETIRED];
    uint32_t retired_count;
    struct cuda_staged staged[CUDA_STAGED];
    uint64_t stage_epoch; /* counts how often the buffer began anew */
    void **placed;        /* weights */
    size_t placed_count, placed_capacity;
    struct cuda_products *products;
    struct cuda_pages *pages;
    struct cuda_step *step;
    struct cuda_marks *marks;
    size_t page_bytes, page_budget;
    /* Activations of the op under way; the inputs of products are bf16, or floats when wide. */
    void *normed;      /* [max_rows, d] */
    void *mixed;       /* [max_rows, di] */
    float *projected;  /* [max_rows, proj_size]; of long segments bf16, unless wide, like the two */
    float *conv;       /* [max_rows, conv_size]                                      after it */
    float *scanned;    /* [max_rows, di] */
    float *scales;     /* [max_rows]: see cuda_norm_linear */
    uint32_t *arrived; /* [max_rows]: blocks of a segment that are done; zeros between kernels */
    float *dt, *decay; /* [max_rows, Hm], or of blocks: see mamba_blocks.cu */
    float *states;     /* of blocks, [Hm, P, N] each */
    float *query;      /* [max_rows, r] */
    void *query_narrow; /* the same in bf16, unless wide */
    struct cuda_candidate *candidates;
    size_t candidate_capacity;
    struct cuda_candidate *kept; /* [max_rows, Hr, cuda_kept]: with fp8, like: */
    uint16_t *expanded;          /* bf16 landmarks of a part of a scan */
    uint64_t *draw_weights;      /* [CUDA_DRAWS, V] */
    int32_t *drawn;              /* [CUDA_DRAWS] */
    uint64_t *pick_chunks;       /* [max_rows, Hr, K] */
    float *pick_weights;
    struct cuda_encoder encoders[CUDA_LANES];
    bool encodes_many, many_tried; /* CUDA_MANY_CHUNKS in one group */
    uint32_t lane; /* of what is launched; 0 but in encode_chunks.cu */
};

struct cuda_candidate {
    float score;
    uint32_t chunk; /* CUDA_NO_CHUNK: none */
};
#define CUDA_NO_CHUNK 0xffffffffu

/* A segment as kernels see it. */
struct cuda_segment {
    uint64_t position;
    uint32_t row, count;
    float *ssm, *conv;         /* mamba; what ssm holds may be bf16, at distances in words */
    const void *const *blocks; /* retrieve: device array of landmark blocks */
    const void *const *narrow; /* and of their twins, with fp8 */
    uint64_t chunk_count;
};

static __host__ __device__ inline uint32_t cuda_ceil(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

/* ---- cuda.cu ---- */

/* What the device in use is and can do, to the context. */
cudaError_t cuda_know_device(struct ops_context *context, cudaDeviceProp *device);
/* Remembers and logs the first failure. */
void cuda_fail(struct ops_context *context, enum status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Whether the call went well; `what` names it. */
bool cuda_check(struct ops_context *context, cudaError_t error, const char *what);
/* After every launch. */
void cuda_launched(struct ops_context *context, const char *kernel);
/* Device memory, zeroed, aligned to 256 bytes; NULL when there is none (the context has not failed
 * then: the caller decides). */
void *cuda_take(struct ops_context *context, size_t bytes);
void cuda_give(struct ops_context *context, void *memory);
/* Pinned host memory, which kernels reach; NULL when there is none. */
void *cuda_alloc_host(struct ops_context *context, size_t bytes);
void cuda_free_host(void *memory);
/* Begins an op: staged arrays of earlier ops may be overwritten from here on. */
void cuda_begin(struct ops_context *context);
/* The device's copy of a small array, which nobody writes to, valid until the next cuda_begin; NULL
 * after a failure. What equals an array that still lies there is not sent again: tables of rows,
 * states, pages and blocks are the same from layer to layer, most of them from step to step. */
void *cuda_stage(struct ops_context *context, const void *data, size_t bytes);
/* Segment structs to be filled in and staged; freed by the caller. NULL after a failure. */
struct cuda_segment *cuda_segments(struct ops_context *context, const struct ops_rows *rows);
/* `host` is pinned, and stays as it is until the stream has passed. */
void cuda_copy_in(struct ops_context *context, void *device, const void *host, size_t bytes);
void cuda_copy_out(struct ops_context *context, void *host, const void *device, size_t bytes);
void cuda_wait(struct ops_context *context);

/* ---- cublaslt.cu ---- */

enum status cuda_products_open(struct ops_context *context, struct error *err);
void cuda_products_close(struct ops_context *context);
/* What becomes of a product: floats, floats added to what is there, or an input of products (bf16,
 * floats when wide). */
enum cuda_sum { CUDA_SET, CUDA_ADD, CUDA_NARROW };

/* out [m, n] = x [m, k] w [n, k]^T; x and w bf16, or floats when wide. The same m, n and k give the
 * same numbers wherever x lies in its buffer. False: cuBLASLt has no kernel for the shape, nothing
 * was done. */
bool cuda_product(struct ops_context *context, const void *w, uint32_t n, uint32_t k, const void *x,
                  uint32_t m, void *out, enum cuda_sum how);

/* ---- linear.cu ---- */

/* out [rows, W.rows] = x W^T + bias, or += with `add`. Segments of few rows share each weight as it
 * is read; longer ones are products of their own, so no segment can change another's numbers. */
void cuda_linear(struct ops_context *context, const struct ops_tensor *weight,
                 const struct ops_tensor *bias, const struct ops_rows *rows, const void *x,
                 float *out, bool add);
/* x W^T of one long segment alone, as inputs of products. */
void cuda_linear_narrow(struct ops_context *context, const struct ops_tensor *weight,
                        const struct ops_segment *segment, const void *x, void *out);
/* States that a kernel will read first: of `count` heads, in the order of all segments. */
struct cuda_soon {
    const struct cuda_segment *segments; /* on the device */
    size_t ssm;                          /* words behind where they say */
    uint32_t count, heads, head_words;
};
/* The causal convolution and SiLU of columns [first, first + count) of a product, a multiple of 4
 * both, whose rows are segments of one row each; see ops_mamba_state. */
struct cuda_convolution {
    const struct cuda_segment *segments; /* on the device */
    size_t offset;                       /* of the tails, floats behind where they say */
    const void *weights;                 /* bf16 [count, 4] */
    const float *bias;                   /* or NULL */
    uint32_t first, count;
    bool early; /* the tails may be read before the kernel in front has ended */
};
/* The input of a product: rows of floats, which a norm may stand before. */
struct cuda_input {
    const float *x;                /* [rows, k] */
    const struct ops_tensor *norm; /* NULL: the rows as they are */
    float epsilon;
    const void *ready; /* NULL, or where segments of more than CUDA_FEW_ROWS rows lie already,
                          normed and narrowed */
    bool short_only;   /* such segments are left out */
    const struct cuda_soon *soon = NULL; /* or what the kernel behind reads, which nobody writes */
    const struct cuda_convolution *conv = NULL; /* or what becomes of the product */
    bool prepared = false; /* the rows were left where cuda_prepared says, and are not in x */
    /* Or that of another product, for which this one's results are left prepared, too: of at
     * most CUDA_LEFT_ROWS rows, whose own were prepared. */
    const struct ops_tensor *next_norm = NULL;
};
/* Where rows of short segments wait for a product of depth k. */
struct cuda_prepared_rows {
    void *rows;     /* bf16 [rows, k], the norm's weight on them */
    float *squares; /* if they were left prepared: sums of each four neighbours' [rows, k / 4] */
};
static inline struct cuda_prepared_rows cuda_prepared(const struct ops_context *x, uint32_t k)
{
    const size_t inner = x->config.inner_size;
    struct cuda_prepared_rows prepared = {x->mixed, x->scanned};
    if (k <= x->config.hidden_size) {
        prepared.rows = x->normed;
        prepared.squares += x->max_rows * (inner / 4); /* k <= di */
    }
    return prepared;
}
/* The same as cuda_linear of RMSNorm(x), in one kernel where there are few rows. */
void cuda_norm_linear(struct ops_context *context, const struct cuda_input *in,
                      const struct ops_tensor *weight, const struct ops_tensor *bias,
                      const struct ops_rows *rows, float *out, bool add);
/* out[row] = RMSNorm(x[row]), as an input of products. weight->data NULL: ones. */
void cuda_norm(struct ops_context *context, const float *x, const struct ops_tensor *weight,
               uint32_t n, float epsilon, uint32_t row_count, void *out);
/* The same as floats; in place allowed. */
void cuda_norm_floats(struct ops_context *context, const float *x, const struct ops_tensor *weight,
                      uint32_t n, float epsilon, uint32_t row_count, float *out);
/* Floats as an input of products. */
void cuda_narrow(struct ops_context *context, const float *x, size_t count, void *out);

/* Landmark blocks as a device array, staged. */
const void *const *cuda_stage_blocks(struct ops_context *context,
                                     const struct ops_landmarks *landmarks);
/* Their twins likewise; NULL without fp8. */
const void *const *cuda_stage_narrow(struct ops_context *context,
                                     const struct ops_landmarks *landmarks);

/* ---- step.cu: what the ops take from the step while they are recorded ---- */

enum status cuda_step_open(struct ops_context *context, struct error *err);
void cuda_step_close(struct ops_context *context);
/* The first part begins: its tables come, and the rows of its tokens in `table` go to `out`. */
void cuda_step_embed(struct ops_context *context, const struct ops_tensor *table, float *out);
/* The step's segments, whose `ssm` and `conv` are where each sequence's state
 * begins, and how many floats behind it `states` lie, which is the same for all. */
const struct cuda_segment *cuda_step_states(struct ops_context *context,
                                            const struct ops_mamba_state *states, size_t *ssm,
                                            size_t *conv);
/* A Mamba-2 block goes to those in front of it, to be launched with them as one kernel, at the
 * latest by cuda_step_flush, in front of whatever reads what they give. False: it is not covered. */
bool cuda_step_mamba(struct ops_context *context, const struct ops_mamba_weights *weights,
                     const struct ops_mamba_state *states, float *hidden);
void cuda_step_flush(struct ops_context *context);
/* Where half of the step's rows go through Mamba-2 blocks, beside the others on the context's
 * stream, which is behind both from cuda_step_flush on; NULL: they are too few for that. */
cudaStream_t cuda_step_aside(struct ops_context *context);
void cuda_step_retrieve(struct ops_context *context, const struct ops_retrieval_weights *weights,
                        struct ops_picks *picks);
void cuda_step_pages(const struct ops_context *context, const float **weights,
                     const void *const **pages);
/* Where the step's rows of logits go, and the largest of each. */
struct cuda_kept_logits {
    uint32_t rows;
    float *const *to;         /* [rows], on the device: each sequence's own */
    unsigned long long *best; /* [rows]: the largest logit and its token so far; zeros between */
    uint32_t *arrived;        /* [rows]: blocks that have seen their share; zeros between kernels */
    int32_t *largest;         /* [rows], pinned: the token of the largest one */
};
struct cuda_kept_logits cuda_step_kept(const struct ops_context *context);
/* How the last kernel of a part tells the host its end; see cuda_tell_end. */
struct cuda_ending {
    uint32_t *count; /* on the device: parts that have told */
    uint32_t *told;  /* NULL: it does not; pinned: the same */
};
/* Who asks is the last kernel of the part that is recorded, and will tell. */
struct cuda_ending cuda_step_ending(struct ops_context *context);

/* ---- pages.cu ---- */

enum status cuda_pages_open(struct ops_context *context, struct error *err);
void cuda_pages_close(struct ops_context *context);
/* The host wrote to `page`: the device's copy of it is stale. */
void cuda_pages_forget(struct ops_context *context, const void *page);
/* Host memory goes: other pages may come to lie where its pages lay. */
void cuda_pages_forget_range(struct ops_context *context, const void *memory, size_t bytes);
/* Device copies of pages that one kernel reads together: begin, then take them. */
void cuda_pages_begin(struct ops_context *context);
/* Where the device's copies of `count` pages lie, to `data` (NULL for NULL); those that are missing
 * are filled by cuda_pages_end. Returns how many it took: less than all when there is no room
 * beside those taken since cuda_pages_begin (or after a failure). */
size_t cuda_pages_take(struct ops_context *context, const void *const *pages, size_t count,
                       const void **data);
/* The device's copy of one page, whose content is about to be written there; NULL: no room. */
void *cuda_pages_create(struct ops_context *context, const void *page);
/* All of the kernel's pages are taken: those that are missing come now, in one copy. */
void cuda_pages_end(struct ops_context *context);
/* Waits until the copies from host pages before the last cuda_pages_end are done. */
void cuda_pages_settle(struct ops_context *context);

/* ---- picked.cu ---- */

bool cuda_picked_open(struct ops_context *context);
void cuda_picked_close(struct ops_context *context);
/* Marks what lies in pick_chunks and pick_weights of these rows: see ops.h, `picked`; the marks are
 * the host's once it has waited. */
void cuda_mark_picks(struct ops_context *context, const struct ops_rows *rows,
                     const struct ops_landmarks *landmarks);
/* The device's copies of the pages of all picks of these rows, which were named; [rows, Hr, K] on
 * the device. */
const void *const *cuda_picked_pages(const struct ops_context *context, uint32_t row_count);

struct ops_page_stats cuda_page_stats(const struct ops_context *context);

/* ---- the ops ---- */

extern "C" {
void cuda_pack_state(struct ops_context *context, float *state, size_t count, void *packed);
void cuda_unpack_state(struct ops_context *context, const void *packed, size_t count, float *state);
void cuda_embed(struct ops_context *context, const struct ops_tensor *table, const int32_t *tokens,
                uint32_t row_count, float *out);
void cuda_mamba(struct ops_context *context, const struct ops_mamba_weights *weights,
                const struct ops_rows *rows, const struct ops_mamba_state *states, float *x);
void cuda_encode_chunks(struct ops_context *context, const struct ops_chunking_weights *weights,
                        uint32_t count, const float *const *chunks, void *const *kv,
                        void *const *landmarks);
void cuda_retrieve(struct ops_context *context, const struct ops_retrieval_weights *weights,
                   const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                   const float *x, struct ops_picks *picks);
const uint64_t *cuda_picked(const struct ops_context *context, uint32_t segment);
bool cuda_name_picked(struct ops_context *context, const void *const *pages, size_t count);
void cuda_prefetch(struct ops_context *context, const void *const *pages, size_t count,
                   bool predicted);
void cuda_fetched(struct ops_context *context);
bool cuda_holds(const struct ops_context *context, const void *page);
size_t cuda_narrow_bytes(const struct ops_context *context);
void cuda_narrow_landmarks(struct ops_context *context, const void *block, uint32_t first,
                           uint32_t count, void *twin);
void cuda_hsa_query(struct ops_context *context, const struct ops_hsa_weights *weights,
                    const struct ops_rows *rows, const float *x, float *q);
void cuda_hsa_attend(struct ops_context *context, uint32_t row_count, const float *q,
                     const float *weights, const void *const *pages, float *o);
void cuda_hsa_out(struct ops_context *context, const struct ops_hsa_weights *weights,
                  const struct ops_rows *rows, const float *o, float *x);
void cuda_step_begin(struct ops_context *context, const struct ops_step *step);
enum ops_part cuda_part_begin(struct ops_context *context, uint32_t part, const float *weights,
                              const void *const *pages);
void cuda_part_end(struct ops_context *context, struct ops_picks *picks, int32_t *largest);
void cuda_draw(struct ops_context *context, const struct ops_draw *draws, uint32_t count,
               const float *logits, int32_t *tokens);
void cuda_keep_rows(struct ops_context *context, const float *x);
void cuda_logits(struct ops_context *context, const struct ops_tensor *norm,
                 const struct ops_tensor *head, const struct ops_rows *rows, const float *x,
                 float *logits);
}

#endif
