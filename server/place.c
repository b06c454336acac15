/* place.c - see place.h. */
#include "server/place.h"

#include <stdlib.h>
#include <string.h>

static struct place *place_of(struct wait *wait)
{
    return LIST_ENTRY(wait, struct place, wait);
}

static void done(struct place *place, enum status status)
{
    if (status && !place->err.message[0])
        error_set(&place->err, status, "memory %s: %s", place->base, status_text(status));
    place->then(place, status);
}

/* On the pool: what lies between the snapshot and the position. */
static void read_tokens(uv_work_t *work)
{
    struct place *place = work->data;
    struct storage *storage = place->server->storage;
    const struct tokenizer *tokenizer = engine_tokenizer(place->server->engine);
    const size_t count = (size_t)(place->position - place->stands);
    struct storage_memory base;
    place->replay = malloc(count * sizeof *place->replay);
    enum status status = place->replay ? storage_read_marked(storage, place->base, place->stands,
                                                             count, place->replay)
                                       : STATUS_NO_MEMORY;
    for (size_t i = 0; !status && i < count; i++) {
        size_t size;
        tokenizer_bytes(tokenizer, place->replay[i] & ~STORAGE_TOKEN_MARK, &size);
        place->replay_bytes += size;
    }
    place->replay_count = status ? 0 : count;
    if (!status)
        status = storage_memory_get(storage, place->base, &base);
    if (!status) { /* it was not taken back to another past meanwhile */
        status = base.branch == place->base_branch ? STATUS_OK : STATUS_CONFLICT;
        storage_memory_close(&base);
    }
    place->wait.status = status;
}

static void tokens_read(uv_work_t *work, int cancelled)
{
    struct place *place = work->data;
    (void)cancelled;
    done(place, place->wait.status);
}

static void forked(struct wait *wait)
{
    struct place *place = place_of(wait);
    struct storage_memory fork;
    enum status status = wait->status;
    place->is_fork = status == STATUS_OK;
    if (!status)
        status = storage_memory_get(place->server->storage, place->memory, &fork);
    if (status) {
        done(place, status);
        return;
    }
    place->stands = fork.token_count;
    storage_memory_close(&fork);
    if (place->stands == place->position) {
        done(place, STATUS_OK);
        return;
    }
    wait->work.data = place;
    uv_queue_work(place->server->loop, &wait->work, read_tokens, tokens_read);
}

void place_fork(struct place *place, const char *tenant, const char *metadata,
                void (*then)(struct place *place, enum status status))
{
    struct storage *storage = place->server->storage;
    struct storage_memory base;
    enum status status = STATUS_OK;
    place->then = then;
    place->wait.server = place->server;
    if (place->position) {
        status = storage_memory_get(storage, place->base, &base);
        place->base_branch = status ? 0 : base.branch;
        if (!status)
            storage_memory_close(&base);
    }
    if (!place->memory[0] || strcmp(place->memory, place->base) == 0)
        server_new_id("mem_", place->memory);
    wait_for_write(&place->wait, forked);
    const struct storage_memory_options options = {.id = place->memory,
                                                   .from = place->position ? place->base : NULL,
                                                   .at = place->position,
                                                   .metadata = metadata,
                                                   .tenant = tenant,
                                                   .expires = place->expires,
                                                   .ephemeral = true};
    if (!status)
        status = storage_memory_create(storage, &options, wait_stored_cb, &place->wait);
    if (status)
        wait_refused(&place->wait, status);
}

void place_new(struct place *place)
{
    server_new_id("mem_", place->memory);
    place->is_fork = place->is_new = true;
}

void place_close(struct place *place)
{
    if (place->is_fork && !place->lasts)
        (void)!storage_memory_delete(place->server->storage, place->memory, NULL, NULL);
    free(place->replay);
    place->replay = NULL;
}

int32_t *place_tokens(const struct place *place, const struct tokenizer_tokens *tokens,
                      const int32_t *more, size_t more_count, size_t *count)
{
    *count = place->replay_count + tokens->count + more_count;
    int32_t *all = malloc((*count ? *count : 1) * sizeof *all);
    if (!all)
        return NULL;
    if (place->replay_count)
        memcpy(all, place->replay, place->replay_count * sizeof *all);
    if (tokens->count)
        memcpy(all + place->replay_count, tokens->ids, tokens->count * sizeof *all);
    if (more_count)
        memcpy(all + *count - more_count, more, more_count * sizeof *all);
    return all;
}
