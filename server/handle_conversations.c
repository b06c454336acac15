/* handle_conversations.c - /v1/conversations: memories with items. A conversation's id is its
 * memory's; its items are the list of that memory, and what they say has been read into it.
 *
 * New items: PREPARING -> (FORKING ->) READING -> answered. FORKING makes the memory of a new
 * conversation, which lasts from the commit of its items on. All states can reach the failure. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/response_request.h"
#include "server/chat.h"
#include "server/forget.h"
#include "server/generate.h"
#include "server/place.h"
#include "server/receipt.h"
#include "server/route.h"

#define PREFIX "conv_"
/* 20 items with their text; the text itself is not limited to that of a name. */
#define BODY_LIMIT LIMITS_JSON_BODY_BYTES
#define METADATA_BODY_LIMIT ((size_t)256 << 10)

static void fail_unknown(struct request *request)
{
    struct error err;
    error_set(&err, STATUS_NOT_FOUND, "no conversation named %s", request->argument);
    request_fail(request, STATUS_NOT_FOUND, &err);
}

/* The conversation of the path, which must be closed; false: the request is answered. */
static bool find(struct request *request, struct storage_memory *memory)
{
    const char *id = request->argument;
    const enum status status = strncmp(id, PREFIX, strlen(PREFIX)) == 0
                                   ? storage_memory_get(request->server->storage, id, memory)
                                   : STATUS_NOT_FOUND;
    if (status && status != STATUS_NOT_FOUND) {
        wait_fail_memory(request, status, id);
        return false;
    }
    if (!status && !memory->ephemeral &&
        (!request->key[0] || strcmp(memory->tenant, request->key) == 0))
        return true;
    if (!status)
        storage_memory_close(memory);
    fail_unknown(request);
    return false;
}

static bool exists(struct request *request)
{
    struct storage_memory memory;
    if (!find(request, &memory))
        return false;
    storage_memory_close(&memory);
    return true;
}

static void answer(struct request *request, const char *id)
{
    struct storage_memory memory;
    const enum status status = storage_memory_get(request->server->storage, id, &memory);
    if (status) { /* it is gone again already */
        wait_fail_memory(request, status, id);
        return;
    }
    struct buf body;
    buf_init(&body);
    buf_append_format(
        &body,
        "{\"id\":\"%s\",\"object\":\"conversation\",\"created_at\":%lld,\"metadata\":", memory.id,
        (long long)memory.created_at);
    buf_append_text(&body, memory.metadata);
    buf_append_text(&body, "}");
    request_answer_json(request, 200, &body);
    buf_close(&body);
    storage_memory_close(&memory);
}

/* ---- new items, of a new conversation or not ---- */

struct addition {
    struct request *request;
    struct server *server;
    struct conversation_request asked;
    struct place place;
    bool is_new; /* the conversation */
    char id[LIMITS_ID_BYTES];
    struct tokenizer_tokens tokens;
    size_t text_bytes;
    struct storage_item items[LIMITS_CONVERSATION_ITEMS];
    struct buf texts[LIMITS_CONVERSATION_ITEMS];
    struct storage_keep keep;
    struct buf kept; /* the receipt: the body's hash, then the ids of what was made */
    struct job *job;
    uv_work_t work;
    struct wait wait;
    enum status status;
    struct error err;
};

static void finish(struct addition *a)
{
    struct request *request = a->request;
    place_close(&a->place);
    tokenizer_tokens_close(&a->tokens);
    for (size_t i = 0; i < LIMITS_CONVERSATION_ITEMS; i++)
        buf_close(&a->texts[i]);
    buf_close(&a->kept);
    conversation_request_close(&a->asked);
    free(a);
    request_done(request);
}

static void end(struct addition *a, enum status status)
{
    if (!a->request->gone && status) {
        request_fail(a->request, status, &a->err);
    } else if (!a->request->gone && a->is_new) {
        answer(a->request, a->id);
    } else if (!a->request->gone) {
        struct buf body;
        buf_init(&body);
        wait_append_items(&body, a->items, a->asked.items.count, false);
        request_answer_json(a->request, 200, &body);
        buf_close(&body);
    }
    finish(a);
}

static void event_cb(void *context, const struct event *event)
{
    struct addition *a = context;
    if (event->kind != EVENT_DONE)
        return;
    a->job = NULL;
    if (event->status && event->error)
        a->err = *event->error;
    a->place.lasts = !event->status;
    end(a, event->status);
}

