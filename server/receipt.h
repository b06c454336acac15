/* receipt.h - requests with an Idempotency-Key: carried out once, however often they are sent.
 * Thread: the loop. Owns nothing beyond the structs; what was answered is kept by storage, in the
 * same commit as what was done. */
#ifndef SERVER_RECEIPT_H
#define SERVER_RECEIPT_H

#include "server/request.h"

/* Whether the request has a key. */
bool receipt_wanted(const struct request *request);
/* The key's name is the request's until it is done. `*kept` is what was kept of an earlier one that
 * was carried out, malloced and `*size` long with a NUL behind, else NULL; with `with_body`, behind
 * the hash of its body, which must be the same now. STATUS_CONFLICT: that request is under way, or
 * was another. STATUS_INVALID (a key that is too long), STATUS_NO_MEMORY, STATUS_CORRUPT. */
STATUS_CHECKED enum status receipt_begin(struct request *request, bool with_body, char **kept,
                                         size_t *size, struct error *err);
/* The hash of the request's body and a space, for what is kept `with_body`. */
void receipt_append_body(const struct request *request, struct buf *out);
/* Called for each request that is done. */
void receipt_end(struct request *request);

#endif
