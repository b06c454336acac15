/* conn.c - see conn.h. */
#include "server/conn.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/answer_json.h"
#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/route.h"

#define READ_BYTES (64u << 10)
#define PENDING_BYTES (64u << 10) /* pipelined behind a request under way; then the socket waits \
                                   */
#define LINGER_MS 2000            /* for a refused client to read its answer while it still sends */
#define PING_MS 15000             /* below what proxies take for a dead stream */

enum conn_state { CONN_HEAD, CONN_BODY, CONN_HANDLING, CONN_REFUSED, CONN_CLOSING };

struct conn {
    struct list node;
    struct server *server;
    uv_tcp_t tcp;
    uv_timer_t timer;
    struct http_parser *parser;
    enum conn_state state;
    struct request request;
    struct buf in, out;
    struct error err; /* why head_cb refused */
    size_t writing;   /* bytes handed to uv_write and not done */
    bool reading, paused, close_after, in_process;
    int handles;
};

struct write {
    uv_write_t uv;
    struct conn *conn;
    char *data;
    size_t size;
};

static void process(struct conn *conn, const char *data, size_t size);
static void finish_request(struct conn *conn);

/* ---- the end of a connection ---- */

static void free_if_over(struct conn *conn)
{
    if (conn->handles || conn->request.held)
        return;
    list_remove(&conn->node);
    conn->server->connection_count--;
    buf_close(&conn->request.body);
    http_parser_destroy(conn->parser);
    buf_close(&conn->in);
    buf_close(&conn->out);
    free(conn);
}

static void handle_closed(uv_handle_t *handle)
{
    struct conn *conn = handle->data;
    conn->handles--;
    free_if_over(conn);
}

/* Closes now. A request under way hears of it, once. */
static void close_now(struct conn *conn)
{
    if (conn->state == CONN_CLOSING)
        return;
    conn->state = CONN_CLOSING;
    uv_close((uv_handle_t *)&conn->tcp, handle_closed);
    uv_close((uv_handle_t *)&conn->timer, handle_closed);
    struct request *r = &conn->request;
    if (r->held && !r->gone) {
        r->gone = true;
        if (r->gone_cb)
            r->gone_cb(r);
    }
}

/* ---- output ---- */

static void close_if_flushed(struct conn *conn)
{
    if (conn->state == CONN_CLOSING || !conn->close_after || conn->out.size || conn->writing)
        return;
    if (conn->state != CONN_REFUSED)
        close_now(conn);
}

static void written(uv_write_t *uv, int status)
{
    struct write *write = (struct write *)uv;
    struct conn *conn = write->conn;
    conn->writing -= write->size;
    free(write->data);
    free(write);
    if (status < 0)
        close_now(conn);
    else
        close_if_flushed(conn);
}

static void flush(struct conn *conn)
{
    if (conn->state == CONN_CLOSING || !conn->out.size)
        return;
    uv_buf_t part = uv_buf_init(conn->out.data, (unsigned)conn->out.size);
    if (!conn->writing) {
        const int sent = uv_try_write((uv_stream_t *)&conn->tcp, &part, 1);
        if (sent > 0)
            buf_consume(&conn->out, (size_t)sent);
    }
    if (conn->out.size) {
        struct write *write = malloc(sizeof *write);
        ASSERT(write);
        *write = (struct write){.conn = conn, .data = conn->out.data, .size = conn->out.size};
        part = uv_buf_init(write->data, (unsigned)write->size);
        conn->writing += write->size;
        buf_init(&conn->out);
        if (uv_write(&write->uv, (uv_stream_t *)&conn->tcp, &part, 1, written)) {
            conn->writing -= write->size;
            free(write->data);
            free(write);
            close_now(conn);
            return;
        }
    }
    close_if_flushed(conn);
}

void conn_flush_all(struct server *server)
{
    LIST_EACH_SAFE(node, &server->connections)
    {
        flush(LIST_ENTRY(node, struct conn, node));
    }
}

/* ---- time ---- */

