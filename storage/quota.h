/* quota.h - how much disk each tenant's memories, branches, objects and items take, and may take.
 * Thread: what counts and checks on the writer thread, inside its transaction; the rest on any.
 * Owns a table in RAM, taken from the records at opening. Private to storage/.
 *
 * A branch counts for the tenant whose memory made it, from its first byte until its last one is
 * collected: also while only forks of others reach it. A memory's record, with its metadata, and an
 * object count for their tenant, an item for that of the object or memory whose list it is in. */
#ifndef STORAGE_QUOTA_H
#define STORAGE_QUOTA_H

#include "storage/record.h"
#include "storage/storage.h"

struct quota;
struct store_write;

/* Counts what is there. STATUS_NO_MEMORY, STATUS_IO. */
STATUS_CHECKED enum status quota_open(struct storage *storage, struct quota **out);
void quota_close(struct quota *quota);

/* For whom the space of a memory's branch counts: what is kept of requests without a memory has a
 * bound of its own, and counts for nobody. */
const char *quota_tenant(const char *id, const char *tenant);
/* The branch's record becomes `record`; either may be NULL: it was not, or is no longer. Counts
 * once the transaction is committed. */
void quota_count(struct store_write *write, const struct record_branch *old,
                 const struct record_branch *record);
/* The same for anything else that takes disk space: so many bytes more, or less. */
void quota_count_bytes(struct store_write *write, const char *tenant, int64_t bytes);
/* Whether it may. STATUS_KEY_QUOTA. */
STATUS_CHECKED enum status quota_check_bytes(struct store_write *write, const char *tenant,
                                             uint64_t more);
/* The transaction has ended: what it counted holds, or does not. */
void quota_end(struct storage *storage, bool committed);
/* Whether the branch, with the items in its memory's list, may take so much more.
 * STATUS_MEMORY_QUOTA, STATUS_KEY_QUOTA. */
STATUS_CHECKED enum status quota_check(struct store_write *write,
                                       const struct record_branch *record, uint64_t more);

#endif
