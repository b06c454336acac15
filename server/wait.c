/* wait.c - see wait.h. */
#include "server/wait.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "proto/answer_json.h"
#include "server/engine_thread.h"

static void gone(struct request *request)
{
    (void)request; /* what was asked for goes on; nobody hears of it */
}

struct wait *wait_create(struct request *request)
{
    struct wait *wait = calloc(1, sizeof *wait);
    if (!wait) {
        request_fail(request, STATUS_NO_MEMORY, NULL);
        return NULL;
    }
    wait->request = request;
    wait->server = request->server;
    request_hold(request);
    request->gone_cb = gone;
    return wait;
}

void wait_end(struct wait *wait)
{
    struct request *request = wait->request;
    buf_close(&wait->body);
    free(wait);
    request_done(request);
}

/* ---- from the writer thread back to the loop ---- */

static void async_closed(uv_handle_t *handle)
{
    struct wait *wait = handle->data;
    wait->then(wait);
}

static void async_cb(uv_async_t *async)
{
    uv_close((uv_handle_t *)async, async_closed);
}

/* On the writer thread. */
void wait_stored_cb(void *context, enum status status)
{
    struct wait *wait = context;
    wait->status = status;
    uv_async_send(&wait->async);
}

void wait_for_write(struct wait *wait, void (*then)(struct wait *wait))
{
    wait->then = then;
    uv_async_init(wait->server->loop, &wait->async, async_cb);
    wait->async.data = wait;
}

void wait_refused(struct wait *wait, enum status status)
{
    wait->status = status;
    uv_async_send(&wait->async);
}

struct storage_expires wait_expires(const struct memory_expires *asked)
{
    return (struct storage_expires){.seconds = (int64_t)asked->seconds,
                                    .from_use = asked->from_use};
}

/* ---- answers ---- */

void wait_append_memory(struct buf *out, const struct storage_memory *memory)
{
    const struct answer_memory answer = {.id = memory->id,
                                         .parent = memory->parent,
                                         .metadata = memory->metadata,
                                         .created_at = memory->created_at,
                                         .expires_s = memory->expires.seconds,
                                         .expires_from_use = memory->expires.from_use,
                                         .expires_at = memory->expires_at,
                                         .token_count = memory->token_count,
                                         .chunk_count = memory->chunk_count,
                                         .text_bytes = memory->text_bytes,
                                         .bytes_on_disk = memory->bytes_on_disk};
    answer_json_memory(out, &answer);
}

void wait_fail_memory(struct request *request, enum status status, const char *id)
{
    struct error err;
    error_set(&err, status, status == STATUS_NOT_FOUND ? "no memory named %s" : "memory %s: %s", id,
              status_text(status));
    if (request->streaming)
        request_stream_fail(request, status, &err);
    else
        request_fail(request, status, &err);
}

static void deleted(struct wait *wait)
{
    const char *id = wait->request->argument;
    if (wait->status) {
        wait_fail_memory(wait->request, wait->status, id);
    } else {
        buf_append_format(&wait->body, "{\"id\":\"%s\",\"object\":\"%s.deleted\",\"deleted\":true}",
                          id, wait->kind);
        request_answer_json(wait->request, 200, &wait->body);
    }
    wait_end(wait);
}

/* The engine has let go of the memory, or uses it. */
static void released_cb(void *context, enum status status)
{
    struct wait *wait = context;
    const char *id = wait->request->argument;
    if (status) {
        error_set(&wait->err, status,
                  "%s %s is being used by another request; try again when it is done", wait->kind,
                  id);
        request_fail(wait->request, status, &wait->err);
        wait_end(wait);
        return;
    }
    wait_for_write(wait, deleted);
    status = storage_memory_delete(wait->server->storage, id, wait_stored_cb, wait);
    if (status)
        wait_refused(wait, status);
}

void wait_delete_memory(struct request *request, const char *kind)
{
    struct wait *wait = wait_create(request);
    if (!wait)
        return;
    wait->kind = kind;
    engine_thread_release_memory(request->server->engine_thread, request->argument, released_cb,
                                 wait);
}

