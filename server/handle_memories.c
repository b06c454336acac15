/* handle_memories.c - /v1/memories: create, fork, list, get, delete, and what a memory's chunks
 * say. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/answer_json.h"
#include "proto/memory_request.h"
#include "server/reach.h"
#include "server/receipt.h"
#include "server/route.h"
#include "server/wait.h"

/* ---- create ---- */

static void created(struct wait *wait)
{
    if (wait->status) {
        if (wait->status == STATUS_NOT_FOUND)
            error_set_param(&wait->err, STATUS_NOT_FOUND, "from", "no memory of that name to fork");
        request_fail(wait->request, wait->status, &wait->err);
    } else {
        wait_answer_memory(wait->request, 201, wait->id);
    }
    wait_end(wait);
}

/* False: the request is answered, by what was made when it came before, or because it cannot be. */
static bool begin_once(struct request *request, const struct memory_request *asked,
                       struct storage_receipt *receipt, struct buf *bytes, const char *id)
{
    struct error err = {0};
    char *kept = NULL;
    size_t size;
    if (!receipt_wanted(request))
        return true;
    enum status status = receipt_begin(request, true, &kept, &size, &err);
    if (!status && asked->at)
        status = error_set_param(&err, STATUS_UNSUPPORTED, "Idempotency-Key",
                                 "an Idempotency-Key is not taken with \"at\"");
    if (status)
        request_fail(request, status, &err);
    else if (kept)
        wait_answer_memory(request, 201, kept);
    free(kept);
    if (status || request->answered)
        return false;
    receipt_append_body(request, bytes);
    buf_append_text(bytes, id);
    memcpy(receipt->name, request->receipt, sizeof receipt->name);
    receipt->bytes = bytes->data;
    receipt->size = bytes->size;
    return true;
}

static void create_now(struct request *request, const struct memory_request *asked, const char *id,
                       const struct storage_receipt *receipt)
{
    struct wait *wait = wait_create(request);
    if (!wait)
        return;
    memcpy(wait->id, id, sizeof wait->id);
    wait_for_write(wait, created);
    const struct storage_memory_options options = {.id = wait->id,
                                                   .from = asked->from[0] ? asked->from : NULL,
                                                   .metadata = asked->metadata,
                                                   .tenant = request->key,
                                                   .receipt = receipt,
                                                   .expires = wait_expires(&asked->expires)};
    const enum status queued =
        storage_memory_create(request->server->storage, &options, wait_stored_cb, wait);
    if (queued)
        wait_refused(wait, queued);
}

/* A fork of a response is one of its memory, as that was behind it. */
static bool find_response(const struct request *request, struct memory_request *asked,
                          struct error *err)
{
    struct storage_object object;
    if (storage_object_get(request->server->storage, asked->from, &object)) {
        error_set_param(err, STATUS_NOT_FOUND, "from", "no response named %s", asked->from);
        return false;
    }
    const bool mine = !request->key[0] || strcmp(object.tenant, request->key) == 0;
    const bool found = mine && object.reachable;
    if (!found)
        error_set_param(err, STATUS_NOT_FOUND, "from",
                        mine ? "the memory of response %s is gone" : "no response named %s",
                        asked->from);
    memcpy(asked->from, object.memory, sizeof asked->from);
    asked->at = object.position;
    storage_object_close(&object);
    return found;
}

static void create(struct request *request)
{
    struct memory_request asked;
    struct error err = {0};
    enum status status = memory_request_parse(request->body.data, request->body.size, &asked, &err);
    if (status) {
        request_fail(request, status, &err);
        return;
    }
    if (strncmp(asked.from, "resp_", 5) == 0 && !find_response(request, &asked, &err)) {
        memory_request_close(&asked);
        request_fail(request, STATUS_NOT_FOUND, &err);
        return;
    }
    if (asked.from[0] && (status = request_find_memory(request, asked.from, &err))) {
        strcpy(err.param, "from");
        memory_request_close(&asked);
        request_fail(request, status, &err);
        return;
    }
    struct storage_receipt receipt = {0};
    struct buf bytes;
    char id[LIMITS_ID_BYTES];
    buf_init(&bytes);
    server_new_id("mem_", id);
    if (begin_once(request, &asked, &receipt, &bytes, id)) {
        request->server->metrics.forks += asked.from[0] != 0;
        if (asked.at)
            reach_fork(request, &asked);
        else
            create_now(request, &asked, id, receipt.size ? &receipt : NULL);
    }
    buf_close(&bytes);
    memory_request_close(&asked);
}

