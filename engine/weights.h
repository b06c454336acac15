/* weights.h - a model's tensors, mapped from safetensors files and checked one by one.
 * Thread: immutable after open, any. Owns the mappings; tensors point into them.
 * Names and shapes: as published checkpoints have them (backbone.layers.{i}...). */
#ifndef ENGINE_WEIGHTS_H
#define ENGINE_WEIGHTS_H

#include "engine/ops.h"
#include "proto/model_config.h"
#include "proto/status.h"

struct weights_layer {
    enum model_layer kind;
    union {
        struct ops_mamba_weights mamba;
        struct ops_chunking_weights chunking;
        struct ops_retrieval_weights retrieval;
        struct ops_hsa_weights hsa;
    };
};

struct weights {
    struct weights_layer *layers;                   /* [config.layer_count] */
    struct ops_tensor embeddings, final_norm, head; /* head is the embeddings when tied */
    size_t bytes;                                   /* of all tensors, tied ones once */
    uint64_t hash; /* of names, shapes and the first and last 4 KiB of each tensor */
    struct weights_private *mapped;
};

/* Opens `folder`'s model.safetensors, or the shards of model.safetensors.index.json. Every tensor
 * of the configuration must be there with its shape, in BF16 or F32, and nothing else but an
 * unused lm_head.weight. With `random_seed`, a folder without weights gets random ones in BF16.
 * STATUS_NOT_FOUND, STATUS_INVALID, STATUS_UNSUPPORTED, STATUS_IO, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status weights_open(const char *folder, const struct model_config *config,
                                        uint64_t random_seed, struct weights *out,
                                        struct error *err);
/* Hands every tensor to `place_cb` once (a tied head follows its embeddings); stops at the first
 * failure and returns it. */
STATUS_CHECKED enum status weights_place(struct weights *weights, const struct model_config *config,
                                         struct ops_context *context, struct error *err,
                                         enum status (*place_cb)(struct ops_context *context,
                                                                 struct ops_tensor *tensor,
                                                                 struct error *err));
void weights_close(struct weights *weights);

#endif
