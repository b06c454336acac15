/* engine_run.c - what the engine's thread does: takes in what comes, admits jobs, puts steps
 * together and hands out their results; and the end of a job. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/engine_thread_private.h"

#define ANSWER_TOKENS 65536u /* that room is kept for; few get as long */
#define IDLE_WAIT_MS 50      /* a bound on sleep, should a wake-up be for something retried */

/* ---- jobs, on the engine's thread ---- */

void job_fail(struct job *job, enum status status, const char *format, ...)
{
    if (job->state == JOB_ABORTING || job->state == JOB_DONE)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(job->err.message, sizeof job->err.message, format, args);
    va_end(args);
    job->status = status;
    job->state = JOB_ABORTING;
}

static double seconds_between(uint64_t from, uint64_t to)
{
    return from && to > from ? (double)(to - from) * 1e-9 : 0;
}

static void observe(struct engine_thread *thread, const struct job *job, const struct event *event)
{
    struct engine_thread_stats *s = &thread->counted;
    metrics_observe(&s->queue, event->queue_seconds);
    if (job->is_append || !job->prefilled_ns)
        return;
    metrics_observe(&s->prefill, event->prefill_seconds);
    if (event->completion_tokens > 1)
        metrics_observe(&s->per_token,
                        event->decode_seconds / (double)(event->completion_tokens - 1));
}

/* Where its time went, and what its key has had of the engine until now. */
static void log_job(const struct job *job, const struct event *event)
{
    const struct job_generate *g = &job->generate;
    const struct job_append *a = &job->append;
    log_event(LOG_DEBUG, "job", "request", LOG_STR, job->is_append ? a->request_id : g->request_id,
              "key", LOG_STR, job->is_append ? a->terms.tenant : g->terms.tenant, "status", LOG_STR,
              status_text(job->status), "queue_seconds", LOG_NUM, event->queue_seconds,
              "prefill_seconds", LOG_NUM, event->prefill_seconds, "decode_seconds", LOG_NUM,
              event->decode_seconds, "commit_seconds", LOG_NUM, event->commit_seconds,
              "key_engine_seconds", LOG_NUM, job->entry.share ? job->entry.share->total : 0.0,
              NULL);
}

void job_finish(struct job *job)
{
    struct engine_thread *thread = job->thread;
    const uint64_t now = engine_thread_now_ns();
    struct event event = {.kind = EVENT_DONE,
                          .status = job->status,
                          .error = job->status ? &job->err : NULL,
                          .prompt_tokens = job->generate.token_count,
                          .cached_tokens = job->cached,
                          .completion_tokens = job->completion_tokens,
                          .tokens_done = job->added,
                          .tokens_total = job->is_append ? 0 : job->generate.token_count,
                          .queue_seconds = seconds_between(job->submitted_ns,
                                                           job->started_ns ? job->started_ns : now),
                          .prefill_seconds = seconds_between(job->started_ns, job->prefilled_ns),
                          .decode_seconds = seconds_between(job->prefilled_ns, job->decoded_ns),
                          .commit_seconds = seconds_between(job->decoded_ns, now)};
    if (job->memory) {
        event.position = job->memory->position;
        event.text_bytes = job->memory->text_bytes;
    }
    if (job->is_append)
        job_append_close(job);
    else
        job_generate_close(job);
    observe(thread, job, &event);
    log_job(job, &event);
    list_remove(&job->node);
    sched_remove(&thread->sched, &job->entry);
    pthread_mutex_lock(&thread->lock);
    if (job->started_ns)
        sched_gate_end(&thread->gate);
    else
        sched_gate_leave(&thread->gate, job->generate.token_count);
    pthread_mutex_unlock(&thread->lock);
    job->state = JOB_DONE;
    job_post(job, &event);
}

/* Storage has dropped what the job had not committed. */
static void truncated(struct reply *reply, enum status status)
{
    struct job *job = reply->context;
    reply_free(reply);
    job->pending--;
    if (status && status != STATUS_NOT_FOUND)
        log_event(LOG_ERROR, "truncate failed", "memory", LOG_STR, job->memory->id, "status",
                  LOG_STR, status_text(status), NULL);
    live_memory_drop(job->thread, job->memory);
    job->memory = NULL;
}

