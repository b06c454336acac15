/* prefix.c - see prefix.h. */
#include "server/prefix.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/base/assert.h"
#include "proto/base/hash.h"

struct mark {
    struct mark *next; /* in its bucket */
    struct list node;  /* in its entry */
    struct prefix_entry *entry;
    uint64_t hash, position;
    bool snapshot;
};

struct prefix {
    uint32_t chunk_tokens;
    uint64_t budget, allowed; /* what was asked for; what there is room for */
    uint64_t bytes, entry_count, doomed_count;
    uint64_t secret; /* so that nobody can make chains that collide */
    struct list entries;
    struct mark **buckets;                           /* a power of two of them */
    size_t bucket_count, mark_count, borrowed_count; /* the last: of marks, too */
};

enum status prefix_create(uint32_t chunk_tokens, uint64_t budget, struct prefix **out)
{
    struct prefix *prefix = calloc(1, sizeof *prefix);
    struct mark **buckets = calloc(1024, sizeof *buckets);
    if (!prefix || !buckets) {
        free(prefix);
        free(buckets);
        return STATUS_NO_MEMORY;
    }
    *prefix = (struct prefix){.chunk_tokens = chunk_tokens,
                              .budget = budget,
                              .allowed = budget,
                              .buckets = buckets,
                              .bucket_count = 1024};
    ASSERT(getrandom(&prefix->secret, sizeof prefix->secret, 0) == sizeof prefix->secret);
    list_init(&prefix->entries);
    *out = prefix;
    return STATUS_OK;
}

void prefix_destroy(struct prefix *prefix)
{
    while (!list_empty(&prefix->entries))
        prefix_remove(prefix, LIST_ENTRY(prefix->entries.next, struct prefix_entry, node));
    free(prefix->buckets);
    free(prefix);
}

/* ---- the chain ---- */

uint64_t prefix_seed(const struct prefix *prefix, const char *tenant)
{
    return hash64(tenant, strlen(tenant), prefix->secret);
}

uint64_t prefix_chain(uint64_t hash, int32_t token)
{
    return hash64(&token, sizeof token, hash);
}

/* ---- marks ---- */

static struct mark **bucket_of(const struct prefix *prefix, uint64_t hash)
{
    return &prefix->buckets[hash & (prefix->bucket_count - 1)];
}

/* Without memory the table stays as it is, only slower. */
static void grow(struct prefix *prefix)
{
    const size_t count = prefix->bucket_count * 2, before = prefix->bucket_count;
    struct mark **old = prefix->buckets, **buckets = calloc(count, sizeof *buckets);
    if (!buckets)
        return;
    prefix->buckets = buckets;
    prefix->bucket_count = count;
    for (size_t i = 0; i < before; i++) {
        for (struct mark *mark = old[i], *next; mark; mark = next) {
            next = mark->next;
            mark->next = *bucket_of(prefix, mark->hash);
            *bucket_of(prefix, mark->hash) = mark;
        }
    }
    free(old);
}

static void put_mark(struct prefix *prefix, struct prefix_entry *entry, bool snapshot)
{
    struct mark *mark = malloc(sizeof *mark);
    if (!mark)
        return;
    if (prefix->mark_count >= prefix->bucket_count)
        grow(prefix);
    struct mark **bucket = bucket_of(prefix, entry->hash);
    *mark = (struct mark){.next = *bucket,
                          .entry = entry,
                          .hash = entry->hash,
                          .position = entry->position,
                          .snapshot = snapshot};
    *bucket = mark;
    list_push_back(&entry->marks, &mark->node);
    prefix->mark_count++;
    prefix->borrowed_count += entry->borrowed;
}

static void drop_mark(struct prefix *prefix, struct mark *mark)
{
    struct mark **at = bucket_of(prefix, mark->hash);
    while (*at != mark)
        at = &(*at)->next;
    *at = mark->next;
    list_remove(&mark->node);
    prefix->mark_count--;
    prefix->borrowed_count -= mark->entry->borrowed;
    free(mark);
}

void prefix_advance(struct prefix *prefix, struct prefix_entry *entry, const int32_t *tokens,
                    size_t count, bool snapshot)
{
    for (size_t i = 0; i < count; i++) {
        entry->hash = prefix_chain(entry->hash, tokens[i]);
        entry->position++;
        const bool end = snapshot && i + 1 == count;
        if (end || entry->position % prefix->chunk_tokens == 0)
            put_mark(prefix, entry, end);
    }
}

void prefix_keep(struct prefix *prefix, struct prefix_entry *entry, const uint64_t *positions,
                 size_t count)
{
    LIST_EACH_SAFE(node, &entry->marks)
    {
        struct mark *mark = LIST_ENTRY(node, struct mark, node);
        bool kept = !mark->snapshot;
        for (size_t i = 0; i < count && !kept; i++)
            kept = positions[i] == mark->position;
        if (kept)
            continue;
        if (mark->position % prefix->chunk_tokens == 0)
            mark->snapshot = false;
        else
            drop_mark(prefix, mark);
    }
}

/* ---- entries ---- */

struct prefix_entry *prefix_add(struct prefix *prefix, const char *id, const char *tenant,
                                struct prefix_entry *parent, uint64_t begin, uint64_t hash)
{
    struct prefix_entry *entry = calloc(1, sizeof *entry);
    if (!entry)
        return NULL;
    ASSERT(strlen(id) < sizeof entry->id && strlen(tenant) < sizeof entry->tenant);
    strcpy(entry->id, id);
    strcpy(entry->tenant, tenant);
    entry->begin = entry->position = begin;
    entry->hash = hash;
    list_init(&entry->marks);
    list_push_back(&prefix->entries, &entry->node);
    prefix->entry_count++;
    if (parent)
        prefix_set_parent(entry, parent);
    return entry;
}

