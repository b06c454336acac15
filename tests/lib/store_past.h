/* store_past.h - memories whose every byte follows from their tokens: written to a store, and
 * checked against it. Thread: the test's. Owns nothing. What is not as it should be fails the
 * running test. */
#ifndef TESTS_LIB_STORE_PAST_H
#define TESTS_LIB_STORE_PAST_H

#include "tests/lib/store_helper.h"

#define STORE_PAST_TOKENS 4096u /* most of one memory */
#define STORE_PAST_CHUNK 8u     /* tokens of a chunk */
#define STORE_PAST_SNAPSHOT 5000u
#define STORE_PAST_KEEP 3u

struct store_past {
    char id[LIMITS_ID_BYTES];
    uint64_t count;
    uint64_t unmarked; /* so many first tokens come from a program that knew no marks */
    int32_t tokens[STORE_PAST_TOKENS];
    bool is_turn[STORE_PAST_TOKENS + 1]; /* whether one was ever committed at this position */
};

struct storage_options store_past_options(const char *path);
struct storage *store_past_open(const char *path);
/* The folder must be closed, and without a fault. */
struct storage_check_report store_past_check(const char *path);
struct storage_memory store_past_get(struct storage *storage, const char *id);
/* Writes what `past` says on to `position` as one commit to memory `id`. */
void store_past_commit(struct storage *storage, const struct store_past *past, const char *id,
                       uint64_t position, bool goes_on);
/* The same, and how it ended. */
enum status store_past_try_commit(struct storage *storage, const struct store_past *past,
                                  const char *id, uint64_t position, bool goes_on);
/* Adds `count` tokens to `past` and commits them to its memory. */
void store_past_write(struct storage *storage, struct store_past *past, uint64_t count,
                      uint64_t seed, bool goes_on);
/* All turns, newest first; room for STORE_PAST_TOKENS. */
size_t store_past_turns(struct storage *storage, const char *id, struct storage_turn *turns);
/* Everything that can be read of the memory, against its past. */
void store_past_assert(struct storage *storage, const struct store_past *past);

#endif
