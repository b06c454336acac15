/* prefix.h - the index of what requests without a memory have said: for the tokens of a new one,
 * the longest beginning that was kept, with a snapshot to go on from.
 * Thread: the engine's. Owns its entries and marks; the tokens themselves are in storage.
 *
 * An entry is a memory whose id begins with STORAGE_PREFIX: a conversation, or a branch of one; or
 * it is borrowed: a memory that its tenant has, of a response, which is pointed at and else left
 * alone. A mark is a place in it, found by the hash of all tokens before it, a chain that begins
 * with the key they belong to: what one key said is never found by another. There is one mark for
 * each snapshot, and one at each chunk border, which tells how far a new request goes along with an
 * old one beyond its snapshots. A hash only proposes: whoever goes on from a mark compares the
 * tokens.
 */
#ifndef SERVER_PREFIX_H
#define SERVER_PREFIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/list.h"
#include "proto/limits.h"
#include "proto/status.h"

struct prefix;

struct prefix_entry {
    struct list node; /* least recently used first */
    char id[LIMITS_ID_BYTES];
    char tenant[LIMITS_ID_BYTES];
    struct prefix_entry *parent; /* the entry it branched off from, if that is still here */
    uint32_t children;
    uint32_t users;          /* jobs that write it or are about to branch off */
    uint32_t pending;        /* commits under way */
    uint64_t begin;          /* where it branched off */
    uint64_t position, hash; /* its last snapshot, on disk or under way, and the chain up to it */
    uint64_t bytes;          /* on disk, of its own */
    bool doomed;             /* not found any more; goes when nobody uses it */
    bool borrowed;           /* it is branched off from, never written; only the entry goes */
    struct list marks;
};

/* `budget`: bytes on disk, above which the least recently used go. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status prefix_create(uint32_t chunk_tokens, uint64_t budget,
                                         struct prefix **out);
void prefix_destroy(struct prefix *prefix);

/* A new entry, used by nobody yet, the youngest: what `parent` (NULL: nothing) holds up to `begin`.
 * NULL: out of memory. */
struct prefix_entry *prefix_add(struct prefix *prefix, const char *id, const char *tenant,
                                struct prefix_entry *parent, uint64_t begin, uint64_t hash);
/* The same with a memory that is not ours. */
struct prefix_entry *prefix_borrow(struct prefix *prefix, const char *id, const char *tenant,
                                   uint64_t begin, uint64_t hash);
/* Of one that was added without. */
void prefix_set_parent(struct prefix_entry *entry, struct prefix_entry *parent);
/* The entry goes; what branched off from it stays. */
void prefix_remove(struct prefix *prefix, struct prefix_entry *entry);
/* It was of use now. So were those it branched off from. */
void prefix_touch(struct prefix *prefix, struct prefix_entry *entry);
/* The entry goes on with these tokens: marks its chunk borders and, with `snapshot`, the end. Marks
 * that find no memory are left out. */
void prefix_advance(struct prefix *prefix, struct prefix_entry *entry, const int32_t *tokens,
                    size_t count, bool snapshot);
/* Storage has dropped the entry's snapshots but those at `positions`. */
void prefix_keep(struct prefix *prefix, struct prefix_entry *entry, const uint64_t *positions,
                 size_t count);
void prefix_set_bytes(struct prefix *prefix, struct prefix_entry *entry, uint64_t bytes);

/* The chain: of no tokens, and with one more. */
uint64_t prefix_seed(const struct prefix *prefix, const char *tenant);
uint64_t prefix_chain(uint64_t hash, int32_t token);
/* Whether some entry has a snapshot at this place. */
bool prefix_has(const struct prefix *prefix, const char *tenant, uint64_t hash, uint64_t position);

struct prefix_hit {
    struct prefix_entry *entry; /* NULL: none */
    uint64_t position, hash;    /* of its snapshot */
    uint64_t border;            /* how far a mark of any kind is known: at least `position` */
};
/* The longest known beginning of the tokens. */
void prefix_find(const struct prefix *prefix, const char *tenant, const int32_t *tokens,
                 size_t count, struct prefix_hit *hit);

/* Whether the entry can be written on from `position`: no branch has to be made. */
bool prefix_is_free_end(const struct prefix_entry *entry, uint64_t position);

/* The next entry to go, which nobody uses: a doomed one; while the borrowed ones have more marks
 * than LIMITS_PREFIX_BORROWED the least recently used of them; or while all take more than the
 * budget the least recently used that nothing branched off from, or that has something to spare.
 * NULL: none. */
struct prefix_entry *prefix_victim(struct prefix *prefix);
/* The entry is not found any more, and goes when nobody uses it. */
void prefix_doom(struct prefix *prefix, struct prefix_entry *entry);
/* The oldest snapshot that the entry can give up before it goes itself, which has others, and is
 * the youngest of all or one that others branched off from: that one cannot go, and were it to keep
 * them all, those others would have to. 0: none. */
uint64_t prefix_spare(const struct prefix *prefix, const struct prefix_entry *entry);
/* There is no room on the disk: half of what is kept goes. */
void prefix_shrink(struct prefix *prefix);

uint64_t prefix_bytes(const struct prefix *prefix);
uint64_t prefix_entries(const struct prefix *prefix);

#endif
