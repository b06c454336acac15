/* session.h - one sequence: recurrent state, partial chunk, landmarks, last logits, position.
 * Thread: the engine's. Owns its state; landmark blocks are shared by reference count.
 * Private to engine/. */
#ifndef ENGINE_SESSION_H
#define ENGINE_SESSION_H

#include "engine/engine.h"
#include "engine/memory.h"

#define SESSION_NO_PICK UINT64_MAX

struct engine_session {
    struct engine *engine;
    struct list node; /* in the engine's sessions */
    struct chunk_range *ranges;
    size_t range_count;
    uint64_t position;
    enum status failed;             /* a chunk of its own could not be written */
    bool rounded;                   /* the state is what its packed form holds */
    float *state;                   /* of all Mamba-2 layers, memory of ops->alloc */
    struct ops_mamba_state *layers; /* [mamba_count], into state */
    float *partial; /* [S, d]: hidden states of the chunk not complete yet; ops->alloc */
    struct memory_landmarks **blocks;
    const void **block_data, **narrow_data; /* [block_count], what ops_landmarks wants */
    size_t block_count, block_capacity;
    uint64_t chunk_count;
    uint64_t *last_picks; /* [groups, Hr, K] of the last token; NULL where nobody asks */
    bool has_logits;
    float *logits; /* [V], host memory */
    /* Where the backend takes steps: [V], ops->alloc; the last logits are there while `away`, and
     * `largest` is the token of the largest one. */
    float *step_logits;
    bool away, drawn; /* drawn: `token` is what the last step's sampler draws */
    int32_t largest, token;
};

/* The branch that holds chunk `index` of the session, and those behind it up to `*end`. */
uint64_t session_branch_of(const struct engine_session *session, uint64_t index, uint64_t *end);
/* The last logits in host memory, [V]; brought there first when they are away. Borrowed until the
 * next step. */
const float *session_logits(struct engine_session *session);
/* The landmarks of chunks [first, first + count) are written: their twins follow, where there are
 * any. */
void session_landmarks_written(struct engine_session *session, uint64_t first, uint64_t count);
/* Where the landmark of the next chunk goes; chunk_count grows by one. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status session_add_landmark(struct engine_session *session, void **landmark);

#endif
