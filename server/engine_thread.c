/* engine_thread.c - the way to the engine's thread and back: its mailboxes, jobs as the loop has
 * them, its beginning and end; see engine_thread.h. What it does is in engine_run.c. */
#include "server/engine_thread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "proto/base/assert.h"
#include "server/engine_thread_private.h"

uint64_t engine_thread_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

double engine_thread_seconds(uint64_t ns)
{
    return (double)ns * 1e-9;
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
    const bool enters =
        sched_gate_enter(&thread->gate, kept->generate.token_count,
                         engine_thread_seconds(kept->submitted_ns), &thread->retry_after);
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
    const double seconds = engine_thread->retry_after > 0 ? engine_thread->retry_after : 1;
    engine_thread->retry_after = 0;
    return seconds;
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
    if (pthread_create(&thread->thread, NULL, engine_thread_run, thread)) {
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
