/* responding.h - a response on its way: from its request to its last event.
 * Thread: the loop; a pool thread while it is prepared. Owns itself: it ends when it is over, and
 * on disk where it is to be stored, and its watchers have heard of it.
 *
 *   PREPARING -> (STORING ->) (FORKING ->) ANSWERING -> (KEEPING ->) over
 *   All states can reach the failure. STORING: a background one is put on disk before it is
 *   acknowledged. KEEPING: the turn is written without the instructions, which the memory does not
 *   keep. A conflict of one that goes on from an earlier response goes back to FORKING, once. */
#ifndef SERVER_RESPONDING_H
#define SERVER_RESPONDING_H

#include "proto/response_json.h"
#include "server/citation.h"
#include "server/generate.h"
#include "server/place.h"

struct responding {
    struct list node; /* of the server's, newest last */
    struct server *server;
    struct list watchers;
    char key[LIMITS_ID_BYTES], request_id[LIMITS_ID_BYTES];
    struct request *creator; /* while it is prepared and begun; held by its watcher */
    struct response_request asked;
    struct response response;
    struct place place;
    bool writes;      /* its turn is committed */
    bool goes_on;     /* from an earlier response, of which it may be a fork */
    bool made_memory; /* its memory is there for responses alone */
    bool wants_fork;
    bool placed, acknowledged; /* in the background: it is on disk; its client has heard of it */
    bool keeping;              /* the job writes the turn; the answer is there */
    bool only_counts;
    /* The prompt; and what the memory keeps, where that is something else. */
    struct tokenizer_tokens prompt, kept_prompt;
    size_t prompt_bytes, kept_bytes;
    struct job *job;
    int32_t *generated;
    size_t generated_count, generated_capacity;
    uint64_t generated_bytes;
    size_t characters; /* of the text so far */
    struct citations citations;
    enum response_status end; /* what it will be once it is on disk */
    /* What is kept with the turn. */
    struct storage_keep keep;
    struct storage_object object;
    struct storage_item *items; /* [input.count + 1], the answer last */
    struct buf *texts;          /* of the items */
    struct buf bytes;           /* of the object */
    bool has_receipt;
    unsigned char receipt[LIMITS_RECEIPT_NAME_BYTES];
    char *receipt_head;
    uv_work_t work;
    struct wait wait;
    enum status status;
    struct error err;
    uint64_t began_ns, first_token_ns;
};

/* POST /v1/responses, and, with `only_counts`, /v1/responses/input_tokens. */
void responding_create(struct request *request, bool only_counts);
/* One of the key's that is not over; NULL: there is none. */
struct responding *responding_find(const struct request *request, const char *id);
/* The request becomes a watcher: of the events behind the first `from`, as they come; or of the
 * end, which it is then answered with. */
void responding_watch_events(struct responding *responding, struct request *request, uint64_t from);
void responding_watch_end(struct responding *responding, struct request *request);
void responding_cancel(struct responding *responding);

/* The stored response of the key, and what storage knows of it; both need their close on STATUS_OK.
 * STATUS_NOT_FOUND, STATUS_CORRUPT. Any thread. */
STATUS_CHECKED enum status responding_read(const struct request *request, const char *id,
                                           struct storage_object *object,
                                           struct response *response);
/* Answers with the stored response: as an object, or with its events from number `from` on. */
void responding_answer(struct request *request, const struct response *response, bool stream,
                       uint64_t from);

#endif
