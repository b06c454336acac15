/* expiry.h - when memories that shall not stay for ever are over: the store's idea of the time, and
 * the table of what ends when.
 * Thread: the clock is behind the storage's clock_lock; the rest on the writer thread, inside its
 * transaction. Owns nothing. Private to storage/.
 *
 * A clock that is set by hand or by the network must not end a memory. So the store keeps a time of
 * its own, which goes on at the pace of the monotonic clock; what the wall clock says is believed
 * only once it has kept to it for EXPIRY_BELIEF_S. What is written down as "last active" is the
 * later of the two, what is over is judged by the store's: a wrong clock makes memories stay too
 * long, never end too early. */
#ifndef STORAGE_EXPIRY_H
#define STORAGE_EXPIRY_H

#include "storage/record.h"
#include "storage/storage.h"

#define EXPIRY_BELIEF_S 600 /* until a wall clock that jumped is believed */
#define EXPIRY_SLACK_S 60   /* by which the two may differ: they run at slightly different pace */
#define EXPIRY_WALL_LEAST 1767225600 /* 2026-01-01: a clock before it was never set */

struct expiry_clock {
    int64_t now;    /* the store's time, in seconds since 1970 */
    int64_t seen;   /* monotonic seconds when that was so */
    int64_t offset; /* of the wall clock that is not believed yet: ahead of ours by so much */
    int64_t since;  /* monotonic seconds since when it kept to that; 0: it is believed */
};

/* `newest`: the latest time that the store has written down, 0 for none. */
void expiry_clock_init(struct expiry_clock *clock, int64_t newest, int64_t wall, int64_t monotonic);
/* The store's time. */
int64_t expiry_clock_now(struct expiry_clock *clock, int64_t wall, int64_t monotonic);

struct store_write;
/* When the memory is over, in seconds since 1970; 0: never. */
int64_t expiry_end(const struct record_memory *memory);
/* The memory is used at `stamp`: moves its end on, if that makes a difference worth a write.
 * Whether it does. */
bool expiry_touch(struct record_memory *memory, int64_t stamp);
/* The memory's record becomes `memory` (NULL: is deleted): the table follows. */
STATUS_CHECKED enum status expiry_update(struct store_write *write, const char *id,
                                         const struct record_memory *old,
                                         const struct record_memory *memory);
/* Key of the table: end (8 bytes), id. Returns its size. */
#define EXPIRY_KEY_BYTES (8 + LIMITS_ID_BYTES)
size_t expiry_key(unsigned char key[EXPIRY_KEY_BYTES], int64_t end, const char *id);

#endif