/* Reads the items into the memory and commits them with it. */
static void read_items(struct addition *a)
{
    struct job_generate g = {.memory_write = true,
                             .settles = a->is_new,
                             .keep = &a->keep,
                             .choices = 1,
                             .text_bytes = a->text_bytes};
    g.tokens = place_tokens(&a->place, &a->tokens, NULL, 0, &g.token_count);
    ASSERT(g.tokens);
    sampler_params_default(&g.sampling);
    memcpy(g.request_id, a->request->id, sizeof g.request_id);
    memcpy(g.memory, a->id, sizeof g.memory);
    memcpy(g.terms.tenant, a->request->key, sizeof g.terms.tenant);
    if (a->kept.size) {
        g.has_receipt = true;
        memcpy(g.receipt, a->request->receipt, sizeof g.receipt);
        g.receipt_head = strdup(buf_text(&a->kept));
        ASSERT(g.receipt_head);
    }
    a->keep.lists[0] = (struct storage_list){a->id, a->items, a->asked.items.count};
    const enum status status = generate_submit(a->server, &g, event_cb, a, &a->job, &a->err);
    if (status) {
        free(g.tokens);
        free(g.receipt_head);
        end(a, status);
    }
}

static void forked(struct place *place, enum status status)
{
    struct addition *a = LIST_ENTRY(place, struct addition, place);
    if (status) {
        a->err = place->err;
        end(a, status);
    } else {
        read_items(a);
    }
}

static void created(struct wait *wait)
{
    struct addition *a = LIST_ENTRY(wait, struct addition, wait);
    if (wait->status)
        error_set(&a->err, wait->status, "%s", status_text(wait->status));
    end(a, wait->status);
}

/* A conversation with nothing in it. */
static void create_empty(struct addition *a)
{
    struct storage_receipt receipt = {.bytes = a->kept.data, .size = a->kept.size};
    memcpy(receipt.name, a->request->receipt, sizeof receipt.name);
    const struct storage_memory_options options = {.id = a->id,
                                                   .metadata = a->asked.metadata,
                                                   .tenant = a->request->key,
                                                   .receipt = a->kept.size ? &receipt : NULL};
    a->wait.server = a->server;
    wait_for_write(&a->wait, created);
    const enum status status =
        storage_memory_create(a->server->storage, &options, wait_stored_cb, &a->wait);
    if (status)
        wait_refused(&a->wait, status);
}

/* ---- once ---- */

/* What was made when the request came before: the conversation, or those of its items that are
 * still there. */
static void answer_kept(struct addition *a, char *kept)
{
    struct storage_item items[LIMITS_CONVERSATION_ITEMS];
    size_t count = 0;
    char *rest = NULL, *ids = strtok_r(kept, " ", &rest);
    for (char *id = ids ? strtok_r(ids, ",", &rest) : NULL;
         id && !a->is_new && count < LIMITS_CONVERSATION_ITEMS; id = strtok_r(NULL, ",", &rest))
        count += !storage_item_get(a->server->storage, a->id, id, &items[count]);
    if (a->is_new && ids) {
        answer(a->request, ids);
        return;
    }
    struct buf body;
    buf_init(&body);
    wait_append_items(&body, items, count, false);
    request_answer_json(a->request, 200, &body);
    buf_close(&body);
    storage_items_close(items, count);
}

/* False: the request is answered, as it was when it came before, or because it cannot be. */
static bool begin_once(struct addition *a)
{
    char *kept = NULL;
    size_t size;
    if (!receipt_wanted(a->request))
        return true;
    const enum status status = receipt_begin(a->request, true, &kept, &size, &a->err);
    if (status)
        request_fail(a->request, status, &a->err);
    else if (kept)
        answer_kept(a, kept);
    free(kept);
    if (status || a->request->answered)
        return false;
    receipt_append_body(a->request, &a->kept);
    if (a->is_new)
        buf_append_text(&a->kept, a->id);
    for (size_t i = 0; i < a->asked.items.count && !a->is_new; i++)
        buf_append_format(&a->kept, "%s%s", i ? "," : "", a->items[i].id);
    buf_append_text(&a->kept, " ");
    return true;
}

/* ---- from the request on ---- */

/* The items as tokens, behind what the conversation holds, and as they are listed. */
static enum status prepare_items(struct addition *a)
{
    const struct response_items *asked = &a->asked.items;
    for (size_t i = 0; i < asked->count; i++) {
        server_new_id("msg_", a->items[i].id);
        response_items_append(asked, i, a->items[i].id, &a->texts[i]);
        a->items[i].bytes = a->texts[i].data;
        a->items[i].size = a->texts[i].size;
    }
    return chat_encode_items(&a->server->chat, asked->messages, asked->count, a->place.position > 0,
                             &a->tokens, &a->text_bytes, &a->err);
}

