/* responding_private.h - for responding.c and responding_prepare.c. See responding.h.
 * Thread: the loop, and where it says so libuv's pool. Owns nothing. */
#ifndef SERVER_RESPONDING_PRIVATE_H
#define SERVER_RESPONDING_PRIVATE_H

#include "server/responding.h"

/* On the pool, since the body may be long, and its tokens many: reads what was asked, finds what it
 * goes on from and where it is written, makes prompt and items. Leaves the status and error. */
void responding_prepare(uv_work_t *work);
/* `text` is borrowed for as long as the item. */
void responding_set_item(struct storage_item *item, const char *id, const struct buf *text);

#endif
