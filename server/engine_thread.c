/* engine_thread.c - the thread, its mailboxes, admission and the batch; see engine_thread.h. */
#include "server/engine_thread.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/engine_thread_private.h"

#define ANSWER_TOKENS 65536u /* that room is kept for; few get as long */
#define IDLE_WAIT_MS 50      /* a bound on sleep, should a wake-up be for something retried */

uint64_t engine_thread_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void wake(struct engine_thread *thread)
{
    pthread_mutex_lock(&thread->lock);
    thread->woken = true;
    pthread_cond_signal(&thread->wake);
    pthread_mutex_unlock(&thread->lock);
}

static void wake_cb(void *context)
{
    wake(context);
}

/* ---- replies ---- */

struct reply *reply_create(struct engine_thread *thread,
                           void (*handle_cb)(struct reply *reply, enum status status),
                           void *context)
{
    struct reply *reply = calloc(1, sizeof *reply);
    if (!reply)
        return NULL;
    reply->thread = thread;
    reply->handle_cb = handle_cb;
    reply->context = context;
    thread->outstanding++;
    return reply;
}

void reply_cancel(struct reply *reply)
{
    reply->thread->outstanding--;
    free(reply);
}

void reply_done_cb(void *context, enum status status)
{
    struct reply *reply = context;
    struct engine_thread *thread = reply->thread;
    pthread_mutex_lock(&thread->lock);
    reply->status = status;
    list_push_back(&thread->replies, &reply->node);
    thread->woken = true;
    pthread_cond_signal(&thread->wake);
    pthread_mutex_unlock(&thread->lock);
}

void reply_free(struct reply *reply)
{
    free(reply);
}

/* ---- events ---- */

#define SPARE_EVENTS 1024 /* kept; more are only there when the loop is far behind */

/* One event with copies of what it points to. It is used again: a token costs no allocation. */
struct event_node {
    struct list node;
    struct job *job;
    struct event event;
    struct error error;
    struct buf text, tops, picks;
    void *taken[2];
};

static struct event_node *event_create(struct engine_thread *thread)
{
    struct event_node *node = NULL;
    pthread_mutex_lock(&thread->lock);
    if (!list_empty(&thread->spare)) {
        node = LIST_ENTRY(thread->spare.next, struct event_node, node);
        list_remove(&node->node);
        thread->spare_count--;
    }
    pthread_mutex_unlock(&thread->lock);
    if (!node) {
        node = calloc(1, sizeof *node);
        ASSERT(node); /* an event must not be lost */
    }
    return node;
}

static void event_free(struct event_node *node)
{
    buf_close(&node->text);
    buf_close(&node->tops);
    buf_close(&node->picks);
    free(node);
}

static void events_free(struct list *events)
{
    while (!list_empty(events)) {
        struct event_node *node = LIST_ENTRY(events->next, struct event_node, node);
        list_remove(&node->node);
        event_free(node);
    }
}

/* They were delivered. One lock for all: the engine's thread wants it for each event. */
static void events_return(struct engine_thread *thread, struct list *events)
{
    pthread_mutex_lock(&thread->lock);
    while (!list_empty(events) && thread->spare_count < SPARE_EVENTS) {
        struct list *node = events->next;
        list_remove(node);
        list_push_front(&thread->spare, node);
        thread->spare_count++;
    }
    pthread_mutex_unlock(&thread->lock);
    events_free(events);
}

static const void *copy_in(struct buf *copy, const void *from, size_t bytes)
{
    copy->size = 0;
    if (!from || !bytes)
        return NULL;
    buf_append(copy, from, bytes);
    return copy->data;
}

void job_post(struct job *job, const struct event *event)
{
    struct engine_thread *thread = job->thread;
    struct event_node *node = event_create(thread);
    node->job = job;
    node->event = *event;
    struct event *e = &node->event;
    e->text = copy_in(&node->text, event->text, event->text_size);
    e->tops = copy_in(&node->tops, event->tops, event->top_count * sizeof *event->tops);
    e->picks = copy_in(&node->picks, event->picks, event->pick_count * sizeof *event->picks);
    if (event->error) {
        node->error = *event->error;
        e->error = &node->error;
    }
    if (event->kind == EVENT_ECHO) { /* large and posted once: handed over, not copied */
        e->echo_logprobs = node->taken[0] = job->echo;
        e->echo_tops = node->taken[1] = job->echo_tops;
        job->echo = NULL;
        job->echo_tops = NULL;
    }
    pthread_mutex_lock(&thread->lock);
    list_push_back(&thread->outbox, &node->node);
    pthread_mutex_unlock(&thread->lock);
    uv_async_send(&thread->async);
}

