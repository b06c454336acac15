/* handle_append.c - POST /v1/memories/{id}/append: text of any size into a memory.
 *
 * The body is cut into blocks by its own bytes, never by how the network cut it, so that a resumed
 * upload gives the same tokens as an uninterrupted one: a block is so many bytes, by the
 * engine's slices, shortened to where tokenizer_cut allows a border. A block is tokenised on
 * libuv's pool, then prefilled by the engine's thread, which commits one or several at a time.
 * While too many wait, the socket is not read. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "proto/answer_json.h"
#include "proto/base/assert.h"
#include "server/receipt.h"
#include "server/route.h"
#include "server/wait.h"

struct upload {
    struct request *request;
    struct server *server;
    struct job *job;
    size_t block_most; /* bytes */
    struct buf text;   /* received, not in a block yet */
    size_t waiting;    /* blocks tokenised or with the engine, not prefilled */
    bool working;      /* a block is on the pool */
    bool ended;        /* the whole body is here */
    bool sent_last, job_done, gone, sse;
    uint64_t tokens, position, text_bytes, appended;
    uint64_t skip;           /* bytes at the beginning that an earlier try has written */
    uint64_t earlier_tokens; /* and as tokens */
    uint64_t began_ns;
    enum status status;
    struct error err;
    /* The block on the pool. */
    uv_work_t work;
    char *block;
    size_t block_size;
    bool block_last;
    struct tokenizer_tokens block_tokens;
    enum status block_status;
};

static void next_block(struct upload *u);

/* The whole of the answer, or its last event. */
static void acknowledge(struct request *request, const struct answer_append *answer)
{
    struct buf json;
    buf_init(&json);
    answer_json_append(&json, answer, false);
    if (request->streaming)
        wait_answer_event(request, &json);
    else
        request_answer_json(request, 200, &json);
    buf_close(&json);
}

static void end_if_over(struct upload *u)
{
    if (!u->job_done || u->working)
        return;
    struct request *request = u->request;
    struct server *server = u->server;
    const double seconds = (double)(uv_hrtime() - u->began_ns) * 1e-9;
    const struct answer_append answer = {.memory = request->argument,
                                         .tokens = u->tokens,
                                         .position = u->position,
                                         .text_bytes = u->text_bytes,
                                         .seconds = seconds};
    server->metrics.appended_tokens += u->tokens - u->earlier_tokens;
    server->metrics.appended_bytes += u->appended;
    if (!u->gone && u->status && request->streaming) {
        request_stream_fail(request, u->status, &u->err);
    } else if (!u->gone && u->status) {
        request_fail(request, u->status, &u->err);
    } else if (!u->gone) {
        acknowledge(request, &answer);
    }
    buf_close(&u->text);
    free(u);
    request_done(request);
}

static void send_progress(struct upload *u)
{
    if (!u->sse || u->gone)
        return;
    struct buf json, event;
    buf_init(&json);
    buf_init(&event);
    const struct answer_append answer = {.memory = u->request->argument,
                                         .tokens = u->tokens,
                                         .position = u->position,
                                         .text_bytes = u->text_bytes,
                                         .seconds = (double)(uv_hrtime() - u->began_ns) * 1e-9};
    answer_json_append(&json, &answer, true);
    answer_json_event(&event, &json);
    if (!u->request->streaming)
        request_stream_begin(u->request);
    request_stream_write(u->request, event.data, event.size);
    buf_close(&json);
    buf_close(&event);
}

static void event_cb(void *context, const struct event *event)
{
    struct upload *u = context;
    switch (event->kind) {
    case EVENT_STARTED:
        u->position = event->position;
        u->text_bytes = event->text_bytes;
        send_progress(u);
        break;
    case EVENT_BLOCK:
        u->waiting--;
        next_block(u);
        break;
    case EVENT_PROGRESS:
        u->tokens = u->earlier_tokens + event->tokens_done;
        u->appended += event->text_bytes - u->text_bytes;
        u->position = event->position;
        u->text_bytes = event->text_bytes;
        u->request->took_part = !u->request->has_receipt; /* which would know how far it came */
        send_progress(u);
        break;
    case EVENT_DONE:
        u->job = NULL;
        u->job_done = true;
        u->status = event->status;
        if (event->error)
            u->err = *event->error;
        end_if_over(u);
        break;
    default:
        break;
    }
}

/* ---- blocks ---- */

