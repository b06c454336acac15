#include "storage/writer.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"
#include "proto/base/list.h"
#include "proto/base/log.h"
#include "storage/branch.h"
#include "storage/keep.h"
#include "storage/memory.h"
#include "storage/quota.h"
#include "storage/receipt.h"

/* One transaction's share of the queue: enough that its fsync is cheap by the byte, little enough
 * that an acknowledgement does not wait long and the dirty pages fit in memory. */
#define GROUP_BYTES (64 * LIMITS_MIB)
#define GROUP_ITEMS 4096
/* Appends alone wait for company, so many and storage->linger_ns: nobody hears of a turn before its
 * commit, and a chunk by itself would cost a sync and half a page for each of its tables. */
#define LINGER_BYTES (4 * LIMITS_MIB)
/* Records freed in one transaction, and groups between two steps while writes are waiting. */
#define COLLECT_RECORDS 64
#define COLLECT_EVERY 8
#define HISTOGRAM_FIRST_NS 64000u

enum item_kind {
    ITEM_CREATE,
    ITEM_UPDATE,
    ITEM_DELETE,
    ITEM_EXPIRE,
    ITEM_APPEND,
    ITEM_COMMIT,
    ITEM_TRUNCATE,
    ITEM_SETTLE,
    ITEM_REPLACE,
    ITEM_BOOKMARK,
    ITEM_DELETE_TURN,
    ITEM_TURNS,
    ITEM_PUT,
    ITEM_DELETE_OBJECT,
    ITEM_DELETE_OBJECT_AND_MEMORY
};

struct item {
    struct list node;
    enum item_kind kind;
    enum status status;
    bool taken; /* append: already part of the transaction */
    storage_done_cb done_cb;
    void *context;
    size_t bytes;           /* what it counts for in the queue */
    uint64_t branch, index; /* append; commit: the branch once it is known */
    const void *kv, *landmark;
    char id[LIMITS_ID_BYTES];
    char from[LIMITS_ID_BYTES];   /* create: "" for none; settle, replace: the ephemeral memory */
    char tenant[LIMITS_ID_BYTES]; /* create */
    uint64_t at; /* create; bookmark, delete turn: the turn's position; replace: where the list is cut;
                    turns: how many in `payload` */
    char bookmark[LIMITS_BOOKMARK_BYTES];
    bool ephemeral;
    size_t keep_at, keep_size;      /* commit, put: in `payload` */
    bool has_metadata, has_expires; /* update */
    struct storage_expires expires; /* create, update */
    size_t metadata_size;           /* create, update: in `payload` */
    struct storage_commit commit;
    void *snapshot; /* of a commit that took it; freed with the item */
    bool has_receipt;
    struct storage_receipt receipt; /* its bytes are in `payload` */
    unsigned char payload[];
};

struct failed_branch {
    uint64_t branch;
    enum status status; /* what all of it gets from then on */
};
struct branch_set {
    struct failed_branch *branches;
    size_t count, capacity;
};

