/* http.h - HTTP/1.1 requests out of bytes, with llhttp and without a socket.
 * Thread: one owner at a time (the loop; a fuzzer). Owns the request's head while it is parsed. */
#ifndef SERVER_HTTP_H
#define SERVER_HTTP_H

#include <llhttp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/status.h"

/* The head of a request. Texts end with NUL and live until the next request begins. */
struct http_head {
    char method[16];
    char *path;  /* percent-decoded */
    char *query; /* as sent, without the '?'; "" when there is none */
    /* "" when absent */
    char *content_type, *accept, *request_id, *authorization, *idempotency_key;
    char *host, *origin, *access_control_request_method;
    bool keep_alive, expect_continue, chunked, http_1_0;
    int64_t content_length; /* -1: not told */
};

struct http_parser;

struct http_callbacks {
    /* The head is complete. Not STATUS_OK: the request is refused with it. */
    enum status (*head_cb)(void *context, const struct http_head *head);
    /* Part of the body, in order. */
    enum status (*body_cb)(void *context, const char *data, size_t size);
    /* The request is complete; the parser stops behind it until http_parser_next. */
    void (*end_cb)(void *context);
};

STATUS_CHECKED enum status http_parser_create(const struct http_callbacks *callbacks, void *context,
                                              struct http_parser **out);
void http_parser_destroy(struct http_parser *parser);
/* Parses; `*consumed` bytes were taken, all of them unless the request is complete or refused.
 * Anything but STATUS_OK ends the connection after it is answered: STATUS_INVALID (malformed),
 * STATUS_HEADERS_TOO_LARGE, or what a callback returned; `err` says more for a malformed one. */
STATUS_CHECKED enum status http_parser_feed(struct http_parser *parser, const char *data,
                                            size_t size, size_t *consumed, struct error *err);
/* Ready for the next request of the connection. */
void http_parser_next(struct http_parser *parser);
/* Whether a request has begun and is not complete. */
bool http_parser_inside(const struct http_parser *parser);

/* The value of `name` in a query string, percent-decoded into `out`; false when it is not there or
 * does not fit. */
bool http_query(const char *query, const char *name, char *out, size_t room);
/* The first field of the query whose name is not in `names` (NULL at the end; NULL: none are
 * taken), where it stands in `query`; NULL when there is none. */
const char *http_query_unknown(const char *query, const char *const *names);

#endif
