/* sched.h - who runs next: admission, the batch of a step, fairness, and how long to wait.
 * Thread: none of its own; a pure function of its inputs and of the time it is given. It reads no
 * clock, allocates nothing and touches no queue but its own. Owns the lists; entries are the
 * caller's, and embedded in what they stand for.
 *
 * Time is in seconds on any clock that only goes forward.
 *
 * Shares. Every entry belongs to a share (an API key), which has a weight. What a share uses of the
 * engine is measured in seconds and divided by its weight: its virtual time. Among shares that want
 * more than they get, the one with the least goes first, to start an entry and for rows of a
 * prefill; one that comes back from idling begins where the others are, so idling saves nothing up.
 *
 * Order in a share. By when an entry came, plus `priority` seconds: so one of priority 10 lets pass
 * what comes within ten seconds after it, and whatever waits is first some day. Of prompts that are
 * being read the short ones go first, by the seconds that they have left; bulk entries (appends)
 * take turns.
 *
 * The step. All running sequences decode in each step, or take turns when there are more than
 * seats. Beside them prefills get as many rows as take no longer than what is left of max_stall, by
 * the times that were measured. Bulk entries get no more of the engine's time than what else there
 * is, by the weights of the shares, and in a share no more than what else it has. */
#ifndef SERVER_SCHED_H
#define SERVER_SCHED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/list.h"
#include "proto/limits.h"

#define SCHED_SHARES (LIMITS_KEYS + 2) /* and the environment's, and everybody's */
#define SCHED_UNITS 64                 /* sizes of a prefill that are timed apart, the last: more */
#define SCHED_PICKS (2 * LIMITS_RUNNING)

struct sched_options {
    uint32_t running_max;  /* entries at work at once, and sequences in a step; <= LIMITS_RUNNING */
    uint32_t slice_tokens; /* most rows of one entry in one step */
    uint32_t row_max;      /* of one step, of all prefills together; >= slice_tokens */
    uint64_t memory_bytes; /* for the sessions of entries at work */
    double max_stall;      /* seconds between two tokens of a running sequence */
    bool shared;           /* there are keys: room is kept for those that are not here yet */
};

struct sched_share {
    char name[LIMITS_ID_BYTES];
    double weight;
    double used;    /* virtual time: seconds of the engine over the weight */
    double total;   /* seconds of the engine */
    double balance; /* of that, what others have had more than bulk, within bounds */
    uint32_t waiting, running, bulk, waiting_bulk; /* entries; of running and waiting ones */
    uint32_t decodes, prefills; /* of the step: sequences, entries with rows to give */
    bool short_before;          /* when last looked at */
    bool has_bulk, has_other;   /* among them */
};

enum sched_phase {
    SCHED_WAITING, /* in the queue */
    SCHED_RUNNING  /* sched_start has returned it */
};

struct sched_entry {
    struct list node; /* the sched's */
    /* By the caller, before sched_add. */
    double came;
    double priority; /* seconds; less is sooner */
    uint64_t bytes;  /* of its sessions */
    bool bulk;
    /* By the caller, before each sched_plan. */
    uint32_t decodes;   /* sequences that can go on by a token; all of them alike */
    uint32_t rows;      /* prefill: to the end of this slice; 0: none */
    uint64_t rows_left; /* of the prefill altogether, as far as it is known */
    /* The sched's. */
    struct sched_share *share;
    enum sched_phase phase;
    bool picked;     /* for rows, in the step */
    uint64_t served; /* the last step it had rows in */
};

/* What an entry may do in this step: `decodes` of its sequences, or `rows` of its prefill. */
struct sched_pick {
    struct sched_entry *entry;
    uint32_t decodes, rows;
};

/* What steps have taken, by what was in them; 0: not seen yet. */
struct sched_speed {
    double decode[LIMITS_RUNNING + 1]; /* seconds of a step of so many sequences alone */
    double prefill[SCHED_UNITS + 1];   /* seconds that so many units of rows add */
    uint32_t units;                    /* of the last such step */
};

struct sched {
    struct sched_options options;
    struct sched_share shares[SCHED_SHARES];
    uint32_t share_count;
    struct list waiting, running;
    uint32_t waiting_count, running_count, bulk_count;
    uint64_t bytes, bulk_bytes; /* of what runs */
    double level;               /* virtual time of those who want more: where others begin */
    double bulk_credit;         /* seconds that bulk entries may take; under 0: they wait */
    struct sched_speed speed;
    /* The step that was planned. */
    struct sched_pick picks[SCHED_PICKS];
    uint32_t pick_count;
    uint32_t step_decodes, step_rows;
    double bulk_part; /* seconds of bulk for each of the others */
    uint64_t step_count;
};

void sched_init(struct sched *sched, const struct sched_options *options);

/* The share of this name, made when it is new; `weight` counts from now on, 0 for 1. */
struct sched_share *sched_share(struct sched *sched, const char *name, double weight);

/* Whether an entry of so many bytes can ever start: half of the memory may be with bulk ones. */
bool sched_can_hold(const struct sched *sched, uint64_t bytes);
/* Queues an entry, whose fields the caller has set. */
void sched_add(struct sched *sched, struct sched_entry *entry, struct sched_share *share);
/* The next entry that may start, which runs from now on; NULL: none. */
struct sched_entry *sched_start(struct sched *sched);
/* An entry at work has grown. */
void sched_resize(struct sched *sched, struct sched_entry *entry, uint64_t bytes);
/* It is over, or was taken back from the queue. */
void sched_remove(struct sched *sched, struct sched_entry *entry);

/* Chooses what goes into the next step: sched->picks. */
void sched_plan(struct sched *sched);
/* The step has taken so many seconds: learns from it, and charges the shares. */
void sched_done(struct sched *sched, double seconds);

/* Seconds that a step of these would take; 0 when nothing like it was seen. */
double sched_predict(const struct sched *sched, uint32_t decodes, uint32_t rows);

/* How many of `left` rows to take when `want` are wished for: all, or a multiple of
 * LIMITS_CUT_TOKENS, so that what is computed does not depend on where a slice was cut. May be more
 * than `want`, when less is not possible. */
uint32_t sched_cut(uint32_t want, uint32_t left);

/* ---- the gate: how much may wait ---- */

/* Used by whoever takes requests in, apart from the sched. */
struct sched_gate {
    uint64_t request_max, token_max; /* 0: no bound */
    uint64_t requests, tokens;       /* waiting */
    uint64_t running, running_max;   /* free places let in as many more */
    double start_s, start_tokens; /* measured while some wait: between two starts, tokens of one */
    double last_start;
    bool backlogged; /* some waited then */
    double promised; /* when those that were sent away will have had their turn */
    uint64_t refused_requests, refused_tokens;
};

void sched_gate_init(struct sched_gate *gate, uint64_t request_max, uint64_t token_max,
                     uint64_t running_max);
/* Lets a request of so many tokens in; false: it is refused, and `*retry_s` says in how many
 * seconds there will be room, by the rates that were measured, behind all that were told so before.
 * A request that is alone is let in whatever its size. */
bool sched_gate_enter(struct sched_gate *gate, uint64_t tokens, double now, double *retry_s);
/* One of those has started. */
void sched_gate_start(struct sched_gate *gate, uint64_t tokens, double now);
/* One has left without. */
void sched_gate_leave(struct sched_gate *gate, uint64_t tokens);
/* One that had started is over. */
void sched_gate_end(struct sched_gate *gate);

#endif
