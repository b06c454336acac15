/* ops.h - the table of operations a backend implements, and the shapes they work on.
 * Thread: the engine's; a backend may use its own workers inside a call.
 * Owns nothing; every pointer is borrowed for the call.
 *
 * A step's rows are the tokens of all its sequences one after another; a segment is one sequence's
 * run of rows. Backends: ref/ (plain fp32, obvious), cpu/ (fast), cuda/. One file per op, the same
 * base name in each. Activations, states and landmarks live in memory from `alloc`; the shared
 * forward pass never looks through such a pointer, it calls `copy`, so that a device backend can
 * hand out device memory. K/V pages live in memory from `alloc_host`, which both sides read.
 *
 * Batch invariance: a segment's results must not depend on the other segments of the call. */
#ifndef ENGINE_OPS_H
#define ENGINE_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/sampler.h"
#include "proto/model_config.h"
#include "proto/status.h"

enum ops_dtype { OPS_BF16, OPS_FP32 };

/* A weight [rows, cols], row-major: y = x W^T, as PyTorch's Linear keeps it. A vector is [1, n].
 * data NULL: the tensor is absent (no bias). */
struct ops_tensor {
    const void *data;
    enum ops_dtype dtype;
    uint32_t rows, cols;
};

struct ops_segment {
    uint32_t row, count; /* rows [row, row + count) of the step */
    uint64_t position;   /* absolute position of the first row */
};

struct ops_rows { /* the segments follow each other without gaps */
    const struct ops_segment *segments;
    uint32_t segment_count;
    uint32_t row_count;
};

/* The recurrent state of one sequence in one Mamba-2 layer. With states_bf16 a call reads `ssm` in
 * bf16, goes through all of its rows in fp32, and rounds what it leaves once, to nearest. */
struct ops_mamba_state {
    void *ssm;   /* [Hm, P, N], floats or, with states_bf16, bf16 */
    float *conv; /* [conv_kernel - 1, di + 2GN]: the last columns of xBC before the convolution,
                    oldest first; zeros at the start of a sequence */
};

struct ops_mamba_weights {
    struct ops_tensor norm, in_proj, in_proj_bias, conv_weight /* [di+2GN, conv_kernel] */,
        conv_bias, dt_bias, a_log, d, gate_norm, out_proj, out_proj_bias;
    const struct ops_tensor *next_norm; /* of the Mamba-2 block right behind, or NULL */
};

struct ops_encoder_layer {
    struct ops_tensor input_norm, q, q_bias, k, k_bias, v, v_bias, o, q_norm, k_norm, post_norm,
        gate, up, down;
};

struct ops_chunking_weights {
    struct ops_tensor cls, enc_prenorm, encoder_norm; /* with an encoder */
    const struct ops_encoder_layer *encoder;          /* [encoder_layers] */
    struct ops_tensor norm;                           /* without one */
    struct ops_tensor proj_k, proj_v, landmark, k_norm;
};

struct ops_retrieval_weights {
    struct ops_tensor pre_norm, query, q_norm, k_norm; /* the last two when enable_lmk_norm */
    float pos_decay;                                   /* 0 without enable_pos_decay */
};

struct ops_hsa_weights {
    struct ops_tensor pre_norm, query, q_norm, out;
};

/* The landmarks of one sequence: blocks of OPS_LANDMARK_BLOCK chunks each [block, r], the dtype of
 * the memory. When enable_lmk_norm, each head's part is already divided by its root mean square, so
 * that the scan need not repeat it; k_norm's weight, each retrieval layer's own, goes to the query
 * (q * w) . m = q . (w * m).
 * With landmarks_fp8 the blocks are memory of `alloc_host`, and each has a twin, memory of `alloc`
 * of narrow_bytes, which is scanned in its place; only the best few are read from the block. */
#define OPS_LANDMARK_BLOCK 256
struct ops_landmarks {
    const void *const *blocks;
    uint64_t count;            /* chunks */
    const void *const *narrow; /* the twins; NULL without landmarks_fp8 */
};

/* What retrieval gives for a row: for each retrieval head the K picks ordered by chunk index,
 * newest first, unused ones last with chunk 0 and weight 0. */
struct ops_picks {
    uint64_t *chunks; /* [rows, Hr, K] */
    float *weights;   /* [rows, Hr, K] */
};

/* A step in which each of `count` sequences goes on by one token: row i is sequence i. */
#define OPS_STEP_ROWS 128
struct ops_step {
    uint32_t count;
    const int32_t *tokens;
    const uint64_t *positions;
    /* Where the state of each sequence begins; the states that `mamba` is given lie at the same
     * distance behind it for all sequences. */
    float *const *states;
    float *const *kept;   /* where keep_rows puts each row's hidden states, [d] */
    float *const *logits; /* where each row's logits are kept, [V] */
    const struct ops_landmarks *landmarks;
};

