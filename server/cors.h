/* cors.h - web pages of other origins: which may call, and what a browser must be told.
 * Thread: the loop (pure functions of the settings and the request's head). Owns nothing.
 * Off unless --cors-origin names origins: then a browser shows no answer to a page of another one.
 * That alone would not keep such a page from writing: without API keys it is turned away. */
#ifndef SERVER_CORS_H
#define SERVER_CORS_H

#include <stdbool.h>

#include "proto/base/buf.h"
#include "server/http.h"

struct config;

/* Whether `list`, as in --cors-origin, is one: "*", or origins such as https://example.com with
 * commas between them. */
bool cors_is_list(const char *list);
/* The request comes from a page of an origin that is neither allowed nor the server's own. */
bool cors_is_stranger(const struct config *config, const struct http_head *head);
/* A browser asks before it calls, for a page that may. */
bool cors_is_preflight(const struct config *config, const struct http_head *head);
/* The header lines of an answer, or of that to a preflight. */
void cors_append(const struct config *config, const struct http_head *head, struct buf *out);

#endif