static void free_job(struct job *job)
{
    while (!list_empty(&job->blocks)) {
        struct append_block *block = LIST_ENTRY(job->blocks.next, struct append_block, node);
        list_remove(&block->node);
        free(block->tokens);
        free(block);
    }
    free(job->generate.tokens);
    free(job->marks);
    free((void *)(uintptr_t)job->generate.sampling.bias);
    for (uint32_t i = 0; i < job->generate.stop_count; i++)
        free(job->generate.stop[i]);
    free(job->echo);
    free(job->echo_tops);
    free(job->targets);
    free(job->slice_logprobs);
    free(job->slice_tops);
    free(job->written);
    free(job->generate.receipt_head);
    buf_close(&job->said);
    free(job->sequences);
    free(job);
}

static void check_drained(struct engine_thread *thread)
{
    if (thread->draining && !thread->job_count && thread->drained_cb) {
        void (*drained_cb)(void *context) = thread->drained_cb;
        thread->drained_cb = NULL;
        uv_timer_stop(&thread->deadline);
        drained_cb(thread->drained_context);
    }
}

struct release {
    struct list node;
    char id[LIMITS_ID_BYTES];
    void (*released_cb)(void *context, enum status status);
    void *context;
    enum status status;
    bool answered;
};

static void deliver(struct engine_thread *thread, struct event_node *node)
{
    struct job *job = node->job;
    const bool done = node->event.kind == EVENT_DONE;
    if (done) {
        list_remove(&job->loop_node);
        thread->job_count--;
    }
    job->event_cb(job->context, &node->event);
    for (size_t i = 0; i < sizeof node->taken / sizeof *node->taken; i++) {
        free(node->taken[i]);
        node->taken[i] = NULL;
    }
    if (done)
        free_job(job);
}

static void async_cb(uv_async_t *async)
{
    struct engine_thread *thread = async->data;
    struct list events, delivered, answered;
    list_init(&delivered);
    pthread_mutex_lock(&thread->lock);
    list_take_all(&thread->outbox, &events);
    list_init(&answered);
    LIST_EACH_SAFE(node, &thread->releases)
    {
        if (LIST_ENTRY(node, struct release, node)->answered) {
            list_remove(node);
            list_push_back(&answered, node);
        }
    }
    pthread_mutex_unlock(&thread->lock);
    while (!list_empty(&events)) {
        struct event_node *node = LIST_ENTRY(events.next, struct event_node, node);
        list_remove(&node->node);
        deliver(thread, node);
        list_push_back(&delivered, &node->node);
    }
    events_return(thread, &delivered);
    while (!list_empty(&answered)) {
        struct release *release = LIST_ENTRY(answered.next, struct release, node);
        list_remove(&release->node);
        release->released_cb(release->context, release->status);
        free(release);
    }
    check_drained(thread);
}

/* ---- jobs, from the loop ---- */

static double seconds_of(uint64_t ns)
{
    return (double)ns * 1e-9;
}

/* Takes `job` when there is room for it to wait. */
static enum status submit(struct engine_thread *thread, const struct job *job,
                          const struct job_terms *terms, struct job **out)
{
    if (thread->draining)
        return STATUS_UNAVAILABLE;
    struct job *kept = malloc(sizeof *kept);
    if (!kept)
        return STATUS_NO_MEMORY;
    *kept = *job;
    kept->thread = thread;
    kept->submitted_ns = engine_thread_now_ns();
    kept->deadline_ns =
        terms->timeout > 0 ? kept->submitted_ns + (uint64_t)(terms->timeout * 1e9) : 0;
    list_init(&kept->blocks);
    pthread_mutex_lock(&thread->lock);
    const bool enters = sched_gate_enter(&thread->gate, kept->generate.token_count,
                                         seconds_of(kept->submitted_ns), &thread->retry_after);
    if (enters) {
        list_push_back(&thread->inbox, &kept->node);
        thread->woken = true;
        pthread_cond_signal(&thread->wake);
    }
    pthread_mutex_unlock(&thread->lock);
    if (!enters) {
        free(kept);
        return STATUS_BUSY;
    }
    list_push_back(&thread->jobs, &kept->loop_node);
    thread->job_count++;
    *out = kept;
    return STATUS_OK;
}

