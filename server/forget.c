/* forget.c - see forget.h. A recurrent memory cannot unlearn a part of its past: it is read anew
 * from before the item on, without it, beside the old one, whose place it takes in one commit.
 *
 *   PREPARE -> FORK -> (READ ->) RELEASE -> REPLACE -> answered
 *   All states can reach the answer of a failure; the conversation is then as it was. */
#include "server/forget.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/response_request.h"
#include "server/generate.h"
#include "server/place.h"

#define PAGE 64

struct forget {
    struct request *request;
    struct server *server;
    void (*answer_cb)(struct request *request, const char *id);
    char id[LIMITS_ID_BYTES], item[LIMITS_ID_BYTES], tenant[LIMITS_ID_BYTES];
    uint64_t branch, head; /* of the conversation, as it was read */
    struct place place;
    struct storage_item *later; /* the items that are told anew */
    size_t later_count, later_capacity;
    struct tokenizer_tokens tokens;
    size_t text_bytes;
    struct storage_keep keep;
    struct job *job;
    uv_work_t work;
    struct wait wait;
    enum status status;
    struct error err;
};

static void end(struct forget *f, enum status status)
{
    struct request *request = f->request;
    if (!request->gone && status) {
        if (!f->err.message[0])
            error_set(&f->err, status, "conversation %s: %s", f->id, status_text(status));
        request_fail(request, status, &f->err);
    } else if (!request->gone) {
        f->answer_cb(request, f->id);
    }
    place_close(&f->place);
    storage_items_close(f->later, f->later_count);
    free(f->later);
    tokenizer_tokens_close(&f->tokens);
    free(f);
    request_done(request);
}

/* ---- replace ---- */

static void replaced(struct wait *wait)
{
    struct forget *f = LIST_ENTRY(wait, struct forget, wait);
    f->place.lasts = wait->status == STATUS_OK;
    end(f, wait->status);
}

/* Nobody uses the conversation now; it must be the one that was read. */
static void conversation_released_cb(void *context, enum status status)
{
    struct forget *f = context;
    struct storage_memory memory;
    if (status) {
        error_set(&f->err, status,
                  "conversation %s is being used by another request; try again when it is done",
                  f->id);
        end(f, status);
        return;
    }
    status = storage_memory_get(f->server->storage, f->id, &memory);
    if (!status) {
        if (memory.branch != f->branch || memory.token_count != f->head)
            status = error_set(&f->err, STATUS_CONFLICT,
                               "conversation %s went on meanwhile; try again", f->id);
        storage_memory_close(&memory);
    }
    if (status) {
        end(f, status);
        return;
    }
    f->keep.lists[0] = (struct storage_list){f->id, f->later, f->later_count};
    f->wait.server = f->server;
    wait_for_write(&f->wait, replaced);
    status = storage_memory_replace(f->server->storage, f->place.memory, f->id, f->place.position,
                                    &f->keep, wait_stored_cb, &f->wait);
    if (status)
        wait_refused(&f->wait, status);
}

static void fork_released_cb(void *context, enum status status)
{
    struct forget *f = context;
    if (status)
        end(f, status);
    else
        engine_thread_release_memory(f->server->engine_thread, f->id, conversation_released_cb, f);
}

static void release(struct forget *f)
{
    engine_thread_release_memory(f->server->engine_thread, f->place.memory, fork_released_cb, f);
}

/* ---- read anew ---- */

static void event_cb(void *context, const struct event *event)
{
    struct forget *f = context;
    if (event->kind != EVENT_DONE)
        return;
    f->job = NULL;
    if (event->status && event->error)
        f->err = *event->error;
    if (event->status)
        end(f, event->status);
    else
        release(f);
}

static void forked(struct place *place, enum status status)
{
    struct forget *f = LIST_ENTRY(place, struct forget, place);
    struct job_generate g = {
        .memory_write = true, .choices = 1, .text_bytes = f->text_bytes + place->replay_bytes};
    if (status) {
        f->err = place->err;
        end(f, status);
        return;
    }
    g.tokens = place_tokens(place, &f->tokens, NULL, 0, &g.token_count);
    ASSERT(g.tokens);
    if (!g.token_count) { /* it was the last, and there is a snapshot before it */
        free(g.tokens);
        release(f);
        return;
    }
    sampler_params_default(&g.sampling);
    memcpy(g.request_id, f->request->id, sizeof g.request_id);
    memcpy(g.memory, place->memory, sizeof g.memory);
    memcpy(g.terms.tenant, f->tenant, sizeof g.terms.tenant);
    status = generate_submit(f->server, &g, event_cb, f, &f->job, &f->err);
    if (status) {
        free(g.tokens);
        end(f, status);
    }
}

/* ---- prepare ---- */

/* Whether the turn at `position` is one of the items': that of the item or of a later one. */
static bool is_of_items(const struct forget *f, uint64_t position, uint64_t of_item)
{
    bool found = position == of_item;
    for (size_t i = 0; i < f->later_count && !found; i++)
        found = f->later[i].position == position;
    return found;
}

/* Finds the turn that the item's came behind; all later ones must be of items, or their words would
 * be lost. */