/* ---- update ---- */

static void updated(struct wait *wait)
{
    if (wait->status)
        wait_fail_memory(wait->request, wait->status, wait->id);
    else
        wait_answer_memory(wait->request, 200, wait->id);
    wait_end(wait);
}

static void update(struct request *request)
{
    struct memory_request asked;
    struct error err = {0};
    const enum status status =
        memory_update_parse(request->body.data, request->body.size, &asked, &err);
    if (status) {
        request_fail(request, status, &err);
        return;
    }
    struct wait *wait = wait_create(request);
    if (wait) {
        const struct storage_expires expires = wait_expires(&asked.expires);
        memcpy(wait->id, request->argument, sizeof wait->id);
        wait_for_write(wait, updated);
        const enum status queued =
            storage_memory_update(request->server->storage, wait->id, asked.metadata,
                                  asked.expires.is_given ? &expires : NULL, wait_stored_cb, wait);
        if (queued)
            wait_refused(wait, queued);
    }
    memory_request_close(&asked);
}

/* ---- get, list, delete ---- */

static void get(struct request *request)
{
    wait_answer_memory(request, 200, request->argument);
}

static void list(struct request *request)
{
    uint64_t limit = WAIT_LIST_DEFAULT;
    char after[LIMITS_ID_BYTES];
    struct error err = {0};
    if (!wait_query_count(request, "limit", WAIT_LIST_MAX, &limit) || !limit) {
        error_set_param(&err, STATUS_INVALID, "limit", "\"limit\" must be from 1 to %d",
                        WAIT_LIST_MAX);
        request_fail(request, STATUS_INVALID, &err);
        return;
    }
    const bool has_after = http_query(request->head->query, "after", after, sizeof after);
    struct storage_memory memories[WAIT_LIST_MAX];
    size_t count = 0;
    bool has_more = false;
    const enum status status =
        storage_memory_list(request->server->storage, request_tenant(request),
                            has_after ? after : NULL, limit, memories, &count, &has_more);
    if (status) {
        wait_fail_memory(request, status, has_after ? after : "");
        return;
    }
    struct buf body;
    buf_init(&body);
    buf_append_text(&body, "{\"object\":\"list\",\"data\":[");
    for (size_t i = 0; i < count; i++) {
        buf_append_text(&body, i ? "," : "");
        wait_append_memory(&body, &memories[i]);
    }
    buf_append_text(&body, "],\"first_id\":");
    buf_append_format(&body, count ? "\"%s\"" : "null", count ? memories[0].id : "");
    buf_append_text(&body, ",\"last_id\":");
    buf_append_format(&body, count ? "\"%s\"" : "null", count ? memories[count - 1].id : "");
    buf_append_format(&body, ",\"has_more\":%s}", has_more ? "true" : "false");
    for (size_t i = 0; i < count; i++)
        storage_memory_close(&memories[i]);
    request_answer_json(request, 200, &body);
    buf_close(&body);
}

static void delete (struct request *request)
{
    wait_delete_memory(request, "memory");
}

/* ---- chunks ---- */

#define SCAN_TOKENS 65536 /* read at a time when looking for the byte a chunk begins at */

/* Bytes of text of the tokens [from, to) of the memory. */
static enum status count_bytes(const struct server *server, const char *id, uint64_t from,
                               uint64_t to, uint64_t *bytes)
{
    const struct tokenizer *tokenizer = engine_tokenizer(server->engine);
    int32_t *tokens = malloc(SCAN_TOKENS * sizeof *tokens);
    enum status status = tokens ? STATUS_OK : STATUS_NO_MEMORY;
    while (!status && from < to) {
        const size_t n = to - from < SCAN_TOKENS ? (size_t)(to - from) : SCAN_TOKENS;
        status = storage_read_tokens(server->storage, id, from, n, tokens);
        for (size_t i = 0; !status && i < n; i++) {
            size_t size;
            tokenizer_bytes(tokenizer, tokens[i], &size);
            *bytes += size;
        }
        from += n;
    }
    free(tokens);
    return status;
}