struct writer {
    struct storage *storage;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    /* under the mutex */
    struct list queue;
    size_t queue_bytes, queue_items;
    size_t urgent;     /* of the queue: items that are no appends */
    uint64_t since_ns; /* when the first of the queue came */
    bool closing;
    struct storage_stats stats; /* the writer's part of it */
    /* the writer thread's own */
    struct branch_set failed;          /* branches that wait for a truncate */
    struct item *appends[GROUP_ITEMS]; /* of the transaction, not yet written */
    const void *kvs[GROUP_ITEMS], *landmarks[GROUP_ITEMS];
    struct item *batch[GROUP_ITEMS];
    size_t append_count;
    uint64_t chunks_in_group;
    unsigned groups_since_collect;
    bool collect;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- branches that failed ---- */

static enum status set_get(const struct branch_set *set, uint64_t branch)
{
    for (size_t i = 0; i < set->count; i++)
        if (set->branches[i].branch == branch)
            return set->branches[i].status;
    return STATUS_OK;
}

/* A full disk or quota is told as such to what follows; anything else is a failure of the branch.
 */
static void set_add(struct branch_set *set, uint64_t branch, enum status status)
{
    if (branch == 0 || set_get(set, branch))
        return;
    if (set->count == set->capacity) {
        set->capacity = set->capacity ? 2 * set->capacity : 16;
        set->branches = realloc(set->branches, set->capacity * sizeof *set->branches);
        ASSERT(set->branches);
    }
    const bool told =
        status == STATUS_DISK_FULL || status == STATUS_MEMORY_QUOTA || status == STATUS_KEY_QUOTA;
    set->branches[set->count++] = (struct failed_branch){branch, told ? status : STATUS_IO};
}

static void set_remove(struct branch_set *set, uint64_t branch)
{
    for (size_t i = 0; i < set->count; i++)
        if (set->branches[i].branch == branch)
            set->branches[i--] = set->branches[--set->count];
}

static struct branch_set set_copy(const struct branch_set *set)
{
    struct branch_set copy = {0};
    for (size_t i = 0; i < set->count; i++)
        set_add(&copy, set->branches[i].branch, set->branches[i].status);
    return copy;
}

/* ---- carrying out ---- */

/* Writes the waiting appends of one branch, `count` of them in `batch`, as one run where it can. */
static enum status write_branch(struct writer *writer, struct store_write *write, uint64_t branch,
                                size_t count)
{
    struct record_branch record;
    size_t good = 0;
    enum status status = set_get(&writer->failed, branch), rest = STATUS_INVALID;
    if (!status)
        status = branch_get(write->storage, write->txn, branch, &record);
    if (!status && !record.owner[0])
        status = STATUS_NOT_FOUND;
    if (!status)
        status = quota_check(write, &record,
                             count * (write->storage->kv_bytes + write->storage->landmark_bytes));
    if (status) {
        /* An unknown branch has no truncate to wait for. */
        if (status != STATUS_NOT_FOUND)
            set_add(&writer->failed, branch, status);
        for (size_t i = 0; i < count; i++)
            writer->batch[i]->status = status;
        return STATUS_OK;
    }
    while (good < count && writer->batch[good]->index == record.chunk_end + good) {
        writer->kvs[good] = writer->batch[good]->kv;
        writer->landmarks[good] = writer->batch[good]->landmark;
        writer->batch[good++]->status = STATUS_OK;
    }
    for (size_t i = good; i < count; i++) {
        writer->batch[i]->status = rest;
        rest = STATUS_IO;
        set_add(&writer->failed, branch, STATUS_IO);
    }
    writer->chunks_in_group += good;
    return good ? branch_append_chunks(write, branch, &record, writer->kvs, writer->landmarks, good)
                : STATUS_OK;
}

/* Writes the appends that wait, branch by branch: those of one branch keep their order, and
 * between branches order does not matter. */
static enum status write_appends(struct writer *writer, struct store_write *write)
{
    enum status status = STATUS_OK;
    for (size_t i = 0; !status && i < writer->append_count; i++) {
        uint64_t branch = writer->appends[i]->branch;
        size_t count = 0;
        if (writer->appends[i]->taken)
            continue;
        for (size_t j = i; j < writer->append_count; j++) {
            if (writer->appends[j]->branch != branch)
                continue;
            writer->appends[j]->taken = true;
            writer->batch[count++] = writer->appends[j];
        }
        status = write_branch(writer, write, branch, count);
    }
    writer->append_count = 0;
    return status;
}

static enum status carry_out_commit(struct writer *writer, struct store_write *write,
                                    struct item *item)
{
    struct record_memory memory;
    enum status status = memory_get(write->storage, write->txn, item->id, &memory);
    if (status)
        return status;
    item->branch = memory.branch;
    status = set_get(&writer->failed, memory.branch);
    if (status)
        return status;
    status = memory_commit(write, &item->commit);
    if (!status && item->has_receipt)
        status = receipt_put(write, &item->receipt);
    if (!status)
        status = keep_put(write, item->payload + item->keep_at, item->keep_size, memory.branch,
                          item->commit.position);
    if (status)
        set_add(&writer->failed, memory.branch, status);
    return status;
}

/* What the list of the memory that was settled says of its new past. */
static enum status replace_list(struct store_write *write, const struct item *item)
{
    struct record_memory memory;
    enum status status = keep_cut(write, item->id, item->at);
    if (!status)
        status = memory_get(write->storage, write->txn, item->id, &memory);
    return status ? status
                  : keep_put(write, item->payload + item->keep_at, item->keep_size, memory.branch,
                             memory.position);
}

static enum status carry_out(struct writer *writer, struct store_write *write, struct item *item)
{
    const char *metadata = (const char *)item->payload;
    const struct storage_memory_options options = {.id = item->id,
                                                   .from = item->from[0] ? item->from : NULL,
                                                   .at = item->at,
                                                   .tenant = item->tenant,
                                                   .expires = item->expires,
                                                   .ephemeral = item->ephemeral};
    struct record_memory memory;
    enum status status;
    switch (item->kind) {
    case ITEM_CREATE:
        status = memory_create(write, &options, metadata, item->metadata_size);
        return status || !item->has_receipt ? status : receipt_put(write, &item->receipt);
    case ITEM_UPDATE:
        return memory_update(write, item->id, item->has_metadata ? metadata : NULL,
                             item->metadata_size, item->has_expires ? &item->expires : NULL);
    case ITEM_COMMIT:
        return carry_out_commit(writer, write, item);
    case ITEM_DELETE:
    case ITEM_EXPIRE:
    case ITEM_TRUNCATE:
        status = memory_get(write->storage, write->txn, item->id, &memory);
        if (!status)
            status = item->kind == ITEM_DELETE   ? memory_delete(write, item->id)
                     : item->kind == ITEM_EXPIRE ? memory_expire(write, item->id)
                                                 : memory_truncate(write, item->id);
        if (!status)
            set_remove(&writer->failed, memory.branch);
        return status;
    case ITEM_SETTLE:
        return memory_settle(write, item->from, item->id, false);
    case ITEM_REPLACE:
        status = memory_get(write->storage, write->txn, item->id, &memory);
        if (!status)
            status = memory_settle(write, item->from, item->id, true);
        if (!status && item->keep_size)
            status = replace_list(write, item);
        if (!status)
            set_remove(&writer->failed, memory.branch);
        return status;
    case ITEM_BOOKMARK:
        return memory_bookmark(write, item->id, item->at, item->bookmark);
    case ITEM_DELETE_TURN:
        return memory_delete_turn(write, item->id, item->at);
    case ITEM_TURNS:
        return memory_put_turns(write, item->id, (const void *)item->payload, (size_t)item->at);
    case ITEM_PUT:
        return keep_put(write, item->payload + item->keep_at, item->keep_size, 0, 0);
    case ITEM_DELETE_OBJECT:
    case ITEM_DELETE_OBJECT_AND_MEMORY:
        return keep_delete_object(write, item->id, item->kind == ITEM_DELETE_OBJECT_AND_MEMORY);
    case ITEM_APPEND:
        break;
    }
    ASSERT(false);
    return STATUS_INTERNAL;
}

/* Carries out `items` in one transaction. Not STATUS_OK: nothing of it happened, and the items'
 * own statuses mean nothing. */
static enum status attempt(struct writer *writer, struct list *items)
{
    struct store_write write;
    writer->append_count = 0;
    writer->chunks_in_group = 0;
    enum status status = store_write_begin(writer->storage, &write);
    if (status)
        return status;
    LIST_EACH(node, items)
    {
        struct item *item = LIST_ENTRY(node, struct item, node);
        item->status = STATUS_OK;
        item->taken = false;
        if (item->kind == ITEM_APPEND) {
            writer->appends[writer->append_count++] = item;
            continue;
        }
        status = write_appends(writer, &write);
        uint64_t mutations = write.mutations;
        if (!status)
            item->status = carry_out(writer, &write, item);
        /* A refusal that wrote nothing concerns its item alone. */
        if (!status && item->status && write.mutations != mutations)
            status = item->status;
        if (status)
            break;
    }
    if (!status)
        status = write_appends(writer, &write);
    if (status || write.mutations == 0) {
        store_write_abort(&write);
        return status;
    }
    return store_write_commit(&write);
}

/* ---- collection ---- */

/* One bounded step. Sets writer->collect to whether there is more to do. */
static enum status collect_step(struct writer *writer)
{
    struct store_write write;
    bool more = false;
    writer->groups_since_collect = 0;
    enum status status = store_write_begin(writer->storage, &write);
    if (!status) {
        status = branch_collect(&write, COLLECT_RECORDS, &more);
        if (status || write.mutations == 0)
            store_write_abort(&write);
        else
            status = store_write_commit(&write);
    }
    if (status == STATUS_DISK_FULL && !writer->storage->reserve_released) {
        store_reserve_release(writer->storage);
        writer->collect = true;
        return STATUS_OK;
    }
    if (status)
        log_event(LOG_ERROR, "storage_collect", "error", LOG_STR, status_text(status), NULL);
    writer->collect = !status && more; /* after a failure the next delete or opening tries again */
    if (!writer->collect && !status)
        store_reserve_restore(writer->storage);
    return status;
}

/* Frees all that can be freed. LMDB hands pages out again only in the second transaction after the
 * one that freed them, so an empty one follows. */
static void collect_all(struct writer *writer)
{
    struct record_counter counter;
    struct store_write write;
    while (writer->collect && collect_step(writer) == STATUS_OK)
        ;
    if (store_write_begin(writer->storage, &write))
        return;
    enum status status = store_get_counter(write.storage, write.txn, &counter);
    if (!status)
        status = store_put_counter(&write, &counter);
    if (!status)
        status = store_write_commit(&write);
    else
        store_write_abort(&write);
}

/* ---- groups ---- */

/* Whether it makes room, so that the reserve is there for it. */
static bool item_frees(const struct item *item)
{
    return item->kind == ITEM_DELETE || item->kind == ITEM_EXPIRE || item->kind == ITEM_TRUNCATE ||
           item->kind == ITEM_REPLACE || item->kind == ITEM_DELETE_TURN ||
           item->kind == ITEM_DELETE_OBJECT || item->kind == ITEM_DELETE_OBJECT_AND_MEMORY;
}

/* One item in a transaction of its own, after the group with it in had failed. */
static void retry_alone(struct writer *writer, struct item *item)
{
    struct list alone;
    list_init(&alone);
    list_push_back(&alone, &item->node);
    bool frees = item_frees(item);
    enum status status =
        item->kind == ITEM_APPEND ? set_get(&writer->failed, item->branch) : STATUS_OK;
    const bool doomed = status != STATUS_OK;
    if (!doomed)
        status = attempt(writer, &alone);
    if (status == STATUS_DISK_FULL && !doomed && (frees || writer->collect)) {
        if (frees)
            store_reserve_release(writer->storage);
        else
            collect_all(writer);
        status = attempt(writer, &alone);
    }
    if (!status && frees)
        writer->collect = true; /* room for the items that follow */
    if (status) {
        item->status = status;
        writer->chunks_in_group = 0;
        if (item->kind == ITEM_APPEND || item->kind == ITEM_COMMIT)
            set_add(&writer->failed, item->branch, status);
    }
    list_remove(&item->node);
}

static void count_group(struct writer *writer, uint64_t began_ns, uint64_t chunks)
{
    uint64_t took = now_ns() - began_ns;
    size_t bucket = 0, last = sizeof writer->stats.commit_ns_histogram / sizeof(uint64_t) - 1;
    while (bucket < last && took >= (uint64_t)HISTOGRAM_FIRST_NS << bucket)
        bucket++;
    pthread_mutex_lock(&writer->mutex);
    writer->stats.commits++;
    writer->stats.commit_ns += took;
    writer->stats.commit_ns_histogram[bucket]++;
    writer->stats.chunks_written += chunks;
    pthread_mutex_unlock(&writer->mutex);
}

/* Carries out a group, each item answered in the order of the queue. */
static void carry_out_group(struct writer *writer, struct list *group)
{
    uint64_t began_ns = now_ns(), chunks = 0;
    /* What a failed attempt thought of a branch must not outlive it. */
    struct branch_set failed = set_copy(&writer->failed);
    if (attempt(writer, group) == STATUS_OK) {
        chunks = writer->chunks_in_group;
        free(failed.branches);
    } else {
        struct list done;
        free(writer->failed.branches);
        writer->failed = failed;
        list_init(&done);
        LIST_EACH_SAFE(node, group)
        {
            struct item *item = LIST_ENTRY(node, struct item, node);
            list_remove(node);
            retry_alone(writer, item);
            chunks += writer->chunks_in_group;
            list_push_back(&done, &item->node);
        }
        LIST_EACH_SAFE(node, &done)
        {
            list_remove(node);
            list_push_back(group, node);
        }
    }
    count_group(writer, began_ns, chunks);
    size_t bytes = 0, items = 0;
    LIST_EACH(node, group)
    {
        struct item *item = LIST_ENTRY(node, struct item, node);
        bytes += item->bytes;
        items++;
        if (item_frees(item))
            writer->collect = true; /* the reserve may have been borrowed */
    }
    /* The room is there before its owners hear of it. */
    pthread_mutex_lock(&writer->mutex);
    writer->queue_bytes -= bytes;
    writer->queue_items -= items;
    pthread_mutex_unlock(&writer->mutex);
    LIST_EACH_SAFE(node, group)
    {
        struct item *item = LIST_ENTRY(node, struct item, node);
        if (item->done_cb)
            item->done_cb(item->context, item->status);
        free(item->snapshot);
        free(item);
    }
    list_init(group);
}

/* Whether what is queued is worth a commit already. Under the mutex. */
static bool is_due(const struct writer *writer, uint64_t *until_ns)
{
    *until_ns = writer->since_ns + writer->storage->linger_ns;
    return writer->urgent || writer->closing || writer->queue_bytes >= LINGER_BYTES ||
           now_ns() >= *until_ns;
}

static void wait_until(struct writer *writer, uint64_t ns)
{
    struct timespec until = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    pthread_cond_timedwait(&writer->wake, &writer->mutex, &until);
}

/* Waits for work. Fills `group`, or leaves it empty when it is time to collect. False: the end. */
static bool next_group(struct writer *writer, struct list *group)
{
    bool alive = true;
    size_t bytes = 0, items = 0;
    list_init(group);
    pthread_mutex_lock(&writer->mutex);
    uint64_t until_ns;
    while (list_empty(&writer->queue) && !writer->closing && !writer->collect)
        pthread_cond_wait(&writer->wake, &writer->mutex);
    while (!list_empty(&writer->queue) && !is_due(writer, &until_ns))
        wait_until(writer, until_ns);
    if (list_empty(&writer->queue) && writer->closing)
        alive = false;
    while (!list_empty(&writer->queue) && items < GROUP_ITEMS) {
        struct item *item = LIST_ENTRY(writer->queue.next, struct item, node);
        if (items > 0 && bytes + item->bytes > GROUP_BYTES)
            break;
        bytes += item->bytes;
        items++;
        writer->urgent -= item->kind != ITEM_APPEND;
        list_remove(&item->node);
        list_push_back(group, &item->node);
    }
    pthread_mutex_unlock(&writer->mutex);
    return alive;
}

static void *run(void *context)
{
    struct storage *storage = context;
    struct writer *writer = storage->writer;
    struct list group;
    /* The creator publishes thread and writer before it lets go of the mutex. */
    pthread_mutex_lock(&writer->mutex);
    pthread_mutex_unlock(&writer->mutex);
    store_assert_writer(storage);
    while (next_group(writer, &group)) {
        bool idle = list_empty(&group);
        if (!idle)
            carry_out_group(writer, &group);
        if (writer->collect && (idle || ++writer->groups_since_collect >= COLLECT_EVERY))
            (void)!collect_step(writer); /* logged there; nobody waits for it */
    }
    return NULL;
}

/* ---- life ---- */

enum status writer_start(struct storage *storage, struct error *err)
{
    sigset_t all, before;
    struct writer *writer = calloc(1, sizeof *writer);
    if (!writer)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    writer->storage = storage;
    writer->collect = true; /* what the last run left over */
    list_init(&writer->queue);
    pthread_mutex_init(&writer->mutex, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&writer->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    storage->writer = writer;
    /* Signals are the main thread's business, but for that of a page which it cannot read itself.
     */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&writer->mutex);
    int rc = pthread_create(&writer->thread, NULL, run, storage);
    if (!rc)
        storage->writer_thread = writer->thread;
    pthread_mutex_unlock(&writer->mutex);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!rc)
        return STATUS_OK;
    pthread_cond_destroy(&writer->wake);
    pthread_mutex_destroy(&writer->mutex);
    free(writer);
    storage->writer = NULL;
    return error_set(err, STATUS_NO_MEMORY, "cannot start the writer thread: %s", strerror(rc));
}

