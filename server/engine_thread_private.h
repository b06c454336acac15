/* engine_thread_private.h - the insides of the engine's thread, for engine_thread.c, engine_run.c,
 * live_memory.c and the jobs.
 * Thread: the engine's, unless a field says otherwise.
 *
 * Three roads lead in: jobs submitted by the loop, answers of storage (replies), and wake-ups for
 * flags that the loop sets on a job. One leads out: events, delivered on the loop by uv_async. */
#ifndef SERVER_ENGINE_THREAD_PRIVATE_H
#define SERVER_ENGINE_THREAD_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <uv.h>

#include "proto/base/buf.h"
#include "proto/base/list.h"
#include "server/engine_thread.h"
#include "server/job.h"
#include "server/prefix.h"
#include "server/sched.h"
#include "server/session_store.h"

/* An answer of storage on its way from the writer thread. handle_cb runs on the engine's thread
 * and frees it or reuses it. */
struct reply {
    struct list node;
    struct engine_thread *thread;
    void (*handle_cb)(struct reply *reply, enum status status);
    enum status status;
    void *context;
};

/* Of the loop's: whether a memory can be let go of; answered once the thread has looked. */
struct release {
    struct list node;
    char id[LIMITS_ID_BYTES];
    void (*released_cb)(void *context, enum status status);
    void *context;
    enum status status;
    bool answered;
};

/* A memory that is in use or kept in RAM between turns. */
struct live_memory {
    struct list node; /* least recently used first */
    char id[LIMITS_ID_BYTES];
    uint64_t branch;
    uint64_t position, text_bytes; /* committed */
    struct engine_session *session;
    struct job *user; /* the one job that writes to it; NULL: idle */
};

/* One sequence being generated. */
struct sequence {
    struct job *job;
    uint32_t index;           /* the choice */
    char id[LIMITS_ID_BYTES]; /* of its ephemeral memory, "" where it writes to the job's */
    uint64_t branch;
    struct engine_session *session;
    struct sampler *sampler;
    struct sampler_stop *stop;
    struct tokenizer_decoder decoder;
    int32_t token; /* sampled, not consumed yet */
    uint32_t generated;
    uint64_t token_ns; /* when it was sampled */
    double logprob_sum;
    bool finished; /* nothing more to sample */
    bool settled;  /* the last token is consumed, or need not be */
};

/*  QUEUED -> OPENING -> PREFILL -> (FORKING ->) DECODE -> COMMITTING -> DONE
 *  Every state but DONE can go to ABORTING when the job fails or is cancelled; ABORTING waits for
 *  storage to drop what was not committed, then goes to DONE. An append has no FORKING or DECODE:
 *  it goes between PREFILL and waiting for its next block, and to COMMITTING after the last. */
enum job_state {
    JOB_QUEUED,
    JOB_OPENING,
    JOB_PREFILL,
    JOB_FORKING,
    JOB_DECODE,
    JOB_COMMITTING,
    JOB_ABORTING,
    JOB_DONE
};

struct append_block {
    struct list node;
    int32_t *tokens;
    size_t token_count;
    uint64_t text_bytes;
    bool last;
};

struct job {
    struct list node;      /* in the thread's queue or its running list */
    struct list loop_node; /* the loop's list of jobs not done */
    struct sched_entry entry;
    struct engine_thread *thread;
    bool is_append;
    struct job_generate generate;
    struct job_append append;
    job_event_cb event_cb;
    void *context;
    atomic_int cancelled;   /* an enum status, set by the loop: why it shall end early; 0: not */
    atomic_bool may_commit; /* set by the loop, for a job that waits */
    struct list blocks;     /* of an append, from the loop; under the thread's lock */

