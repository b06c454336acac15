/* conn_private.h - the insides of a connection, for conn.c and request.c.
 * Thread: the loop. See conn.h. */
#ifndef SERVER_CONN_PRIVATE_H
#define SERVER_CONN_PRIVATE_H

#include <uv.h>

#include "server/request.h"

enum conn_state { CONN_HEAD, CONN_BODY, CONN_HANDLING, CONN_LINGERING, CONN_CLOSING };

struct conn {
    struct list node;
    struct list unsent_node; /* in the server's list while `out` holds something */
    struct server *server;
    uv_tcp_t tcp;
    uv_timer_t timer;
    uv_shutdown_t shutdown;
    struct http_parser *parser;
    enum conn_state state;
    struct request request;
    struct buf in, out;
    struct error err;     /* why head_cb refused */
    size_t writing;       /* bytes handed to uv_write and not done */
    size_t unsent_before; /* at the last look of the timer */
    size_t largest_write; /* of the stream under way */
    bool reading, paused, close_after, in_process;
    bool waiting;  /* between requests: not one byte of the next is here */
    bool ended;    /* the client has sent its last */
    bool shutting; /* we have */
    int handles;
    uint64_t deadline_ms; /* of the loop's clock: when the timer's time has come */
};

/* What is to be written: added to it, it leaves at the end of this turn of the loop. */
struct buf *conn_output(struct conn *conn);
/* Closes now. A request under way hears of it, once. */
void conn_close(struct conn *conn);
/* The answer is complete and nobody holds the request: on to the next, or the end. */
void conn_finish_request(struct conn *conn);

#endif
