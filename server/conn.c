/* conn.c - see conn.h. */
#include "server/conn.h"

#include <ctype.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/conn_private.h"
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

struct write {
    uv_write_t uv;
    struct conn *conn;
    char *data;
    size_t size;
};

static void process(struct conn *conn, const char *data, size_t size);
static void process_pending(struct conn *conn);
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

void conn_close(struct conn *conn)
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
        conn_close(conn);
    } else if (!conn->shutting) {
        conn->shutting = true;
        if (uv_shutdown(&conn->shutdown, (uv_stream_t *)&conn->tcp, shut_cb))
            conn_close(conn);
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
        conn_close(conn);
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
            conn_close(conn);
            return;
        }
    }
    drained(conn);
}

struct buf *conn_output(struct conn *conn)
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
        conn_close(request->conn);
        return;
    }
    /* The timer comes by at PING_MS, give or take. */
    if (uv_hrtime() - request->spoke_ns < (PING_MS - PAUSE_LOOK_MS) * UINT64_C(1000000))
        return;
    request->spoke_ns = uv_hrtime();
    if (request->download) { /* a part waits for its reader, or storage for the disk */
        if (request->conn->writing && !takes_output(request->conn))
            conn_close(request->conn);
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
            conn_close(conn);
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
            conn_close(conn);
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
            conn_close(conn);
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
        conn_close(conn);
}

static void start_reading(struct conn *conn)
{
    if (conn->reading || conn->paused || conn->ended || conn->state == CONN_CLOSING ||
        is_backed_up(conn))
        return;
    conn->reading = uv_read_start((uv_stream_t *)&conn->tcp, alloc_cb, read_cb) == 0;
    if (!conn->reading)
        conn_close(conn);
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
            conn_finish_request(conn);
    }
    conn->in_process = false;
    if (conn->state == CONN_BODY && conn->request.complete && !conn->request.held)
        conn_finish_request(conn);
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
        server_new_id("req_", r->id);
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
    if (!r->refusal && r->handler->of_memory)
        status = request_find_memory(r, r->argument, &conn->err);
    if (status && (status = turn_away(conn, head, status)))
        return status;
    if (!r->handler->body_cb && head->content_length > (int64_t)r->handler->body_limit)
        return error_set(&conn->err, STATUS_TOO_LARGE, "the body may hold at most %zu bytes",
                         r->handler->body_limit);
    conn->state = CONN_BODY;
    arm(conn, conn->server->config->body_timeout * 1000);
    if (r->handler->begin_cb)
        r->handler->begin_cb(r);
    if (head->expect_continue && !r->answered)
        buf_append_text(conn_output(conn), "HTTP/1.1 100 Continue\r\n\r\n");
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

void conn_finish_request(struct conn *conn)
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
        server_new_id("req_", r->id);
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
        conn_finish_request(conn);
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
        conn_close(conn);
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
            conn_close(conn);
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
        conn_close(LIST_ENTRY(node, struct conn, node));
    }
}
