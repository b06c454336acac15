/* fuzz_http.c - any bytes as the requests of one connection, through the parser that connections
 * use.
 *
 * Input: a byte that seeds the cuts, then what the client sends. The same bytes must give the same
 * requests however the network cuts them, each callback in its turn. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/limits.h"
#include "server/http.h"
#include "server/route.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct trace {
    struct buf text; /* what the callbacks told, bodies joined */
    bool in_body, refused;
    const struct http_head *head;
};

static void tell(struct trace *trace, const char *what)
{
    buf_append_text(&trace->text, what ? what : "-");
    buf_append(&trace->text, "\n", 1);
}

/* What a connection does with a head. */
static void route(struct trace *trace, const struct http_head *head)
{
    static const char *const names[] = {"limit", "from", NULL};
    const struct request_handler *handler = NULL;
    char argument[LIMITS_ID_BYTES], item[LIMITS_ID_BYTES], value[32];
    const enum status status = route_find(head, &handler, argument, item);
    ASSERT(status == STATUS_OK || status == STATUS_NOT_FOUND || status == STATUS_METHOD);
    ASSERT((status == STATUS_OK) == (handler != NULL));
    if (status == STATUS_METHOD)
        route_append_methods(head->path, &trace->text);
    const char *unknown = http_query_unknown(head->query, names);
    ASSERT(!unknown || (unknown >= head->query && unknown < head->query + strlen(head->query)));
    if (http_query(head->query, "limit", value, sizeof value))
        ASSERT(strlen(value) < sizeof value);
    tell(trace, handler ? argument : status_text(status));
}

static enum status head_cb(void *context, const struct http_head *head)
{
    struct trace *trace = context;
    ASSERT(!trace->in_body && !trace->refused);
    ASSERT(head->path[0] == '/' && strlen(head->path) <= LIMITS_URL_BYTES);
    ASSERT(head->method[0] && head->content_length >= -1);
    const char *const texts[] = {head->method,       head->path,   head->query,
                                 head->content_type, head->accept, head->request_id};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        tell(trace, texts[i]);
    buf_append_format(&trace->text, "%d%d%d%d %lld\n", head->keep_alive, head->expect_continue,
                      head->chunked, head->http_1_0, (long long)head->content_length);
    trace->head = head;
    trace->in_body = true;
    /* A connection refuses some; here those with a query of "no". */
    if (strcmp(head->query, "no") == 0) {
        trace->refused = true;
        return STATUS_TOO_LARGE;
    }
    route(trace, head);
    return STATUS_OK;
}

static enum status body_cb(void *context, const char *data, size_t size)
{
    struct trace *trace = context;
    ASSERT(trace->in_body && !trace->refused);
    buf_append(&trace->text, data, size);
    return STATUS_OK;
}

static void end_cb(void *context)
{
    struct trace *trace = context;
    ASSERT(trace->in_body && !trace->refused);
    trace->in_body = false;
    tell(trace, "\nend"); /* the head's texts live until the next request begins */
    tell(trace, trace->head->path);
}

static uint32_t draw(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 16;
}

/* Sends it all; `cuts` 0: in one piece. Every piece is in memory of its own, so that reading past
 * its end is seen. */
static void send_all(struct trace *trace, const uint8_t *data, size_t size, uint32_t cuts)
{
    static const struct http_callbacks callbacks = {head_cb, body_cb, end_cb};
    struct http_parser *parser;
    struct error err = {0};
    enum status status = STATUS_OK;
    *trace = (struct trace){0};
    ASSERT(!http_parser_create(&callbacks, trace, &parser));
    while (size && !status) {
        const size_t most = cuts ? 1 + draw(&cuts) % 24 : size;
        const size_t piece = most < size ? most : size;
        char *copy = malloc(piece);
        ASSERT(copy);
        memcpy(copy, data, piece);
        for (size_t at = 0; at < piece && !status;) {
            size_t consumed = 0;
            status = http_parser_feed(parser, copy + at, piece - at, &consumed, &err);
            ASSERT(consumed <= piece - at);
            at += consumed;
            if (!status && at < piece) /* it stopped behind a complete request */
                ASSERT(!trace->in_body && !http_parser_inside(parser));
            if (!status && !trace->in_body && !http_parser_inside(parser))
                http_parser_next(parser);
            ASSERT(status || consumed || at == piece);
        }
        free(copy);
        data += piece;
        size -= piece;
    }
    ASSERT(!status || err.message[0]);
    ASSERT(!trace->refused || status == STATUS_TOO_LARGE);
    tell(trace, status_text(status));
    http_parser_destroy(parser);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct trace whole, cut;
    if (!size)
        return 0;
    send_all(&whole, data + 1, size - 1, 0);
    send_all(&cut, data + 1, size - 1, data[0] + 1u);
    ASSERT(whole.text.size == cut.text.size);
    ASSERT(memcmp(whole.text.data, cut.text.data, cut.text.size) == 0);
    buf_close(&whole.text);
    buf_close(&cut.text);
    return 0;
}
