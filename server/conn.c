/* conn.c - see conn.h. */
#include "server/conn.h"

#include <ctype.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "proto/answer_json.h"
#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/cors.h"
#include "server/receipt.h"
#include "server/route.h"

#define READ_BYTES (64u << 10)
#define PENDING_BYTES                                                                            \
    (64u << 10)                   /* pipelined behind a request under way; then the socket waits \
                                   */
#define DRAIN_STALL_MS 5000       /* of a client that takes nothing, while we want to end */
#define LINGER_MS 2000            /* for a client to take its last answer while it still sends */
#define PING_MS 15000             /* below what proxies take for a dead stream */
#define KEEPALIVE_S 60            /* of silence, before a peer is asked whether it is still there */
#define PAUSE_LOOK_MS 1000        /* how often a client that we keep waiting is looked after */
#define NOWHERE_BYTES (64u << 10) /* a body that is read although nothing takes it */

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

struct write {
    uv_write_t uv;
    struct conn *conn;
    char *data;
    size_t size;
};

static void process(struct conn *conn, const char *data, size_t size);
static void process_pending(struct conn *conn);
static void finish_request(struct conn *conn);
static void start_reading(struct conn *conn);
static void arm(struct conn *conn, uint64_t ms);
static void flush(struct conn *conn);

/* ---- the end of a connection ---- */