void writer_stop(struct storage *storage)
{
    struct writer *writer = storage->writer;
    pthread_mutex_lock(&writer->mutex);
    writer->closing = true;
    pthread_cond_signal(&writer->wake);
    pthread_mutex_unlock(&writer->mutex);
    pthread_join(writer->thread, NULL);
    pthread_cond_destroy(&writer->wake);
    pthread_mutex_destroy(&writer->mutex);
    free(writer->failed.branches);
    free(writer);
    storage->writer = NULL;
}

void writer_get_stats(const struct storage *storage, struct storage_stats *stats)
{
    struct writer *writer = storage->writer;
    pthread_mutex_lock(&writer->mutex);
    stats->queue_bytes = writer->queue_bytes;
    stats->queue_items = writer->queue_items;
    stats->commits = writer->stats.commits;
    stats->chunks_written = writer->stats.chunks_written;
    stats->commit_ns = writer->stats.commit_ns;
    memcpy(stats->commit_ns_histogram, writer->stats.commit_ns_histogram,
           sizeof stats->commit_ns_histogram);
    pthread_mutex_unlock(&writer->mutex);
}

/* ---- queueing ---- */

static struct item *new_item(enum item_kind kind, size_t payload_bytes, storage_done_cb done_cb,
                             void *context)
{
    struct item *item = malloc(sizeof *item + payload_bytes);
    if (!item)
        return NULL;
    memset(item, 0, sizeof *item);
    list_init(&item->node);
    item->kind = kind;
    item->bytes = sizeof *item + payload_bytes;
    item->done_cb = done_cb;
    item->context = context;
    return item;
}

