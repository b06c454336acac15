/* session_store.c - see session_store.h. */
#include "server/session_store.h"

#include <pthread.h>
#include <stdlib.h>

#include "proto/base/list.h"

struct answer {
    struct list node;
    struct session_store *store;
    struct chunk_key key;
    enum status status;
};

struct session_store {
    struct storage *storage;
    void (*wake_cb)(void *context);
    void *context;
    pthread_mutex_t lock;
    struct list answers; /* under the lock */
    size_t outstanding;  /* engine's thread */
};

enum status session_store_create(struct storage *storage, void (*wake_cb)(void *context),
                                 void *context, struct session_store **out)
{
    struct session_store *store = calloc(1, sizeof *store);
    if (!store)
        return STATUS_NO_MEMORY;
    store->storage = storage;
    store->wake_cb = wake_cb;
    store->context = context;
    pthread_mutex_init(&store->lock, NULL);
    list_init(&store->answers);
    *out = store;
    return STATUS_OK;
}

void session_store_destroy(struct session_store *store)
{
    pthread_mutex_destroy(&store->lock);
    free(store);
}

static size_t append_room(void *context)
{
    const struct session_store *store = context;
    return storage_append_room(store->storage);
}

static void append_done(void *context, enum status status)
{
    struct answer *answer = context;
    struct session_store *store = answer->store;
    answer->status = status;
    pthread_mutex_lock(&store->lock);
    list_push_back(&store->answers, &answer->node);
    store->wake_cb(store->context); /* under the lock: once it is taken, the store may end */
    pthread_mutex_unlock(&store->lock);
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    struct session_store *store = context;
    struct answer *answer = malloc(sizeof *answer);
    if (!answer)
        return STATUS_NO_MEMORY;
    *answer = (struct answer){.store = store, .key = key};
    const enum status status = storage_append_promised(store->storage, key.branch, key.index, kv,
                                                       landmark, append_done, answer);
    if (status)
        free(answer);
    else
        store->outstanding++;
    return status;
}

static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    const struct session_store *store = context;
    struct storage_read *wanted = calloc(count, sizeof *wanted);
    if (!wanted)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < count; i++)
        wanted[i] = (struct storage_read){
            .branch = reads[i].key.branch, .index = reads[i].key.index, .kv = reads[i].kv};
    const enum status status = storage_read_chunks(store->storage, wanted, count);
    free(wanted);
    return status;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    const struct session_store *store = context;
    return storage_read_landmarks(store->storage, branch, first, count, out);
}

void session_store_io(struct session_store *store, struct chunk_io *io)
{
    *io = (struct chunk_io){.context = store,
                            .append_room = append_room,
                            .append = append,
                            .read = read_chunks,
                            .read_landmarks = read_landmarks};
}

void session_store_deliver(struct session_store *store, struct engine *engine)
{
    struct list taken;
    list_init(&taken);
    pthread_mutex_lock(&store->lock);
    while (!list_empty(&store->answers)) {
        struct list *node = store->answers.next;
        list_remove(node);
        list_push_back(&taken, node);
    }
    pthread_mutex_unlock(&store->lock);
    while (!list_empty(&taken)) {
        struct answer *answer = LIST_ENTRY(taken.next, struct answer, node);
        list_remove(&answer->node);
        engine_chunk_durable(engine, answer->key, answer->status);
        store->outstanding--;
        free(answer);
    }
}

size_t session_store_outstanding(const struct session_store *store)
{
    return store->outstanding;
}
