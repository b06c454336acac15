/* forget.h - takes an item out of a conversation, and what it said out of the memory.
 * Thread: the loop; a pool thread reads and renders. Owns itself until the request is answered. */
#ifndef SERVER_FORGET_H
#define SERVER_FORGET_H

#include "server/request.h"

/* Answers with `answer_cb` once the conversation of the path no longer knows of the item of the
 * path, or with why it still does. */
void forget_item(struct request *request,
                 void (*answer_cb)(struct request *request, const char *id));

#endif
