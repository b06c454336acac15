/* conn.h - the connections: socket, parser, timers, bounded output; each with its request
 * (request.h).
 * Thread: the loop. Owns the sockets and, while they are handled, the requests.
 *
 * One request at a time: the parser stops behind a request until its answer is complete, so
 * pipelined ones wait in a bounded buffer, then in the socket.
 *
 *   HEAD -> BODY -> HANDLING -> HEAD (keep-alive)
 *   All three can reach LINGERING, after the last answer: one with "close", or an error that ends
 *   the connection. All states can reach CLOSING: time-out, end of file, a client that is gone. */
#ifndef SERVER_CONN_H
#define SERVER_CONN_H

#include <stdbool.h>

struct server;

void conn_accept(struct server *server);
/* Sends what has gathered; called once per turn of the loop. */
void conn_flush_all(struct server *server);
/* Closes idle ones now, the others when their answer is complete and taken; a client that takes
 * nothing of it for a few seconds is not waited for. */
void conn_drain_all(struct server *server);
/* No request is under way and no answer unsent. */
bool conn_all_answered(const struct server *server);
void conn_close_all(struct server *server);

#endif