/* Moves an aborting job on: the memory goes back to its last commit, then the job is done. */
static void abort_step(struct job *job)
{
    if (job->memory && job->memory->session) {
        struct reply *reply = reply_create(job->thread, truncated, job);
        if (!reply)
            return;
        if (storage_truncate(job->thread->storage, job->memory->id, reply_done_cb, reply)) {
            reply_cancel(reply); /* the queue is full: again after the next answer */
            return;
        }
        job->pending++;
        const uint64_t chunk = engine_get_info(job->thread->engine)->config->chunk_tokens;
        engine_session_forget(job->memory->session, job->memory->position / chunk);
        engine_session_destroy(job->memory->session);
        job->memory->session = NULL;
    }
    if (!job->pending && !job->commits_pending)
        job_finish(job);
}

/* ---- admission and the step ---- */

/* What the job's sessions will take in RAM: known before, from the sizes of a session. */
static uint64_t bytes_of(const struct job *job)
{
    const char *id = job->is_append ? job->append.memory : job->generate.memory;
    uint64_t position = 0;
    struct storage_memory memory;
    if (*id && !storage_memory_get(job->thread->storage, id, &memory)) {
        position = memory.token_count;
        storage_memory_close(&memory);
    }
    if (job->is_append)
        return engine_session_bytes_at(job->thread->engine, position);
    const struct job_generate *g = &job->generate;
    const uint64_t answer = g->max_tokens < ANSWER_TOKENS ? g->max_tokens : ANSWER_TOKENS;
    return g->choices *
           engine_session_bytes_at(job->thread->engine, position + g->token_count + answer);
}

static void enqueue(struct engine_thread *thread, struct job *job)
{
    const struct job_terms *terms = job->is_append ? &job->append.terms : &job->generate.terms;
    job->entry.came = engine_thread_seconds(job->submitted_ns);
    job->entry.priority = terms->priority;
    job->entry.bulk = job->is_append;
    job->entry.bytes = bytes_of(job);
    list_push_back(&thread->queue, &job->node);
    sched_add(&thread->sched, &job->entry,
              sched_share(&thread->sched, terms->tenant, (double)terms->weight));
    if (!sched_can_hold(&thread->sched, job->entry.bytes))
        job_fail(job, STATUS_TOO_LARGE,
                 "this needs %llu MiB of RAM for its sessions, and at most %llu MiB can be had at "
                 "once (half of --running-memory); ask for fewer choices or tokens",
                 (unsigned long long)(job->entry.bytes / LIMITS_MIB),
                 (unsigned long long)(thread->options.running_bytes / 2 / LIMITS_MIB));
}

static void start(struct engine_thread *thread, struct job *job)
{
    list_remove(&job->node);
    list_push_back(&thread->running, &job->node);
    job->started_ns = engine_thread_now_ns();
    job->state = JOB_OPENING;
    pthread_mutex_lock(&thread->lock);
    sched_gate_start(&thread->gate, job->generate.token_count,
                     engine_thread_seconds(job->started_ns));
    pthread_mutex_unlock(&thread->lock);
    if (job->is_append)
        job_append_start(job);
    else
        job_generate_start(job);
}

static void admit(struct engine_thread *thread)
{
    struct sched_entry *entry;
    while ((entry = sched_start(&thread->sched)))
        start(thread, LIST_ENTRY(entry, struct job, entry));
}

static void check_deadline(struct job *job, uint64_t now)
{
    if (!job->deadline_ns || now < job->deadline_ns || job->state == JOB_COMMITTING ||
        job->state == JOB_ABORTING)
        return;
    if (job->state == JOB_QUEUED)
        job->thread->counted.timeouts_queued++;
    else
        job->thread->counted.timeouts_running++;
    const double waited = seconds_between(job->submitted_ns, now);
    if (job->state == JOB_QUEUED)
        job_fail(job, STATUS_TIMEOUT,
                 "it waited %.1f s for its turn, and that is its whole \"timeout\"", waited);
    else
        job_fail(job, STATUS_TIMEOUT,
                 "its \"timeout\" has passed after %.1f s, %.1f of them at work", waited,
                 seconds_between(job->started_ns, now));
    memcpy(job->err.param, "timeout", sizeof "timeout");
}