static void timer_cb(uv_timer_t *timer);

static void arm(struct conn *conn, uint64_t ms)
{
    if (conn->state != CONN_CLOSING)
        uv_timer_start(&conn->timer, timer_cb, ms, 0);
}

static void refuse(struct conn *conn, enum status status, const struct error *err);

static void timer_cb(uv_timer_t *timer)
{
    struct conn *conn = timer->data;
    struct error err;
    switch (conn->state) {
    case CONN_HEAD:
        if (!http_parser_inside(conn->parser)) {
            close_now(conn);
            break;
        }
        error_set(&err, STATUS_TIMEOUT, "the request's head did not arrive within %d s",
                  LIMITS_HEADER_TIMEOUT_MS / 1000);
        refuse(conn, STATUS_TIMEOUT, &err);
        break;
    case CONN_BODY:
        if (conn->paused) { /* it is we who wait */
            arm(conn, LIMITS_BODY_TIMEOUT_MS);
            break;
        }
        error_set(&err, STATUS_TIMEOUT, "nothing of the request's body arrived for %d s",
                  LIMITS_BODY_TIMEOUT_MS / 1000);
        refuse(conn, STATUS_TIMEOUT, &err);
        break;
    case CONN_HANDLING:
        if (conn->request.streaming && !conn->request.complete)
            request_stream_write(&conn->request, ": ping\n\n", 8);
        arm(conn, PING_MS);
        break;
    case CONN_REFUSED:
        close_now(conn);
        break;
    case CONN_CLOSING:
        break;
    }
}

/* ---- input ---- */

static void alloc_cb(uv_handle_t *handle, size_t suggested, uv_buf_t *out)
{
    static char buffer[READ_BYTES]; /* the loop alone reads, and uses it before the next read */
    (void)handle;
    (void)suggested;
    *out = uv_buf_init(buffer, sizeof buffer);
}

static void read_cb(uv_stream_t *stream, ssize_t size, const uv_buf_t *data)
{
    struct conn *conn = stream->data;
    if (size < 0) {
        close_now(conn);
        return;
    }
    if (size == 0 || conn->state == CONN_REFUSED)
        return;
    if (conn->state == CONN_HANDLING || conn->in.size) {
        buf_append(&conn->in, data->base, (size_t)size);
        if (conn->in.size > PENDING_BYTES) {
            uv_read_stop(stream);
            conn->reading = false;
        }
        return;
    }
    process(conn, data->base, (size_t)size);
}

static void start_reading(struct conn *conn)
{
    if (conn->reading || conn->paused || conn->state == CONN_CLOSING)
        return;
    conn->reading = uv_read_start((uv_stream_t *)&conn->tcp, alloc_cb, read_cb) == 0;
    if (!conn->reading)
        close_now(conn);
}

static void process(struct conn *conn, const char *data, size_t size)
{
    struct error err = {0};
    conn->in_process = true;
    while (size && (conn->state == CONN_HEAD || conn->state == CONN_BODY)) {
        size_t consumed = 0;
        if (conn->state == CONN_HEAD && !http_parser_inside(conn->parser))
            arm(conn, LIMITS_HEADER_TIMEOUT_MS);
        const enum status status = http_parser_feed(conn->parser, data, size, &consumed, &err);
        if (status) {
            conn->in_process = false;
            refuse(conn, status, conn->err.message[0] ? &conn->err : &err);
            return;
        }
        data += consumed;
        size -= consumed;
        if (conn->state == CONN_BODY)
            arm(conn, LIMITS_BODY_TIMEOUT_MS);
        if (conn->state == CONN_HANDLING && conn->request.complete && !conn->request.held)
            finish_request(conn);
    }
    conn->in_process = false;
    if (size && conn->state != CONN_CLOSING && conn->state != CONN_REFUSED)
        buf_append(&conn->in, data, size);
}

