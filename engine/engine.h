/* engine.h - RAMba: open a model, keep sessions, step a batch of them.
 * Thread: everything here runs on the engine's thread, except the functions marked "any thread".
 * Owns the mapped weights, the backend with its worker threads, and the pool of K/V pages.
 *
 * A step takes any mix of sequences, each with its next few tokens (one when decoding, a slice
 * when prefilling), and carries each forward by exactly those. What a sequence computes does not
 * depend on what else is in the batch: same tokens in the same slices, same numbers. */
#ifndef ENGINE_ENGINE_H
#define ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/chunk_io.h"
#include "engine/sampler.h"
#include "engine/tokenizer.h"
#include "proto/model_config.h"
#include "proto/status.h"

struct engine;
struct engine_session;

enum engine_backend {
    ENGINE_BACKEND_AUTO,
    ENGINE_BACKEND_REF,
    ENGINE_BACKEND_CPU,
    ENGINE_BACKEND_CUDA
};
enum engine_dtype { ENGINE_DTYPE_BF16, ENGINE_DTYPE_FP32 };

struct engine_options {
    const char *model_path;      /* folder with config.json, *.safetensors, tokenizer.json */
    enum engine_backend backend; /* AUTO: the fastest that this build and machine have */
    uint32_t threads;            /* CPU workers, the engine's own thread among them; 0: all CPUs */
    size_t host_memory_bytes;    /* budget of resident K/V pages, of all sessions together */
    size_t device_memory_bytes;  /* a GPU's own copies of K/V pages; 0: an eighth of its memory */
    enum engine_dtype memory_dtype; /* chunk memories and landmarks; BF16 halves everything */
    bool landmarks_fp8;    /* a GPU scans landmarks in fp8 and scores the best again in bf16, which
                              then lie in the host's memory; bf16 memory alone */
    bool states_bf16;      /* recurrent states in half the memory, rounded once a step */
    uint32_t slice_tokens; /* most rows of one sequence in one step; 0: the backend's */
    uint32_t running_max;  /* sequences in a step that scratch memory is made for; 0:
                              LIMITS_RUNNING */
    struct chunk_io io;    /* copied */
    /* Weights of random numbers for the shape in config.json when the folder holds none: for
     * benchmarks. 0: off, else the seed. */
    uint64_t random_weights_seed;
};

/* Opens the model: maps and checks every tensor. Refusals name the file, the tensor and the
 * expectation. STATUS_NOT_FOUND, STATUS_INVALID, STATUS_UNSUPPORTED, STATUS_IO, STATUS_NO_MEMORY.
 */
STATUS_CHECKED enum status engine_open(const struct engine_options *options, struct engine **out,
                                       struct error *err);
/* All sessions must be destroyed before. */
void engine_close(struct engine *engine);
/* Sets the io after open, before the first session: storage needs engine_info's sizes to open. */
void engine_set_io(struct engine *engine, const struct chunk_io *io);

struct engine_info { /* constant after open; any thread */
    const struct model_config *config;
    const char *model_name; /* the folder's base name */
    uint64_t fingerprint;   /* of config, weights and memory dtype: chunk memories of one
                               fingerprint are meaningless to another */
    const char *backend;    /* "cpu (avx2, 2 threads)" */
    size_t kv_bytes;        /* of one chunk: 2 * S * Hkv * hd * element size, K then V */
    size_t landmark_bytes;  /* of one chunk: r * element size */
    size_t weight_bytes;
    uint32_t slice_tokens, running_max;
    uint32_t head_count;  /* Hr: retrieval heads; each picks its own chunks */
    uint32_t group_count; /* upper groups; each retrieves anew */
};
const struct engine_info *engine_get_info(const struct engine *engine);
/* Any thread. Borrowed. */
const struct tokenizer *engine_tokenizer(const struct engine *engine);

/* ---- sessions ---- */

/* A session at position 0, or at `snapshot`'s position with its landmarks read through chunk_io.
 * `ranges` (copied) says which branch holds which chunks; the last is the session's own.
 * STATUS_MISMATCH (another model's snapshot), STATUS_CORRUPT, STATUS_NO_MEMORY, and chunk_io's. */
STATUS_CHECKED enum status engine_session_create(struct engine *engine,
                                                 const struct chunk_range *ranges,
                                                 size_t range_count, const void *snapshot,
                                                 size_t snapshot_bytes, struct engine_session **out,
                                                 struct error *err);
/* A copy that shares the past (landmark blocks by reference, pages by name) and writes its own
 * chunks to `branch` from here on. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status engine_session_fork(const struct engine_session *session,
                                               uint64_t branch, struct engine_session **out);
/* Pages of its own branch that only this session could reach may stay cached. */
void engine_session_destroy(struct engine_session *session);
/* Forgets the pages of the session's own branch from chunk `first` on, which are to be truncated or
 * deleted. Takes a time that their number alone decides. */
