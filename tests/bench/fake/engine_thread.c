/* engine_thread.c - a fake behind the doors of engine_thread.h and job.h, for load tests of the
 * server alone: every job gets tokens at a set rate, and no model is run. tests/CMakeLists.txt
 * links it in the place of the real one; all else of that daemon is the shipped one's.
 * RAMBAD_FAKE_RATE: tokens a second of each sequence; 0 (the default): all at once.
 *
 * The text of a token is "<its number> <CLOCK_MONOTONIC in ns> ", so that who reads the stream can
 * tell that none is missing and how long it was under way. */
#include "server/engine_thread.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"
#include "proto/base/list.h"

struct job {
    struct list node; /* in the inbox, then in `running` */
    struct engine_thread *thread;
    struct job_generate generate;
    job_event_cb event_cb;
    void *context;
    atomic_bool cancelled;
    uint64_t due_ns, sent;
};

struct message {
    struct list node;
    struct job *job;
    struct event event;
    char text[48];
};

struct engine_thread {
    struct engine *engine;
    uint64_t period_ns;
    pthread_t thread;

    pthread_mutex_t lock; /* of what follows, up to the next comment */
    pthread_cond_t wake;
    struct list inbox, outbox, spare; /* spare: messages to use again */
    bool closing;

    /* The thread alone. */
    struct list running; /* the next token is the first one's */
    struct list posted;  /* messages that the outbox gets at the end of this turn */
    struct list unused;  /* messages */

