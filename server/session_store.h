/* session_store.h - the engine's chunk_io over storage, and the acknowledgements on their way back.
 * Thread: chunk_io's calls and session_store_deliver on the engine's; storage answers on its
 * writer thread, which only queues the answer here and wakes the engine.
 * Owns the queue of answers. Must outlive every append: destroy it once nothing is outstanding. */
#ifndef SERVER_SESSION_STORE_H
#define SERVER_SESSION_STORE_H

#include <stdbool.h>

#include "engine/engine.h"
#include "storage/storage.h"

struct session_store;

/* `storage` is borrowed. wake_cb runs on the writer thread after each answer. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status session_store_create(struct storage *storage,
                                                void (*wake_cb)(void *context), void *context,
                                                struct session_store **out);
void session_store_destroy(struct session_store *store);
void session_store_io(struct session_store *store, struct chunk_io *io);
/* Hands the answers that have come to engine_chunk_durable. */
void session_store_deliver(struct session_store *store, struct engine *engine);
/* Appends not delivered yet. */
size_t session_store_outstanding(const struct session_store *store);

#endif