    enum job_state state;
    enum status status; /* why it ends */
    struct error err;
    struct live_memory *memory;       /* written by this job */
    struct prefix_entry *prefix;      /* its entry, where it is one; see job_prefix.c */
    struct prefix_entry *prefix_from; /* to branch off from, until that is done */
    struct prefix_entry *prefix_wait; /* a commit of it is waited for */
    uint64_t prefix_border;           /* worth a snapshot on the way; 0: none is */
    uint64_t resumed;                 /* tokens of the prompt that need not be read */
    struct sequence *sequences;       /* [generate.choices]; [0] prefills */
    uint32_t sequence_count;          /* those with a session */
    uint32_t pending;                 /* storage answers that the present state waits for */
    size_t prompt_done;               /* tokens of the prompt or of the block under way */
    size_t *marks;                    /* of the prompt: tokens with one, those done first */
    size_t mark_count, marks_done;
    uint64_t cached, added; /* tokens there before; prefilled by this job */
    uint32_t completion_tokens;
    uint64_t start_text_bytes;
    struct append_block *block; /* under way */
    uint32_t commits_pending;
    bool ended;       /* the append's last block has been prefilled */
    bool last_seen;   /* and its commit is queued */
    bool turn_open;   /* a commit of the append is: the others go on with its turn */
    uint64_t due_ns;  /* when its next one shall be */
    int32_t *written; /* tokens of the next commit: generated, beside the prompt; or of blocks */
    size_t written_count, written_capacity;
    uint64_t written_text_bytes;
    struct buf said; /* for the receipt: the text as it went out */
    enum finish_reason finish_reason;
    uint64_t began_text_bytes; /* an append: where it, or what it goes on with, began */
    float *echo;
    struct sampler_top *echo_tops;
    int32_t *targets; /* of the slice under way, with its results */
    float *slice_logprobs;
    struct sampler_top *slice_tops;
    uint32_t cursor; /* the choice that goes first in the next step */
    uint64_t submitted_ns, started_ns, prefilled_ns, decoded_ns;
    uint64_t deadline_ns; /* 0: none */
};

/* The batch of one step, as it is put together. */
struct step_builder {
    struct engine_step_item items[2 * LIMITS_RUNNING + LIMITS_CHOICES];
    struct job *jobs[2 * LIMITS_RUNNING + LIMITS_CHOICES];
    struct sequence *sequences[2 * LIMITS_RUNNING + LIMITS_CHOICES];
    uint32_t count;
};

struct engine_thread {
    struct engine *engine;
    struct storage *storage;
    struct session_store *store;
    struct prefix *prefix; /* the engine's thread's; NULL: nothing is kept */
    size_t prefix_room;    /* storage_append_room of an idle writer */
    bool prefix_thins;     /* an entry is giving up a snapshot */
    struct engine_thread_options options;
    pthread_t thread;

    pthread_mutex_t lock; /* of what follows, up to the next comment */
    pthread_cond_t wake;
    bool woken, closing;
    struct list inbox;   /* jobs */
    struct list replies; /* from the writer thread */
    struct list outbox;  /* events, to the loop */
    struct list spare;   /* events that were delivered, for those to come */
    size_t spare_count;
    struct list releases;
    struct engine_thread_stats stats;
    struct sched_gate gate;

    /* The engine's thread alone. */
    struct list queue;   /* jobs waiting */
    struct list running; /* jobs admitted, oldest first */
    struct list memories;
    uint64_t evicted[1024], evictions; /* hashes of the ids of memories that had to leave RAM */
    size_t outstanding;                /* storage answers to come */
    struct buf decoded, text;          /* of the token under way */
    struct sched sched;
    struct step_builder builder;
    struct engine_thread_stats counted;

    /* The loop alone. */
    uv_loop_t *loop;
    uv_async_t async;
    uv_timer_t deadline;
    struct list jobs; /* submitted, EVENT_DONE not delivered */
    size_t job_count;
    double retry_after;
    bool draining;
    void (*drained_cb)(void *context);
    void *drained_context;
    void (*closed_cb)(void *context);
    void *closed_context;
    int handles_open;
};

uint64_t engine_thread_now_ns(void);
double engine_thread_seconds(uint64_t ns);
/* The thread: its argument is the struct engine_thread. */
void *engine_thread_run(void *thread);
/* A reply whose handle_cb will run; counted as outstanding. NULL: out of memory. */
struct reply *reply_create(struct engine_thread *thread,
                           void (*handle_cb)(struct reply *reply, enum status status),
                           void *context);
/* The storage call was refused: the reply will not come. */
void reply_cancel(struct reply *reply);
/* storage_done_cb that queues `context` (struct reply). */
void reply_done_cb(void *context, enum status status);
void reply_free(struct reply *reply);

