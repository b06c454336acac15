/* request.h - a request on its connection, and its answer.
 * Thread: the loop, request_find_memory apart. The connection owns the request; a handler that
 * holds it may use it until request_done. */
#ifndef SERVER_REQUEST_H
#define SERVER_REQUEST_H

#include "server/http.h"
#include "server/server.h"

struct conn;
struct request;

/* How a resource takes its request. body_cb NULL: the body is collected, up to body_limit. */
struct request_handler {
    const char *name; /* for metrics and the log */
    size_t body_limit;
    const char *const *query; /* names it takes, NULL at the end; NULL: none */
    bool while_draining;      /* is answered to the last */
    bool without_key;         /* is answered to everybody */
    bool of_memory;           /* {id} is a memory of the key's */
    /* A stream of text: part of the body. It may stop the flow with request_pause. */
    void (*body_cb)(struct request *request, const char *data, size_t size);
    /* The body begins: for handlers with a body_cb. */
    void (*begin_cb)(struct request *request);
    /* The request is complete. */
    void (*end_cb)(struct request *request);
};

struct request {
    struct conn *conn;
    struct server *server;
    const struct request_handler *handler;
    const struct http_head *head;
    char id[LIMITS_ID_BYTES];
    char argument[LIMITS_ID_BYTES]; /* {id} of the path */
    char item[LIMITS_ID_BYTES];     /* a second one */
    char key[LIMITS_ID_BYTES];      /* name of the API key; "": the server has none */
    struct buf body;
    /* The handler's own. gone_cb runs once if the client goes away before the answer is complete;
     * after it the handler must not answer, only clean up and call request_done. */
    void *state;
    void (*gone_cb)(struct request *request);
    /* Of a download: all that was written so far has left. May write, never end it. */
    void (*drained_cb)(struct request *request);
    /* The answer will be an event stream: a client that waits long gets its head with the first
     * sign of life. Set by the handler while it holds the request. */
    bool wants_stream;
    /* Part of what it sent is on disk: after an error it must not come again as it is. */
    bool took_part;
    struct list receipt_node; /* receipt.h */
    bool has_receipt;
    unsigned char receipt[LIMITS_RECEIPT_NAME_BYTES];
    bool gone, head_complete, answered, streaming, chunked, complete, held;
    bool download;       /* a stream of bytes that are no events */
    enum status refusal; /* of a request that no handler takes */
    int http_status;
    uint64_t began_ns, spoke_ns; /* when it came; the last sign of life to its client */
};

/* A handler that answers later holds the request until request_done; without request_hold it must
 * have answered when end_cb returns. */
void request_hold(struct request *request);
void request_done(struct request *request);
/* Whose memories the request is about; NULL: everybody's, on a server without keys. */
const char *request_tenant(const struct request *request);
/* Whether the request may know of the memory `id`: STATUS_NOT_FOUND for a stranger's as for one
 * that is not there (on a server without keys, which is everybody's, it is not looked for), and
 * what is wrong with it where nobody can tell whose it is. Any thread. */
STATUS_CHECKED enum status request_find_memory(const struct request *request, const char *id,
                                               struct error *err);
/* The whole answer. */
void request_answer(struct request *request, int http_status, const char *type, const char *body,
                    size_t size);
void request_answer_json(struct request *request, int http_status, const struct buf *body);
/* The error body; for STATUS_BUSY and STATUS_CONFLICT with a hint when to come again, or, where that
 * is of no use or does harm, not to: a conflict that names a field (err->param), and a request that
 * was carried out in part. */
void request_fail(struct request *request, enum status status, const struct error *err);
/* An answer in parts, text/event-stream: head, any number of writes, the end. */
void request_stream_begin(struct request *request);
/* The same for a file, without the comments that keep an event stream alive; the writer keeps to
 * the pace of the reader by waiting for drained_cb. One that cannot go on is cut, not ended. */
void request_download_begin(struct request *request, const char *name);
void request_download_cut(struct request *request);
void request_stream_write(struct request *request, const char *data, size_t size);
void request_stream_end(struct request *request);
/* An error as the stream's last event. */
void request_stream_fail(struct request *request, enum status status, const struct error *err);
/* The body's flow, for handlers with a body_cb. */
void request_pause(struct request *request);
void request_resume(struct request *request);

#endif
