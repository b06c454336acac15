/* gather.h - waits for the answers of queued writes.
 * Thread: any but the writer's; gather_cb runs on the writer's.
 * Owns nothing. Private to storage/. */
#ifndef STORAGE_GATHER_H
#define STORAGE_GATHER_H

#include <pthread.h>

#include "storage/storage.h"

struct gather {
    pthread_mutex_t mutex;
    pthread_cond_t answered;
    size_t pending;
    enum status status; /* the first that was not STATUS_OK */
};
void gather_init(struct gather *gather);
void gather_close(struct gather *gather);
/* Before a write is queued with gather_cb and this. */
void gather_expect(struct gather *gather);
void gather_cb(void *gather, enum status status);
/* The write that was expected last was not taken. True: the queue is full, so queue it again; this
 * has waited until an answer came or a moment had passed. */
bool gather_refused(struct gather *gather, enum status status);
/* Waits for all answers; the first failure since the last call. */
STATUS_CHECKED enum status gather_wait(struct gather *gather);

/* A name that nobody can guess, for an ephemeral memory. */
void gather_new_id(char id[LIMITS_ID_BYTES]);
/* storage_memory_create, settle and delete, waited for. */
STATUS_CHECKED enum status gather_create(struct gather *gather, struct storage *storage,
                                         const struct storage_memory_options *options);
STATUS_CHECKED enum status gather_commit(struct gather *gather, struct storage *storage,
                                         const struct storage_commit *commit);
STATUS_CHECKED enum status gather_settle(struct gather *gather, struct storage *storage,
                                         const char *ephemeral, const char *id);

#endif