static void tokenize(uv_work_t *work)
{
    struct upload *u = work->data;
    u->block_status = tokenizer_encode(engine_tokenizer(u->server->engine), u->block, u->block_size,
                                       false, &u->block_tokens);
}

static void tokenized(uv_work_t *work, int cancelled)
{
    struct upload *u = work->data;
    (void)cancelled;
    u->working = false;
    free(u->block);
    u->block = NULL;
    if (!u->job) { /* it failed meanwhile */
        tokenizer_tokens_close(&u->block_tokens);
        end_if_over(u);
        return;
    }
    if (u->block_status) {
        tokenizer_tokens_close(&u->block_tokens);
        job_cancel(u->job);
        return;
    }
    if (u->block_tokens.count)
        u->waiting++;
    job_append_block(u->job, u->block_tokens.ids, u->block_tokens.count, u->block_size,
                     u->block_last);
    u->block_tokens = (struct tokenizer_tokens){0};
    next_block(u);
}

/* Size of the next block, 0 when its bytes are not all here yet. */
static size_t block_size(const struct upload *u)
{
    if (u->text.size > u->block_most)
        return tokenizer_cut(engine_tokenizer(u->server->engine), u->text.data, u->block_most);
    return u->ended ? u->text.size : 0;
}

static void next_block(struct upload *u)
{
    if (u->gone || !u->job || u->working || u->sent_last ||
        u->waiting >= LIMITS_APPEND_BLOCKS_WAITING)
        return;
    const size_t size = block_size(u);
    if (!size && !u->ended)
        return;
    u->block_last = u->ended && size == u->text.size;
    u->sent_last = u->block_last;
    if (!size) { /* nothing was sent, or its end fell on a border */
        job_append_block(u->job, NULL, 0, 0, true);
        return;
    }
    u->block = malloc(size);
    ASSERT(u->block);
    memcpy(u->block, u->text.data, size);
    u->block_size = size;
    buf_consume(&u->text, size);
    u->working = true;
    u->work.data = u;
    uv_queue_work(u->server->loop, &u->work, tokenize, tokenized);
    if (!u->ended && u->text.size <= 2 * u->block_most)
        request_resume(u->request);
}

/* ---- the request ---- */

static void gone(struct request *request)
{
    struct upload *u = request->state;
    u->gone = true;
    if (u->job)
        job_cancel(u->job);
}

/* A number in the query; false when it is none, or out of bounds. */
static bool read_seconds(const struct request *request, const char *name, double min, double max,
                         double *out)
{
    char text[32], *end;
    if (!http_query(request->head->query, name, text, sizeof text))
        return true;
    *out = strtod(text, &end);
    return end != text && !*end && *out >= min && *out <= max;
}

static enum status read_terms(const struct request *request, struct job_terms *terms,
                              struct error *err)
{
    memcpy(terms->tenant, request->key, sizeof terms->tenant);
    terms->weight = auth_weight(request->server->auth, request->key);
    if (!read_seconds(request, "priority", -LIMITS_PRIORITY_S, LIMITS_PRIORITY_S, &terms->priority))
        return error_set_param(err, STATUS_INVALID, "priority",
                               "\"priority\" must be seconds from %g to %g", -LIMITS_PRIORITY_S,
                               LIMITS_PRIORITY_S);
    if (!read_seconds(request, "timeout", 0.001, LIMITS_TIMEOUT_S, &terms->timeout))
        return error_set_param(err, STATUS_INVALID, "timeout",
                               "\"timeout\" must be seconds from 0.001 to %g", LIMITS_TIMEOUT_S);
    return STATUS_OK;
}

static bool read_offset(const struct request *request, int64_t *out)
{
    char text[32], *end;
    *out = -1;
    if (!http_query(request->head->query, "offset", text, sizeof text))
        return true;
    errno = 0;
    *out = strtoll(text, &end, 10);
    return end != text && !*end && !errno && *out >= 0;
}

static enum status check(const struct request *request, int64_t *offset, struct error *err)
{
    const char *type = request->head->content_type;
    if (*type && strncasecmp(type, "text/plain", 10) != 0)
        return error_set(err, STATUS_MEDIA_TYPE,
                         "send the text itself, with content-type: text/plain (UTF-8)");
    if (!read_offset(request, offset))
        return error_set_param(err, STATUS_INVALID, "offset",
                               "\"offset\" must be the bytes of text that the memory holds");
    return STATUS_OK;
}

