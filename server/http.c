/* http.c - see http.h. */
#include "server/http.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "proto/base/assert.h"
#include "proto/limits.h"

enum kept {
    KEPT_CONTENT_TYPE,
    KEPT_ACCEPT,
    KEPT_REQUEST_ID,
    KEPT_AUTHORIZATION,
    KEPT_IDEMPOTENCY_KEY,
    KEPT_HOST,
    KEPT_ORIGIN,
    KEPT_ACCESS_CONTROL_REQUEST_METHOD,
    KEPT_TRANSFER_ENCODING,
    KEPT_EXPECT,
    KEPT_COUNT
};
static const char *const kept_names[] = {
    "content-type",      "accept", "x-request-id", "authorization",
    "idempotency-key",   "host",   "origin",       "access-control-request-method",
    "transfer-encoding", "expect"};

struct http_parser {
    llhttp_t llhttp;
    llhttp_settings_t settings;
    struct http_callbacks callbacks;
    void *context;
    struct http_head head;
    struct buf url, field, value, kept[KEPT_COUNT];
    size_t header_bytes;
    bool inside, complete;
    enum status status; /* why a callback stopped the parser */
    const char *why;    /* the same in words; NULL: the status tells */
};

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Decodes %XX in place; false on a malformed one or a NUL. */
static bool decode(char *text)
{
    char *to = text;
    for (const char *from = text; *from; from++) {
        if (*from != '%') {
            *to++ = *from;
            continue;
        }
        const int high = hex(from[1]), low = high < 0 ? -1 : hex(from[2]);
        if (low < 0 || (!high && !low))
            return false;
        *to++ = (char)(high << 4 | low);
        from += 2;
    }
    *to = 0;
    return true;
}

static int stop(struct http_parser *p, enum status status)
{
    p->status = status;
    return HPE_USER;
}

static int malformed(struct http_parser *p, const char *why)
{
    p->why = why;
    return stop(p, STATUS_INVALID);
}

static int count(struct http_parser *p, size_t size)
{
    p->header_bytes += size;
    return p->header_bytes > LIMITS_HEADER_BYTES ? stop(p, STATUS_HEADERS_TOO_LARGE) : 0;
}

static int on_begin(llhttp_t *llhttp)
{
    struct http_parser *p = llhttp->data;
    p->inside = true;
    p->header_bytes = 0;
    p->url.size = p->field.size = p->value.size = 0;
    for (int i = 0; i < KEPT_COUNT; i++)
        p->kept[i].size = 0;
    return 0;
}

static int on_url(llhttp_t *llhttp, const char *at, size_t size)
{
    struct http_parser *p = llhttp->data;
    if (p->url.size + size > LIMITS_URL_BYTES)
        return stop(p, STATUS_HEADERS_TOO_LARGE);
    buf_append(&p->url, at, size);
    return count(p, size);
}

static int on_field(llhttp_t *llhttp, const char *at, size_t size)
{
    struct http_parser *p = llhttp->data;
    const int over = count(p, size);
    if (!over)
        buf_append(&p->field, at, size);
    return over;
}

static int on_value(llhttp_t *llhttp, const char *at, size_t size)
{
    struct http_parser *p = llhttp->data;
    const int over = count(p, size);
    if (!over)
        buf_append(&p->value, at, size);
    return over;
}

static int on_value_complete(llhttp_t *llhttp)
{
    struct http_parser *p = llhttp->data;
    for (int i = 0; i < KEPT_COUNT; i++)
        if (p->field.size == strlen(kept_names[i]) &&
            strncasecmp(p->field.data, kept_names[i], p->field.size) == 0) {
            p->kept[i].size = 0;
            if (p->value.size)
                buf_append(&p->kept[i], p->value.data, p->value.size);
        }
    p->field.size = p->value.size = 0;
    return count(p, 4); /* the line's colon and end, or empty ones would cost nothing */
}

static int on_head(llhttp_t *llhttp)
{
    struct http_parser *p = llhttp->data;
    struct http_head *h = &p->head;
    *h = (struct http_head){.content_length = -1};
    strncpy(h->method, llhttp_method_name(llhttp_get_method(llhttp)), sizeof h->method - 1);
    buf_text(&p->url);
    h->path = p->url.data;
    h->query = strchr(h->path, '?');
    if (h->query)
        *h->query++ = 0;
    else
        h->query = h->path + strlen(h->path);
    if (!decode(h->path) || h->path[0] != '/')
        return malformed(p, "malformed HTTP request: the path begins with a slash, and its %XX are "
                            "hexadecimal and not NUL");
    char **const texts[] = {
        &h->content_type,    &h->accept, &h->request_id, &h->authorization,
        &h->idempotency_key, &h->host,   &h->origin,     &h->access_control_request_method};
    static char none[1]; /* a connection keeps no buffers for fields that never come */
    for (int i = 0; i < KEPT_TRANSFER_ENCODING; i++) {
        *texts[i] = none;
        if (p->kept[i].size) {
            buf_text(&p->kept[i]);
            *texts[i] = p->kept[i].data;
        }
    }
    h->expect_continue = p->kept[KEPT_EXPECT].size == 12 &&
                         strncasecmp(p->kept[KEPT_EXPECT].data, "100-continue", 12) == 0;
    h->keep_alive = llhttp_should_keep_alive(llhttp) != 0;
    h->chunked = (llhttp->flags & F_CHUNKED) != 0;
    h->http_1_0 = llhttp->http_major == 1 && llhttp->http_minor == 0;
    /* What one server takes for the end of a body, another on the way might not: a coding that is
     * not known here, and any before HTTP/1.1, is refused. */
    const struct buf *coding = &p->kept[KEPT_TRANSFER_ENCODING];
    const bool is_chunked = coding->size == 7 && !strncasecmp(coding->data, "chunked", 7);
    if (llhttp->http_major < 1)
        return malformed(p, "malformed HTTP request: it names no version");
    if (coding->size && (h->http_1_0 || !is_chunked))
        return malformed(p, "of transfer codings, \"chunked\" alone is taken, from HTTP/1.1 on");
    llhttp->upgrade = 0; /* an offer of another protocol may be passed over, and is */
    if (llhttp->flags & F_CONTENT_LENGTH)
        h->content_length =
            llhttp->content_length > INT64_MAX ? INT64_MAX : (int64_t)llhttp->content_length;
    const enum status status = p->callbacks.head_cb(p->context, h);
    return status ? stop(p, status) : 0;
}