void engine_session_forget(struct engine_session *session, uint64_t first);
/* Tokens consumed so far. */
uint64_t engine_session_position(const struct engine_session *session);
/* Resident bytes: state, partial chunk, landmarks (shared blocks counted in full). */
size_t engine_session_bytes(const struct engine_session *session);
/* What a session of so many tokens takes. */
size_t engine_session_bytes_at(const struct engine *engine, uint64_t tokens);
/* Whether logits of the last position are there, so that a token can be sampled at once. */
bool engine_session_has_logits(const struct engine_session *session);
/* Rounds the recurrent state to 15 bits a number (see packed.h), so that a snapshot of it takes
 * half the room and still brings back the very state that the session goes on with. Until the next
 * step a second time changes nothing. A state in bf16 stays as it is: it takes half the room
 * already. */
void engine_session_round(struct engine_session *session);
bool engine_session_is_rounded(const struct engine_session *session);
/* A snapshot holds the recurrent state, the conv tails, the partial chunk's hidden states, the
 * last logits if there are any, the position and the fingerprint; versioned, little-endian. The
 * state is in bf16 where the engine keeps it so, else packed where it is rounded, and in full
 * otherwise: always the session that is made of it computes the same bits. An engine whose states
 * are of the other type takes it too, and goes on with what that makes of it.
 * engine_session_snapshot writes exactly engine_session_snapshot_bytes bytes. */
size_t engine_session_snapshot_bytes(const struct engine_session *session);
/* Of the largest that any session of this model can have. Any thread. */
size_t engine_snapshot_bytes_most(const struct engine *engine);
void engine_session_snapshot(const struct engine_session *session, void *out);

/* ---- the step ---- */

struct engine_pick { /* one chunk one token read */
    uint32_t group, head;
    uint64_t chunk;
    float weight; /* stick-breaking or softmax weight, in [0, 1] */
};

struct engine_step_item {
    /* in */
    struct engine_session *session; /* at most once in a step */
    const int32_t *tokens;          /* borrowed during the step; ids checked by the caller */
    uint32_t token_count;           /* 1 to slice_tokens; 0: sample from the last logits again */
    bool want_logits;               /* compute and keep the last position's logits */
    struct sampler *sampler;        /* NULL: do not sample; implies want_logits */
    bool want_picks;                /* report what the last position read */
    /* Echoed prompts: for row i the log probability of targets[i] (its following token), and the
     * `target_top_count` best alternatives of each row. targets NULL: off; -1: skip the row. */
    const int32_t *targets;
    uint32_t target_top_count;
    float *target_logprobs;          /* out [token_count] */
    struct sampler_top *target_tops; /* out [token_count * target_top_count] */
    /* out */
    enum status status;              /* STATUS_OK: done. STATUS_BUSY: nothing happened to this
                                        sequence, its chunks found no room (unacknowledged pages, a
                                        full writer queue, or many others' in the same step); step
                                        it again after an engine_chunk_durable. Else the session is lost: destroy
                                        it              and reopen it from its last snapshot. */
    struct sampler_result result;    /* when sampler */
    const struct engine_pick *picks; /* borrowed until the next step */
    uint32_t pick_count;
};

/* Carries every item forward. STATUS_INVALID, and nothing happens, when they have more than
 * slice_tokens + running_max tokens; else STATUS_OK unless the engine itself is broken (then every
 * session is lost). Each item has its own status. */
STATUS_CHECKED enum status engine_step(struct engine *engine, struct engine_step_item *items,
                                       size_t count);
/* The chunk is on disk: its page may now be evicted. `status` other than STATUS_OK: it never will
 * be; the page is dropped and a session that still needs it fails with that status. */
void engine_chunk_durable(struct engine *engine, struct chunk_key key, enum status status);

struct engine_stats {
    uint64_t page_hits, page_misses, page_evictions, page_read_bytes, page_read_ns;
    uint64_t pages_resident, pages_pinned, page_capacity;
    uint64_t tokens_prefilled, tokens_decoded, chunks_encoded;
    uint64_t landmark_bytes; /* resident */
    /* A GPU's own copies of pages, and what copying them there took; zeros without one. */
    uint64_t device_page_capacity, device_pages, device_page_hits, device_page_misses;
    uint64_t device_copy_bytes, device_copy_ns;
    /* With a GPU: chunks read by tokens that came one at a time, and of these what the token before
     * had read too; pages brought because of that before a token asked for them, and those that one
     * then did, from disk to the host and from the host to the device; steps in which sequences
     * went on without others, whose pages were on their way. */
    uint64_t picks, picks_repeated;
    uint64_t pages_expected, pages_expected_hits;
    uint64_t device_pages_expected, device_pages_expected_hits;
    uint64_t steps_divided;
};
/* Any thread: a consistent enough copy for metrics. */
void engine_get_stats(const struct engine *engine, struct engine_stats *stats);

#endif
