/* expiry.h - deletes memories whose time is over, when nobody uses them, and responses that nothing
 * goes on from any more.
 * Thread: the loop. Owns its timer. */
#ifndef SERVER_EXPIRY_H
#define SERVER_EXPIRY_H

struct server;

/* From now on, a few at a time. */
void expiry_start(struct server *server);
/* No new ones; server->expiring counts those whose engine has not answered yet. */
void expiry_stop(struct server *server);
void expiry_close(struct server *server);

#endif
