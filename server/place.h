/* place.h - where a turn goes that does not simply go on with a memory: to a new memory, or to a
 * fork of one as it was at some position. Thread: the loop; a pool thread reads tokens between. The
 * caller embeds it and keeps it until place_close; `then` runs on the loop. Owns the fork until it
 * lasts, and the tokens.
 *
 * A fork starts at the nearest snapshot at or before the position; what lies between is read back
 * as tokens, which the turn's job then has in front of its own. */
#ifndef SERVER_PLACE_H
#define SERVER_PLACE_H

#include "server/wait.h"

struct place {
    struct server *server;
    char base[LIMITS_ID_BYTES];   /* what the turn goes on from; "": nothing */
    uint64_t position;            /* and as it was there, in tokens */
    char memory[LIMITS_ID_BYTES]; /* where the job goes: `base`, or the fork; "": nowhere */
    bool is_fork;
    bool is_new;     /* a fork of nothing, which the turn's job makes by itself */
    bool lasts;      /* the fork was settled by a commit */
    uint64_t stands; /* where `memory` stands, in tokens */
    int32_t *replay; /* tokens from there to `position`, with their marks */
    size_t replay_count;
    uint64_t replay_bytes;          /* of their text */
    struct storage_expires expires; /* of the fork, once it lasts */
    struct error err;               /* when `then` gets a status */
    /* Its own. */
    uint64_t base_branch;
    struct wait wait;
    void (*then)(struct place *place, enum status status);
};

/* Makes the fork, ephemeral until a commit settles it: under the name in `memory`, or a new one.
 * `metadata` NULL: "{}". */
void place_fork(struct place *place, const char *tenant, const char *metadata,
                void (*then)(struct place *place, enum status status));
/* Names a memory for job_generate.makes instead. */
void place_new(struct place *place);
/* Deletes a fork that does not last. */
void place_close(struct place *place);
/* The tokens to be replayed, `count` tokens behind them, and `more`, in one malloced array. NULL:
 * out of memory. */
int32_t *place_tokens(const struct place *place, const struct tokenizer_tokens *tokens,
                      const int32_t *more, size_t more_count, size_t *count);

#endif
