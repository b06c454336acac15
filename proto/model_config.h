/* model_config.h - a model's config.json as plain numbers, and the order of its layers.
 * Thread: any (pure functions; the struct is immutable once parsed). Owns nothing.
 * Source of the keys: the published RAMba checkpoints. */
#ifndef PROTO_MODEL_CONFIG_H
#define PROTO_MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define MODEL_LAYERS_MAX 512 /* 3B has 69 */

enum model_layer {
    MODEL_LAYER_MAMBA,
    MODEL_LAYER_CHUNKING,
    MODEL_LAYER_RETRIEVAL,
    MODEL_LAYER_HSA
};

struct model_config {
    uint32_t hidden_size; /* d */
    uint32_t vocab_size;  /* V */
    bool tie_word_embeddings;
    int32_t bos_token, eos_token; /* -1: none */

    /* Mamba-2 blocks. */
    uint32_t inner_size;     /* di = expand * d */
    uint32_t mamba_heads;    /* Hm = di / P */
    uint32_t mamba_head_dim; /* P */
    uint32_t state_size;     /* N */
    uint32_t state_groups;   /* G */
    uint32_t conv_kernel;
    uint32_t conv_size;   /* di + 2 G N: columns of xBC */
    uint32_t proj_size;   /* 2 di + 2 G N + Hm: rows of in_proj */
    float norm_epsilon;   /* layer_norm_epsilon: Mamba-2 blocks and norm_f */
    float dt_min, dt_max; /* time_step_limit */
    bool use_bias, use_conv_bias;

    /* Chunk memory. */
    uint32_t chunk_tokens;    /* S */
    uint32_t topk;            /* K */
    uint32_t heads;           /* H: query heads */
    uint32_t kv_heads;        /* Hkv */
    uint32_t head_dim;        /* hd = d / H */
    uint32_t retrieval_dim;   /* r */
    uint32_t retrieval_heads; /* Hr */
    uint32_t encoder_layers;
    uint32_t encoder_kv_heads;
    uint32_t encoder_mlp_size;
    uint32_t slide_window; /* tokens, when mask_slide_window; never under chunk_tokens */
    bool encoder_prenorm, qk_norm, landmark_norm, softmax_weights, softmax1, pos_decay,
        mask_slide_window;

    uint32_t group_count; /* upper groups, each with one retrieval layer */
    uint32_t mamba_count;
    uint32_t layer_count;
    uint8_t layers[MODEL_LAYERS_MAX]; /* enum model_layer, in the order of backbone.layers */
};

#define MODEL_MEMORY_EPSILON 1e-6f /* RMSNorm epsilon of the chunking, retrieval and HSA layers */

/* Parses the text of config.json. STATUS_INVALID: not JSON, a key missing or out of range.
 * STATUS_UNSUPPORTED: an option that this engine does not compute, named. */
STATUS_CHECKED enum status model_config_parse(const char *json, size_t size,
                                              struct model_config *config, struct error *err);

/* Number of weights, embeddings counted once when tied. */
uint64_t model_config_parameters(const struct model_config *config);

#endif