/* Copies the event and what it points to, and sends it to the loop. */
void job_post(struct job *job, const struct event *event);
/* The job is over: posts EVENT_DONE; the job must not be touched after it. */
void job_finish(struct job *job);
/* Ends the job with a status, unless it is ending already. */
void job_fail(struct job *job, enum status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- live_memory.c ---- */

struct live_memory *live_memory_find(struct engine_thread *thread, const char *id);
/* Opens the memory for `job`, which becomes its user: from RAM, else from storage.
 * STATUS_CONFLICT: another job uses it. */
STATUS_CHECKED enum status live_memory_open(struct engine_thread *thread, const char *id,
                                            struct job *job, struct live_memory **out,
                                            struct error *err);
/* The job leaves; the session stays in RAM as long as the budget allows. */
void live_memory_release(struct engine_thread *thread, struct live_memory *memory);
/* Destroys the session and forgets the memory. */
void live_memory_drop(struct engine_thread *thread, struct live_memory *memory);
void live_memory_drop_all(struct engine_thread *thread);
/* A session over what storage holds of `id`; the log says for whom (cache_miss), and the `reason`
 * that it was not in RAM: "evicted" (see --session-memory), "first_use", "in_use" by a writer that
 * it is read beside, "other_position" than the one wanted, "prefix": each of several choices goes on
 * alone. */
STATUS_CHECKED enum status live_memory_load(const struct job *job, const char *id,
                                            const char *reason, uint64_t *position,
                                            struct engine_session **out, struct error *err);
/* `prefix` and 24 hexadecimal digits. */
void live_memory_new_id(const char *prefix, char id[LIMITS_ID_BYTES]);
/* Deletes an ephemeral memory, when storage gets to it. */
void live_memory_delete_ephemeral(struct engine_thread *thread, const char *id);

/* ---- job_prefix.c: requests that name no memory ---- */

/* Reads the index from storage. */
STATUS_CHECKED enum status job_prefix_open(struct engine_thread *thread, struct error *err);
void job_prefix_close_all(struct engine_thread *thread);
/* Finds what the job goes on from. True: it will be on its way by itself; false: it is to make an
 * ephemeral memory of its own, from job->prefix_from at `*at` where that is set. Where nothing is
 * gone on from, the log says why (prefix_miss): "new", "no_snapshot" of what was said before, "echo"
 * asks of each token what it was likely, or an error's code. Else (prefix_hit) it says how many of
 * the prompt's tokens were said before, and how many of those a snapshot has. */
bool job_prefix_start(struct job *job, uint64_t *at);
/* The job's session stands at `position` of memory `id`: whether the prompt begins like that. It
 * need not be read so far, then. Else a memory that is only the job's shall be made. */
bool job_prefix_take(struct job *job, const char *id, const struct engine_session *session);
/* Makes the memory of a job that `makes` one, with the longest beginning of the prompt that is
 * known, and opens it; after the turn is committed, lets others begin with what it holds. */
void job_prefix_make(struct job *job);
void job_prefix_leave(struct job *job);
/* Rows of the prompt's next slice, at most `n`: it ends where a snapshot is wanted. */
uint32_t job_prefix_slice(const struct job *job, uint32_t n);
/* More of the prompt, all of it, all that was to be said: leaves snapshots. */
void job_prefix_moved(struct job *job);
void job_prefix_prompt_done(struct job *job);
void job_prefix_finish(struct job *job);
/* The job is over. */
void job_prefix_close(struct job *job);
/* Deletes what is too much. */
void job_prefix_sweep(struct engine_thread *thread);

/* ---- job_generate.c, job_append.c ---- */

/* Opens what the job writes to or goes on from: in job_generate_start, and when that had to wait
 * for a commit. */
void job_generate_open(struct job *job);
/* A memory that is only the job's, and empty. */
void job_generate_open_empty(struct job *job);
/* The session is there: on with the prompt. */
void job_generate_begin(struct job *job);
/* Of the prompt and what was kept of the answer. */
int32_t job_generate_token(const struct job *job, size_t index);
/* The session's snapshot, malloced and counted. NULL: out of memory. */
void *job_snapshot(struct engine_thread *thread, const struct engine_session *session,
                   size_t *size);
/* Queues a commit of those tokens and the session's snapshot to memory `id`. */
STATUS_CHECKED enum status job_generate_commit(struct job *job, const char *id,
                                               const struct engine_session *session, size_t from,
                                               size_t to, uint64_t text_bytes, struct reply *reply);

/* Each runs at admission. */
void job_generate_start(struct job *job);
void job_append_start(struct job *job);
/* Does what is to be done before a step, and says in job->entry what the job wants of it. */
void job_generate_prepare(struct job *job);
void job_append_prepare(struct job *job);
/* Adds what the scheduler granted to the step. */
void job_generate_build(struct job *job, const struct sched_pick *pick,
                        struct step_builder *builder);
void job_append_build(struct job *job, const struct sched_pick *pick, struct step_builder *builder);
/* Takes the result of one of its items. */
void job_generate_result(struct job *job, struct sequence *sequence,
                         const struct engine_step_item *item);
void job_append_result(struct job *job, const struct engine_step_item *item);
/* Frees what the job holds, sessions included; its memory is released or dropped. */
void job_generate_close(struct job *job);
void job_append_close(struct job *job);

void step_add(struct step_builder *builder, struct job *job, struct sequence *sequence,
              const struct engine_step_item *item);
/* Tokens to the end of the next slice of a prefill at `position`, so that slices end at multiples
 * of slice_tokens whatever the beginnings. */
uint32_t step_slice(const struct engine_thread *thread, uint64_t position, size_t left);

#endif