/* What came behind the request that is over now. */
static void process_pending(struct conn *conn)
{
    if (conn->in_process || !conn->in.size)
        return;
    struct buf pending = conn->in;
    buf_init(&conn->in);
    process(conn, pending.data, pending.size);
    buf_close(&pending);
}

/* ---- requests ---- */

static bool plain_id(const char *text)
{
    size_t n = 0;
    while (isalnum((unsigned char)text[n]) || text[n] == '-' || text[n] == '_')
        n++;
    return n && !text[n] && n < LIMITS_ID_BYTES;
}

static void reset_request(struct conn *conn)
{
    struct buf body = conn->request.body;
    buf_close(&body);
    conn->request = (struct request){.conn = conn, .server = conn->server};
    buf_init(&conn->request.body);
    conn->err.message[0] = 0;
}

static enum status head_cb(void *context, const struct http_head *head)
{
    struct conn *conn = context;
    struct request *r = &conn->request;
    r->head = head;
    r->head_complete = true;
    r->began_ns = uv_hrtime();
    if (plain_id(head->request_id))
        snprintf(r->id, sizeof r->id, "%s", head->request_id);
    else
        server_new_id(conn->server, "req_", r->id);
    enum status status = route_find(head, &r->handler, r->argument);
    if (status == STATUS_NOT_FOUND)
        return error_set(&conn->err, status, "there is nothing at %.200s", head->path);
    if (status)
        return error_set(&conn->err, status, "%s does not take %s", head->path, head->method);
    const bool health = r->handler == &handle_health_live || r->handler == &handle_health_ready;
    if (conn->server->draining && !health)
        return error_set(&conn->err, STATUS_UNAVAILABLE, "the server is shutting down");
    if (!r->handler->body_cb && head->content_length > (int64_t)r->handler->body_limit)
        return error_set(&conn->err, STATUS_TOO_LARGE, "the body may hold at most %zu bytes",
                         r->handler->body_limit);
    if (head->expect_continue)
        buf_append_text(&conn->out, "HTTP/1.1 100 Continue\r\n\r\n");
    conn->state = CONN_BODY;
    arm(conn, LIMITS_BODY_TIMEOUT_MS);
    if (r->handler->begin_cb)
        r->handler->begin_cb(r);
    return STATUS_OK;
}

static enum status body_cb(void *context, const char *data, size_t size)
{
    struct conn *conn = context;
    struct request *r = &conn->request;
    if (r->complete)
        return STATUS_OK; /* answered early: the rest is read and dropped */
    if (r->handler->body_cb) {
        r->handler->body_cb(r, data, size);
        return STATUS_OK;
    }
    if (r->body.size + size > r->handler->body_limit)
        return error_set(&conn->err, STATUS_TOO_LARGE, "the body may hold at most %zu bytes",
                         r->handler->body_limit);
    buf_append(&r->body, data, size);
    return STATUS_OK;
}

static void end_cb(void *context)
{
    struct conn *conn = context;
    struct request *r = &conn->request;
    conn->state = CONN_HANDLING;
    arm(conn, PING_MS);
    if (!r->complete)
        r->handler->end_cb(r);
    ASSERT(r->complete || r->held);
}

/* The answer is complete and nobody holds the request: on to the next, or the end. */
static void finish_request(struct conn *conn)
{
    struct request *r = &conn->request;
    const double seconds = (double)(uv_hrtime() - r->began_ns) * 1e-9;
    if (r->handler) {
        metrics_request(&conn->server->metrics, r->handler->name, r->http_status);
        log_event(LOG_DEBUG, "request", "request", LOG_STR, r->id, "handler", LOG_STR,
                  r->handler->name, "status", LOG_INT, (int64_t)r->http_status, "seconds", LOG_NUM,
                  seconds, NULL);
    }
    if (conn->state == CONN_BODY) { /* answered before the body was there */
        conn->state = CONN_REFUSED;
        conn->close_after = true;
        conn->paused = false;
        start_reading(conn);
        arm(conn, LINGER_MS);
    }
    if (conn->state != CONN_HANDLING)
        return;
    conn->close_after |= !r->head->keep_alive || conn->server->draining;
    reset_request(conn);
    if (conn->close_after) {
        flush(conn);
        return;
    }
    conn->state = CONN_HEAD;
    arm(conn, LIMITS_IDLE_TIMEOUT_MS);
    http_parser_next(conn->parser);
    process_pending(conn);
    start_reading(conn);
}