static enum status find_start(struct forget *f, uint64_t of_item)
{
    struct storage_turn turns[PAGE];
    size_t count;
    bool more = true;
    f->place.position = 0;
    for (uint64_t from = UINT64_MAX; more;) {
        enum status status =
            storage_turn_list(f->server->storage, f->id, from, PAGE, turns, &count, &more);
        if (status)
            return status;
        for (size_t i = 0; i < count; i++) {
            if (turns[i].position < of_item) {
                f->place.position = turns[i].position;
                return STATUS_OK;
            }
            if (!is_of_items(f, turns[i].position, of_item))
                return error_set(&f->err, STATUS_CONFLICT,
                                 "behind this item, up to position %llu, the conversation's memory "
                                 "holds words that are not items and would be lost; rewind it "
                                 "instead",
                                 (unsigned long long)turns[i].position);
            from = turns[i].position - 1;
        }
        more = more && count;
    }
    return STATUS_OK;
}

/* The items of the item's own turn and of later ones, without it. */
static enum status read_later(struct forget *f, uint64_t of_item)
{
    struct storage_item page[PAGE];
    char after[LIMITS_ID_BYTES] = "";
    size_t count;
    bool more = true;
    while (more) {
        enum status status = storage_item_list(f->server->storage, f->id, after[0] ? after : NULL,
                                               false, PAGE, page, &count, &more);
        if (status)
            return status;
        for (size_t i = 0; i < count; i++) {
            memcpy(after, page[i].id, sizeof after);
            if (page[i].position < of_item || strcmp(page[i].id, f->item) == 0) {
                storage_items_close(&page[i], 1);
                continue;
            }
            if (f->later_count == f->later_capacity) {
                f->later_capacity = f->later_capacity ? 2 * f->later_capacity : PAGE;
                f->later = realloc(f->later, f->later_capacity * sizeof *f->later);
                ASSERT(f->later);
            }
            f->later[f->later_count++] = page[i];
        }
    }
    return STATUS_OK;
}

/* Parses the items that come behind, and renders them as their conversation would be. */
static enum status encode(struct forget *f)
{
    struct conversation_request *parsed = calloc(f->later_count + 1, sizeof *parsed);
    struct chat_message *messages = calloc(f->later_count + 1, sizeof *messages);
    size_t count = 0;
    enum status status = parsed && messages ? STATUS_OK : STATUS_NO_MEMORY;
    for (; count < f->later_count && !status; count += !status) {
        struct buf body;
        buf_init(&body);
        buf_append_text(&body, "{\"items\":[");
        buf_append(&body, f->later[count].bytes, f->later[count].size);
        buf_append_text(&body, "]}");
        status = conversation_items_parse(body.data, body.size, &parsed[count], &f->err);
        if (!status)
            messages[count] = parsed[count].items.messages[0];
        buf_close(&body);
    }
    if (!status && count)
        status = chat_encode_items(&f->server->chat, messages, count, f->place.position > 0,
                                   &f->tokens, &f->text_bytes, &f->err);
    for (size_t i = 0; i < count; i++)
        conversation_request_close(&parsed[i]);
    free(parsed);
    free(messages);
    return status;
}

/* On the pool. */
static void prepare(uv_work_t *work)
{
    struct forget *f = work->data;
    struct storage_memory memory;
    struct storage_item item;
    f->status = storage_memory_get(f->server->storage, f->id, &memory);
    if (f->status)
        return;
    f->branch = memory.branch;
    f->head = memory.token_count;
    storage_memory_close(&memory);
    f->status = storage_item_get(f->server->storage, f->id, f->item, &item);
    if (f->status == STATUS_NOT_FOUND)
        error_set(&f->err, f->status, "there is no item %s in this conversation", f->item);
    if (f->status)
        return;
    storage_items_close(&item, 1);
    f->status = read_later(f, item.position);
    if (!f->status)
        f->status = find_start(f, item.position);
    if (!f->status)
        f->status = encode(f);
}

static void prepared(uv_work_t *work, int cancelled)
{
    struct forget *f = work->data;
    (void)cancelled;
    if (f->status || f->request->gone)
        end(f, f->status);
    else
        place_fork(&f->place, f->tenant, NULL, forked);
}

static void gone(struct request *request)
{
    struct forget *f = request->state;
    if (f->job)
        job_cancel(f->job);
}

void forget_item(struct request *request,
                 void (*answer_cb)(struct request *request, const char *id))
{
    struct forget *f = calloc(1, sizeof *f);
    if (!f) {
        request_fail(request, STATUS_NO_MEMORY, NULL);
        return;
    }
    f->request = request;
    f->server = f->place.server = request->server;
    f->answer_cb = answer_cb;
    memcpy(f->id, request->argument, sizeof f->id);
    memcpy(f->place.base, f->id, sizeof f->id);
    memcpy(f->item, request->item, sizeof f->item);
    memcpy(f->tenant, request->key, sizeof f->tenant);
    request->state = f;
    request->gone_cb = gone;
    request_hold(request);
    f->work.data = f;
    uv_queue_work(request->server->loop, &f->work, prepare, prepared);
}
