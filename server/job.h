/* job.h - what the loop asks of the engine's thread, and the events that come back.
 * Thread: a job is made on the loop, crosses to the engine's thread with job_submit, and belongs
 * to it until its EVENT_DONE has been delivered on the loop; the loop keeps only the handle for
 * job_cancel and job_append_block. Events are delivered on the loop, in order, and freed there
 * after event_cb returns.
 * Owns what its fields point to; job_submit takes it all.
 *
 * Every submitted job gets exactly one EVENT_DONE, last, whatever happens: success, failure,
 * cancel, shutdown. A success is sent only after the commit: what it acknowledges is on disk. */
#ifndef SERVER_JOB_H
#define SERVER_JOB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"
#include "proto/limits.h"
#include "proto/status.h"

struct engine_thread; /* server/engine_thread.h */
struct storage_keep;  /* storage/storage.h */
struct job;           /* a handle; struct job_generate or job_append inside engine_thread.c */

enum event_kind {
    EVENT_STARTED,  /* the job left the queue: prompt tokens, of which cached */
    EVENT_BLOCK,    /* one block of an append was prefilled, the next may come */
    EVENT_PROGRESS, /* prefill moved on; append: so far it is durable */
    EVENT_ECHO,     /* log probabilities of the prompt's tokens, once, when asked for */
    EVENT_TOKEN,    /* one generated token of one choice */
    EVENT_FINISHED, /* one choice is complete */
    EVENT_DONE      /* the job is over */
};

enum finish_reason { FINISH_STOP, FINISH_LENGTH };

struct event {
    enum event_kind kind;
    /* STARTED, PROGRESS, DONE */
    uint64_t prompt_tokens, cached_tokens, completion_tokens;
    uint64_t resumed_tokens; /* STARTED: of the cached ones, those that the request had sent */
    uint64_t tokens_done, tokens_total; /* of this job's prefill; total 0: not known (append) */
    uint64_t position;                  /* of the memory: committed position, in tokens */
    uint64_t text_bytes;                /* of the memory: committed bytes of text */
    /* ECHO: [prompt_tokens], the first is NaN */
    const float *echo_logprobs;
    const struct sampler_top *echo_tops; /* [prompt_tokens * echo_top_count] */
    uint32_t echo_top_count;
    /* TOKEN, FINISHED */
    uint32_t choice;
    int32_t token;
    float logprob;
    uint32_t top_count;
    const struct sampler_top *tops;
    const struct engine_pick *picks; /* when asked for */
    uint32_t pick_count;
    const char *text; /* what may be sent now: whole characters, no part of a stop string; a
                         FINISHED carries the rest. May be empty. */
    size_t text_size;
    enum finish_reason finish_reason; /* FINISHED */
    int32_t stop_index;               /* FINISHED by a stop string: its index, else -1 */
    double cumulative_logprob;        /* FINISHED: for best_of */
    /* DONE */
    enum status status;
    const struct error *error; /* when status */
    double queue_seconds, prefill_seconds, decode_seconds, commit_seconds;
};

typedef void (*job_event_cb)(void *context, const struct event *event);

/* How it is to be served beside others; all zeros: as everybody's. */
struct job_terms {
    char tenant[LIMITS_ID_BYTES]; /* the API key's name; "": nobody's in particular */
    uint32_t weight;              /* of its share; 0: 1 */
    double priority;              /* seconds: as if it had come so much later; under 0: earlier */
    double timeout;               /* seconds from now on; 0: none. Then STATUS_TIMEOUT */
};