/* The same with `keep` (NULL: nothing) packed behind `before` bytes of payload. */
static struct item *new_keep_item(enum item_kind kind, size_t before,
                                  const struct storage_keep *keep, storage_done_cb done_cb,
                                  void *context)
{
    struct buf packed;
    buf_init(&packed);
    if (keep)
        keep_pack(keep, &packed);
    struct item *item = new_item(kind, before + packed.size, done_cb, context);
    if (item) {
        item->keep_at = before;
        item->keep_size = packed.size;
        if (packed.size)
            memcpy(item->payload + before, packed.data, packed.size);
    }
    buf_close(&packed);
    return item;
}

/* Takes the item on success and frees it otherwise. What was promised a place has one, as has a delete
 * that nobody waits for, and so would not ask for again: there are no more of them than ephemeral
 * memories. */
static enum status enqueue_promised(struct storage *storage, struct item *item, bool is_promised)
{
    struct writer *writer = storage->writer;
    enum status status = STATUS_OK;
    pthread_mutex_lock(&writer->mutex);
    if (writer->closing) {
        status = STATUS_CLOSED;
    } else if (!is_promised && (item->kind != ITEM_DELETE || item->done_cb) &&
               (writer->queue_items >= LIMITS_WRITER_QUEUE_ITEMS ||
                (writer->queue_items > 0 &&
                 writer->queue_bytes + item->bytes > storage->queue_bytes))) {
        status = STATUS_BUSY;
    } else {
        if (list_empty(&writer->queue))
            writer->since_ns = now_ns();
        writer->queue_bytes += item->bytes;
        writer->queue_items++;
        writer->urgent += item->kind != ITEM_APPEND;
        list_push_back(&writer->queue, &item->node);
        pthread_cond_signal(&writer->wake);
    }
    pthread_mutex_unlock(&writer->mutex);
    if (status)
        free(item);
    return status;
}