double engine_thread_retry_after(struct engine_thread *engine_thread)
{
    return engine_thread->retry_after > 0 ? engine_thread->retry_after : 1;
}

enum status job_submit_generate(struct engine_thread *engine_thread,
                                const struct job_generate *generate, job_event_cb event_cb,
                                void *context, struct job **out)
{
    ASSERT(generate->choices >= 1 && generate->choices <= LIMITS_CHOICES);
    ASSERT(!generate->memory_write || (generate->choices == 1 && generate->memory[0]));
    const struct job job = {.generate = *generate, .event_cb = event_cb, .context = context};
    return submit(engine_thread, &job, &generate->terms, out);
}

enum status job_submit_append(struct engine_thread *engine_thread, const struct job_append *append,
                              job_event_cb event_cb, void *context, struct job **out)
{
    const struct job job = {
        .is_append = true, .append = *append, .event_cb = event_cb, .context = context};
    return submit(engine_thread, &job, &append->terms, out);
}

void job_append_block(struct job *job, int32_t *tokens, size_t token_count, uint64_t text_bytes,
                      bool last)
{
    struct append_block *block = calloc(1, sizeof *block);
    ASSERT(block);
    *block = (struct append_block){
        .tokens = tokens, .token_count = token_count, .text_bytes = text_bytes, .last = last};
    pthread_mutex_lock(&job->thread->lock);
    list_push_back(&job->blocks, &block->node);
    pthread_mutex_unlock(&job->thread->lock);
    wake(job->thread);
}

static void cancel(struct job *job, enum status why)
{
    atomic_store(&job->cancelled, (int)why);
    wake(job->thread);
}

void job_go_on(struct job *job)
{
    atomic_store(&job->may_commit, true); /* what was written before is seen by who sees this */
    wake(job->thread);
}

void job_cancel(struct job *job)
{
    cancel(job, STATUS_CANCELLED);
}

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
    const uint64_t chunk = engine_get_info(job->thread->engine)->config->chunk_tokens;
    engine_forget_chunks(job->thread->engine, job->memory->branch, job->memory->position / chunk);
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
    job->entry.came = seconds_of(job->submitted_ns);
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
    sched_gate_start(&thread->gate, job->generate.token_count, seconds_of(job->started_ns));
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
        sched_done(&thread->sched, seconds_of(took));
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

static void *thread_main(void *context)
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

/* ---- life ---- */

static void open_sched(struct engine_thread *thread)
{
    struct engine_thread_options *o = &thread->options;
    const struct engine_info *info = engine_get_info(thread->engine);
    if (!o->running_max || o->running_max > LIMITS_RUNNING)
        o->running_max = LIMITS_RUNNING;
    if (!o->queue_max)
        o->queue_max = LIMITS_QUEUE_REQUESTS;
    if (!o->queue_tokens)
        o->queue_tokens = LIMITS_QUEUE_TOKENS;
    if (!o->running_bytes)
        o->running_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) / 2;
    if (!(o->max_stall > 0))
        o->max_stall = 1e-3 * (strncmp(info->backend, "cuda", 4) == 0 ? LIMITS_STALL_GPU_MS
                                                                      : LIMITS_STALL_CPU_MS);
    const struct sched_options options = {.running_max = o->running_max,
                                          .slice_tokens = info->slice_tokens,
                                          .row_max = info->slice_tokens,
                                          .memory_bytes = o->running_bytes,
                                          .max_stall = o->max_stall,
                                          .shared = o->shared};
    thread->counted.max_stall = o->max_stall;
    thread->counted.running_bytes_max = o->running_bytes;
    sched_init(&thread->sched, &options);
    sched_gate_init(&thread->gate, o->queue_max, o->queue_tokens, o->running_max);
}

