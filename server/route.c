/* route.c - see route.h. */
#include "server/route.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *method, *path; /* {} stands for an id; two at most */
    const struct request_handler *handler;
} routes[] = {
    {"GET", "/v1/models", &handle_models_list},
    {"GET", "/v1/models/{}", &handle_models_get},
    {"POST", "/v1/completions", &handle_completions},
    {"POST", "/v1/chat/completions", &handle_chat},
    {"POST", "/v1/responses", &handle_responses_create},
    {"POST", "/v1/responses/input_tokens", &handle_responses_count},
    {"GET", "/v1/responses/{}", &handle_responses_get},
    {"DELETE", "/v1/responses/{}", &handle_responses_delete},
    {"POST", "/v1/responses/{}/cancel", &handle_responses_cancel},
    {"GET", "/v1/responses/{}/input_items", &handle_responses_items},
    {"POST", "/v1/conversations", &handle_conversations_create},
    {"GET", "/v1/conversations/{}", &handle_conversations_get},
    {"POST", "/v1/conversations/{}", &handle_conversations_update},
    {"DELETE", "/v1/conversations/{}", &handle_conversations_delete},
    {"GET", "/v1/conversations/{}/items", &handle_items_list},
    {"POST", "/v1/conversations/{}/items", &handle_items_create},
    {"GET", "/v1/conversations/{}/items/{}", &handle_items_get},
    {"DELETE", "/v1/conversations/{}/items/{}", &handle_items_delete},
    {"POST", "/v1/memories", &handle_memories_create},
    {"GET", "/v1/memories", &handle_memories_list},
    {"GET", "/v1/memories/{}", &handle_memories_get},
    {"PATCH", "/v1/memories/{}", &handle_memories_update},
    {"DELETE", "/v1/memories/{}", &handle_memories_delete},
    {"POST", "/v1/memories/{}/append", &handle_append},
    {"GET", "/v1/memories/{}/chunks", &handle_memories_chunks},
    {"GET", "/v1/memories/{}/export", &handle_memories_export},
    {"POST", "/v1/memories/import", &handle_memories_import},
    {"GET", "/v1/memories/{}/turns", &handle_turns_list},
    {"POST", "/v1/memories/{}/turns", &handle_turns_bookmark},
    {"DELETE", "/v1/memories/{}/turns", &handle_turns_delete},
    {"POST", "/v1/memories/{}/rewind", &handle_memories_rewind},
    {"GET", "/health", &handle_health_ready},
    {"GET", "/health/ready", &handle_health_ready},
    {"GET", "/health/live", &handle_health_live},
    {"GET", "/metrics", &handle_metrics},
};

/* Whether `path` has the shape of `pattern`; its ids go to `argument` and `item`. */
static bool match(const char *pattern, const char *path, char argument[LIMITS_ID_BYTES],
                  char item[LIMITS_ID_BYTES])
{
    char *ids[] = {argument, item};
    size_t count = 0;
    argument[0] = item[0] = 0;
    while (*pattern) {
        if (*pattern != '{') {
            if (*pattern++ != *path++)
                return false;
            continue;
        }
        const size_t size = strcspn(path, "/");
        if (!size || size >= LIMITS_ID_BYTES)
            return false;
        memcpy(ids[count], path, size);
        ids[count++][size] = 0;
        pattern += 2;
        path += size;
    }
    return !*path;
}

enum status route_find(const struct http_head *head, const struct request_handler **handler,
                       char argument[LIMITS_ID_BYTES], char item[LIMITS_ID_BYTES])
{
    enum status status = STATUS_NOT_FOUND;
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        if (!match(routes[i].path, head->path, argument, item))
            continue;
        status = STATUS_METHOD;
        if (strcmp(routes[i].method, head->method) == 0 ||
            (strcmp(head->method, "HEAD") == 0 && strcmp(routes[i].method, "GET") == 0)) {
            *handler = routes[i].handler;
            return STATUS_OK;
        }
    }
    return status;
}

bool route_at(size_t index, const char **method, const char **path)
{
    if (index >= sizeof routes / sizeof *routes)
        return false;
    *method = routes[index].method;
    *path = routes[index].path;
    return true;
}

void route_append_methods(const char *path, struct buf *out)
{
    char argument[LIMITS_ID_BYTES], item[LIMITS_ID_BYTES];
    const char *before = "";
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        if (!match(routes[i].path, path, argument, item))
            continue;
        const bool get = strcmp(routes[i].method, "GET") == 0;
        buf_append_format(out, "%s%s%s", before, routes[i].method, get ? ", HEAD" : "");
        before = ", ";
    }
}
