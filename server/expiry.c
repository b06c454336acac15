/* expiry.c - see expiry.h. The store says what is over; the engine, whether it is in use, and lets
 * go of it if not; the writer looks once more, for a turn may have been on its way.
 *
 * Responses go with the memory that was made for them. Others can be read for --response-days, and
 * for as long as their memory leads on from them: a hand goes round over all of them for the rest.
 */
#include "server/expiry.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/log.h"
#include "server/server.h"

#define RESPONSES 32 /* looked at at once, on the loop */
/* Asked for at once; each costs the engine's thread a look through its memories. */
#define BATCH 16

struct ending {
    struct server *server;
    char id[LIMITS_ID_BYTES];
    bool is_last; /* of a full batch: there may be more */
};

static void sweep(struct server *server, const char *after);

static void released_cb(void *context, enum status status)
{
    struct ending *ending = context;
    struct server *server = ending->server;
    server->expiring--;
    /* One in use, or whose turn is in the full queue, is looked at again with the next sweep. */
    if (!status && !storage_memory_expire(server->storage, ending->id, NULL, NULL)) {
        server->metrics.expired++;
        log_event(LOG_INFO, "memory is over", "memory", LOG_STR, ending->id, NULL);
    }
    if (ending->is_last && !server->draining)
        sweep(server, ending->id);
    free(ending);
}

static void sweep(struct server *server, const char *after)
{
    char ids[BATCH][LIMITS_ID_BYTES];
    size_t count;
    const enum status status = storage_expired(server->storage, after, BATCH, ids, &count);
    if (status) {
        log_event(LOG_ERROR, "cannot look for memories that are over", "error", LOG_STR,
                  status_text(status), NULL);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        struct ending *ending = calloc(1, sizeof *ending);
        if (!ending)
            return;
        *ending = (struct ending){.server = server, .is_last = i + 1 == BATCH};
        memcpy(ending->id, ids[i], sizeof ending->id);
        server->expiring++;
        engine_thread_release_memory(server->engine_thread, ending->id, released_cb, ending);
    }
}

static void sweep_responses(struct server *server)
{
    char ids[RESPONSES][LIMITS_ID_BYTES];
    size_t count;
    const int64_t age_s = (int64_t)server->config->response_days * 86400;
    if (!age_s)
        return;
    const enum status status =
        storage_object_left_over(server->storage, age_s, RESPONSES, server->swept, ids, &count);
    if (status)
        log_event(LOG_ERROR, "cannot look for responses that are over", "error", LOG_STR,
                  status_text(status), NULL);
    for (size_t i = 0; i < count; i++) /* one that the full queue does not take comes round again */
        if (!storage_object_delete(server->storage, ids[i], false, NULL, NULL)) {
            server->metrics.expired_responses++;
            log_event(LOG_INFO, "response is over", "response", LOG_STR, ids[i], NULL);
        }
}

static void timer_cb(uv_timer_t *timer)
{
    struct server *server = timer->data;
    sweep_responses(server);
    if (!server->expiring)
        sweep(server, NULL);
}

void expiry_start(struct server *server)
{
    uv_timer_init(server->loop, &server->expiry);
    server->expiry.data = server;
    uv_timer_start(&server->expiry, timer_cb, LIMITS_EXPIRY_SWEEP_MS, LIMITS_EXPIRY_SWEEP_MS);
}

void expiry_stop(struct server *server)
{
    uv_timer_stop(&server->expiry);
}

void expiry_close(struct server *server)
{
    uv_close((uv_handle_t *)&server->expiry, NULL);
}