enum status engine_thread_open(uv_loop_t *loop, const struct engine_thread_options *options,
                               struct engine_thread **out, struct error *err)
{
    struct engine_thread *thread = calloc(1, sizeof *thread);
    if (!thread)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    thread->options = *options;
    thread->engine = options->engine;
    open_sched(thread);
    thread->storage = options->storage;
    thread->loop = loop;
    pthread_mutex_init(&thread->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC); /* the other one can be set */
    pthread_cond_init(&thread->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    struct list *lists[] = {&thread->inbox,   &thread->replies,  &thread->outbox,
                            &thread->spare,   &thread->releases, &thread->queue,
                            &thread->running, &thread->memories, &thread->jobs};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        list_init(lists[i]);
    enum status status = session_store_create(options->storage, wake_cb, thread, &thread->store);
    if (status) {
        error_set(err, status, "out of memory");
        goto failed;
    }
    struct chunk_io io;
    session_store_io(thread->store, &io);
    engine_set_io(thread->engine, &io);
    status = job_prefix_open(thread, err);
    if (status)
        goto failed;
    ASSERT(!uv_async_init(loop, &thread->async, async_cb));
    ASSERT(!uv_timer_init(loop, &thread->deadline));
    thread->async.data = thread->deadline.data = thread;
    if (pthread_create(&thread->thread, NULL, thread_main, thread)) {
        status = error_set(err, STATUS_NO_MEMORY, "the engine's thread cannot be started");
        goto failed; /* the handles live on: the process ends over this */
    }
    *out = thread;
    return STATUS_OK;
failed:
    job_prefix_close_all(thread);
    if (thread->store)
        session_store_destroy(thread->store);
    free(thread);
    return status;
}

static void deadline_cb(uv_timer_t *timer)
{
    struct engine_thread *thread = timer->data;
    LIST_EACH(node, &thread->jobs)
    {
        cancel(LIST_ENTRY(node, struct job, loop_node), STATUS_UNAVAILABLE);
    }
}

void engine_thread_drain(struct engine_thread *engine_thread, uint64_t deadline_ms,
                         void (*drained_cb)(void *context), void *context)
{
    engine_thread->draining = true;
    engine_thread->drained_cb = drained_cb;
    engine_thread->drained_context = context;
    uv_timer_start(&engine_thread->deadline, deadline_cb, deadline_ms, 0);
    uv_async_send(&engine_thread->async); /* check_drained runs from there, never from here */
}

static void handle_closed(uv_handle_t *handle)
{
    struct engine_thread *thread = handle->data;
    if (--thread->handles_open)
        return;
    void (*closed_cb)(void *context) = thread->closed_cb;
    void *context = thread->closed_context;
    session_store_destroy(thread->store);
    engine_close(thread->engine);
    events_free(&thread->spare);
    buf_close(&thread->decoded);
    buf_close(&thread->text);
    pthread_mutex_destroy(&thread->lock);
    pthread_cond_destroy(&thread->wake);
    free(thread);
    closed_cb(context);
}

void engine_thread_close(struct engine_thread *engine_thread, void (*closed_cb)(void *context),
                         void *context)
{
    ASSERT(engine_thread->draining && !engine_thread->job_count);
    engine_thread->closed_cb = closed_cb;
    engine_thread->closed_context = context;
    pthread_mutex_lock(&engine_thread->lock);
    engine_thread->closing = true;
    pthread_mutex_unlock(&engine_thread->lock);
    wake(engine_thread);
    /* It has nothing left but to hear storage's last answers: a commit or two away. */
    pthread_join(engine_thread->thread, NULL);
    engine_thread->handles_open = 2;
    uv_close((uv_handle_t *)&engine_thread->async, handle_closed);
    uv_close((uv_handle_t *)&engine_thread->deadline, handle_closed);
}

const struct engine *engine_thread_engine(const struct engine_thread *engine_thread)
{
    return engine_thread->engine;
}

void engine_thread_release_memory(struct engine_thread *engine_thread, const char *id,
                                  void (*released_cb)(void *context, enum status status),
                                  void *context)
{
    struct release *release = calloc(1, sizeof *release);
    ASSERT(release);
    snprintf(release->id, sizeof release->id, "%s", id);
    release->released_cb = released_cb;
    release->context = context;
    pthread_mutex_lock(&engine_thread->lock);
    list_push_back(&engine_thread->releases, &release->node);
    pthread_mutex_unlock(&engine_thread->lock);
    wake(engine_thread);
}

void engine_thread_get_stats(const struct engine_thread *engine_thread,
                             struct engine_thread_stats *stats)
{
    struct engine_thread *unlocked = (struct engine_thread *)(uintptr_t)engine_thread;
    pthread_mutex_lock(&unlocked->lock);
    *stats = engine_thread->stats;
    stats->waiting = engine_thread->gate.requests;
    stats->waiting_tokens = engine_thread->gate.tokens;
    stats->refused_requests = engine_thread->gate.refused_requests;
    stats->refused_tokens = engine_thread->gate.refused_tokens;
    pthread_mutex_unlock(&unlocked->lock);
}
