/* server.h - the daemon's loop side: what its parts share.
 * Thread: the loop. Owns the listener and the connections; borrows the engine's thread and the
 * storage, which main.c opens and closes. */
#ifndef SERVER_SERVER_H
#define SERVER_SERVER_H

#include <uv.h>

#include "proto/base/list.h"
#include "server/auth.h"
#include "server/chat.h"
#include "server/config.h"
#include "server/engine_thread.h"
#include "server/metrics.h"
#include "storage/storage.h"

struct server {
    uv_loop_t *loop;
    const struct config *config;
    struct auth *auth;
    struct engine_thread *engine_thread;
    struct chat chat;
    const struct engine *engine; /* its immutable parts: tokeniser, sizes */
    struct storage *storage;
    struct metrics metrics;
    uv_tcp_t listener;
    uv_prepare_t flush; /* one write per connection and turn of the loop */
    uv_timer_t expiry;
    size_t expiring;             /* memories that are over, about which the engine was asked */
    char swept[LIMITS_ID_BYTES]; /* the response up to which was looked for such that are over */
    uv_timer_t cutoff; /* of clients that do not take their answers while we drain */
    struct list connections;
    struct list unsent; /* of them, those with something to write */
    size_t connection_count;
    struct list receipts;   /* requests under way that have an Idempotency-Key */
    struct buf json, event; /* a stream's next part, so that a token allocates nothing here */
    struct list responses;  /* under way: struct responding */
    bool draining, engine_drained;
    void (*drained_cb)(void *context);
    void *drained_context;
    int64_t started_at; /* seconds since 1970 */
};

/* Binds and listens. STATUS_INVALID (address), STATUS_CONFLICT (in use), STATUS_IO. `*port` is the
 * port bound (the asked one, or any when that was 0). */
STATUS_CHECKED enum status server_listen(struct server *server, int *port, struct error *err);
/* New work is refused from here on; health and metrics are still answered. drained_cb runs on the
 * loop when what was under way is answered, or cut off: jobs after `deadline_ms`, clients that do
 * not take their answers a little later. */
void server_drain(struct server *server, uint64_t deadline_ms, void (*drained_cb)(void *context),
                  void *context);
/* Closes what is left of the connections and the handles. */
void server_close(struct server *server);
/* `prefix` and 24 hexadecimal digits nobody can guess. Any thread. */
void server_new_id(const char *prefix, char out[LIMITS_ID_BYTES]);

#endif