static void free_if_over(struct conn *conn)
{
    if (conn->handles || conn->request.held)
        return;
    receipt_end(&conn->request);
    list_remove(&conn->node);
    list_remove(&conn->unsent_node);
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

static void tell_gone(struct request *request)
{
    if (!request->held || request->gone)
        return;
    request->gone = true;
    if (!request->complete)
        request->server->metrics.disconnects++;
    if (request->gone_cb)
        request->gone_cb(request);
}

/* Closes now. A request under way hears of it, once. */
static void close_now(struct conn *conn)
{
    if (conn->state == CONN_CLOSING)
        return;
    conn->state = CONN_CLOSING;
    uv_close((uv_handle_t *)&conn->tcp, handle_closed);
    uv_close((uv_handle_t *)&conn->timer, handle_closed);
    tell_gone(&conn->request);
}

/* The last answer is on its way. What the client still sends is read and dropped for a while:
 * closing on unread bytes would reset the connection and could take the answer with it. */
static void linger(struct conn *conn)
{
    if (conn->state == CONN_CLOSING)
        return;
    conn->state = CONN_LINGERING;
    conn->close_after = true;
    conn->paused = false;
    conn->in.size = 0;
    if (!conn->ended)
        start_reading(conn);
    arm(conn, LINGER_MS);
    flush(conn);
}

/* While we do not read, the end of the connection stands behind what was sent before it. */
static bool has_hung_up(const struct conn *conn)
{
    struct pollfd look = {.events = POLLRDHUP};
    if (conn->reading || uv_fileno((const uv_handle_t *)&conn->tcp, &look.fd))
        return false;
    return poll(&look, 1, 0) == 1 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

/* ---- output ---- */

static void shut_cb(uv_shutdown_t *shutdown, int status)
{
    (void)shutdown;
    (void)status; /* the timer, or the client's own end, closes */
}

static void close_if_flushed(struct conn *conn)
{
    if (conn->state != CONN_LINGERING || conn->out.size || conn->writing)
        return;
    if (conn->ended) {
        close_now(conn);
    } else if (!conn->shutting) {
        conn->shutting = true;
        if (uv_shutdown(&conn->shutdown, (uv_stream_t *)&conn->tcp, shut_cb))
            close_now(conn);
        else
            arm(conn, LINGER_MS);
    }
}

/* A client that asks and asks, and takes no answer, is not read from until it does. */
static bool is_backed_up(const struct conn *conn)
{
    return conn->state == CONN_HEAD && conn->out.size + conn->writing > LIMITS_OUTPUT_BYTES;
}

/* More to write, or the end, once nothing waits any more; or to read on. */
static void drained(struct conn *conn)
{
    struct request *r = &conn->request;
    if (r->download && !r->complete && !r->gone && !conn->out.size && !conn->writing)
        r->drained_cb(r);
    else
        close_if_flushed(conn);
    if (conn->state == CONN_HEAD && !conn->reading && !is_backed_up(conn)) {
        process_pending(conn);
        start_reading(conn);
    }
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
        drained(conn);
}

static void flush(struct conn *conn)
{
    list_remove(&conn->unsent_node);
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
    drained(conn);
}

/* What is to be written: added to `out`, it leaves at the end of this turn of the loop. */
static struct buf *output(struct conn *conn)
{
    if (list_empty(&conn->unsent_node))
        list_push_back(&conn->server->unsent, &conn->unsent_node);
    return &conn->out;
}

void conn_flush_all(struct server *server)
{
    while (!list_empty(&server->unsent))
        flush(LIST_ENTRY(server->unsent.next, struct conn, unsent_node));
}

/* ---- time ---- */

static void timer_cb(uv_timer_t *timer);

/* Every request moves the deadline several times, mostly away: the timer itself is set anew only
 * when it would be late. When it comes early, it goes on to the deadline. */
static void arm(struct conn *conn, uint64_t ms)
{
    conn->deadline_ms = uv_now(conn->server->loop) + ms;
    if (conn->state != CONN_CLOSING &&
        (!uv_is_active((uv_handle_t *)&conn->timer) || uv_timer_get_due_in(&conn->timer) > ms))
        uv_timer_start(&conn->timer, timer_cb, ms, 0);
}

static void refuse(struct conn *conn, enum status status, const struct error *err);

/* Whether bytes wait for the client and it has taken some since the last look. What the kernel
 * holds counts: it asks for more only when a third of that has gone, which can take a slow link
 * long. */
static bool takes_output(struct conn *conn)
{
    size_t unsent = uv_stream_get_write_queue_size((uv_stream_t *)&conn->tcp);
    int fd, held;
    if (!uv_fileno((const uv_handle_t *)&conn->tcp, &fd) && ioctl(fd, SIOCOUTQ, &held) == 0)
        unsent += (size_t)held;
    const bool moved = unsent && unsent != conn->unsent_before;
    conn->unsent_before = unsent;
    return moved;
}

/* A request takes its time. A client that waits hears from us now and then, or it would take us for
 * dead. */
static void look_after(struct request *request)
{
    if (request->complete || request->gone)
        return;
    if (has_hung_up(request->conn)) {
        close_now(request->conn);
        return;
    }
    /* The timer comes by at PING_MS, give or take. */
    if (uv_hrtime() - request->spoke_ns < (PING_MS - PAUSE_LOOK_MS) * UINT64_C(1000000))
        return;
    request->spoke_ns = uv_hrtime();
    if (request->download) { /* a part waits for its reader, or storage for the disk */
        if (request->conn->writing && !takes_output(request->conn))
            close_now(request->conn);
        return;
    }
    if (request->wants_stream && !request->answered)
        request_stream_begin(request);
    if (request->streaming)
        request_stream_write(request, ": ping\n\n", 8);
}

static void timer_cb(uv_timer_t *timer)
{
    struct conn *conn = timer->data;
    const struct config *config = conn->server->config;
    struct error err;
    if (uv_now(conn->server->loop) < conn->deadline_ms) {
        arm(conn, conn->deadline_ms - uv_now(conn->server->loop));
        return;
    }
    switch (conn->state) {
    case CONN_HEAD:
        if (takes_output(conn)) {
            arm(conn, config->idle_timeout * 1000);
        } else if (!http_parser_inside(conn->parser)) {
            close_now(conn);
        } else {
            error_set(&err, STATUS_TIMEOUT, "the request's head did not arrive within %llu s",
                      (unsigned long long)config->header_timeout);
            refuse(conn, STATUS_TIMEOUT, &err);
        }
        break;
    case CONN_BODY:
        if (conn->paused) { /* it is we who wait */
            look_after(&conn->request);
            arm(conn, PAUSE_LOOK_MS);
            break;
        }
        error_set(&err, STATUS_TIMEOUT, "nothing of the request's body arrived for %llu s",
                  (unsigned long long)config->body_timeout);
        refuse(conn, STATUS_TIMEOUT, &err);
        break;
    case CONN_HANDLING:
        look_after(&conn->request);
        arm(conn, conn->reading ? PING_MS : PAUSE_LOOK_MS);
        break;
    case CONN_LINGERING:
        if (takes_output(conn))
            arm(conn, conn->server->draining ? DRAIN_STALL_MS : config->body_timeout * 1000);
        else
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
        /* A client that is gone takes its request back; one that has only sent its last still gets
         * the answers that are complete. */
        conn->ended = true;
        conn->reading = false;
        if (size != UV_EOF || conn->request.held || (!conn->out.size && !conn->writing))
            close_now(conn);
        else
            linger(conn);
        return;
    }
    if (size == 0 || conn->state == CONN_LINGERING)
        return;
    if (conn->state == CONN_HANDLING || conn->in.size) {
        buf_append(&conn->in, data->base, (size_t)size);
        if (conn->in.size > PENDING_BYTES) {
            uv_read_stop(stream);
            conn->reading = false;
            arm(conn, PAUSE_LOOK_MS);
        }
        return;
    }
    process(conn, data->base, (size_t)size);
    if (conn->paused && has_hung_up(conn))
        close_now(conn);
}

static void start_reading(struct conn *conn)
{
    if (conn->reading || conn->paused || conn->ended || conn->state == CONN_CLOSING ||
        is_backed_up(conn))
        return;
    conn->reading = uv_read_start((uv_stream_t *)&conn->tcp, alloc_cb, read_cb) == 0;
    if (!conn->reading)
        close_now(conn);
}

static void process(struct conn *conn, const char *data, size_t size)
{
    struct error err = {0};
    conn->in_process = true;
    while (size && (conn->state == CONN_HEAD || conn->state == CONN_BODY) && !is_backed_up(conn)) {
        size_t consumed = 0;
        if (conn->waiting) { /* once: bytes that come drop by drop win no time */
            conn->waiting = false;
            arm(conn, conn->server->config->header_timeout * 1000);
        }
        const enum status status = http_parser_feed(conn->parser, data, size, &consumed, &err);
        if (status) {
            conn->in_process = false;
            refuse(conn, status, conn->err.message[0] ? &conn->err : &err);
            return;
        }
        data += consumed;
        size -= consumed;
        if (conn->state == CONN_BODY && !conn->paused)
            arm(conn, conn->server->config->body_timeout * 1000);
        if (conn->state == CONN_HANDLING && conn->request.complete && !conn->request.held)
            finish_request(conn);
    }
    conn->in_process = false;
    if (conn->state == CONN_BODY && conn->request.complete && !conn->request.held)
        finish_request(conn);
    if (size && conn->state != CONN_CLOSING && conn->state != CONN_LINGERING)
        buf_append(&conn->in, data, size);
    if (conn->reading && is_backed_up(conn)) {
        uv_read_stop((uv_stream_t *)&conn->tcp);
        conn->reading = false;
    }
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
    receipt_end(&conn->request);
    conn->request = (struct request){.conn = conn, .server = conn->server};
    buf_init(&conn->request.body);
    conn->err.message[0] = conn->err.param[0] = 0;
    conn->largest_write = 0;
}

/* A path or a method that nothing takes: answered like any request, the connection goes on. */
static void nowhere_end(struct request *request)
{
    request_fail(request, request->refusal, &request->conn->err);
}

static const struct request_handler nowhere = {
    .name = "none", .body_limit = NOWHERE_BYTES, .end_cb = nowhere_end};

static void preflight_end(struct request *request)
{
    request_answer(request, 200, "text/plain", "", 0);
}

static const struct request_handler preflight = {
    .name = "preflight", .while_draining = true, .without_key = true, .end_cb = preflight_end};

/* Leaves the request to `nowhere`; one with a long body ends the connection instead. */
static enum status turn_away(struct conn *conn, const struct http_head *head, enum status status)
{
    conn->request.handler = &nowhere;
    conn->request.refusal = status;
    return head->chunked || head->content_length > (int64_t)NOWHERE_BYTES ? status : STATUS_OK;
}

static enum status find_handler(struct conn *conn, const struct http_head *head)
{
    struct request *r = &conn->request;
    r->refusal = route_find(head, &r->handler, r->argument, r->item);
    if (r->refusal == STATUS_METHOD && cors_is_preflight(conn->server->config, head)) {
        r->refusal = STATUS_OK;
        r->handler = &preflight;
    }
    if (!r->refusal)
        return STATUS_OK;
    if (r->refusal == STATUS_NOT_FOUND)
        error_set(&conn->err, r->refusal, "there is nothing at %.200s", head->path);
    else
        error_set(&conn->err, r->refusal, "%.200s does not take %s", head->path, head->method);
    return turn_away(conn, head, r->refusal);
}

static enum status check_key(struct conn *conn, const struct http_head *head)
{
    struct request *r = &conn->request;
    const struct auth *auth = conn->server->auth;
    if (r->handler->without_key)
        return STATUS_OK;
    if (!auth_is_required(auth)) { /* else a page that the user opens could write here */
        if (!cors_is_stranger(conn->server->config, head))
            return STATUS_OK;
        error_set(&conn->err, STATUS_FORBIDDEN,
                  "pages of %.100s may not call this server; --cors-origin names those that may",
                  head->origin);
        return turn_away(conn, head, STATUS_FORBIDDEN);
    }
    if (auth_check(auth, head->authorization, r->key))
        return STATUS_OK;
    error_set(&conn->err, STATUS_UNAUTHORIZED,
              *head->authorization ? "the API key is not one of this server's"
                                   : "send an API key: \"authorization: Bearer KEY\"");
    return turn_away(conn, head, STATUS_UNAUTHORIZED);
}

static enum status head_cb(void *context, const struct http_head *head)
{
    struct conn *conn = context;
    struct request *r = &conn->request;
    r->head = head;
    r->head_complete = true;
    r->began_ns = r->spoke_ns = uv_hrtime();
    if (plain_id(head->request_id))
        snprintf(r->id, sizeof r->id, "%s", head->request_id);
    else
        server_new_id(conn->server, "req_", r->id);
    enum status status = find_handler(conn, head);
    if (!status)
        status = check_key(conn, head);
    if (status)
        return status;
    if (conn->server->draining && !r->handler->while_draining)
        return error_set(&conn->err, STATUS_UNAVAILABLE, "the server is shutting down");
    const char *unknown = r->refusal ? NULL : http_query_unknown(head->query, r->handler->query);
    if (unknown) {
        r->handler = &nowhere;
        r->refusal =
            error_set(&conn->err, STATUS_UNSUPPORTED, "\"%.*s\" is not a query field of %.200s",
                      (int)strcspn(unknown, "=&") < 60 ? (int)strcspn(unknown, "=&") : 60, unknown,
                      head->path);
    }
    if (!r->refusal && r->handler->of_memory && !request_may_use(r, r->argument)) {
        error_set(&conn->err, STATUS_NOT_FOUND, "no memory named %s", r->argument);
        status = turn_away(conn, head, STATUS_NOT_FOUND);
        if (status)
            return status;
    }
    if (!r->handler->body_cb && head->content_length > (int64_t)r->handler->body_limit)
        return error_set(&conn->err, STATUS_TOO_LARGE, "the body may hold at most %zu bytes",
                         r->handler->body_limit);
    conn->state = CONN_BODY;
    arm(conn, conn->server->config->body_timeout * 1000);
    if (r->handler->begin_cb)
        r->handler->begin_cb(r);
    if (head->expect_continue && !r->answered)
        buf_append_text(output(conn), "HTTP/1.1 100 Continue\r\n\r\n");
    return STATUS_OK;
}

static enum status body_cb(void *context, const char *data, size_t size)
{
    struct conn *conn = context;
    struct request *r = &conn->request;
    if (r->complete || conn->state == CONN_CLOSING)
        return STATUS_OK; /* answered early, or gone: the rest is dropped */
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
    if (conn->state == CONN_CLOSING)
        return;
    conn->state = CONN_HANDLING;
    arm(conn, PING_MS);
    if (!r->complete)
        r->handler->end_cb(r);
    ASSERT(r->complete || r->held);
}

/* The answer is complete and nobody holds the request: on to the next, or the end. */
static void finish_request(struct conn *conn)
{
    const struct request *r = &conn->request;
    if (conn->state == CONN_CLOSING || conn->state == CONN_LINGERING)
        return;
    /* In another state it was answered before all of it was here. */
    if (conn->state != CONN_HANDLING || conn->close_after || !r->head->keep_alive ||
        conn->server->draining) {
        linger(conn);
        return;
    }
    reset_request(conn);
    conn->state = CONN_HEAD;
    conn->paused = false; /* a body that waited for nothing more */
    conn->waiting = true;
    arm(conn, conn->server->config->idle_timeout * 1000);
    http_parser_next(conn->parser);
    process_pending(conn);
    start_reading(conn);
}

/* An error that ends the connection, for requests that cannot be read on. */
static void refuse(struct conn *conn, enum status status, const struct error *err)
{
    struct request *r = &conn->request;
    if (conn->state == CONN_CLOSING || conn->state == CONN_LINGERING)
        return;
    conn->close_after = true;
    if (!r->id[0])
        server_new_id(conn->server, "req_", r->id);
    if (!r->answered)
        request_fail(r, status, err);
    else if (r->streaming && !r->complete)
        request_stream_fail(r, status, err);
    tell_gone(r); /* an append whose body broke off */
    linger(conn);
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
    receipt_end(request);
    request->state = NULL;
    request->gone_cb = NULL;
    request->wants_stream = false;
    if (conn->state == CONN_CLOSING)
        free_if_over(conn);
    else if (request->complete && !conn->in_process)
        finish_request(conn);
}

const char *request_tenant(const struct request *request)
{
    return request->key[0] ? request->key : NULL;
}

bool request_may_use(const struct request *request, const char *id)
{
    struct storage_memory memory;
    if (storage_is_prefix(id))
        return false;
    if (!request->key[0])
        return true;
    if (storage_memory_get(request->server->storage, id, &memory))
        return false;
    const bool may = !memory.ephemeral && strcmp(memory.tenant, request->key) == 0;
    storage_memory_close(&memory);
    return may;
}

/* ---- answers ---- */

static const char *reason(int http_status)
{
    static const struct {
        int status;
        const char *text;
    } reasons[] = {{200, "OK"},
                   {201, "Created"},
                   {400, "Bad Request"},
                   {401, "Unauthorized"},
                   {403, "Forbidden"},
                   {404, "Not Found"},
                   {405, "Method Not Allowed"},
                   {408, "Request Timeout"},
                   {409, "Conflict"},
                   {411, "Length Required"},
                   {413, "Content Too Large"},
                   {415, "Unsupported Media Type"},
                   {422, "Unprocessable Content"},
                   {429, "Too Many Requests"},
                   {431, "Request Header Fields Too Large"},
                   {500, "Internal Server Error"},
                   {503, "Service Unavailable"},
                   {507, "Insufficient Storage"}};
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == http_status)
            return reasons[i].text;
    return http_status < 500 ? "Client Error" : "Server Error";
}

static void append_head(struct request *request, int http_status, const char *type)
{
    struct conn *conn = request->conn;
    /* An answer before the body's end: the rest of the body will not be read. A stream goes on
     * beside the body. */
    if (conn->state == CONN_BODY && !request->streaming)
        conn->close_after = true;
    buf_append_format(output(conn), "HTTP/1.1 %d %s\r\ncontent-type: %s\r\nx-request-id: %s\r\n",
                      http_status, reason(http_status), type, request->id);
    if (conn->close_after || conn->server->draining ||
        (request->head_complete && !request->head->keep_alive))
        buf_append_text(output(conn), "connection: close\r\n");
    if (request->head_complete)
        cors_append(conn->server->config, request->head, output(conn));
    request->answered = true;
    request->http_status = http_status;
}

static void completed(struct request *request)
{
    const char *name = request->handler ? request->handler->name : "none";
    request->complete = true;
    metrics_request(&request->server->metrics, name, request->http_status);
    log_event(LOG_DEBUG, "request", "request", LOG_STR, request->id, "handler", LOG_STR, name,
              "argument", LOG_STR, request->argument, "status", LOG_INT,
              (int64_t)request->http_status, "seconds", LOG_NUM,
              request->began_ns ? (double)(uv_hrtime() - request->began_ns) * 1e-9 : 0.0, NULL);
    if (!request->held && !request->conn->in_process)
        finish_request(request->conn);
}

static void answer(struct request *request, int http_status, const char *type, const char *headers,
                   const char *body, size_t size)
{
    if (request->gone)
        return;
    ASSERT(!request->answered);
    append_head(request, http_status, type);
    buf_append_format(output(request->conn), "%scontent-length: %zu\r\n\r\n", headers, size);
    if (size && !(request->head_complete && strcmp(request->head->method, "HEAD") == 0))
        buf_append(output(request->conn), body, size);
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

/* A quota that is used up is told in numbers. */
static void append_quota(struct buf *out, const struct request *request, enum status status)
{
    struct storage_usage usage;
    struct error err;
    request->server->metrics.quota_refusals++;
    storage_get_quota(request->server->storage, request->key, &usage);
    if (status == STATUS_KEY_QUOTA)
        error_set(&err, status,
                  "the memories of \"%s\" take %llu bytes on disk and may take %llu (quota= in the "
                  "file of keys); what was acknowledged is there; delete a memory, or ask the "
                  "server's operator",
                  request->key, (unsigned long long)usage.bytes,
                  (unsigned long long)usage.key_quota);
    else
        error_set(&err, status,
                  "the memory may take %llu bytes on disk (--memory-quota); what was acknowledged "
                  "is there; go on in another memory, or rewind it",
                  (unsigned long long)usage.memory_quota);
    answer_json_error(out, status, err.message, "");
}

static void append_error(struct buf *out, const struct request *request, enum status status,
                         const struct error *err)
{
    if (status == STATUS_KEY_QUOTA || status == STATUS_MEMORY_QUOTA)
        append_quota(out, request, status);
    else
        answer_json_error(out, status, err && err->message[0] ? err->message : status_text(status),
                          err ? err->param : "");
}

static void append_retry(struct buf *headers, double seconds)
{
    const unsigned long long ms = (unsigned long long)(seconds * 1e3) + 1;
    buf_append_format(headers, "retry-after-ms: %llu\r\nretry-after: %llu\r\n", ms,
                      (ms + 999) / 1000);
}

void request_fail(struct request *request, enum status status, const struct error *err)
{
    struct buf body, headers;
    buf_init(&body);
    buf_init(&headers);
    append_error(&body, request, status, err);
    /* A busy memory is free after a turn, a full queue after a few; a conflict with a field stays
     * one. */
    if ((status == STATUS_CONFLICT && err && err->param[0]) || status == STATUS_KEY_QUOTA ||
        status == STATUS_MEMORY_QUOTA)
        buf_append_text(&headers, "x-should-retry: false\r\n");
    else if (status == STATUS_CONFLICT)
        buf_append_text(&headers, "retry-after-ms: 1000\r\nretry-after: 1\r\n");
    else if (status == STATUS_TIMEOUT && err && err->param[0]) /* it asked for no more time */
        buf_append_text(&headers, "x-should-retry: false\r\n");
    else if (status == STATUS_BUSY)
        append_retry(&headers, engine_thread_retry_after(request->server->engine_thread));
    else if (status == STATUS_UNAVAILABLE)
        buf_append_text(&headers, "retry-after-ms: 2000\r\nretry-after: 2\r\n");
    else if (status == STATUS_UNAUTHORIZED)
        buf_append_text(&headers, "www-authenticate: Bearer\r\n");
    else if (status == STATUS_METHOD) {
        buf_append_text(&headers, "allow: ");
        route_append_methods(request->head->path, &headers);
        buf_append_text(&headers, "\r\n");
    }
    answer(request, status_http(status), "application/json", buf_text(&headers), body.data,
           body.size);
    buf_close(&body);
    buf_close(&headers);
}

void request_stream_begin(struct request *request)
{
    if (request->gone)
        return;
    request->streaming = true;
    /* HTTP/1.0 knows no chunks: there the connection's end is the stream's. */
    request->chunked = !request->head->http_1_0;
    request->conn->close_after |= !request->chunked;
    append_head(request, 200, "text/event-stream");
    buf_append_format(output(request->conn),
                      "cache-control: no-cache\r\nx-accel-buffering: no\r\n%s\r\n",
                      request->chunked ? "transfer-encoding: chunked\r\n" : "");
}

void request_download_begin(struct request *request, const char *name)
{
    if (request->gone)
        return;
    request->streaming = request->download = true;
    request->chunked = !request->head->http_1_0;
    request->conn->close_after |= !request->chunked;
    append_head(request, 200, "application/octet-stream");
    buf_append_format(output(request->conn),
                      "content-disposition: attachment; filename=\"%s\"\r\n%s\r\n", name,
                      request->chunked ? "transfer-encoding: chunked\r\n" : "");
}

void request_download_cut(struct request *request)
{
    if (!request->gone)
        close_now(request->conn);
}

void request_stream_write(struct request *request, const char *data, size_t size)
{
    struct conn *conn = request->conn;
    if (request->gone || !size)
        return;
    const size_t unsent = conn->out.size + conn->writing;
    if (request->chunked) {
        buf_append_number(output(conn), size, 16, 1);
        buf_append_text(output(conn), "\r\n");
    }
    buf_append(output(conn), data, size);
    if (request->chunked)
        buf_append_text(output(conn), "\r\n");
    if (size > conn->largest_write) /* an echoed prompt may be longer than the limit by itself */
        conn->largest_write = size;
    if (unsent > LIMITS_OUTPUT_BYTES + conn->largest_write) {
        log_event(LOG_WARN, "reader too slow", "request", LOG_STR, request->id, NULL);
        close_now(conn);
    }
}

void request_stream_end(struct request *request)
{
    if (request->gone)
        return;
    if (request->chunked)
        buf_append_text(output(request->conn), "0\r\n\r\n");
    completed(request);
}

void request_stream_fail(struct request *request, enum status status, const struct error *err)
{
    struct buf json, event;
    buf_init(&json);
    buf_init(&event);
    append_error(&json, request, status, err);
    answer_json_event(&event, &json);
    request_stream_write(request, event.data, event.size);
    request_stream_end(request);
    buf_close(&json);
    buf_close(&event);
}

void request_pause(struct request *request)
{
    struct conn *conn = request->conn;
    conn->paused = true;
    if (conn->reading && conn->state != CONN_CLOSING)
        uv_read_stop((uv_stream_t *)&conn->tcp);
    conn->reading = false;
    arm(conn, PAUSE_LOOK_MS);
}

void request_resume(struct request *request)
{
    struct conn *conn = request->conn;
    if (!conn->paused)
        return;
    conn->paused = false;
    if (conn->state == CONN_BODY)
        arm(conn, conn->server->config->body_timeout * 1000);
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
    list_init(&conn->unsent_node);
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
    uv_tcp_keepalive(&conn->tcp, 1, KEEPALIVE_S);
    if (server->connection_count > server->config->connections) {
        struct error err;
        error_set(&err, STATUS_UNAVAILABLE, "too many connections");
        refuse(conn, STATUS_UNAVAILABLE, &err);
        return;
    }
    arm(conn, server->config->header_timeout * 1000);
    start_reading(conn);
}

void conn_drain_all(struct server *server)
{
    LIST_EACH_SAFE(node, &server->connections)
    {
        struct conn *conn = LIST_ENTRY(node, struct conn, node);
        const bool unsent = conn->out.size || conn->writing;
        if (conn->state == CONN_HEAD && !unsent && !http_parser_inside(conn->parser))
            close_now(conn);
        else if (conn->state == CONN_HEAD && unsent)
            linger(conn);
        if (conn->state == CONN_LINGERING) { /* it may have had the whole body_timeout */
            takes_output(conn);
            arm(conn, DRAIN_STALL_MS);
        }
    }
}

bool conn_all_answered(const struct server *server)
{
    LIST_EACH(node, &server->connections)
    {
        const struct conn *conn = LIST_ENTRY(node, struct conn, node);
        const bool at_work = conn->state == CONN_BODY || conn->state == CONN_HANDLING;
        const bool unsent = conn->state != CONN_CLOSING && (conn->out.size || conn->writing);
        if (conn->request.held || at_work || unsent)
            return false;
    }
    return true;
}

void conn_close_all(struct server *server)
{
    LIST_EACH_SAFE(node, &server->connections)
    {
        close_now(LIST_ENTRY(node, struct conn, node));
    }
}