/* An upload with an Idempotency-Key that was sent before. Whole: the answer is given again, and
 * the request is answered. Broken off: it goes on behind what is on disk. */
static enum status begin_again(struct request *request, const char *kept, struct upload *u,
                               struct job_append *append, struct error *err)
{
    unsigned long long start, tokens, position, text_bytes;
    int is_last;
    double seconds;
    struct storage_memory memory;
    if (sscanf(kept, "%llu %llu %llu %llu %d %lf", &start, &tokens, &position, &text_bytes,
               &is_last, &seconds) != 6)
        return STATUS_CORRUPT;
    if (is_last) {
        const struct answer_append answer = {.memory = request->argument,
                                             .tokens = tokens,
                                             .position = position,
                                             .text_bytes = text_bytes,
                                             .seconds = seconds};
        if (u->sse)
            request_stream_begin(request);
        acknowledge(request, &answer);
        return STATUS_OK;
    }
    const enum status status =
        storage_memory_get(request->server->storage, request->argument, &memory);
    if (status)
        return error_set(err, status, "no memory named %s", request->argument);
    const bool stands = memory.text_bytes == text_bytes && memory.token_count == position;
    storage_memory_close(&memory);
    if (!stands)
        return error_set_param(err, STATUS_CONFLICT, "Idempotency-Key",
                               "the upload with this Idempotency-Key broke off, and the memory has "
                               "been written since");
    append->expected_text_bytes = (int64_t)text_bytes;
    append->goes_on = true;
    append->earlier_start = start;
    append->earlier_tokens = u->earlier_tokens = u->tokens = tokens;
    u->skip = text_bytes - start;
    return STATUS_OK;
}

static enum status begin_once(struct request *request, struct upload *u, struct job_append *append,
                              struct error *err)
{
    char *kept = NULL;
    size_t size;
    if (!receipt_wanted(request))
        return STATUS_OK;
    enum status status = receipt_begin(request, false, &kept, &size, err);
    append->has_receipt = true;
    memcpy(append->receipt, request->receipt, sizeof append->receipt);
    if (!status && kept)
        status = begin_again(request, kept, u, append, err);
    free(kept);
    return status;
}

static void begin(struct request *request)
{
    struct error err = {0};
    int64_t offset = -1;
    enum status status = check(request, &offset, &err);
    struct upload *u = status ? NULL : calloc(1, sizeof *u);
    if (!status && !u)
        status = STATUS_NO_MEMORY;
    if (!status) {
        const struct engine_info *info = engine_get_info(request->server->engine);
        *u = (struct upload){.request = request,
                             .server = request->server,
                             .block_most = (size_t)info->slice_tokens * LIMITS_APPEND_BLOCK_RATIO,
                             .began_ns = request->began_ns,
                             .sse = strstr(request->head->accept, "text/event-stream") != NULL};
        struct job_append append = {.expected_text_bytes = offset};
        memcpy(append.request_id, request->id, sizeof append.request_id);
        memcpy(append.memory, request->argument, sizeof append.memory);
        status = read_terms(request, &append.terms, &err);
        if (!status)
            status = begin_once(request, u, &append, &err);
        if (!status && !request->answered)
            status =
                job_submit_append(request->server->engine_thread, &append, event_cb, u, &u->job);
        if (status == STATUS_BUSY)
            error_set(&err, status,
                      "too much is waiting before this; come again after the time in retry-after");
    }
    if (status)
        request_fail(request, status, &err);
    if (request->answered) {
        free(u);
        return;
    }
    request->state = u;
    request->gone_cb = gone;
    request->wants_stream = u->sse;
    request_hold(request);
}

static void body(struct request *request, const char *data, size_t size)
{
    struct upload *u = request->state;
    if (!u || u->job_done)
        return;
    if (u->skip) {
        const size_t skip = u->skip < size ? (size_t)u->skip : size;
        u->skip -= skip;
        data += skip;
        size -= skip;
    }
    buf_append(&u->text, data, size);
    if (u->text.size > 2 * u->block_most)
        request_pause(request);
    next_block(u);
}

static void end(struct request *request)
{
    struct upload *u = request->state;
    if (!u)
        return;
    u->ended = true;
    next_block(u);
}

const struct request_handler handle_append = {
    .name = "append",
    .of_memory = true,
    .query = (const char *const[]){"offset", "priority", "timeout", NULL},
    .begin_cb = begin,
    .body_cb = body,
    .end_cb = end};