static int on_body(llhttp_t *llhttp, const char *at, size_t size)
{
    struct http_parser *p = llhttp->data;
    const enum status status = p->callbacks.body_cb(p->context, at, size);
    return status ? stop(p, status) : 0;
}

/* Nobody reads them, and they have no end of their own. */
static int on_extension(llhttp_t *llhttp, const char *at, size_t size)
{
    (void)at;
    return count(llhttp->data, size);
}

static int on_chunk(llhttp_t *llhttp)
{
    struct http_parser *p = llhttp->data;
    p->header_bytes = 0;
    return 0;
}

static int on_complete(llhttp_t *llhttp)
{
    struct http_parser *p = llhttp->data;
    p->inside = false;
    p->complete = true;
    return HPE_PAUSED;
}

enum status http_parser_create(const struct http_callbacks *callbacks, void *context,
                               struct http_parser **out)
{
    struct http_parser *p = calloc(1, sizeof *p);
    if (!p)
        return STATUS_NO_MEMORY;
    p->callbacks = *callbacks;
    p->context = context;
    llhttp_settings_init(&p->settings);
    p->settings.on_message_begin = on_begin;
    p->settings.on_url = on_url;
    p->settings.on_header_field = on_field;
    p->settings.on_header_value = on_value;
    p->settings.on_header_value_complete = on_value_complete;
    p->settings.on_headers_complete = on_head;
    p->settings.on_body = on_body;
    p->settings.on_chunk_extension_name = on_extension;
    p->settings.on_chunk_extension_value = on_extension;
    p->settings.on_chunk_complete = on_chunk;
    p->settings.on_message_complete = on_complete;
    llhttp_init(&p->llhttp, HTTP_REQUEST, &p->settings);
    p->llhttp.data = p;
    *out = p;
    return STATUS_OK;
}

void http_parser_destroy(struct http_parser *p)
{
    buf_close(&p->url);
    buf_close(&p->field);
    buf_close(&p->value);
    for (int i = 0; i < KEPT_COUNT; i++)
        buf_close(&p->kept[i]);
    free(p);
}

enum status http_parser_feed(struct http_parser *p, const char *data, size_t size, size_t *consumed,
                             struct error *err)
{
    ASSERT(!p->complete);
    const llhttp_errno_t result = llhttp_execute(&p->llhttp, data, size);
    *consumed = size;
    if (result == HPE_OK)
        return STATUS_OK;
    if (p->complete) {
        *consumed = (size_t)(llhttp_get_error_pos(&p->llhttp) - data);
        p->callbacks.end_cb(p->context);
        return STATUS_OK;
    }
    if (p->status)
        return error_set(err, p->status, "%s", p->why ? p->why : status_text(p->status));
    return error_set(err, STATUS_INVALID, "malformed HTTP request: %s",
                     llhttp_get_error_reason(&p->llhttp));
}

void http_parser_next(struct http_parser *p)
{
    p->complete = false;
    llhttp_resume(&p->llhttp);
}

bool http_parser_inside(const struct http_parser *p)
{
    return p->inside;
}

const char *http_query_unknown(const char *query, const char *const *names)
{
    while (*query) {
        const size_t size = strcspn(query, "=&");
        size_t i = 0;
        while (names && names[i] && !(strlen(names[i]) == size && !memcmp(names[i], query, size)))
            i++;
        if (size && (!names || !names[i]))
            return query;
        query += strcspn(query, "&");
        query += *query == '&';
    }
    return NULL;
}

bool http_query(const char *query, const char *name, char *out, size_t room)
{
    const size_t size = strlen(name);
    while (*query) {
        const size_t length = strcspn(query, "&");
        if (length > size && query[size] == '=' && strncmp(query, name, size) == 0) {
            if (length - size - 1 >= room)
                return false;
            memcpy(out, query + size + 1, length - size - 1);
            out[length - size - 1] = 0;
            return decode(out);
        }
        query += length;
        query += *query == '&';
    }
    return false;
}