struct prefix_entry *prefix_borrow(struct prefix *prefix, const char *id, const char *tenant,
                                   uint64_t begin, uint64_t hash)
{
    struct prefix_entry *entry = prefix_add(prefix, id, tenant, NULL, begin, hash);
    if (entry)
        entry->borrowed = true;
    return entry;
}

void prefix_set_parent(struct prefix_entry *entry, struct prefix_entry *parent)
{
    entry->parent = parent;
    parent->children++;
}

void prefix_remove(struct prefix *prefix, struct prefix_entry *entry)
{
    while (!list_empty(&entry->marks))
        drop_mark(prefix, LIST_ENTRY(entry->marks.next, struct mark, node));
    if (entry->parent)
        entry->parent->children--;
    LIST_EACH(node, &prefix->entries)
    {
        struct prefix_entry *other = LIST_ENTRY(node, struct prefix_entry, node);
        if (entry->children && other->parent == entry)
            other->parent = NULL;
    }
    list_remove(&entry->node);
    prefix->bytes -= entry->bytes;
    prefix->entry_count--;
    prefix->doomed_count -= entry->doomed;
    free(entry);
}

void prefix_touch(struct prefix *prefix, struct prefix_entry *entry)
{
    struct prefix_entry *above = entry->parent;
    for (; above; above = above->parent) {
        list_remove(&above->node);
        list_push_back(&prefix->entries, &above->node);
    }
    list_remove(&entry->node);
    list_push_back(&prefix->entries, &entry->node);
}

void prefix_set_bytes(struct prefix *prefix, struct prefix_entry *entry, uint64_t bytes)
{
    prefix->bytes += bytes - entry->bytes;
    entry->bytes = bytes;
}

/* ---- looking up ---- */

bool prefix_has(const struct prefix *prefix, const char *tenant, uint64_t hash, uint64_t position)
{
    for (const struct mark *mark = *bucket_of(prefix, hash); mark; mark = mark->next)
        if (mark->hash == hash && mark->position == position && mark->snapshot &&
            !mark->entry->doomed && strcmp(mark->entry->tenant, tenant) == 0)
            return true;
    return false;
}

bool prefix_is_free_end(const struct prefix_entry *entry, uint64_t position)
{
    return entry->position == position && !entry->users && !entry->borrowed;
}

void prefix_find(const struct prefix *prefix, const char *tenant, const int32_t *tokens,
                 size_t count, struct prefix_hit *hit)
{
    uint64_t hash = prefix_seed(prefix, tenant);
    *hit = (struct prefix_hit){.entry = NULL};
    for (size_t i = 0; i < count; i++) {
        hash = prefix_chain(hash, tokens[i]);
        for (const struct mark *mark = *bucket_of(prefix, hash); mark; mark = mark->next) {
            struct prefix_entry *entry = mark->entry;
            if (mark->hash != hash || mark->position != i + 1 || entry->doomed ||
                strcmp(entry->tenant, tenant) != 0)
                continue;
            hit->border = i + 1;
            if (!mark->snapshot || (hit->position == i + 1 && !prefix_is_free_end(entry, i + 1)))
                continue;
            hit->entry = entry;
            hit->position = i + 1;
            hit->hash = hash;
        }
    }
}

void prefix_doom(struct prefix *prefix, struct prefix_entry *entry)
{
    prefix->doomed_count += !entry->doomed;
    entry->doomed = true;
}

uint64_t prefix_spare(const struct prefix *prefix, const struct prefix_entry *entry)
{
    uint64_t oldest = entry->position;
    const bool youngest = prefix->entries.prev == &entry->node;
    if (entry->doomed || !(youngest || entry->children))
        return 0;
    LIST_EACH(node, &entry->marks)
    {
        const struct mark *mark = LIST_ENTRY(node, struct mark, node);
        if (mark->snapshot && mark->position < oldest)
            oldest = mark->position;
    }
    return oldest < entry->position ? oldest : 0;
}

struct prefix_entry *prefix_victim(struct prefix *prefix)
{
    if (prefix->bytes <= prefix->allowed)
        prefix->allowed = prefix->budget;
    const bool full = prefix->bytes > prefix->allowed;
    const bool many = prefix->borrowed_count > LIMITS_PREFIX_BORROWED;
    if (!full && !many && !prefix->doomed_count)
        return NULL;
    struct prefix_entry *oldest = NULL;
    LIST_EACH(node, &prefix->entries)
    {
        struct prefix_entry *entry = LIST_ENTRY(node, struct prefix_entry, node);
        if (entry->users || entry->pending)
            continue;
        if (entry->doomed || (many && entry->borrowed))
            return entry;
        if (full && !oldest && !entry->borrowed &&
            (!entry->children || prefix_spare(prefix, entry)))
            oldest = entry;
    }
    return oldest;
}

void prefix_shrink(struct prefix *prefix)
{
    prefix->allowed = prefix->bytes / 2;
}

uint64_t prefix_bytes(const struct prefix *prefix)
{
    return prefix->bytes;
}

uint64_t prefix_entries(const struct prefix *prefix)
{
    return prefix->entry_count;
}