static enum status enqueue(struct storage *storage, struct item *item)
{
    return enqueue_promised(storage, item, false);
}

static enum status set_id(char out[LIMITS_ID_BYTES], const char *id)
{
    size_t size = id ? strnlen(id, LIMITS_ID_BYTES) : 0;
    if (size == 0 || size >= LIMITS_ID_BYTES)
        return STATUS_INVALID;
    memcpy(out, id, size + 1);
    return STATUS_OK;
}

/* Copies it to where it belongs in the payload. */
static void set_receipt(struct item *item, const struct storage_receipt *receipt, size_t at)
{
    item->has_receipt = receipt != NULL;
    if (!receipt)
        return;
    item->receipt = *receipt;
    item->receipt.bytes = item->payload + at;
    if (receipt->size)
        memcpy(item->payload + at, receipt->bytes, receipt->size);
}

static enum status queue_metadata(struct storage *storage, enum item_kind kind,
                                  const struct storage_memory_options *options,
                                  const struct storage_expires *expires, storage_done_cb done_cb,
                                  void *context)
{
    const char *metadata = options->metadata ? options->metadata : "{}";
    size_t size = strlen(metadata);
    if (!storage->writer)
        return STATUS_CLOSED;
    if (size > RECORD_METADATA_BYTES)
        return STATUS_TOO_LARGE;
    const size_t receipt_bytes = options->receipt ? options->receipt->size : 0;
    struct item *item = new_item(kind, size + receipt_bytes, done_cb, context);
    if (!item)
        return STATUS_NO_MEMORY;
    item->ephemeral = options->ephemeral;
    item->at = options->at;
    item->has_metadata = options->metadata != NULL;
    item->has_expires = expires != NULL;
    item->expires = expires ? *expires : options->expires;
    item->metadata_size = size;
    memcpy(item->payload, metadata, size);
    set_receipt(item, options->receipt, size);
    if (set_id(item->id, options->id) || (options->from && set_id(item->from, options->from)) ||
        (options->tenant && options->tenant[0] && set_id(item->tenant, options->tenant))) {
        free(item);
        return STATUS_INVALID;
    }
    return enqueue(storage, item);
}