struct job_generate {
    char request_id[LIMITS_ID_BYTES];
    struct job_terms terms;
    char memory[LIMITS_ID_BYTES]; /* "": none; leaves nothing but a prefix for the tenant's next */
    bool memory_write;            /* commit prompt and completion, every generated token of it, to
                                     `memory`; choices must be 1 */
    int32_t *tokens;              /* malloced, taken; may be empty when the memory has logits. A
                                     STORAGE_TOKEN_MARK: behind this one the state is rounded, as it
                                     was when the token was read the first time */
    size_t token_count;
    uint64_t text_bytes; /* of the prompt, for the memory's count */
    uint32_t choices;    /* sequences sampled from the one prefilled prompt; seed + choice index */
    uint32_t max_tokens; /* 0: only prefill (and echo) */
    bool ignore_eos;
    struct sampler_params sampling;  /* bias array malloced, taken */
    char *stop[LIMITS_STOP_STRINGS]; /* malloced, taken */
    size_t stop_sizes[LIMITS_STOP_STRINGS];
    uint32_t stop_count;
    bool echo_logprobs;
    bool retrieval;
    bool has_at; /* the memory must stand at `at` tokens, else STATUS_CONFLICT before anything */
    uint64_t at;
    bool settles; /* the memory is ephemeral, and lasts from this turn on */
    bool makes; /* the memory is not there yet: the job makes it, with what is known of the prompt's
                   beginning in it; it settles. The tokens and text_bytes are of the whole of it */
    int64_t expires_s; /* of a memory that it makes: seconds after its last use; 0: never */
    const struct storage_keep *keep; /* commit with the turn; NULL: nothing. Borrowed, with all that
                                        it points to, until EVENT_DONE */
    bool waits; /* the commit waits behind EVENT_FINISHED for job_go_on, for `keep` to be filled */
    bool has_receipt; /* commit, with the turn, what was answered: `receipt_head`, malloced, taken,
                         "FINISH PROMPT CACHED COMPLETION\\n" and the text */
    unsigned char receipt[LIMITS_RECEIPT_NAME_BYTES];
    char *receipt_head;
};

struct job_append {
    char request_id[LIMITS_ID_BYTES];
    struct job_terms terms;
    char memory[LIMITS_ID_BYTES];
    int64_t expected_text_bytes; /* the memory must hold exactly these bytes of text, else
                                    STATUS_CONFLICT: how a resumed or retried upload cannot apply
                                    twice; -1: wherever it stands */
    bool has_receipt; /* commit, with each block, how far it has come: "START TOKENS POSITION
                         TEXT_BYTES IS_LAST SECONDS" */
    unsigned char receipt[LIMITS_RECEIPT_NAME_BYTES];
    bool goes_on;                           /* with an upload that broke off, */
    uint64_t earlier_start, earlier_tokens; /* which began at that byte and added so many */
};

/* Both take what the fields point to when they return STATUS_OK. STATUS_BUSY: the queue is full
 * (429; engine_thread_retry_after says for how long). STATUS_UNAVAILABLE: draining. STATUS_CONFLICT
 * comes as an event: the memory is busy with another turn. Loop thread. */
STATUS_CHECKED enum status job_submit_generate(struct engine_thread *engine_thread,
                                               const struct job_generate *generate,
                                               job_event_cb event_cb, void *context,
                                               struct job **out);
STATUS_CHECKED enum status job_submit_append(struct engine_thread *engine_thread,
                                             const struct job_append *append, job_event_cb event_cb,
                                             void *context, struct job **out);
/* One more block of an append: `tokens` malloced, taken. A block with tokens is answered by an
 * EVENT_BLOCK once it is prefilled; the caller keeps at most LIMITS_APPEND_BLOCKS_WAITING of them
 * outstanding and stops reading its socket meanwhile. An EVENT_PROGRESS tells of each commit, which
 * covers one block or more. `last` (a block of no tokens is allowed) ends the append. Loop thread,
 * before EVENT_DONE. */
void job_append_block(struct job *job, int32_t *tokens, size_t token_count, uint64_t text_bytes,
                      bool last);
/* What the job's commit waited for is there. Loop thread, once, between EVENT_FINISHED and
 * EVENT_DONE of a job that `waits`. */
void job_go_on(struct job *job);
/* Asks for an early end: EVENT_DONE with STATUS_CANCELLED follows, unless it was already over.
 * The memory stays at its last commit. Loop thread, any number of times before EVENT_DONE. */
void job_cancel(struct job *job);

#endif