/* An error that ends the connection, for requests that cannot be read on. */
static void refuse(struct conn *conn, enum status status, const struct error *err)
{
    struct request *r = &conn->request;
    if (conn->state == CONN_CLOSING || conn->state == CONN_REFUSED)
        return;
    conn->state = CONN_REFUSED;
    conn->close_after = true;
    if (r->held && !r->gone) { /* an append whose body broke off */
        r->gone = true;
        if (r->gone_cb)
            r->gone_cb(r);
    }
    if (!r->answered) {
        if (!r->id[0])
            server_new_id(conn->server, "req_", r->id);
        request_fail(r, status, err);
    }
    metrics_request(&conn->server->metrics, r->handler ? r->handler->name : "none",
                    status_http(status));
    flush(conn);
    arm(conn, LINGER_MS);
}

void request_hold(struct request *request)
{
    request->held = true;
}

void request_done(struct request *request)
{
    struct conn *conn = request->conn;
    ASSERT(request->held);
    request->held = false;
    request->state = NULL;
    request->gone_cb = NULL;
    if (conn->state == CONN_CLOSING)
        free_if_over(conn);
    else if (request->complete && !conn->in_process)
        finish_request(conn);
}

/* ---- answers ---- */

static const char *reason(int http_status)
{
    switch (http_status) {
    case 200:
        return "OK";
    case 201:
        return "Created";
    case 400:
        return "Bad Request";
    case 404:
        return "Not Found";
    case 409:
        return "Conflict";
    case 429:
        return "Too Many Requests";
    case 503:
        return "Service Unavailable";
    default:
        return http_status < 500 ? "Client Error" : "Server Error";
    }
}

static void append_head(struct request *request, int http_status, const char *type)
{
    struct buf *out = &request->conn->out;
    /* An answer before the body's end: the rest of the body will not be read. A stream goes on
     * beside the body. */
    if (request->conn->state == CONN_BODY && !request->streaming)
        request->conn->close_after = true;
    buf_append_format(out, "HTTP/1.1 %d %s\r\ncontent-type: %s\r\nx-request-id: %s\r\n",
                      http_status, reason(http_status), type, request->id);
    if (request->conn->close_after || request->conn->server->draining ||
        (request->head_complete && !request->head->keep_alive))
        buf_append_text(out, "connection: close\r\n");
    request->answered = true;
    request->http_status = http_status;
}

static void completed(struct request *request)
{
    request->complete = true;
    if (!request->held && !request->conn->in_process)
        finish_request(request->conn);
}

static void answer(struct request *request, int http_status, const char *type, const char *headers,
                   const char *body, size_t size)
{
    ASSERT(!request->answered);
    if (request->gone)
        return;
    append_head(request, http_status, type);
    buf_append_format(&request->conn->out, "%scontent-length: %zu\r\n\r\n", headers, size);
    if (size && !(request->head_complete && strcmp(request->head->method, "HEAD") == 0))
        buf_append(&request->conn->out, body, size);
    completed(request);
}

void request_answer(struct request *request, int http_status, const char *type, const char *body,
                    size_t size)
{
    answer(request, http_status, type, "", body, size);
}

void request_answer_json(struct request *request, int http_status, const struct buf *body)
{
    answer(request, http_status, "application/json", "", body->data, body->size);
}