enum status storage_memory_create(struct storage *storage,
                                  const struct storage_memory_options *options,
                                  storage_done_cb done_cb, void *context)
{
    return queue_metadata(storage, ITEM_CREATE, options, NULL, done_cb, context);
}

enum status storage_memory_update(struct storage *storage, const char *id, const char *metadata,
                                  const struct storage_expires *expires, storage_done_cb done_cb,
                                  void *context)
{
    struct storage_memory_options options = {.id = id, .metadata = metadata};
    return queue_metadata(storage, ITEM_UPDATE, &options, expires, done_cb, context);
}

/* `from`: NULL for none. Frees the item when it is not taken. */
static enum status queue_named(struct storage *storage, struct item *item, const char *id,
                               const char *from)
{
    if (!item)
        return STATUS_NO_MEMORY;
    if (set_id(item->id, id) ||
        (from && (set_id(item->from, from) || strcmp(item->id, item->from) == 0))) {
        free(item);
        return STATUS_INVALID;
    }
    return enqueue(storage, item);
}

static enum status queue_id(struct storage *storage, enum item_kind kind, const char *id,
                            const char *from, storage_done_cb done_cb, void *context)
{
    if (!storage->writer)
        return STATUS_CLOSED;
    return queue_named(storage, new_item(kind, 0, done_cb, context), id, from);
}

