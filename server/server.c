/* server.c - see server.h. */
#include "server/server.h"

#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/conn.h"
#include "server/expiry.h"

#define ID_RANDOM_BYTES 12
#define CUTOFF_MS 2000 /* behind the last answer, for a client to take it */

static void connection_cb(uv_stream_t *stream, int status)
{
    if (status < 0)
        log_event(LOG_WARN, "accept failed", "error", LOG_STR, uv_strerror(status), NULL);
    else
        conn_accept(stream->data);
}

static void flush_cb(uv_prepare_t *prepare)
{
    struct server *server = prepare->data;
    conn_flush_all(server);
    if (!server->drained_cb || !server->engine_drained || server->expiring ||
        !conn_all_answered(server))
        return;
    void (*drained_cb)(void *context) = server->drained_cb;
    server->drained_cb = NULL;
    drained_cb(server->drained_context);
}

enum status server_listen(struct server *server, int *port, struct error *err)
{
    struct sockaddr_storage address;
    const char *host = server->config->host;
    list_init(&server->connections);
    list_init(&server->unsent);
    buf_init(&server->json);
    buf_init(&server->event);
    list_init(&server->receipts);
    list_init(&server->responses);
    metrics_init(&server->metrics);
    server->started_at = (int64_t)time(NULL);
    if (uv_ip4_addr(host, *port, (struct sockaddr_in *)&address) &&
        uv_ip6_addr(host, *port, (struct sockaddr_in6 *)&address))
        return error_set(err, STATUS_INVALID, "--host %s is not an IP address", host);
    ASSERT(!uv_tcp_init(server->loop, &server->listener));
    ASSERT(!uv_prepare_init(server->loop, &server->flush));
    ASSERT(!uv_timer_init(server->loop, &server->cutoff));
    server->listener.data = server->flush.data = server->cutoff.data = server;
    int rc = uv_tcp_bind(&server->listener, (struct sockaddr *)&address, 0);
    if (!rc)
        rc = uv_listen((uv_stream_t *)&server->listener, 511, connection_cb);
    if (rc)
        return error_set(err, rc == UV_EADDRINUSE ? STATUS_CONFLICT : STATUS_IO,
                         "cannot listen on %s port %d: %s", host, *port, uv_strerror(rc));
    int size = sizeof address;
    if (!uv_tcp_getsockname(&server->listener, (struct sockaddr *)&address, &size))
        *port = ntohs(((struct sockaddr_in *)&address)->sin_port); /* the same place in both */
    ASSERT(!uv_prepare_start(&server->flush, flush_cb));
    expiry_start(server);
    return STATUS_OK;
}

static void engine_drained_cb(void *context)
{
    struct server *server = context;
    server->engine_drained = true;
}

static void cutoff_cb(uv_timer_t *timer)
{
    conn_close_all(timer->data);
}

void server_drain(struct server *server, uint64_t deadline_ms, void (*drained_cb)(void *context),
                  void *context)
{
    server->draining = true;
    server->drained_cb = drained_cb;
    server->drained_context = context;
    conn_drain_all(server);
    expiry_stop(server);
    uv_timer_start(&server->cutoff, cutoff_cb, deadline_ms + CUTOFF_MS, 0);
    engine_thread_drain(server->engine_thread, deadline_ms, engine_drained_cb, server);
}

void server_close(struct server *server)
{
    uv_close((uv_handle_t *)&server->listener, NULL);
    conn_close_all(server);
    uv_close((uv_handle_t *)&server->flush, NULL);
    uv_close((uv_handle_t *)&server->cutoff, NULL);
    buf_close(&server->json);
    buf_close(&server->event);
    expiry_close(server);
}

void server_new_id(const char *prefix, char out[LIMITS_ID_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    static _Thread_local unsigned char random[768]; /* its first random_left bytes are unused */
    static _Thread_local size_t random_left;
    if (random_left < ID_RANDOM_BYTES) { /* a system call for many */
        ASSERT(getrandom(random, sizeof random, 0) == sizeof random);
        random_left = sizeof random;
    }
    size_t size = strlen(prefix);
    memcpy(out, prefix, size);
    ASSERT(size + 2 * ID_RANDOM_BYTES < LIMITS_ID_BYTES);
    for (int i = 0; i < ID_RANDOM_BYTES; i++) {
        const unsigned char byte = random[--random_left];
        out[size++] = digits[byte >> 4];
        out[size++] = digits[byte & 15];
    }
    out[size] = 0;
}
