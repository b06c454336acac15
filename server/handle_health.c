/* handle_health.c - /health/live, /health/ready, /metrics. */
#include "server/route.h"

static void live(struct request *request)
{
    request_answer(request, 200, "application/json", "{\"status\":\"live\"}", 17);
}

static void ready(struct request *request)
{
    if (request->server->draining)
        request_answer(request, 503, "application/json", "{\"status\":\"draining\"}", 21);
    else
        request_answer(request, 200, "application/json", "{\"status\":\"ready\"}", 18);
}

static void metrics(struct request *request)
{
    struct server *server = request->server;
    struct engine_thread_stats engine;
    struct storage_stats storage;
    struct buf body;
    engine_thread_get_stats(server->engine_thread, &engine);
    storage_get_stats(server->storage, &storage);
    buf_init(&body);
    metrics_write(&server->metrics, &engine, &storage, server->connection_count, &body);
    request_answer(request, 200, "text/plain; version=0.0.4", body.data, body.size);
    buf_close(&body);
}

const struct request_handler handle_health_live = {
    .name = "health", .while_draining = true, .without_key = true, .end_cb = live};
const struct request_handler handle_health_ready = {
    .name = "health", .while_draining = true, .without_key = true, .end_cb = ready};
const struct request_handler handle_metrics = {
    .name = "metrics", .while_draining = true, .end_cb = metrics};