/* Those that are called back, or too late. */
static void check_ends(struct list *jobs)
{
    const uint64_t now = engine_thread_now_ns();
    LIST_EACH_SAFE(node, jobs)
    {
        struct job *job = LIST_ENTRY(node, struct job, node);
        const enum status why = (enum status)atomic_load(&job->cancelled);
        if (why && job->state != JOB_COMMITTING)
            job_fail(job, why, "%s",
                     why == STATUS_UNAVAILABLE ? "the server is shutting down" : status_text(why));
        check_deadline(job, now);
        if (job->state == JOB_ABORTING)
            abort_step(job);
    }
}

void step_add(struct step_builder *builder, struct job *job, struct sequence *sequence,
              const struct engine_step_item *item)
{
    ASSERT(builder->count < sizeof builder->items / sizeof *builder->items);
    for (uint32_t i = 0; i < builder->count; i++)
        ASSERT(builder->items[i].session != item->session); /* it would read its tokens twice */
    builder->items[builder->count] = *item;
    builder->jobs[builder->count] = job;
    builder->sequences[builder->count++] = sequence;
}

uint32_t step_slice(const struct engine_thread *thread, uint64_t position, size_t left)
{
    const uint32_t slice = engine_get_info(thread->engine)->slice_tokens;
    const uint32_t to_border = slice - (uint32_t)(position % slice);
    return left < to_border ? (uint32_t)left : to_border;
}

/* Puts a step together out of what jobs want and the scheduler grants. */
static void build(struct engine_thread *thread, struct step_builder *builder)
{
    builder->count = 0;
    LIST_EACH_SAFE(node, &thread->running)
    {
        struct job *job = LIST_ENTRY(node, struct job, node);
        job->entry.decodes = job->entry.rows = 0;
        if (job->is_append)
            job_append_prepare(job);
        else
            job_generate_prepare(job);
    }
    sched_plan(&thread->sched);
    for (uint32_t i = 0; i < thread->sched.pick_count; i++) {
        const struct sched_pick *pick = &thread->sched.picks[i];
        struct job *job = LIST_ENTRY(pick->entry, struct job, entry);
        if (job->is_append)
            job_append_build(job, pick, builder);
        else
            job_generate_build(job, pick, builder);
    }
}

_Static_assert(JOB_DONE == ENGINE_THREAD_STATES, "what /metrics tells apart");

static void publish_stats(struct engine_thread *thread)
{
    struct engine_thread_stats *s = &thread->counted;
    engine_get_stats(thread->engine, &s->engine);
    s->prefix_entries = thread->prefix ? prefix_entries(thread->prefix) : 0;
    s->prefix_bytes = thread->prefix ? prefix_bytes(thread->prefix) : 0;
    s->running = 0;
    memset(s->states, 0, sizeof s->states);
    s->running_bytes = thread->sched.bytes;
    LIST_EACH(node, &thread->queue)
    {
        s->states[LIST_ENTRY(node, struct job, node)->state]++;
    }
    s->sessions_idle = s->sessions_idle_bytes = 0;
    LIST_EACH(node, &thread->running)
    {
        s->running++;
        s->states[LIST_ENTRY(node, struct job, node)->state]++;
    }
    LIST_EACH(node, &thread->memories)
    {
        const struct live_memory *memory = LIST_ENTRY(node, struct live_memory, node);
        if (memory->user)
            continue;
        s->sessions_idle++;
        s->sessions_idle_bytes += engine_session_bytes(memory->session);
    }
    pthread_mutex_lock(&thread->lock);
    thread->stats = *s;
    pthread_mutex_unlock(&thread->lock);
}

/* The scheduler learns from steps that went as they were planned. */
static void note_step(struct engine_thread *thread, const struct step_builder *builder,
                      uint64_t took)
{
    uint32_t rows = 0;
    for (uint32_t i = 0; i < builder->count; i++) {
        if (builder->items[i].status == STATUS_BUSY)
            return;
        rows += builder->items[i].token_count;
    }
    if (rows)
        sched_done(&thread->sched, engine_thread_seconds(took));
}