void request_fail(struct request *request, enum status status, const struct error *err)
{
    struct buf body;
    const char *headers = "";
    buf_init(&body);
    answer_json_error(&body, status, err && err->message[0] ? err->message : status_text(status),
                      err ? err->param : "");
    /* A busy memory is free after a turn, a full queue after a few. */
    if (status == STATUS_CONFLICT)
        headers = "retry-after-ms: 1000\r\nretry-after: 1\r\n";
    else if (status == STATUS_BUSY || status == STATUS_UNAVAILABLE)
        headers = "retry-after-ms: 2000\r\nretry-after: 2\r\n";
    if (request->conn->state == CONN_REFUSED || !request->gone) {
        append_head(request, status_http(status), "application/json");
        buf_append_format(&request->conn->out, "%scontent-length: %zu\r\n\r\n", headers, body.size);
        buf_append(&request->conn->out, body.data, body.size);
        if (request->conn->state != CONN_REFUSED)
            completed(request);
    }
    buf_close(&body);
}

void request_stream_begin(struct request *request)
{
    if (request->gone)
        return;
    request->streaming = true;
    append_head(request, 200, "text/event-stream");
    buf_append_text(&request->conn->out,
                    "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n");
}

void request_stream_write(struct request *request, const char *data, size_t size)
{
    struct conn *conn = request->conn;
    if (request->gone || !size)
        return;
    buf_append_format(&conn->out, "%zx\r\n", size);
    buf_append(&conn->out, data, size);
    buf_append_text(&conn->out, "\r\n");
    if (conn->out.size + conn->writing > LIMITS_OUTPUT_BYTES) {
        log_event(LOG_WARN, "reader too slow", "request", LOG_STR, request->id, NULL);
        close_now(conn);
    }
}

void request_stream_end(struct request *request)
{
    if (request->gone)
        return;
    buf_append_text(&request->conn->out, "0\r\n\r\n");
    completed(request);
}

void request_pause(struct request *request)
{
    struct conn *conn = request->conn;
    conn->paused = true;
    if (conn->reading && conn->state != CONN_CLOSING)
        uv_read_stop((uv_stream_t *)&conn->tcp);
    conn->reading = false;
}

void request_resume(struct request *request)
{
    struct conn *conn = request->conn;
    if (!conn->paused)
        return;
    conn->paused = false;
    if (conn->state == CONN_BODY)
        arm(conn, LIMITS_BODY_TIMEOUT_MS);
    start_reading(conn);
}

/* ---- life ---- */

void conn_accept(struct server *server)
{
    static const struct http_callbacks callbacks = {head_cb, body_cb, end_cb};
    struct conn *conn = calloc(1, sizeof *conn);
    if (!conn || http_parser_create(&callbacks, conn, &conn->parser)) {
        free(conn);
        return; /* the client stays in the backlog until memory is free again */
    }
    conn->server = server;
    reset_request(conn);
    list_push_back(&server->connections, &conn->node);
    server->connection_count++;
    ASSERT(!uv_tcp_init(server->loop, &conn->tcp));
    ASSERT(!uv_timer_init(server->loop, &conn->timer));
    conn->tcp.data = conn->timer.data = conn;
    conn->handles = 2;
    if (uv_accept((uv_stream_t *)&server->listener, (uv_stream_t *)&conn->tcp)) {
        close_now(conn);
        return;
    }
    uv_tcp_nodelay(&conn->tcp, 1);
    if (server->connection_count > LIMITS_CONNECTIONS) {
        struct error err;
        error_set(&err, STATUS_UNAVAILABLE, "too many connections");
        refuse(conn, STATUS_UNAVAILABLE, &err);
        return;
    }
    arm(conn, LIMITS_HEADER_TIMEOUT_MS);
    start_reading(conn);
}

void conn_drain_all(struct server *server)
{
    LIST_EACH_SAFE(node, &server->connections)
    {
        struct conn *conn = LIST_ENTRY(node, struct conn, node);
        if (conn->state == CONN_HEAD && !http_parser_inside(conn->parser) && !conn->out.size &&
            !conn->writing)
            close_now(conn);
    }
}

void conn_close_all(struct server *server)
{
    LIST_EACH_SAFE(node, &server->connections)
    {
        close_now(LIST_ENTRY(node, struct conn, node));
    }
}
