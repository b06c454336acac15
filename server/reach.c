/* reach.c - see reach.h.
 *
 *   FORK -> (READ -> REPLAY ->) RELEASE -> SETTLE or REPLACE -> answered
 *   A replay may take longer than a client waits for a byte: one that accepts text/event-stream
 *   hears how far it is, and gets the memory as the last event.
 *   All states can reach the answer of a failure; the ephemeral fork is then deleted. */
#include "server/reach.h"

#include <stdlib.h>
#include <string.h>

#include "proto/answer_json.h"
#include "server/job.h"
#include "server/wait.h"

struct reach {
    struct wait *wait; /* wait->id: the memory that is asked for */
    struct server *server;
    char source[LIMITS_ID_BYTES], fork[LIMITS_ID_BYTES];
    bool is_rewind, has_fork;
    uint64_t source_branch; /* another by the time the tokens were read: it was rewound meanwhile */
    uint64_t at, position;  /* wanted; where the fork stands */
    int32_t *tokens;
    uint64_t text_bytes; /* of the tokens */
    struct job *job;
    uv_work_t work;
};

static void finish(struct reach *reach, enum status status, const char *message)
{
    struct wait *wait = reach->wait;
    if (status) {
        if (reach->has_fork)
            (void)!storage_memory_delete(reach->server->storage, reach->fork, NULL, NULL);
        if (!wait->request->gone) {
            struct error err;
            error_set(&err, status, "memory %s: %s", reach->source,
                      message ? message : status_text(status));
            if (wait->request->streaming)
                request_stream_fail(wait->request, status, &err);
            else
                request_fail(wait->request, status, &err);
        }
    } else if (!wait->request->gone) {
        wait_answer_memory(wait->request, reach->is_rewind ? 200 : 201, wait->id);
    }
    free(reach->tokens);
    wait->request->state = NULL;
    free(reach);
    wait_end(wait);
}

static struct reach *reach_of(const struct wait *wait)
{
    return wait->request->state;
}

/* ---- settle ---- */

static void settled(struct wait *wait)
{
    struct reach *reach = reach_of(wait);
    reach->has_fork = wait->status != STATUS_OK;
    finish(reach, wait->status,
           wait->status == STATUS_NOT_FOUND ? "it was deleted meanwhile" : NULL);
}

static void target_released_cb(void *context, enum status status)
{
    struct reach *reach = context;
    struct storage *storage = reach->server->storage;
    struct wait *wait = reach->wait;
    if (status) {
        finish(reach, status, "is being used by another request; try again when it is done");
        return;
    }
    wait_for_write(wait, settled);
    status = reach->is_rewind
                 ? storage_memory_replace(storage, reach->fork, wait->id, 0, NULL, wait_stored_cb,
                                          wait)
                 : storage_memory_settle(storage, reach->fork, wait->id, wait_stored_cb, wait);
    if (status)
        wait_refused(wait, status);
}

/* The engine has let go of the fork; now of the memory whose place it takes. */
static void fork_released_cb(void *context, enum status status)
{
    struct reach *reach = context;
    if (status)
        finish(reach, status, NULL);
    else
        engine_thread_release_memory(reach->server->engine_thread, reach->wait->id,
                                     target_released_cb, reach);
}

static void settle(struct reach *reach)
{
    engine_thread_release_memory(reach->server->engine_thread, reach->fork, fork_released_cb,
                                 reach);
}

/* ---- replay ---- */

static void send_progress(const struct reach *reach, const struct event *event)
{
    struct request *request = reach->wait->request;
    struct buf json, text;
    if (!request->wants_stream || request->gone)
        return;
    buf_init(&json);
    buf_init(&text);
    answer_json_replay(&json, reach->wait->id, event->tokens_done, event->tokens_total);
    answer_json_event(&text, &json);
    if (!request->streaming)
        request_stream_begin(request);
    request_stream_write(request, text.data, text.size);
    buf_close(&json);
    buf_close(&text);
}

static void event_cb(void *context, const struct event *event)
{
    struct reach *reach = context;
    if (event->kind == EVENT_PROGRESS)
        send_progress(reach, event);
    if (event->kind != EVENT_DONE)
        return;
    reach->job = NULL;
    if (event->status)
        finish(reach, event->status, event->error ? event->error->message : NULL);
    else
        settle(reach);
}

static void replay(struct reach *reach)
{
    struct job_generate generate = {.memory_write = true,
                                    .tokens = reach->tokens,
                                    .token_count = (size_t)(reach->at - reach->position),
                                    .text_bytes = reach->text_bytes,
                                    .choices = 1};
    sampler_params_default(&generate.sampling);
    memcpy(generate.request_id, reach->wait->request->id, sizeof generate.request_id);
    memcpy(generate.memory, reach->fork, sizeof generate.memory);
    const enum status status =
        job_submit_generate(reach->server->engine_thread, &generate, event_cb, reach, &reach->job);
    if (status)
        finish(reach, status, NULL);
    else
        reach->tokens = NULL; /* the job's */
}