    uv_async_t async; /* the loop alone, with all below */
    size_t job_count;
    bool draining;
    void (*drained_cb)(void *context);
    void *drained_context;
    void (*closed_cb)(void *context);
    void *closed_context;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- the thread ---- */

/* Makes an event known to the loop with the next send_posted. */
static void post(struct job *job, const struct event *event)
{
    struct engine_thread *thread = job->thread; /* who hears of the job's end may free it */
    struct message *message = NULL;
    if (list_empty(&thread->unused)) {
        pthread_mutex_lock(&thread->lock);
        list_take_all(&thread->spare, &thread->unused);
        pthread_mutex_unlock(&thread->lock);
    }
    if (!list_empty(&thread->unused)) {
        message = LIST_ENTRY(thread->unused.next, struct message, node);
        list_remove(&message->node);
    } else {
        message = malloc(sizeof *message);
        ASSERT(message);
    }
    message->job = job;
    message->event = *event;
    if (event->text) {
        memcpy(message->text, event->text, event->text_size);
        message->event.text = message->text;
    }
    list_push_back(&thread->posted, &message->node);
}

/* One lock and one wake-up for all that a turn of the thread has posted. */
static void send_posted(struct engine_thread *thread)
{
    if (list_empty(&thread->posted))
        return;
    pthread_mutex_lock(&thread->lock);
    list_append_all(&thread->outbox, &thread->posted);
    pthread_mutex_unlock(&thread->lock);
    uv_async_send(&thread->async);
}

static void post_done(struct job *job, enum status status)
{
    const struct event event = {.kind = EVENT_DONE,
                                .status = status,
                                .prompt_tokens = job->generate.token_count,
                                .completion_tokens = job->sent};
    list_remove(&job->node);
    post(job, &event);
}

/* The next token of a job; false when it was the last. */
static bool step(struct job *job)
{
    char text[48];
    const int size = snprintf(text, sizeof text, "%llu %llu ", (unsigned long long)job->sent,
                              (unsigned long long)now_ns());
    const struct event token = {
        .kind = EVENT_TOKEN, .text = text, .text_size = (size_t)size, .stop_index = -1};
    job->sent++;
    post(job, &token);
    if (job->sent < job->generate.max_tokens)
        return true;
    const struct event finished = {
        .kind = EVENT_FINISHED, .finish_reason = FINISH_LENGTH, .stop_index = -1};
    post(job, &finished);
    post_done(job, STATUS_OK);
    return false;
}

static void begin(struct engine_thread *thread, struct job *job)
{
    const struct event started = {.kind = EVENT_STARTED,
                                  .prompt_tokens = job->generate.token_count};
    list_push_back(&thread->running, &job->node);
    job->due_ns = now_ns() + thread->period_ns;
    post(job, &started);
}

/* Every sequence has the same rate: who had a token goes behind the others, and the list stays in
 * the order of what is due. Returns when the next one is. */
static uint64_t run_due(struct engine_thread *thread)
{
    while (!list_empty(&thread->running)) {
        struct job *job = LIST_ENTRY(thread->running.next, struct job, node);
        if (atomic_load(&job->cancelled)) {
            post_done(job, STATUS_CANCELLED);
            continue;
        }
        if (job->due_ns > now_ns())
            return job->due_ns;
        if (!step(job))
            continue;
        job->due_ns += thread->period_ns;
        list_remove(&job->node);
        list_push_back(&thread->running, &job->node);
    }
    return 0;
}

static void *thread_main(void *context)
{
    struct engine_thread *thread = context;
    for (;;) {
        struct list jobs;
        const uint64_t due = run_due(thread);
        send_posted(thread);
        const struct timespec until = {.tv_sec = (time_t)(due / 1000000000u),
                                       .tv_nsec = (long)(due % 1000000000u)};
        pthread_mutex_lock(&thread->lock);
        if (list_empty(&thread->inbox) && !thread->closing) {
            if (due)
                pthread_cond_timedwait(&thread->wake, &thread->lock, &until);
            else
                pthread_cond_wait(&thread->wake, &thread->lock);
        }
        const bool closing = thread->closing;
        list_take_all(&thread->inbox, &jobs);
        pthread_mutex_unlock(&thread->lock);
        while (!list_empty(&jobs)) {
            struct job *job = LIST_ENTRY(jobs.next, struct job, node);
            list_remove(&job->node);
            begin(thread, job);
        }
        send_posted(thread);
        if (closing)
            return NULL;
    }
}

/* ---- the loop ---- */

static void deliver(struct engine_thread *thread, struct message *message)
{
    struct job *job = message->job;
    const bool done = message->event.kind == EVENT_DONE;
    if (done)
        thread->job_count--;
    job->event_cb(job->context, &message->event);
    if (!done)
        return;
    free(job->generate.tokens);
    free((void *)(uintptr_t)job->generate.sampling.bias);
    for (uint32_t i = 0; i < job->generate.stop_count; i++)
        free(job->generate.stop[i]);
    free(job);
}

static void async_cb(uv_async_t *async)
{
    struct engine_thread *thread = async->data;
    struct list messages;
    pthread_mutex_lock(&thread->lock);
    list_take_all(&thread->outbox, &messages);
    pthread_mutex_unlock(&thread->lock);
    LIST_EACH(node, &messages)
    {
        deliver(thread, LIST_ENTRY(node, struct message, node));
    }
    pthread_mutex_lock(&thread->lock);
    list_append_all(&thread->spare, &messages);
    pthread_mutex_unlock(&thread->lock);
    if (thread->draining && !thread->job_count && thread->drained_cb) {
        void (*drained_cb)(void *context) = thread->drained_cb;
        thread->drained_cb = NULL;
        drained_cb(thread->drained_context);
    }
}

enum status job_submit_generate(struct engine_thread *thread, const struct job_generate *generate,
                                job_event_cb event_cb, void *context, struct job **out)
{
    if (thread->draining)
        return STATUS_UNAVAILABLE;
    ASSERT(generate->choices == 1 && generate->max_tokens); /* what a load test asks for */
    struct job *job = calloc(1, sizeof *job);
    if (!job)
        return STATUS_NO_MEMORY;
    job->thread = thread;
    job->generate = *generate;
    job->event_cb = event_cb;
    job->context = context;
    thread->job_count++;
    *out = job;
    pthread_mutex_lock(&thread->lock);
    list_push_back(&thread->inbox, &job->node);
    pthread_cond_signal(&thread->wake);
    pthread_mutex_unlock(&thread->lock);
    return STATUS_OK;
}

void job_go_on(struct job *job)
{
    (void)job; /* nothing is committed here, so nothing waits */
}

void job_cancel(struct job *job)
{
    atomic_store(&job->cancelled, true); /* heard of at its next token */
}

enum status job_submit_append(struct engine_thread *thread, const struct job_append *append,
                              job_event_cb event_cb, void *context, struct job **out)
{
    (void)thread;
    (void)append;
    (void)event_cb;
    (void)context;
    (void)out;
    return STATUS_UNAVAILABLE; /* nothing here keeps memories */
}

void job_append_block(struct job *job, int32_t *tokens, size_t token_count, uint64_t text_bytes,
                      bool last)
{
    (void)job;
    (void)tokens;
    (void)token_count;
    (void)text_bytes;
    (void)last;
    ASSERT(!"an append was never taken");
}

void engine_thread_release_memory(struct engine_thread *thread, const char *id,
                                  void (*released_cb)(void *context, enum status status),
                                  void *context)
{
    (void)thread;
    (void)id;
    released_cb(context, STATUS_OK);
}

double engine_thread_retry_after(struct engine_thread *engine_thread)
{
    (void)engine_thread;
    return 1; /* nothing waits here */
}

void engine_thread_get_stats(const struct engine_thread *thread, struct engine_thread_stats *stats)
{
    *stats = (struct engine_thread_stats){.running = thread->job_count};
}

/* ---- life ---- */

enum status engine_thread_open(uv_loop_t *loop, const struct engine_thread_options *options,
                               struct engine_thread **out, struct error *err)
{
    struct engine_thread *thread = calloc(1, sizeof *thread);
    const char *rate = getenv("RAMBAD_FAKE_RATE");
    const double per_second = rate ? strtod(rate, NULL) : 0;
    if (!thread)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    thread->engine = options->engine;
    thread->period_ns = per_second > 0 ? (uint64_t)(1e9 / per_second) : 0;
    list_init(&thread->inbox);
    list_init(&thread->outbox);
    list_init(&thread->spare);
    list_init(&thread->running);
    list_init(&thread->posted);
    list_init(&thread->unused);
    pthread_mutex_init(&thread->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&thread->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    ASSERT(!uv_async_init(loop, &thread->async, async_cb));
    thread->async.data = thread;
    ASSERT(!pthread_create(&thread->thread, NULL, thread_main, thread));
    *out = thread;
    return STATUS_OK;
}

void engine_thread_drain(struct engine_thread *thread, uint64_t deadline_ms,
                         void (*drained_cb)(void *context), void *context)
{
    (void)deadline_ms; /* its jobs end by themselves, or are stopped with a second signal */
    thread->draining = true;
    thread->drained_cb = drained_cb;
    thread->drained_context = context;
    uv_async_send(&thread->async);
}

static void handle_closed(uv_handle_t *handle)
{
    struct engine_thread *thread = handle->data;
    void (*closed_cb)(void *context) = thread->closed_cb;
    void *context = thread->closed_context;
    engine_close(thread->engine);
    list_append_all(&thread->spare, &thread->unused);
    while (!list_empty(&thread->spare)) {
        struct message *message = LIST_ENTRY(thread->spare.next, struct message, node);
        list_remove(&message->node);
        free(message);
    }
    free(thread);
    closed_cb(context);
}

void engine_thread_close(struct engine_thread *thread, void (*closed_cb)(void *context),
                         void *context)
{
    thread->closed_cb = closed_cb;
    thread->closed_context = context;
    pthread_mutex_lock(&thread->lock);
    thread->closing = true;
    pthread_cond_signal(&thread->wake);
    pthread_mutex_unlock(&thread->lock);
    pthread_join(thread->thread, NULL);
    uv_close((uv_handle_t *)&thread->async, handle_closed);
}
