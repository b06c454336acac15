/* handle_responses.c - /v1/responses: create, get, delete, cancel, what went in, how many tokens.
 */
#include <stdlib.h>
#include <string.h>

#include "server/responding.h"
#include "server/route.h"

static void create(struct request *request)
{
    responding_create(request, false);
}

static void count_input(struct request *request)
{
    responding_create(request, true);
}

static void fail(struct request *request, enum status status)
{
    struct error err;
    error_set(&err, status, status == STATUS_NOT_FOUND ? "no response named %s" : "response %s: %s",
              request->argument, status_text(status));
    request_fail(request, status, &err);
}

/* ---- get ---- */

/* ?stream=true and &starting_after=N: the number of its first event, or UINT64_MAX: an object. */
static bool read_stream(struct request *request, uint64_t *from)
{
    char stream[8] = "false";
    uint64_t after = UINT64_MAX;
    struct error err = {0};
    const char *wrong = NULL;
    *from = UINT64_MAX;
    http_query(request->head->query, "stream", stream, sizeof stream);
    const bool is_stream = strcmp(stream, "true") == 0;
    if (!is_stream && strcmp(stream, "false") != 0)
        wrong = "stream";
    else if (!wait_query_count(request, "starting_after", UINT64_MAX >> 16, &after) ||
             (after != UINT64_MAX && !is_stream))
        wrong = "starting_after";
    if (wrong) {
        error_set_param(&err, STATUS_INVALID, wrong,
                        "\"stream\" must be true or false; with true, \"starting_after\" the "
                        "number of an event");
        request_fail(request, STATUS_INVALID, &err);
        return false;
    }
    if (is_stream)
        *from = after == UINT64_MAX ? 0 : after + 1;
    return true;
}

static void get(struct request *request)
{
    struct storage_object object;
    struct response response;
    uint64_t from;
    if (!read_stream(request, &from))
        return;
    const bool stream = from != UINT64_MAX;
    struct responding *live = responding_find(request, request->argument);
    if (live && stream && strcmp(request->head->method, "HEAD") != 0) {
        responding_watch_events(live, request, from);
        return;
    }
    if (live) {
        responding_answer(request, &live->response, false, 0);
        return;
    }
    const enum status status = responding_read(request, request->argument, &object, &response);
    if (status) {
        fail(request, status);
        return;
    }
    responding_answer(request, &response, stream, from);
    storage_object_close(&object);
    response_close(&response);
}

/* ---- cancel ---- */

static void cancel(struct request *request)
{
    struct storage_object object;
    struct response response;
    struct error err = {0};
    struct responding *live = responding_find(request, request->argument);
    if (live && live->asked.background) {
        responding_watch_end(live, request);
        responding_cancel(live);
        return;
    }
    const enum status status =
        live ? STATUS_OK : responding_read(request, request->argument, &object, &response);
    if (status) {
        fail(request, status);
    } else if (live || !response.background) {
        error_set(&err, STATUS_INVALID,
                  "response %s was not made with \"background\": true; close its connection to "
                  "cancel it",
                  request->argument);
        request_fail(request, STATUS_INVALID, &err);
    } else {
        responding_answer(request, &response, false, 0);
    }
    if (!status && !live) {
        storage_object_close(&object);
        response_close(&response);
    }
}

/* ---- delete ---- */

static void deleted(struct wait *wait)
{
    struct buf body;
    if (wait->status) {
        fail(wait->request, wait->status);
    } else {
        buf_init(&body);
        buf_append_format(&body, "{\"id\":\"%s\",\"object\":\"response\",\"deleted\":true}",
                          wait->request->argument);
        request_answer_json(wait->request, 200, &body);
        buf_close(&body);
    }
    wait_end(wait);
}

/* The engine has let go of its memory; one that is in use stays. */
static void released_cb(void *context, enum status status)
{
    struct wait *wait = context;
    wait_for_write(wait, deleted);
    status = storage_object_delete(wait->server->storage, wait->request->argument,
                                   status == STATUS_OK, wait_stored_cb, wait);
    if (status)
        wait_refused(wait, status);
}

static void delete (struct request *request)
{
    struct storage_object object;
    struct response response;
    struct error err = {0};
    if (responding_find(request, request->argument)) {
        error_set(&err, STATUS_CONFLICT,
                  "response %s is not complete; cancel it, or wait for its end", request->argument);
        request_fail(request, STATUS_CONFLICT, &err);
        return;
    }
    const enum status status = responding_read(request, request->argument, &object, &response);
    if (status) {
        fail(request, status);
        return;
    }
    struct wait *wait = wait_create(request);
    if (wait) {
        memcpy(wait->id, object.memory, sizeof wait->id);
        engine_thread_release_memory(request->server->engine_thread, wait->id, released_cb, wait);
    }
    storage_object_close(&object);
    response_close(&response);
}

/* ---- input items ---- */

static void input_items(struct request *request)
{
    struct storage_object object;
    struct response response;
    const enum status status = responding_read(request, request->argument, &object, &response);
    if (status) {
        fail(request, status);
        return;
    }
    storage_object_close(&object);
    response_close(&response);
    wait_answer_items(request, request->argument);
}

const struct request_handler handle_responses_create = {
    .name = "responses_create", .body_limit = LIMITS_JSON_BODY_BYTES, .end_cb = create};
const struct request_handler handle_responses_count = {
    .name = "responses_input_tokens", .body_limit = LIMITS_JSON_BODY_BYTES, .end_cb = count_input};
const struct request_handler handle_responses_get = {
    .name = "responses_get",
    .query = (const char *const[]){"stream", "starting_after", NULL},
    .end_cb = get};
const struct request_handler handle_responses_delete = {.name = "responses_delete",
                                                        .end_cb = delete};
const struct request_handler handle_responses_cancel = {.name = "responses_cancel",
                                                        .end_cb = cancel};
const struct request_handler handle_responses_items = {
    .name = "responses_input_items", .query = wait_items_query, .end_cb = input_items};