/* One batch. Returns whether anything moved. */
static bool step(struct engine_thread *thread)
{
    struct step_builder *builder = &thread->builder;
    build(thread, builder);
    if (!builder->count)
        return false;
    const uint64_t begin = engine_thread_now_ns();
    const enum status status = engine_step(thread->engine, builder->items, builder->count);
    const uint64_t took = engine_thread_now_ns() - begin;
    thread->counted.step_ns += took;
    thread->counted.steps++;
    note_step(thread, builder, took);
    bool moved = false;
    for (uint32_t i = 0; i < builder->count; i++) {
        struct engine_step_item *item = &builder->items[i];
        struct job *job = builder->jobs[i];
        if (status)
            item->status = status;
        if (item->status == STATUS_BUSY || job->state == JOB_ABORTING)
            continue; /* pages or the writer's queue: again after the next answer */
        moved = true;
        thread->counted.step_rows += item->token_count;
        if (item->status)
            job_fail(job, item->status, "%s",
                     item->status == STATUS_CORRUPT
                         ? "a chunk of this memory is damaged on disk; run rambad check"
                         : status_text(item->status));
        else if (job->is_append)
            job_append_result(job, item);
        else
            job_generate_result(job, builder->sequences[i], item);
    }
    return moved;
}

static void answer_releases(struct engine_thread *thread)
{
    bool any = false;
    pthread_mutex_lock(&thread->lock);
    LIST_EACH(node, &thread->releases)
    {
        struct release *release = LIST_ENTRY(node, struct release, node);
        if (release->answered)
            continue;
        struct live_memory *memory = live_memory_find(thread, release->id);
        release->status = memory && memory->user ? STATUS_CONFLICT : STATUS_OK;
        if (memory && !memory->user)
            live_memory_drop(thread, memory);
        release->answered = any = true;
    }
    pthread_mutex_unlock(&thread->lock);
    if (any)
        uv_async_send(&thread->async);
}

/* Takes what has come in; returns false when it is time to end. */
static bool receive(struct engine_thread *thread)
{
    struct list replies, jobs;
    pthread_mutex_lock(&thread->lock);
    list_take_all(&thread->inbox, &jobs);
    list_take_all(&thread->replies, &replies);
    const bool closing = thread->closing;
    pthread_mutex_unlock(&thread->lock);
    while (!list_empty(&jobs)) {
        struct job *job = LIST_ENTRY(jobs.next, struct job, node);
        list_remove(&job->node);
        enqueue(thread, job);
    }
    /* Before the replies: what storage acknowledged before an answer has come before it. */
    session_store_deliver(thread->store, thread->engine);
    while (!list_empty(&replies)) {
        struct reply *reply = LIST_ENTRY(replies.next, struct reply, node);
        list_remove(&reply->node);
        thread->outstanding--;
        reply->handle_cb(reply, reply->status);
    }
    answer_releases(thread);
    return !(closing && list_empty(&thread->queue) && list_empty(&thread->running) &&
             !thread->outstanding && !session_store_outstanding(thread->store));
}

static void wait(struct engine_thread *thread)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += IDLE_WAIT_MS * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&thread->lock);
    const bool idle = list_empty(&thread->running) && list_empty(&thread->queue);
    while (!thread->woken) {
        if (idle && !thread->closing)
            pthread_cond_wait(&thread->wake, &thread->lock);
        else if (pthread_cond_timedwait(&thread->wake, &thread->lock, &until) == ETIMEDOUT)
            break;
    }
    thread->woken = false;
    pthread_mutex_unlock(&thread->lock);
}

void *engine_thread_run(void *context)
{
    struct engine_thread *thread = context;
    while (receive(thread)) {
        check_ends(&thread->queue);
        check_ends(&thread->running);
        admit(thread);
        const bool moved = step(thread);
        job_prefix_sweep(thread);
        publish_stats(thread);
        if (!moved)
            wait(thread);
    }
    live_memory_drop_all(thread);
    job_prefix_close_all(thread);
    return NULL;
}
