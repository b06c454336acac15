/* unreadable.h - a page of a mapped file that cannot be read ends the process with a message: the
 * store's file was cut short, or the disk fails under it.
 * Thread: main's, once, before the store is opened. Owns nothing. */
#ifndef SERVER_UNREADABLE_H
#define SERVER_UNREADABLE_H

/* From now on SIGBUS says so of the folder `data`, and that its words are as they were committed;
 * the exit code is 1. */
void unreadable_watch(const char *data);

#endif
