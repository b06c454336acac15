/* route.h - which handler takes a request.
 * Thread: the loop. Owns nothing. */
#ifndef SERVER_ROUTE_H
#define SERVER_ROUTE_H

#include "server/request.h"

/* Finds the handler and the ids of the path, "" where there are none. STATUS_NOT_FOUND,
 * STATUS_METHOD. */
STATUS_CHECKED enum status route_find(const struct http_head *head,
                                      const struct request_handler **handler,
                                      char argument[LIMITS_ID_BYTES], char item[LIMITS_ID_BYTES]);

/* The routes one by one, "{}" for an id; false behind the last. */
bool route_at(size_t index, const char **method, const char **path);

/* What `path` takes, such as "GET, HEAD"; nothing for a path that is not there. */
void route_append_methods(const char *path, struct buf *out);

extern const struct request_handler handle_models_list, handle_models_get;
extern const struct request_handler handle_completions, handle_chat;
extern const struct request_handler handle_responses_create, handle_responses_count,
    handle_responses_get, handle_responses_delete, handle_responses_cancel, handle_responses_items;
extern const struct request_handler handle_conversations_create, handle_conversations_get,
    handle_conversations_update, handle_conversations_delete, handle_items_list,
    handle_items_create, handle_items_get, handle_items_delete;
extern const struct request_handler handle_memories_create, handle_memories_list,
    handle_memories_get, handle_memories_update, handle_memories_delete, handle_memories_chunks;
extern const struct request_handler handle_turns_list, handle_turns_bookmark, handle_turns_delete,
    handle_memories_rewind;
extern const struct request_handler handle_memories_export, handle_memories_import;
extern const struct request_handler handle_append;
extern const struct request_handler handle_health_live, handle_health_ready, handle_metrics;

#endif
