/* engine_thread.h - the one thread that owns the engine: drains its inbox, lets the scheduler pick
 * a batch, steps the engine, posts events to the loop.
 * Thread: made and closed on the loop; inside, the engine's thread.
 * Owns the engine, the session store and the thread. */
#ifndef SERVER_ENGINE_THREAD_H
#define SERVER_ENGINE_THREAD_H

#include <uv.h>

#include "engine/engine.h"
#include "server/metrics_histogram.h"
#include "server/job.h"
#include "storage/storage.h"

struct engine_thread_options {
    struct engine *engine;   /* taken on success */
    struct storage *storage; /* borrowed; outlives this */
    uint32_t running_max;    /* sequences stepped together; 0: LIMITS_RUNNING */
    uint32_t queue_max;      /* jobs waiting; 0: LIMITS_QUEUE_REQUESTS */
    uint64_t queue_tokens;   /* of their prompts; 0: LIMITS_QUEUE_TOKENS */
    size_t session_bytes;    /* budget of idle sessions kept in RAM between turns */
    uint64_t prefix_bytes;   /* of disk for what requests without a memory said; 0: not kept */
    uint64_t running_bytes;  /* and of those at work; 0: half of the machine's RAM */
    double max_stall;        /* seconds, see server/sched.h; 0: by the backend */
    bool shared;             /* by several keys */
};

STATUS_CHECKED enum status engine_thread_open(uv_loop_t *loop,
                                              const struct engine_thread_options *options,
                                              struct engine_thread **out, struct error *err);
/* No new jobs (STATUS_UNAVAILABLE); running ones go on. drained_cb runs on the loop when none is
 * left. Ends them all with STATUS_UNAVAILABLE after deadline_ms. */
void engine_thread_drain(struct engine_thread *engine_thread, uint64_t deadline_ms,
                         void (*drained_cb)(void *context), void *context);
/* After drained_cb: stops the thread, closes the engine; closed_cb runs on the loop once the
 * handles are gone, then nothing of it is left. */
void engine_thread_close(struct engine_thread *engine_thread, void (*closed_cb)(void *context),
                         void *context);

/* Seconds after which a job that was just refused with STATUS_BUSY may be sent again, by what was
 * measured; told once. One second where nothing was, as for the store's full queue. Loop thread. */
double engine_thread_retry_after(struct engine_thread *engine_thread);

/* A memory was deleted or is about to be: drops its idle session. `busy_cb` answers on the loop
 * with STATUS_CONFLICT when a job is using it now, else STATUS_OK after it was dropped; from then
 * on new jobs naming it get STATUS_NOT_FOUND. */
void engine_thread_release_memory(struct engine_thread *engine_thread, const char *id,
                                  void (*released_cb)(void *context, enum status status),
                                  void *context);

/* What a job may be about: queued, opening, prefill, forking, decode, committing, aborting. */
#define ENGINE_THREAD_STATES 7

/* A consistent enough copy for /metrics. Any thread. */
struct engine_thread_stats {
    struct engine_stats engine;
    uint64_t running, waiting, waiting_tokens;
    uint64_t refused_requests, refused_tokens; /* sent away: too many of these waited */
    uint64_t timeouts_queued, timeouts_running;
    uint64_t states[ENGINE_THREAD_STATES]; /* jobs */
    uint64_t running_bytes, running_bytes_max;
    struct metrics_histogram queue, prefill, per_token, token_gap;
    double max_stall;
    uint64_t stalls; /* gaps that were longer */
    uint64_t sessions_idle, sessions_idle_bytes;
    uint64_t resumes_ram, resumes_disk, resumes_empty;
    uint64_t snapshots_full, snapshots_rounded; /* given to storage */
    uint64_t snapshot_full_bytes, snapshot_rounded_bytes;
    uint64_t prefix_hits, prefix_misses, prefix_tokens; /* tokens: that hits saved */
    uint64_t prefix_evictions, prefix_entries, prefix_bytes;
    uint64_t steps, step_rows, prefill_tokens;
    uint64_t step_ns;
};
void engine_thread_get_stats(const struct engine_thread *engine_thread,
                             struct engine_thread_stats *stats);

#endif