/* A token to be drawn from a row of logits. */
struct ops_draw {
    struct sampler_draw how;
    uint32_t row;
    int32_t largest; /* the row's largest logit */
};

/* How a part of a step goes. */
enum ops_part {
    OPS_PART_PLAIN,  /* the ops are called and run, as in any other call */
    OPS_PART_RECORD, /* the ops are called, always the same for a part and a count, and noted */
    OPS_PART_REPLAY, /* no op is called: they were noted before */
};

/* A device's own copies of K/V pages; in pages. */
struct ops_page_stats {
    uint64_t capacity, resident, hits, misses; /* now, now; since `open` */
    uint64_t copy_ns;                          /* that the device took to copy those it missed */
    uint64_t predicted, predicted_hits; /* copied before they were asked for; and then were */
};

/* Context of an open backend: worker threads, scratch memory. */
struct ops_context;

struct ops_options {
    const struct model_config *config;
    uint32_t threads;
    uint32_t max_rows;           /* of one step */
    enum ops_dtype memory_dtype; /* of K/V pages and landmarks */
    size_t device_memory_bytes;  /* budget of a device's own copies of K/V pages; 0: its choice */
    bool landmarks_fp8;          /* with narrow_landmarks alone */
    bool states_bf16;            /* recurrent states, which are fp32 without */
};

struct ops {
    const char *name;
    /* STATUS_UNSUPPORTED where this machine cannot run the backend. */
    enum status (*open)(const struct ops_options *options, struct ops_context **out,
                        struct error *err);
    void (*close)(struct ops_context *context);
    /* "cpu (avx2, 2 threads)"; borrowed. */
    const char *(*describe)(const struct ops_context *context);
    /* Waits for the work so far; STATUS_OK unless the backend is broken (then the message says how,
     * and nothing computed since the last check may be used). NULL: it cannot break. */
    enum status (*check)(struct ops_context *context, struct error *err);
    /* Takes a weight to where the ops want it: `data` and `dtype` change, and stay the backend's
     * until `close`. Every tensor that an op is given went through here. NULL: no need. */
    enum status (*place)(struct ops_context *context, struct ops_tensor *tensor, struct error *err);

    /* Zeroed memory for activations and states, aligned to 64 bytes; NULL when there is none. */
    void *(*alloc)(struct ops_context *context, size_t bytes);
    void (*release)(struct ops_context *context, void *memory);
    /* Host memory for K/V pages, aligned to 64 bytes; NULL when there is none. */
    void *(*alloc_host)(struct ops_context *context, size_t bytes);
    void (*release_host)(struct ops_context *context, void *memory);
    /* The host wrote a page: a copy that the backend keeps of it is stale. NULL: it keeps none. */
    void (*host_wrote)(struct ops_context *context, const void *page);
    /* Of those copies. NULL: it keeps none. */
    struct ops_page_stats (*page_stats)(const struct ops_context *context);
    /* Copies of host pages on their way beside the work of the device: `pages` (NULLs are left
     * out) that it lacks, as many as there is room for. They stay as they are until fetched
     * returns, which waits for them. `predicted`: nobody has asked for them yet. `holds`: whether a
     * copy is there, or on its way. All NULL where there are no copies. */
    void (*prefetch)(struct ops_context *context, const void *const *pages, size_t count,
                     bool predicted);
    void (*fetched)(struct ops_context *context);
    bool (*holds)(const struct ops_context *context, const void *page);
    /* Bytes of the device's memory in use, by whomever. NULL: there is no device. */
    size_t (*device_bytes)(struct ops_context *context);
    /* Bytes of a landmark block's twin in fp8, and landmarks [first, first + count) of a block,
     * which are there now, into it. NULL: the backend scans what it is given. */
    size_t (*narrow_bytes)(const struct ops_context *context);
    void (*narrow_landmarks)(struct ops_context *context, const void *block, uint32_t first,
                             uint32_t count, void *twin);
    /* Any direction between memory of `alloc` and the host's; complete when it returns. */
    void (*copy)(struct ops_context *context, void *to, const void *from, size_t bytes);

    /* Rounds `count` numbers of a state in place to what their packed form holds, and writes that
     * to `packed` (memory of alloc): see packed.h. The same bits in every backend. */
    void (*pack_state)(struct ops_context *context, float *state, size_t count, void *packed);
    /* And back. */
    void (*unpack_state)(struct ops_context *context, const void *packed, size_t count,
                         float *state);

    /* out[row] = table[tokens[row]], [rows, d]. */
    void (*embed)(struct ops_context *context, const struct ops_tensor *table,
                  const int32_t *tokens, uint32_t row_count, float *out);

