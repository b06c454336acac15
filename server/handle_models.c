/* handle_models.c - GET /v1/models, /v1/models/{id}: the one model that is loaded. */
#include <string.h>

#include "proto/json.h"
#include "server/route.h"

static void append_model(struct buf *out, const struct server *server)
{
    const char *name = engine_get_info(server->engine)->model_name;
    buf_append_text(out, "{\"id\":");
    json_append_string(out, name, strlen(name));
    buf_append_format(out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"rambad\"}",
                      (long long)server->started_at);
}

static void list(struct request *request)
{
    struct buf body;
    buf_init(&body);
    buf_append_text(&body, "{\"object\":\"list\",\"data\":[");
    append_model(&body, request->server);
    buf_append_text(&body, "]}");
    request_answer_json(request, 200, &body);
    buf_close(&body);
}

static void get(struct request *request)
{
    if (strcmp(request->argument, engine_get_info(request->server->engine)->model_name) != 0) {
        struct error err;
        error_set_param(&err, STATUS_NOT_FOUND, "model", "no model named %s; this server has %s",
                        request->argument, engine_get_info(request->server->engine)->model_name);
        request_fail(request, STATUS_NOT_FOUND, &err);
        return;
    }
    struct buf body;
    buf_init(&body);
    append_model(&body, request->server);
    request_answer_json(request, 200, &body);
    buf_close(&body);
}

const struct request_handler handle_models_list = {.name = "models", .end_cb = list};
const struct request_handler handle_models_get = {.name = "models", .end_cb = get};