enum status storage_memory_delete(struct storage *storage, const char *id, storage_done_cb done_cb,
                                  void *context)
{
    return queue_id(storage, ITEM_DELETE, id, NULL, done_cb, context);
}

enum status storage_memory_expire(struct storage *storage, const char *id, storage_done_cb done_cb,
                                  void *context)
{
    return queue_id(storage, ITEM_EXPIRE, id, NULL, done_cb, context);
}

enum status storage_truncate(struct storage *storage, const char *id, storage_done_cb done_cb,
                             void *context)
{
    return queue_id(storage, ITEM_TRUNCATE, id, NULL, done_cb, context);
}

enum status storage_memory_settle(struct storage *storage, const char *ephemeral, const char *id,
                                  storage_done_cb done_cb, void *context)
{
    return queue_id(storage, ITEM_SETTLE, id, ephemeral, done_cb, context);
}

enum status storage_memory_replace(struct storage *storage, const char *ephemeral, const char *id,
                                   uint64_t position, const struct storage_keep *keep,
                                   storage_done_cb done_cb, void *context)
{
    if (!storage->writer)
        return STATUS_CLOSED;
    struct item *item = new_keep_item(ITEM_REPLACE, 0, keep, done_cb, context);
    if (item)
        item->at = position;
    return queue_named(storage, item, id, ephemeral);
}

static enum status queue_turn(struct storage *storage, enum item_kind kind, const char *id,
                              uint64_t position, const char *bookmark, storage_done_cb done_cb,
                              void *context)
{
    size_t size = bookmark ? strnlen(bookmark, LIMITS_BOOKMARK_BYTES) : 0;
    if (!storage->writer)
        return STATUS_CLOSED;
    if (size == LIMITS_BOOKMARK_BYTES)
        return STATUS_INVALID;
    struct item *item = new_item(kind, 0, done_cb, context);
    if (!item)
        return STATUS_NO_MEMORY;
    item->at = position;
    if (size)
        memcpy(item->bookmark, bookmark, size);
    if (set_id(item->id, id)) {
        free(item);
        return STATUS_INVALID;
    }
    return enqueue(storage, item);
}

enum status storage_turn_bookmark(struct storage *storage, const char *id, uint64_t position,
                                  const char *bookmark, storage_done_cb done_cb, void *context)
{
    return queue_turn(storage, ITEM_BOOKMARK, id, position, bookmark, done_cb, context);
}

enum status storage_turn_delete(struct storage *storage, const char *id, uint64_t position,
                                storage_done_cb done_cb, void *context)
{
    return queue_turn(storage, ITEM_DELETE_TURN, id, position, NULL, done_cb, context);
}

enum status storage_put(struct storage *storage, const struct storage_keep *keep,
                        storage_done_cb done_cb, void *context)
{
    if (!storage->writer)
        return STATUS_CLOSED;
    struct item *item = new_keep_item(ITEM_PUT, 0, keep, done_cb, context);
    return item ? enqueue(storage, item) : STATUS_NO_MEMORY;
}

enum status storage_object_delete(struct storage *storage, const char *id, bool with_memory,
                                  storage_done_cb done_cb, void *context)
{
    return queue_id(storage, with_memory ? ITEM_DELETE_OBJECT_AND_MEMORY : ITEM_DELETE_OBJECT, id,
                    NULL, done_cb, context);
}

