/* wait.h - a request about memories that waits for another thread: the writer, the engine, the
 * pool. Thread: the loop, wait_stored_cb apart. Owns itself and its texts until wait_end. */
#ifndef SERVER_WAIT_H
#define SERVER_WAIT_H

#include "proto/memory_request.h"
#include "server/request.h"

#define WAIT_LIST_DEFAULT 20
#define WAIT_LIST_MAX 100

struct wait {
    struct request *request;
    struct server *server;
    uv_async_t async; /* the writer's way back to the loop */
    uv_work_t work;
    enum status status;
    struct error err;
    char id[LIMITS_ID_BYTES];
    uint64_t from, limit;
    const char *kind; /* of what is deleted */
    struct buf body;
    void (*then)(struct wait *wait);
};

/* Holds the request; NULL: it was answered, there is no memory. */
struct wait *wait_create(struct request *request);
/* The request has its answer. */
void wait_end(struct wait *wait);
/* `then` runs on the loop after the write that is queued next with wait_stored_cb and `wait`. */
void wait_for_write(struct wait *wait, void (*then)(struct wait *wait));
void wait_stored_cb(void *wait, enum status status);
/* The write was not taken: `then` gets this status the same way. */
void wait_refused(struct wait *wait, enum status status);

struct storage_expires wait_expires(const struct memory_expires *asked);

/* Answers that several resources give. */
void wait_append_memory(struct buf *out, const struct storage_memory *memory);
void wait_fail_memory(struct request *request, enum status status, const char *id);
/* Deletes the memory that the path names, once the engine has let go of it, and answers: it is what
 * the API calls a `kind`, a text that stays. */
void wait_delete_memory(struct request *request, const char *kind);
/* As an event, the last one, where a stream is wanted. */
void wait_answer_memory(struct request *request, int http_status, const char *id);
/* The last event of a stream, and its end. */
void wait_answer_event(struct request *request, const struct buf *json);
/* A page of the list of `owner`, as the query asks: "limit", "after", "order" (desc when it is not
 * given). */
extern const char *const wait_items_query[];
void wait_answer_items(struct request *request, const char *owner);
/* {"object":"list","data":[...],"first_id","last_id","has_more"}. */
void wait_append_items(struct buf *out, const struct storage_item *items, size_t count,
                       bool has_more);
/* A count in the query; false when it is there and is none. */
bool wait_query_count(const struct request *request, const char *name, uint64_t max, uint64_t *out);

#endif
