/* loader.h - reads chunks on a thread of its own while the engine goes on.
 * Thread: the engine's, and one that it owns. One batch at a time; between loader_begin and
 * loader_end the engine makes no other call of the same chunk_io, and leaves the pages alone.
 * Private to engine/. */
#ifndef ENGINE_LOADER_H
#define ENGINE_LOADER_H

#include "engine/chunk_io.h"

struct loader;

/* STATUS_NO_MEMORY. */
STATUS_CHECKED enum status loader_create(struct loader **out);
/* Nothing is under way. */
void loader_destroy(struct loader *loader);
/* `io` and `reads` are borrowed until loader_end. */
void loader_begin(struct loader *loader, const struct chunk_io *io, const struct chunk_read *reads,
                  size_t count);
/* Waits; what the read gave. */
STATUS_CHECKED enum status loader_end(struct loader *loader);

#endif