enum status writer_put_turns(struct storage *storage, const char *id,
                             const struct storage_turn *turns, size_t count,
                             storage_done_cb done_cb, void *context)
{
    struct item *item = new_item(ITEM_TURNS, count * sizeof *turns, done_cb, context);
    if (!item)
        return STATUS_NO_MEMORY;
    item->at = count;
    memcpy(item->payload, turns, count * sizeof *turns);
    if (set_id(item->id, id)) {
        free(item);
        return STATUS_INVALID;
    }
    return enqueue(storage, item);
}

static enum status append(struct storage *storage, uint64_t branch, uint64_t index, const void *kv,
                          const void *landmark, bool is_promised, storage_done_cb done_cb,
                          void *context)
{
    if (!storage->writer)
        return STATUS_CLOSED;
    struct item *item =
        new_item(ITEM_APPEND, storage->kv_bytes + storage->landmark_bytes, done_cb, context);
    if (!item)
        return STATUS_NO_MEMORY;
    item->branch = branch;
    item->index = index;
    item->kv = memcpy(item->payload, kv, storage->kv_bytes);
    item->landmark = memcpy(item->payload + storage->kv_bytes, landmark, storage->landmark_bytes);
    return enqueue_promised(storage, item, is_promised);
}

enum status storage_append(struct storage *storage, uint64_t branch, uint64_t index, const void *kv,
                           const void *landmark, storage_done_cb done_cb, void *context)
{
    return append(storage, branch, index, kv, landmark, false, done_cb, context);
}

enum status storage_append_promised(struct storage *storage, uint64_t branch, uint64_t index,
                                    const void *kv, const void *landmark, storage_done_cb done_cb,
                                    void *context)
{
    return append(storage, branch, index, kv, landmark, true, done_cb, context);
}

size_t storage_append_room(struct storage *storage)
{
    struct writer *writer = storage->writer;
    size_t each = sizeof(struct item) + storage->kv_bytes + storage->landmark_bytes;
    if (!writer)
        return 0;
    pthread_mutex_lock(&writer->mutex);
    size_t free_bytes =
        writer->queue_bytes < storage->queue_bytes ? storage->queue_bytes - writer->queue_bytes : 0;
    size_t free_items = writer->queue_items < LIMITS_WRITER_QUEUE_ITEMS
                            ? LIMITS_WRITER_QUEUE_ITEMS - writer->queue_items
                            : 0;
    size_t room = free_bytes / each < free_items ? free_bytes / each : free_items;
    if (room == 0 && writer->queue_items == 0)
        room = 1;
    if (writer->closing)
        room = 0;
    pthread_mutex_unlock(&writer->mutex);
    return room;
}

enum status storage_commit(struct storage *storage, const struct storage_commit *commit,
                           storage_done_cb done_cb, void *context)
{
    if (!storage->writer)
        return STATUS_CLOSED;
    if (!commit->snapshot || commit->snapshot_bytes == 0 ||
        (commit->token_count && !commit->tokens) || commit->token_count > commit->position)
        return STATUS_INVALID;
    size_t token_bytes = commit->token_count * sizeof *commit->tokens;
    const size_t copied_bytes = commit->takes_snapshot ? 0 : commit->snapshot_bytes;
    const size_t receipt_bytes = commit->receipt ? commit->receipt->size : 0;
    const size_t keep_at = token_bytes + copied_bytes + receipt_bytes;
    struct item *item = new_keep_item(ITEM_COMMIT, keep_at, commit->keep, done_cb, context);
    if (!item)
        return STATUS_NO_MEMORY;
    if (set_id(item->id, commit->id)) {
        free(item);
        return STATUS_INVALID;
    }
    item->commit = *commit;
    item->commit.id = item->id;
    item->commit.keep = NULL; /* packed behind the rest */
    if (token_bytes)
        memcpy(item->payload, commit->tokens, token_bytes);
    item->commit.tokens = (const int32_t *)(const void *)item->payload;
    if (commit->takes_snapshot) {
        item->snapshot = (void *)(uintptr_t)commit->snapshot;
        item->bytes += commit->snapshot_bytes;
    } else {
        memcpy(item->payload + token_bytes, commit->snapshot, commit->snapshot_bytes);
        item->commit.snapshot = item->payload + token_bytes;
    }
    set_receipt(item, commit->receipt, token_bytes + copied_bytes);
    return enqueue(storage, item);
}
