/* loader.c - see loader.h. */
#include "engine/loader.h"

#include <pthread.h>
#include <stdlib.h>

#include "proto/base/assert.h"

enum loader_state { IDLE, ASKED, DONE, LEAVING };

struct loader {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    const struct chunk_io *io;
    const struct chunk_read *reads;
    size_t count;
    enum loader_state state;
    enum status status;
};

static void *work(void *context)
{
    struct loader *l = context;
    pthread_mutex_lock(&l->lock);
    for (;;) {
        while (l->state == IDLE || l->state == DONE)
            pthread_cond_wait(&l->changed, &l->lock);
        if (l->state == LEAVING)
            break;
        pthread_mutex_unlock(&l->lock);
        const enum status status = l->io->read(l->io->context, l->reads, l->count);
        pthread_mutex_lock(&l->lock);
        l->status = status;
        l->state = DONE;
        pthread_cond_broadcast(&l->changed);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

enum status loader_create(struct loader **out)
{
    struct loader *l = calloc(1, sizeof *l);
    if (!l)
        return STATUS_NO_MEMORY;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->changed, NULL);
    if (pthread_create(&l->thread, NULL, work, l)) {
        free(l);
        return STATUS_NO_MEMORY;
    }
    *out = l;
    return STATUS_OK;
}

static void change(struct loader *l, enum loader_state state)
{
    pthread_mutex_lock(&l->lock);
    ASSERT(l->state == IDLE);
    l->state = state;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
}

void loader_destroy(struct loader *l)
{
    if (!l)
        return;
    change(l, LEAVING);
    pthread_join(l->thread, NULL);
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->changed);
    free(l);
}

void loader_begin(struct loader *l, const struct chunk_io *io, const struct chunk_read *reads,
                  size_t count)
{
    l->io = io;
    l->reads = reads;
    l->count = count;
    change(l, ASKED);
}

enum status loader_end(struct loader *l)
{
    pthread_mutex_lock(&l->lock);
    while (l->state != DONE)
        pthread_cond_wait(&l->changed, &l->lock);
    l->state = IDLE;
    pthread_mutex_unlock(&l->lock);
    return l->status;
}
