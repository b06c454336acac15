/* reach.h - a memory as it was at a position of its past: a fork of it there, or itself gone back.
 * Thread: the loop. Owns what is under way until the request is answered.
 *
 * From the last snapshot at or before the position an ephemeral fork is made; the tokens from there
 * to the position, if any, are read again by the engine; then the fork is settled under the name of
 * the new memory, or of the old one. Until that last write nothing is to be seen of it, and after a
 * crash nothing is left of it. */
#ifndef SERVER_REACH_H
#define SERVER_REACH_H

#include "proto/memory_request.h"
#include "server/request.h"

/* Answers 201 with a new memory, a fork of asked->from at asked->at. */
void reach_fork(struct request *request, const struct memory_request *asked);
/* Takes memory `id` back to position `to`; answers 200 with it. */
void reach_rewind(struct request *request, const char *id, uint64_t to);

#endif
