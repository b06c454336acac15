#include "storage/gather.h"

#include <stdio.h>
#include <sys/random.h>
#include <time.h>

#include "proto/base/assert.h"

#define RETRY_NS 2000000 /* a full queue is emptied at the disk's pace */

void gather_init(struct gather *gather)
{
    *gather = (struct gather){.status = STATUS_OK};
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC); /* the other one can be set */
    pthread_mutex_init(&gather->mutex, NULL);
    pthread_cond_init(&gather->answered, &attributes);
    pthread_condattr_destroy(&attributes);
}

void gather_close(struct gather *gather)
{
    ASSERT(gather->pending == 0);
    pthread_cond_destroy(&gather->answered);
    pthread_mutex_destroy(&gather->mutex);
}

void gather_expect(struct gather *gather)
{
    pthread_mutex_lock(&gather->mutex);
    gather->pending++;
    pthread_mutex_unlock(&gather->mutex);
}

void gather_cb(void *context, enum status status)
{
    struct gather *gather = context;
    pthread_mutex_lock(&gather->mutex);
    if (!gather->status)
        gather->status = status;
    gather->pending--;
    pthread_cond_signal(&gather->answered);
    pthread_mutex_unlock(&gather->mutex);
}

bool gather_refused(struct gather *gather, enum status status)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += RETRY_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&gather->mutex);
    gather->pending--;
    if (status == STATUS_BUSY)
        pthread_cond_timedwait(&gather->answered, &gather->mutex, &until);
    else if (!gather->status)
        gather->status = status;
    pthread_mutex_unlock(&gather->mutex);
    return status == STATUS_BUSY;
}

enum status gather_wait(struct gather *gather)
{
    pthread_mutex_lock(&gather->mutex);
    while (gather->pending > 0)
        pthread_cond_wait(&gather->answered, &gather->mutex);
    enum status status = gather->status;
    gather->status = STATUS_OK;
    pthread_mutex_unlock(&gather->mutex);
    return status;
}

void gather_new_id(char id[LIMITS_ID_BYTES])
{
    uint64_t words[2];
    ASSERT(getrandom(words, sizeof words, 0) == sizeof words);
    snprintf(id, LIMITS_ID_BYTES, "ephemeral_%016llx%08x", (unsigned long long)words[0],
             (unsigned)words[1]);
}

enum status gather_create(struct gather *gather, struct storage *storage,
                          const struct storage_memory_options *options)
{
    enum status status;
    do {
        gather_expect(gather);
        status = storage_memory_create(storage, options, gather_cb, gather);
    } while (status && gather_refused(gather, status));
    return gather_wait(gather);
}

enum status gather_commit(struct gather *gather, struct storage *storage,
                          const struct storage_commit *commit)
{
    enum status status;
    do {
        gather_expect(gather);
        status = storage_commit(storage, commit, gather_cb, gather);
    } while (status && gather_refused(gather, status));
    return gather_wait(gather);
}

enum status gather_settle(struct gather *gather, struct storage *storage, const char *ephemeral,
                          const char *id)
{
    enum status status;
    do {
        gather_expect(gather);
        status = storage_memory_settle(storage, ephemeral, id, gather_cb, gather);
    } while (status && gather_refused(gather, status));
    return gather_wait(gather);
}
