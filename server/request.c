/* request.c - see request.h. What belongs to the connection, its flow, is in conn.c. */
#include "server/request.h"

#include <string.h>

#include "proto/answer_json.h"
#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/conn_private.h"
#include "server/cors.h"
#include "server/route.h"

const char *request_tenant(const struct request *request)
{
    return request->key[0] ? request->key : NULL;
}

enum status request_find_memory(const struct request *request, const char *id, struct error *err)
{
    struct storage_memory memory;
    enum status status = storage_is_prefix(id) ? STATUS_NOT_FOUND : STATUS_OK;
    if (!status && request->key[0]) {
        status = storage_memory_get(request->server->storage, id, &memory);
        if (!status) {
            if (memory.ephemeral || strcmp(memory.tenant, request->key) != 0)
                status = STATUS_NOT_FOUND;
            storage_memory_close(&memory);
        }
    }
    if (status)
        error_set(err, status, status == STATUS_NOT_FOUND ? "no memory named %s" : "memory %s: %s",
                  id, status_text(status));
    return status;
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
    buf_append_format(conn_output(conn),
                      "HTTP/1.1 %d %s\r\ncontent-type: %s\r\nx-request-id: %s\r\n", http_status,
                      reason(http_status), type, request->id);
    if (conn->close_after || conn->server->draining ||
        (request->head_complete && !request->head->keep_alive))
        buf_append_text(conn_output(conn), "connection: close\r\n");
    if (request->head_complete)
        cors_append(conn->server->config, request->head, conn_output(conn));
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
        conn_finish_request(request->conn);
}

static void answer(struct request *request, int http_status, const char *type, const char *headers,
                   const char *body, size_t size)
{
    if (request->gone)
        return;
    ASSERT(!request->answered);
    append_head(request, http_status, type);
    buf_append_format(conn_output(request->conn), "%scontent-length: %zu\r\n\r\n", headers, size);
    if (size && !(request->head_complete && strcmp(request->head->method, "HEAD") == 0))
        buf_append(conn_output(request->conn), body, size);
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
        error_set(
            &err, status,
            "the memories and responses of \"%s\" take %llu bytes on disk and may take %llu "
            "(quota= in the file of keys); what was acknowledged is there; delete one, or ask "
            "the server's operator",
            request->key, (unsigned long long)usage.bytes, (unsigned long long)usage.key_quota);
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
    else if (status == STATUS_BUSY && !(err && err->message[0])) /* the engine's queue says more */
        answer_json_error(out, status,
                          "too much waits for the disk (--write-queue); come again after the time "
                          "in retry-after",
                          "");
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

/* Sent again as it is, the request would fail again, or happen a second time in part. */
static bool is_final(const struct request *request, enum status status, const struct error *err)
{
    const bool names_field = err && err->param[0];
    return request->took_part || status == STATUS_KEY_QUOTA || status == STATUS_MEMORY_QUOTA ||
           (names_field && (status == STATUS_CONFLICT ||
                            status == STATUS_TIMEOUT)); /* it asked for no more time */
}

void request_fail(struct request *request, enum status status, const struct error *err)
{
    struct buf body, headers;
    buf_init(&body);
    buf_init(&headers);
    append_error(&body, request, status, err);
    /* A busy memory is free after a turn, a full queue after a few. */
    if (is_final(request, status, err))
        buf_append_text(&headers, "x-should-retry: false\r\n");
    else if (status == STATUS_CONFLICT)
        buf_append_text(&headers, "retry-after-ms: 1000\r\nretry-after: 1\r\n");
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
    buf_append_format(conn_output(request->conn),
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
    buf_append_format(conn_output(request->conn),
                      "content-disposition: attachment; filename=\"%s\"\r\n%s\r\n", name,
                      request->chunked ? "transfer-encoding: chunked\r\n" : "");
}

void request_download_cut(struct request *request)
{
    if (!request->gone)
        conn_close(request->conn);
}

void request_stream_write(struct request *request, const char *data, size_t size)
{
    struct conn *conn = request->conn;
    if (request->gone || !size)
        return;
    const size_t unsent = conn->out.size + conn->writing;
    if (request->chunked)
        buf_append_format(conn_output(conn), "%zx\r\n", size);
    buf_append(conn_output(conn), data, size);
    if (request->chunked)
        buf_append_text(conn_output(conn), "\r\n");
    if (size > conn->largest_write) /* an echoed prompt may be longer than the limit by itself */
        conn->largest_write = size;
    if (unsent > LIMITS_OUTPUT_BYTES + conn->largest_write) {
        log_event(LOG_WARN, "reader too slow", "request", LOG_STR, request->id, NULL);
        conn_close(conn);
    }
}

void request_stream_end(struct request *request)
{
    if (request->gone)
        return;
    if (request->chunked)
        buf_append_text(conn_output(request->conn), "0\r\n\r\n");
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