/* On the pool: items may be long. */
static void prepare(uv_work_t *work)
{
    struct addition *a = work->data;
    const struct buf *body = &a->request->body;
    a->status = a->is_new ? conversation_request_parse(body->data, body->size, &a->asked, &a->err)
                          : conversation_items_parse(body->data, body->size, &a->asked, &a->err);
    if (!a->status && a->asked.items.count)
        a->status = prepare_items(a);
}

static void prepared(uv_work_t *work, int cancelled)
{
    struct addition *a = work->data;
    (void)cancelled;
    if (a->status || a->request->gone)
        end(a, a->status);
    else if (!begin_once(a))
        finish(a);
    else if (!a->asked.items.count)
        create_empty(a);
    else if (a->is_new)
        place_fork(&a->place, a->request->key, a->asked.metadata, forked);
    else
        read_items(a);
}

static void gone(struct request *request)
{
    struct addition *a = request->state;
    if (a->job)
        job_cancel(a->job);
}

static void add(struct request *request, uint64_t position, bool is_new)
{
    struct addition *a = calloc(1, sizeof *a);
    if (!a) {
        request_fail(request, STATUS_NO_MEMORY, NULL);
        return;
    }
    a->request = request;
    a->server = a->place.server = request->server;
    a->is_new = is_new;
    a->place.position = a->place.stands = position;
    if (is_new)
        server_new_id(PREFIX, a->id);
    else
        memcpy(a->id, request->argument, sizeof a->id);
    memcpy(a->place.memory, a->id, sizeof a->id);
    request->state = a;
    request->gone_cb = gone;
    request_hold(request);
    a->work.data = a;
    uv_queue_work(request->server->loop, &a->work, prepare, prepared);
}

static void create(struct request *request)
{
    add(request, 0, true);
}

static void create_items(struct request *request)
{
    struct storage_memory memory;
    if (!find(request, &memory))
        return;
    add(request, memory.token_count, false);
    storage_memory_close(&memory);
}

/* ---- get, update, delete ---- */

static void get(struct request *request)
{
    if (exists(request))
        answer(request, request->argument);
}

static void updated(struct wait *wait)
{
    if (wait->status)
        wait_fail_memory(wait->request, wait->status, wait->request->argument);
    else
        answer(wait->request, wait->request->argument);
    wait_end(wait);
}

static void update(struct request *request)
{
    struct conversation_request asked;
    struct error err = {0};
    if (!exists(request))
        return;
    enum status status =
        conversation_update_parse(request->body.data, request->body.size, &asked, &err);
    if (status) {
        request_fail(request, status, &err);
        return;
    }
    struct wait *wait = wait_create(request);
    if (wait) {
        wait_for_write(wait, updated);
        status = storage_memory_update(request->server->storage, request->argument, asked.metadata,
                                       NULL, wait_stored_cb, wait);
        if (status)
            wait_refused(wait, status);
    }
    conversation_request_close(&asked);
}

static void delete (struct request *request)
{
    if (exists(request))
        wait_delete_memory(request, "conversation");
}

/* ---- items ---- */

static void list_items(struct request *request)
{
    if (exists(request))
        wait_answer_items(request, request->argument);
}

static void fail_item(struct request *request, enum status status)
{
    struct error err;
    error_set(&err, status,
              status == STATUS_NOT_FOUND ? "there is no item %s in this conversation"
                                         : "item %s: %s",
              request->item, status_text(status));
    request_fail(request, status, &err);
}

static void get_item(struct request *request)
{
    struct storage_item item;
    if (!exists(request))
        return;
    const enum status status =
        storage_item_get(request->server->storage, request->argument, request->item, &item);
    if (status) {
        fail_item(request, status);
        return;
    }
    request_answer(request, 200, "application/json", item.bytes, item.size);
    storage_items_close(&item, 1);
}

static void delete_item(struct request *request)
{
    if (exists(request))
        forget_item(request, answer);
}

const struct request_handler handle_conversations_create = {
    .name = "conversations_create", .body_limit = BODY_LIMIT, .end_cb = create};
const struct request_handler handle_conversations_get = {.name = "conversations_get",
                                                         .end_cb = get};
const struct request_handler handle_conversations_update = {
    .name = "conversations_update", .body_limit = METADATA_BODY_LIMIT, .end_cb = update};
const struct request_handler handle_conversations_delete = {.name = "conversations_delete",
                                                            .end_cb = delete};
const struct request_handler handle_items_list = {
    .name = "items_list", .query = wait_items_query, .end_cb = list_items};
const struct request_handler handle_items_create = {
    .name = "items_create", .body_limit = BODY_LIMIT, .end_cb = create_items};
const struct request_handler handle_items_get = {.name = "items_get", .end_cb = get_item};
const struct request_handler handle_items_delete = {.name = "items_delete", .end_cb = delete_item};
