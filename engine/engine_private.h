/* engine_private.h - the engine's insides, for engine.c, session.c and model.c alone.
 * Thread: the engine's, but for `stats`. Owns what engine.h says. */
#ifndef ENGINE_ENGINE_PRIVATE_H
#define ENGINE_ENGINE_PRIVATE_H

#include <pthread.h>

#include "engine/engine.h"
#include "engine/memory.h"
#include "engine/ops.h"
#include "engine/session.h"
#include "engine/weights.h"

struct engine_noted_pick {
    uint32_t item;
    struct engine_pick pick;
};

struct engine {
    struct model_config config;
    struct weights weights;
    struct tokenizer *tokenizer; /* NULL: random weights without one */
    const struct ops *ops;
    struct ops_context *context;
    struct memory memory;
    struct chunk_io io;
    struct engine_info info;
    char model_name[256];
    enum ops_dtype memory_dtype;
    bool states_bf16;
    size_t state_numbers; /* of one session: all layers */
    size_t state_bytes;   /* that they take */
    void *packed;         /* room for a packed state, memory of ops->alloc; of fp32 states alone */
    const struct engine_session
        *packed_of; /* the rounded session whose state it is; NULL: nobody's */
    struct list sessions;
    struct model *model;        /* scratch of the forward pass */
    struct model_item *running; /* and of a step; grows to what one needs */
    size_t running_capacity;
    /* What the last step read: as noted, layer by layer, and in the order of its items. */
    struct engine_noted_pick *noted;
    struct engine_pick *picks;
    size_t pick_count, pick_capacity;
    pthread_mutex_t stats_lock;
    struct engine_stats stats, counted; /* published under the lock; the engine's own */
};

/* Of the numbers that one Mamba-2 layer's `ssm` holds. */
static inline size_t engine_ssm_numbers(const struct engine *engine)
{
    return (size_t)engine->config.inner_size * engine->config.state_size;
}

/* What they take: whole words, since floats lie behind. */
static inline size_t engine_ssm_bytes(const struct engine *engine, bool bf16)
{
    const size_t numbers = engine_ssm_numbers(engine);
    return (bf16 ? (numbers + 1) / 2 : numbers) * sizeof(float);
}

static inline size_t engine_conv_numbers(const struct engine *engine)
{
    return (size_t)(engine->config.conv_kernel - 1) * engine->config.conv_size;
}

/* Of all layers' state, each its ssm and then its conv. */
static inline size_t engine_state_bytes(const struct engine *engine, bool bf16)
{
    return engine->config.mamba_count *
           (engine_ssm_bytes(engine, bf16) + engine_conv_numbers(engine) * sizeof(float));
}

/* Waits for the backend; where it is broken (a GPU that failed), says so and ends the process:
 * nothing computed since the last call can be trusted, and memories come back from disk. Called
 * before anything leaves the engine: tokens, chunks, snapshots. */
void engine_must_work(const struct engine *engine);

/* One sequence of a forward pass. */
struct model_item {
    struct engine_session *session;
    struct engine_step_item *step;
    struct ops_segment segment;
    size_t pick_first, pick_count; /* in engine->picks */
    enum status status;
};

STATUS_CHECKED enum status model_create(struct engine *engine, uint32_t max_rows,
                                        struct model **out);
/* Chunks that one pass can complete. */
size_t model_chunk_room(const struct model *model);
void model_destroy(struct engine *engine, struct model *model);
/* Carries the items forward: all layers, chunks appended, logits and target scores where wanted. */
void model_forward(struct engine *engine, struct model_item *items, uint32_t count);

#endif