void wait_answer_event(struct request *request, const struct buf *json)
{
    struct buf event;
    if (!request->streaming)
        request_stream_begin(request);
    buf_init(&event);
    answer_json_event(&event, json);
    buf_append_text(&event, "data: [DONE]\n\n");
    request_stream_write(request, event.data, event.size);
    request_stream_end(request);
    buf_close(&event);
}

void wait_answer_memory(struct request *request, int http_status, const char *id)
{
    struct storage_memory memory;
    const enum status status = storage_memory_get(request->server->storage, id, &memory);
    if (!status && memory.ephemeral) {
        storage_memory_close(&memory);
        wait_fail_memory(request, STATUS_NOT_FOUND, id);
        return;
    }
    if (status) {
        wait_fail_memory(request, status, id);
        return;
    }
    struct buf body;
    buf_init(&body);
    wait_append_memory(&body, &memory);
    if (request->wants_stream)
        wait_answer_event(request, &body);
    else
        request_answer_json(request, http_status, &body);
    buf_close(&body);
    storage_memory_close(&memory);
}

bool wait_query_count(const struct request *request, const char *name, uint64_t max, uint64_t *out)
{
    char text[32], *end;
    if (!http_query(request->head->query, name, text, sizeof text))
        return true;
    errno = 0;
    const unsigned long long value = strtoull(text, &end, 10);
    if (*end || end == text || errno || text[0] == '-' || value > max)
        return false;
    *out = value;
    return true;
}

/* ---- lists of items ---- */

const char *const wait_items_query[] = {"limit", "after", "order", NULL};

void wait_append_items(struct buf *out, const struct storage_item *items, size_t count,
                       bool has_more)
{
    buf_append_text(out, "{\"object\":\"list\",\"data\":[");
    for (size_t i = 0; i < count; i++) {
        buf_append_text(out, i ? "," : "");
        buf_append(out, items[i].bytes, items[i].size);
    }
    buf_append_text(out, "],\"first_id\":");
    buf_append_format(out, count ? "\"%s\"" : "null", count ? items[0].id : "");
    buf_append_text(out, ",\"last_id\":");
    buf_append_format(out, count ? "\"%s\"" : "null", count ? items[count - 1].id : "");
    buf_append_format(out, ",\"has_more\":%s}", has_more ? "true" : "false");
}

void wait_answer_items(struct request *request, const char *owner)
{
    struct storage_item items[WAIT_LIST_MAX];
    uint64_t limit = WAIT_LIST_DEFAULT;
    char after[LIMITS_ID_BYTES], order[8] = "desc";
    struct error err = {0};
    size_t count;
    bool has_more;
    const char *query = request->head->query;
    const bool has_after = http_query(query, "after", after, sizeof after);
    http_query(query, "order", order, sizeof order);
    const bool newest_first = strcmp(order, "desc") == 0;
    enum status status = STATUS_OK;
    if (!wait_query_count(request, "limit", WAIT_LIST_MAX, &limit) || !limit)
        status = error_set_param(&err, STATUS_INVALID, "limit", "\"limit\" must be from 1 to %d",
                                 WAIT_LIST_MAX);
    else if (!newest_first && strcmp(order, "asc") != 0)
        status = error_set_param(&err, STATUS_INVALID, "order", "\"order\" is asc or desc");
    if (!status)
        status = storage_item_list(request->server->storage, owner, has_after ? after : NULL,
                                   newest_first, (size_t)limit, items, &count, &has_more);
    if (status == STATUS_NOT_FOUND)
        error_set_param(&err, status, "after", "there is no item %s in this list", after);
    if (status) {
        request_fail(request, status, &err);
        return;
    }
    struct buf body;
    buf_init(&body);
    wait_append_items(&body, items, count, has_more);
    request_answer_json(request, 200, &body);
    buf_close(&body);
    storage_items_close(items, count);
}