/* On the pool: the tokens between the fork and the place that is wanted. */
static void read_tokens(uv_work_t *work)
{
    struct reach *reach = work->data;
    struct wait *wait = reach->wait;
    const struct tokenizer *tokenizer = engine_tokenizer(reach->server->engine);
    const size_t count = (size_t)(reach->at - reach->position);
    struct storage_memory source;
    reach->tokens = malloc(count * sizeof *reach->tokens);
    wait->status = reach->tokens ? storage_read_marked(reach->server->storage, reach->source,
                                                       reach->position, count, reach->tokens)
                                 : STATUS_NO_MEMORY;
    for (size_t i = 0; !wait->status && i < count; i++) {
        size_t size;
        tokenizer_bytes(tokenizer, reach->tokens[i] & ~STORAGE_TOKEN_MARK, &size);
        reach->text_bytes += size;
    }
    if (!wait->status)
        wait->status = storage_memory_get(reach->server->storage, reach->source, &source);
    if (!wait->status) {
        if (source.branch != reach->source_branch)
            wait->status = STATUS_CONFLICT;
        storage_memory_close(&source);
    }
}

static void tokens_read(uv_work_t *work, int cancelled)
{
    struct reach *reach = work->data;
    (void)cancelled;
    if (reach->wait->status)
        finish(reach, reach->wait->status, NULL);
    else
        replay(reach);
}

/* ---- fork ---- */

static void forked(struct wait *wait)
{
    struct reach *reach = reach_of(wait);
    struct storage_memory fork;
    if (wait->status) {
        finish(reach, wait->status,
               wait->status == STATUS_INVALID     ? "holds fewer tokens than that position"
               : wait->status == STATUS_NOT_FOUND ? "there is no such memory"
                                                  : NULL);
        return;
    }
    reach->has_fork = true;
    const enum status status = storage_memory_get(reach->server->storage, reach->fork, &fork);
    if (status) {
        finish(reach, status, NULL);
        return;
    }
    reach->position = fork.token_count;
    storage_memory_close(&fork);
    if (reach->position == reach->at) {
        settle(reach);
        return;
    }
    reach->work.data = reach;
    uv_queue_work(reach->server->loop, &reach->work, read_tokens, tokens_read);
}

static void gone(struct request *request)
{
    struct reach *reach = request->state;
    if (reach && reach->job)
        job_cancel(reach->job);
}

static struct reach *create(struct request *request, const char *source, uint64_t at)
{
    struct wait *wait = wait_create(request);
    if (!wait)
        return NULL;
    struct reach *reach = calloc(1, sizeof *reach);
    struct storage_memory memory;
    enum status status =
        reach ? storage_memory_get(request->server->storage, source, &memory) : STATUS_NO_MEMORY;
    if (!status && memory.ephemeral)
        status = STATUS_NOT_FOUND;
    if (status) {
        wait_fail_memory(request, status, source);
        free(reach);
        wait_end(wait);
        return NULL;
    }
    reach->wait = wait;
    reach->server = request->server;
    reach->source_branch = memory.branch;
    reach->at = at;
    storage_memory_close(&memory);
    memcpy(reach->source, source, strlen(source) + 1);
    server_new_id("ephemeral_", reach->fork);
    request->state = reach;
    request->gone_cb = gone;
    request->wants_stream = strstr(request->head->accept, "text/event-stream") != NULL;
    return reach;
}

/* A fork is made of what the new memory shall be; a rewind's keeps all that but what it says, and
 * counts for nobody's quota until it has taken the memory's place: it is how room is made. */
static void start(struct reach *reach, const struct memory_request *asked)
{
    struct storage_memory_options options = {.id = reach->fork,
                                             .from = reach->at ? reach->source : NULL,
                                             .at = reach->at,
                                             .ephemeral = true};
    if (asked) {
        options.metadata = asked->metadata;
        options.tenant = reach->wait->request->key;
        options.expires = wait_expires(&asked->expires);
    }
    wait_for_write(reach->wait, forked);
    const enum status status =
        storage_memory_create(reach->server->storage, &options, wait_stored_cb, reach->wait);
    if (status)
        wait_refused(reach->wait, status);
}

void reach_fork(struct request *request, const struct memory_request *asked)
{
    struct reach *reach = create(request, asked->from, asked->at);
    if (!reach)
        return;
    server_new_id("mem_", reach->wait->id);
    start(reach, asked);
}

void reach_rewind(struct request *request, const char *id, uint64_t to)
{
    struct reach *reach = create(request, id, to);
    if (!reach)
        return;
    reach->is_rewind = true;
    memcpy(reach->wait->id, reach->source, sizeof reach->source);
    start(reach, NULL);
}