    /* One Mamba-2 block in place: x += mixer(RMSNorm(x)); x [rows, d]. states[i] belongs to
     * segment i and is carried forward. A segment of one row takes the single-step form, longer
     * ones the chunked (SSD) form; both continue from the state. */
    void (*mamba)(struct ops_context *context, const struct ops_mamba_weights *weights,
                  const struct ops_rows *rows, const struct ops_mamba_state *states, float *x);

    /* `count` whole chunks [count, S, d] -> K and V pages (each page K [S, Hkv, hd] then V the
     * same, memory dtype) and landmarks ([r] each, memory dtype, see ops_landmarks). */
    void (*encode_chunks)(struct ops_context *context, const struct ops_chunking_weights *weights,
                          uint32_t count, const float *const *chunks, void *const *kv,
                          void *const *landmarks);

    /* x [rows, d] -> picks and weights. landmarks[i] belongs to segment i; a row at position t
     * sees chunk c when t >= (c+1) * S (or RAMBA.md's slide-window form). Never stores the
     * [rows, chunks] scores. Equal scores: the lower chunk index wins. */
    void (*retrieve)(struct ops_context *context, const struct ops_retrieval_weights *weights,
                     const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                     const float *x, struct ops_picks *picks);

    /* Each chunk that the last `retrieve` picked, once, so that its page is named once and not for
     * every row that reads it: of segment i, bit c % 64 of word c / 64 says it of chunk c. Borrowed
     * until the next `retrieve`, or a step in parts. NULL: nobody knows. */
    const uint64_t *(*picked)(const struct ops_context *context, uint32_t segment);
    /* The K/V pages of those chunks, segment by segment, in the order of the bits (NULL: its picks
     * are not read), for hsa_attend of all rows, which is then given neither weights nor pages, as
     * long as no other pages are. False: they do not fit the device all at once; they are not
     * named. Both NULL where there is no device. */
    bool (*name_picked)(struct ops_context *context, const void *const *pages, size_t count);

    /* q[rows, H * hd] = q_proj(RMSNorm(x)) (q_norm when enable_qk_norm). Apart from hsa_attend, so
     * that attention can go by sub-blocks of rows when pages are short. */
    void (*hsa_query)(struct ops_context *context, const struct ops_hsa_weights *weights,
                      const struct ops_rows *rows, const float *x, float *q);
    /* o[row_count, H * hd] for rows with q and picks given from their first row on; pages[row,
     * Hr, K] are the K/V pages of the picks (NULL where the weight is 0). Weights and pages NULL:
     * those of all rows of the last `retrieve`, which were named. */
    void (*hsa_attend)(struct ops_context *context, uint32_t row_count, const float *q,
                       const float *weights, const void *const *pages, float *o);
    /* x += o_proj(o). */
    void (*hsa_out)(struct ops_context *context, const struct ops_hsa_weights *weights,
                    const struct ops_rows *rows, const float *o, float *x);

    /* Steps in parts that are noted once and then repeated as a whole, each up to a retrieval, the
     * last one up to the logits; all NULL where a backend has no such thing. Between step_begin and
     * the last part_end `step` stays as it is; between two parts step_begin may be called again,
     * and the step goes on with other rows. A part other than the first is given the picks' weights
     * and pages; PLAIN there when the pages do not fit the device all at once. While a part is
     * noted, ops take from `step` what differs from step to step, whatever they are called with,
     * and the other arguments are the same in every step: `picks` (memory of alloc_host), buffers,
     * weights. part_end runs a part that was noted, waits, and gives the picks of a retrieval, or
     * the token of each row's largest logit (the lowest of equal ones). */
    void (*step_begin)(struct ops_context *context, const struct ops_step *step);
    enum ops_part (*part_begin)(struct ops_context *context, uint32_t part, const float *weights,
                                const void *const *pages);
    void (*part_end)(struct ops_context *context, struct ops_picks *picks, int32_t *largest);
    /* Within a step, noted: each row of x goes to its place in `kept`. */
    void (*keep_rows)(struct ops_context *context, const float *x);

    /* The token of each draw from `logits` [rows, V], to the bit as sampler_sample draws it.
     * NULL: the backend cannot. */
    void (*draw)(struct ops_context *context, const struct ops_draw *draws, uint32_t count,
                 const float *logits, int32_t *tokens);

    /* logits[rows, V] = lm_head(RMSNorm(x)) for the given x rows. */
    void (*logits)(struct ops_context *context, const struct ops_tensor *norm,
                   const struct ops_tensor *head, const struct ops_rows *rows, const float *x,
                   float *logits);
};

const struct ops *ops_ref(void);
const struct ops *ops_cpu(void);
const struct ops *ops_cuda(void); /* where RAMBAD_CUDA is defined */

#endif
