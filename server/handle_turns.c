/* handle_turns.c - /v1/memories/{id}/turns: the turns of a memory's past, bookmarks; and rewinding.
 */
#include <string.h>

#include "proto/answer_json.h"
#include "proto/memory_request.h"
#include "server/reach.h"
#include "server/route.h"
#include "server/wait.h"

#define BODY_LIMIT ((size_t)4 << 10)

static void append_turns(struct buf *body, const struct storage_turn *turns, size_t count,
                         size_t known)
{
    for (size_t i = 0; i < count; i++) {
        const struct storage_turn *turn = &turns[i];
        const struct answer_turn answer = {.position = turn->position,
                                           .parent =
                                               i + 1 < known ? (int64_t)turns[i + 1].position : -1,
                                           .text_bytes = turn->text_bytes,
                                           .created_at = turn->created_at,
                                           .has_snapshot = turn->has_snapshot,
                                           .bookmark = turn->bookmark};
        buf_append_text(body, i ? "," : "");
        answer_json_turn(body, &answer);
    }
}

static void list(struct request *request)
{
    struct storage_turn turns[WAIT_LIST_MAX + 1]; /* one more: the parent of the last */
    uint64_t limit = WAIT_LIST_DEFAULT, from = UINT64_MAX;
    size_t count;
    bool more;
    if (!wait_query_count(request, "limit", WAIT_LIST_MAX, &limit) || !limit ||
        !wait_query_count(request, "from", UINT64_MAX, &from)) {
        struct error err;
        error_set(&err, STATUS_INVALID, "\"from\" must be a position, \"limit\" from 1 to %d",
                  WAIT_LIST_MAX);
        request_fail(request, STATUS_INVALID, &err);
        return;
    }
    const enum status status = storage_turn_list(request->server->storage, request->argument, from,
                                                 (size_t)limit + 1, turns, &count, &more);
    if (status) {
        wait_fail_memory(request, status, request->argument);
        return;
    }
    struct buf body;
    buf_init(&body);
    buf_append_text(&body, "{\"object\":\"list\",\"data\":[");
    append_turns(&body, turns, count < limit ? count : (size_t)limit, count);
    buf_append_format(&body, "],\"has_more\":%s}", count > limit ? "true" : "false");
    request_answer_json(request, 200, &body);
    buf_close(&body);
}

/* The turn as it is after a change, or that it is gone. */
static void changed(struct wait *wait)
{
    struct error err;
    struct storage_turn turn[2];
    size_t count;
    bool more;
    enum status status = wait->status;
    if (status) {
        error_set(&err, status,
                  status == STATUS_NOT_FOUND
                      ? "memory %s has no turn at position %llu"
                      : "memory %s: the turn at position %llu is its last, was written by another "
                        "memory, or its snapshot is gone; fork the memory \"at\" that position",
                  wait->id, (unsigned long long)wait->from);
        request_fail(wait->request, status,
                     status == STATUS_NOT_FOUND || status == STATUS_CONFLICT ? &err : NULL);
        wait_end(wait);
        return;
    }
    status = storage_turn_list(wait->server->storage, wait->id, wait->from, 2, turn, &count, &more);
    if (status || count == 0 || turn[0].position != wait->from)
        buf_append_format(&wait->body,
                          "{\"object\":\"memory.turn.deleted\",\"position\":%llu,\"deleted\":true}",
                          (unsigned long long)wait->from);
    else
        append_turns(&wait->body, turn, 1, count);
    request_answer_json(wait->request, 200, &wait->body);
    wait_end(wait);
}

static struct wait *begin_change(struct request *request, uint64_t position)
{
    struct wait *wait = wait_create(request);
    if (!wait)
        return NULL;
    memcpy(wait->id, request->argument, sizeof wait->id);
    wait->from = position;
    wait_for_write(wait, changed);
    return wait;
}

static void bookmark(struct request *request)
{
    struct memory_bookmark asked;
    struct error err = {0};
    enum status status =
        memory_bookmark_parse(request->body.data, request->body.size, &asked, &err);
    if (status) {
        request_fail(request, status, &err);
        return;
    }
    struct wait *wait = begin_change(request, asked.position);
    if (!wait)
        return;
    status = storage_turn_bookmark(request->server->storage, wait->id, asked.position, asked.name,
                                   wait_stored_cb, wait);
    if (status)
        wait_refused(wait, status);
}

static void delete (struct request *request)
{
    uint64_t position = UINT64_MAX;
    if (!wait_query_count(request, "position", UINT64_MAX - 1, &position) ||
        position == UINT64_MAX) {
        struct error err;
        error_set_param(&err, STATUS_INVALID, "position",
                        "\"position\" must be the position of a turn, in tokens");
        request_fail(request, STATUS_INVALID, &err);
        return;
    }
    struct wait *wait = begin_change(request, position);
    if (!wait)
        return;
    const enum status status =
        storage_turn_delete(request->server->storage, wait->id, position, wait_stored_cb, wait);
    if (status)
        wait_refused(wait, status);
}

static void rewind_memory(struct request *request)
{
    uint64_t to;
    struct error err = {0};
    const enum status status =
        memory_rewind_parse(request->body.data, request->body.size, &to, &err);
    if (status)
        request_fail(request, status, &err);
    else
        reach_rewind(request, request->argument, to);
}

const struct request_handler handle_turns_list = {.name = "turns_list",
                                                  .of_memory = true,
                                                  .query =
                                                      (const char *const[]){"from", "limit", NULL},
                                                  .end_cb = list};
const struct request_handler handle_turns_bookmark = {
    .name = "turns_bookmark", .of_memory = true, .body_limit = BODY_LIMIT, .end_cb = bookmark};
const struct request_handler handle_turns_delete = {.name = "turns_delete",
                                                    .of_memory = true,
                                                    .query =
                                                        (const char *const[]){"position", NULL},
                                                    .end_cb = delete};
const struct request_handler handle_memories_rewind = {.name = "memories_rewind",
                                                       .of_memory = true,
                                                       .body_limit = BODY_LIMIT,
                                                       .end_cb = rewind_memory};