/* On the pool: builds the answer. */
static void read_chunks(uv_work_t *work)
{
    struct wait *wait = work->data;
    const struct server *server = wait->server;
    const struct tokenizer *tokenizer = engine_tokenizer(server->engine);
    const uint64_t s = engine_get_info(server->engine)->config->chunk_tokens;
    int32_t tokens[LIMITS_CHUNK_TOKENS];
    struct storage_memory memory;
    wait->status = storage_memory_get(server->storage, wait->id, &memory);
    if (wait->status)
        return;
    const uint64_t count = memory.chunk_count;
    storage_memory_close(&memory);
    const uint64_t end = wait->from >= count                ? wait->from
                         : count - wait->from < wait->limit ? count
                                                            : wait->from + wait->limit;
    uint64_t byte = 0;
    if (wait->from < count)
        wait->status = count_bytes(server, wait->id, 0, wait->from * s, &byte);
    buf_append_text(&wait->body, "{\"object\":\"list\",\"data\":[");
    struct buf text;
    buf_init(&text);
    for (uint64_t i = wait->from; i < end && !wait->status; i++) {
        wait->status = storage_read_tokens(server->storage, wait->id, i * s, s, tokens);
        text.size = 0;
        for (uint64_t j = 0; j < s && !wait->status; j++) {
            size_t size;
            const char *bytes = tokenizer_bytes(tokenizer, tokens[j], &size);
            if (size)
                buf_append(&text, bytes, size);
        }
        const struct answer_chunk chunk = {.index = i,
                                           .token_start = i * s,
                                           .token_end = (i + 1) * s,
                                           .byte_start = byte,
                                           .byte_end = byte + text.size,
                                           .text = text.data ? text.data : "",
                                           .text_size = text.size};
        buf_append_text(&wait->body, i > wait->from ? "," : "");
        answer_json_memory_chunk(&wait->body, &chunk);
        byte += text.size;
    }
    buf_close(&text);
    buf_append_format(&wait->body, "],\"has_more\":%s}", end < count ? "true" : "false");
}

static void chunks_read(uv_work_t *work, int cancelled)
{
    struct wait *wait = work->data;
    (void)cancelled;
    if (wait->status)
        wait_fail_memory(wait->request, wait->status, wait->id);
    else
        request_answer_json(wait->request, 200, &wait->body);
    wait_end(wait);
}

static void chunks(struct request *request)
{
    uint64_t from = 0, limit = WAIT_LIST_DEFAULT;
    struct error err = {0};
    if (!wait_query_count(request, "from", UINT64_MAX >> 16, &from) ||
        !wait_query_count(request, "limit", WAIT_LIST_MAX, &limit) || !limit) {
        error_set(&err, STATUS_INVALID, "\"from\" must be a chunk's index, \"limit\" from 1 to %d",
                  WAIT_LIST_MAX);
        request_fail(request, STATUS_INVALID, &err);
        return;
    }
    struct wait *wait = wait_create(request);
    if (!wait)
        return;
    memcpy(wait->id, request->argument, sizeof wait->id);
    wait->from = from;
    wait->limit = limit;
    wait->work.data = wait;
    uv_queue_work(request->server->loop, &wait->work, read_chunks, chunks_read);
}

#define BODY_LIMIT ((size_t)256 << 10) /* a name and 16 pairs of metadata */

const struct request_handler handle_memories_create = {
    .name = "memories_create", .body_limit = BODY_LIMIT, .end_cb = create};
const struct request_handler handle_memories_list = {
    .name = "memories_list",
    .query = (const char *const[]){"limit", "after", NULL},
    .end_cb = list};
const struct request_handler handle_memories_get = {
    .name = "memories_get", .of_memory = true, .end_cb = get};
const struct request_handler handle_memories_update = {
    .name = "memories_update", .of_memory = true, .body_limit = BODY_LIMIT, .end_cb = update};
const struct request_handler handle_memories_delete = {
    .name = "memories_delete", .of_memory = true, .end_cb = delete};
const struct request_handler handle_memories_chunks = {
    .name = "memories_chunks",
    .of_memory = true,
    .query = (const char *const[]){"from", "limit", NULL},
    .end_cb = chunks};
