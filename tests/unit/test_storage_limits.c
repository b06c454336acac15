/* Memories that are over, by a clock that jumps; quotas by memory and by tenant; a map that is full
 * and is made larger for deletes while others read. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "storage/expiry.h"
#include "tests/lib/store_tree.h"

#define DAY 86400
#define YEAR (365 * DAY)
#define BEGIN 1795000000 /* late in 2026 */

/* ---- the clock by itself ---- */

static void test_clock(void **state)
{
    struct expiry_clock clock;
    int64_t mono = 5000, wall = BEGIN;
    (void)state;
    expiry_clock_init(&clock, 0, wall, mono);
    assert_int_equal(expiry_clock_now(&clock, wall + 10, mono + 10), wall + 10);
    /* A little off is a different pace. */
    assert_int_equal(expiry_clock_now(&clock, wall + 40, mono + 20), wall + 40);
    mono += 20;
    wall += 40;
    /* Forwards by a year: believed after ten minutes, in which it keeps to it, and no sooner. */
    for (int64_t t = 0; t < EXPIRY_BELIEF_S; t += 100)
        assert_int_equal(expiry_clock_now(&clock, wall + YEAR + t, mono + t), wall + t);
    assert_int_equal(expiry_clock_now(&clock, wall + YEAR + 600, mono + 600), wall + YEAR + 600);
    wall += YEAR + 600;
    mono += 600;
    /* Back again: the same. Between the two, it is started over by a clock that jumps on. */
    for (int64_t t = 0; t < 2000; t += 100)
        assert_int_equal(expiry_clock_now(&clock, wall - YEAR - 100 * t, mono + t), wall + t);
    for (int64_t t = 2000; t < 2000 + EXPIRY_BELIEF_S; t += 100)
        assert_int_equal(expiry_clock_now(&clock, wall - 9 * DAY + t, mono + t), wall + t);
    assert_int_equal(expiry_clock_now(&clock, wall - 9 * DAY + 2600, mono + 2600),
                     wall - 9 * DAY + 2600);
    /* A clock that was never set is not believed however long it says so. */
    expiry_clock_init(&clock, BEGIN, 100, 0);
    for (int64_t t = 0; t < 5 * DAY; t += 300)
        assert_int_equal(expiry_clock_now(&clock, 100 + t, t), BEGIN + t);
    assert_int_equal(expiry_clock_now(&clock, BEGIN + 5 * DAY, 5 * DAY), BEGIN + 5 * DAY);
}

/* ---- a store with a clock of ours ---- */

struct limits {
    char *folder;
    struct storage *storage;
    int64_t wall, mono;
    uint64_t memory_quota;
    size_t map_bytes;
};

static int64_t clock_cb(void *context, bool monotonic)
{
    const struct limits *limits = context;
    return monotonic ? limits->mono : limits->wall;
}

static void open_store(struct limits *limits)
{
    struct storage_options options = store_past_options(limits->folder);
    struct error err = {0};
    options.clock_cb = clock_cb;
    options.clock_context = limits;
    options.memory_quota = limits->memory_quota;
    options.map_bytes = limits->map_bytes;
    assert_int_equal(storage_open(&options, &limits->storage, &err), STATUS_OK);
}

static void reopen(struct limits *limits)
{
    storage_close(limits->storage);
    store_past_check(limits->folder);
    open_store(limits);
}

static int setup(void **state)
{
    struct limits *limits = calloc(1, sizeof *limits);
    limits->folder = store_helper_folder();
    limits->wall = BEGIN;
    limits->mono = 1000;
    *state = limits;
    return 0;
}

static int teardown(void **state)
{
    struct limits *limits = *state;
    storage_close(limits->storage);
    store_past_check(limits->folder);
    store_helper_remove(limits->folder);
    free(limits);
    return 0;
}

static void pass(struct limits *limits, int64_t seconds)
{
    limits->wall += seconds;
    limits->mono += seconds;
}

static void create(struct storage *storage, const char *id, const char *from, const char *tenant,
                   int64_t seconds, bool from_use, bool ephemeral)
{
    const struct storage_memory_options options = {.id = id,
                                                   .from = from,
                                                   .tenant = tenant,
                                                   .expires = {seconds, from_use},
                                                   .ephemeral = ephemeral};
    struct store_wait wait;
    store_wait_init(&wait);
    assert_int_equal(
        store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
        STATUS_OK);
}

static enum status expire(struct storage *storage, const char *id)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_memory_expire(storage, id, store_wait_cb, &wait));
}

static enum status try_update(struct storage *storage, const char *id, const char *metadata,
                              const struct storage_expires *expires)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(
        &wait, storage_memory_update(storage, id, metadata, expires, store_wait_cb, &wait));
}

static void update(struct storage *storage, const char *id, const char *metadata,
                   const struct storage_expires *expires)
{
    assert_int_equal(try_update(storage, id, metadata, expires), STATUS_OK);
}

/* What is over, the ids one behind the other; it is asked for two at a time. */
static void assert_over(struct storage *storage, const char *expected)
{
    char ids[2][LIMITS_ID_BYTES], after[LIMITS_ID_BYTES], all[1024] = "";
    size_t count;
    const char *from = NULL;
    do {
        assert_int_equal(storage_expired(storage, from, 2, ids, &count), STATUS_OK);
        for (size_t i = 0; i < count; i++) {
            strcat(strcat(all, ids[i]), " ");
            from = strcpy(after, ids[i]);
        }
    } while (count == 2);
    assert_string_equal(all, expected);
}

static void test_expiry(void **state)
{
    struct limits *limits = *state;
    struct store_past *past = calloc(1, sizeof *past);
    open_store(limits);
    struct storage *storage = limits->storage;
    create(storage, "made", NULL, "", 100, false, false);
    create(storage, "used", NULL, "", 200, true, false);
    create(storage, "asked", NULL, "", 200, true, false);
    create(storage, "for-ever", NULL, "", 0, false, false);
    create(storage, "passing", NULL, "", 1, false, true);
    struct storage_memory memory = store_past_get(storage, "made");
    assert_int_equal(memory.expires_at, BEGIN + 100);
    assert_int_equal(memory.expires.seconds, 100);
    assert_false(memory.expires.from_use);
    assert_int_equal(store_past_get(storage, "for-ever").expires_at, 0);
    assert_over(storage, "");
    assert_int_equal(expire(storage, "made"), STATUS_CONFLICT);
    assert_int_equal(expire(storage, "for-ever"), STATUS_CONFLICT);
    assert_int_equal(expire(storage, "nobody"), STATUS_NOT_FOUND);
    pass(limits, 150);
    strcpy(past->id, "used");
    store_past_write(storage, past, 20, 1, false);
    create(storage, "fork", "asked", "", 0, false, true);
    assert_over(storage, "made ");
    assert_int_equal(store_past_get(storage, "used").expires_at, BEGIN + 350);
    assert_int_equal(store_past_get(storage, "asked").expires_at, BEGIN + 350);
    pass(limits, 1); /* less than a hundredth: not worth a write */
    store_past_write(storage, past, 20, 1, false);
    assert_int_equal(store_past_get(storage, "used").expires_at, BEGIN + 350);
    assert_int_equal(expire(storage, "used"), STATUS_CONFLICT);
    assert_int_equal(expire(storage, "made"), STATUS_OK);
    struct storage_memory gone;
    assert_int_equal(storage_memory_get(storage, "made", &gone), STATUS_NOT_FOUND);
    assert_over(storage, "");
    reopen(limits);
    storage = limits->storage;
    pass(limits, 200);
    assert_over(storage, "asked used ");
    /* Used at the last moment; changed; for ever. */
    store_past_write(storage, past, 20, 1, false);
    assert_int_equal(expire(storage, "used"), STATUS_CONFLICT);
    assert_over(storage, "asked ");
    update(storage, "asked", "{\"a\":\"b\"}", NULL);
    assert_over(storage, "asked ");
    update(storage, "asked", NULL, &(struct storage_expires){50, true});
    assert_over(storage, "");
    pass(limits, 50);
    assert_over(storage, "asked ");
    update(storage, "asked", NULL, &(struct storage_expires){0});
    assert_over(storage, "");
    assert_int_equal(storage_memory_get(storage, "asked", &memory), STATUS_OK);
    assert_string_equal(memory.metadata, "{\"a\":\"b\"}");
    storage_memory_close(&memory);
    store_past_assert(storage, past);
    free(past);
}

/* A fork that settles: as what it was made to be, or as what it takes the place of. */
static void test_expiry_settled(void **state)
{
    struct limits *limits = *state;
    open_store(limits);
    create(limits->storage, "old", NULL, "ann", 100, false, false);
    create(limits->storage, "e1", NULL, "", 0, false, true);
    create(limits->storage, "e2", NULL, "bob", 30, false, true);
    create(limits->storage, "used", NULL, "ann", 100, true, false);
    create(limits->storage, "e3", NULL, "", 0, false, true);
    pass(limits, 40);
    assert_over(limits->storage, "");
    assert_int_equal(store_replace(limits->storage, "e1", "old"), STATUS_OK);
    assert_int_equal(store_settle(limits->storage, "e2", "new"), STATUS_OK);
    assert_int_equal(store_replace(limits->storage, "e3", "used"), STATUS_OK);
    assert_over(limits->storage, "new ");
    pass(limits, 60);
    assert_over(limits->storage, "new old "); /* a rewind is a use */
    pass(limits, EXPIRY_SLACK_S);
    assert_over(limits->storage, "new old used ");
    reopen(limits);
    assert_over(limits->storage, "new "); /* how long it was closed, the wall clock alone says */
    pass(limits, EXPIRY_BELIEF_S);
    assert_over(limits->storage, "new old used ");
}

static void test_clock_jumps(void **state)
{
    struct limits *limits = *state;
    open_store(limits);
    create(limits->storage, "a", NULL, "", DAY, true, false);
    /* A minute at the wrong time ends nothing. */
    limits->wall += YEAR;
    assert_over(limits->storage, "");
    assert_int_equal(expire(limits->storage, "a"), STATUS_CONFLICT);
    pass(limits, 60);
    assert_over(limits->storage, "");
    limits->wall -= YEAR;
    pass(limits, 60);
    assert_over(limits->storage, "");
    /* Back to before there was a store: what is written then does not count from there. */
    limits->wall -= 3 * DAY;
    create(limits->storage, "b", NULL, "", DAY, false, false);
    pass(limits, 2 * EXPIRY_BELIEF_S);
    assert_over(limits->storage, "");
    limits->wall += 3 * DAY;
    for (int i = 0; i < 12; i++, pass(limits, 300))
        assert_over(limits->storage, "");
    /* A machine that slept: what is over is so, once the clock is believed. */
    limits->wall += 2 * DAY;
    assert_over(limits->storage, "");
    pass(limits, EXPIRY_BELIEF_S);
    assert_over(limits->storage, "a b ");
    /* So it is after an opening with a clock that says something new. */
    create(limits->storage, "c", NULL, "", 10 * DAY, false, false);
    storage_close(limits->storage);
    limits->wall += 20 * DAY;
    limits->mono = 7;
    open_store(limits);
    assert_over(limits->storage, "a b ");
    pass(limits, EXPIRY_BELIEF_S + 1);
    assert_over(limits->storage, "a b c ");
}

static void count_cb(void *context, const char *message)
{
    (void)message;
    ++*(unsigned *)context;
}

/* ---- quotas ---- */

static enum status write_more(struct limits *limits, struct store_past *past, uint64_t count)
{
    struct store_past before = *past;
    for (uint64_t i = 0; i < count; i++)
        past->tokens[past->count + i] = store_token(3, past->count + i);
    past->count += count;
    past->is_turn[past->count] = true;
    enum status status = store_past_try_commit(limits->storage, past, past->id, past->count, false);
    if (status)
        *past = before;
    return status;
}

static void test_memory_quota(void **state)
{
    struct limits *limits = *state;
    struct store_past *past = calloc(1, sizeof *past), *fork = calloc(1, sizeof *fork);
    limits->memory_quota = 200000;
    open_store(limits);
    strcpy(past->id, "a");
    assert_int_equal(store_create(limits->storage, "a", NULL), STATUS_OK);
    enum status status;
    unsigned turns = 0;
    while (!(status = write_more(limits, past, 60)))
        turns++;
    assert_int_equal(status, STATUS_MEMORY_QUOTA);
    assert_true(turns > 5);
    /* What follows on the branch hears the same, until it is cut back; nothing of it is lost. */
    assert_int_equal(write_more(limits, past, 1), STATUS_MEMORY_QUOTA);
    store_past_assert(limits->storage, past);
    assert_int_equal(store_truncate(limits->storage, "a"), STATUS_OK);
    struct storage_memory memory = store_past_get(limits->storage, "a");
    assert_true(memory.bytes_on_disk <= 200000 && memory.bytes_on_disk > 150000);
    reopen(limits);
    store_past_assert(limits->storage, past);
    assert_int_equal(write_more(limits, past, 200), STATUS_MEMORY_QUOTA);
    assert_int_equal(store_truncate(limits->storage, "a"), STATUS_OK);
    /* A fork has one of its own. */
    assert_int_equal(store_create(limits->storage, "b", "a"), STATUS_OK);
    *fork = *past;
    strcpy(fork->id, "b");
    assert_int_equal(write_more(limits, fork, 200), STATUS_OK);
    store_past_assert(limits->storage, fork);
    /* And more room, more words. */
    storage_close(limits->storage);
    limits->memory_quota = 1000000;
    open_store(limits);
    assert_int_equal(write_more(limits, past, 200), STATUS_OK);
    store_past_assert(limits->storage, past);
    free(past);
    free(fork);
}

static uint64_t used(struct limits *limits, const char *tenant)
{
    struct storage_usage usage;
    storage_get_quota(limits->storage, tenant, &usage);
    return usage.bytes;
}

static void test_key_quota(void **state)
{
    struct limits *limits = *state;
    struct store_past *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
    struct store_past *other = calloc(1, sizeof *other);
    const struct storage_quota quotas[] = {{"ann", 300000}, {"cid", 10}};
    open_store(limits);
    assert_int_equal(storage_set_quotas(limits->storage, quotas, 2), STATUS_OK);
    create(limits->storage, "a", NULL, "ann", 0, false, false);
    const uint64_t record = used(limits, "ann"); /* of an empty memory */
    assert_true(record > 0 && record < 300);
    create(limits->storage, "b", NULL, "ann", 0, false, false);
    create(limits->storage, "other", NULL, "bob", 0, false, false);
    const uint64_t his_record = used(limits, "bob");
    strcpy(a->id, "a");
    strcpy(b->id, "b");
    strcpy(other->id, "other");
    for (int i = 0; i < 3; i++)
        assert_int_equal(write_more(limits, a, 60), STATUS_OK);
    enum status status;
    while (!(status = write_more(limits, b, 60)))
        ;
    assert_int_equal(status, STATUS_KEY_QUOTA);
    assert_int_equal(store_truncate(limits->storage, "b"), STATUS_OK);
    /* Her other memory is full with it; his is not. */
    assert_int_equal(write_more(limits, a, 400), STATUS_KEY_QUOTA);
    assert_int_equal(store_truncate(limits->storage, "a"), STATUS_OK);
    for (int i = 0; i < 10; i++)
        assert_int_equal(write_more(limits, other, 60), STATUS_OK);
    assert_true(used(limits, "ann") <= 300000 && used(limits, "ann") > 200000);
    assert_int_equal(used(limits, "ann"), store_past_get(limits->storage, "a").bytes_on_disk +
                                              store_past_get(limits->storage, "b").bytes_on_disk +
                                              2 * record);
    assert_int_equal(used(limits, "bob"),
                     store_past_get(limits->storage, "other").bytes_on_disk + his_record);
    assert_int_equal(used(limits, "cid"), 0);
    /* It is counted anew at the next opening. */
    const uint64_t before = used(limits, "ann");
    reopen(limits);
    assert_int_equal(used(limits, "ann"), before);
    store_past_assert(limits->storage, a);
    store_past_assert(limits->storage, b);
    assert_int_equal(storage_set_quotas(limits->storage, quotas, 2), STATUS_OK);
    /* What forks still reach of a deleted memory counts on. */
    create(limits->storage, "fork", "a", "ann", 0, false, false);
    assert_int_equal(store_remove(limits->storage, "a"), STATUS_OK);
    store_wait_collected(limits->storage);
    const uint64_t left = used(limits, "ann");
    assert_true(left > store_past_get(limits->storage, "b").bytes_on_disk + 2 * record);
    assert_int_equal(store_remove(limits->storage, "fork"), STATUS_OK);
    store_wait_collected(limits->storage);
    assert_int_equal(used(limits, "ann"),
                     store_past_get(limits->storage, "b").bytes_on_disk + record);
    assert_int_equal(write_more(limits, b, 60), STATUS_OK);
    /* A quota that is lowered refuses what is new and keeps what is there; none at all: all goes.
     */
    assert_int_equal(storage_set_quotas(limits->storage, quotas + 1, 1), STATUS_OK);
    assert_int_equal(write_more(limits, b, 400), STATUS_OK);
    assert_int_equal(storage_set_quotas(limits->storage, &(struct storage_quota){"ann", 1}, 1),
                     STATUS_OK);
    assert_int_equal(write_more(limits, b, 1), STATUS_KEY_QUOTA);
    assert_int_equal(store_truncate(limits->storage, "b"), STATUS_OK);
    store_past_assert(limits->storage, b);
    free(a);
    free(b);
    free(other);
}

/* A settled fork counts for whom it then belongs to; repair finds nothing to change. */
static void test_quota_settled(void **state)
{
    struct limits *limits = *state;
    struct store_past *past = calloc(1, sizeof *past);
    struct error err = {0};
    uint64_t changes;
    unsigned told = 0;
    open_store(limits);
    create(limits->storage, "a", NULL, "ann", 0, false, false);
    const uint64_t record = used(limits, "ann");
    create(limits->storage, "e", NULL, "", 0, false, true);
    strcpy(past->id, "e");
    assert_int_equal(write_more(limits, past, 100), STATUS_OK);
    assert_int_equal(used(limits, "ann"), record);
    assert_int_equal(store_replace(limits->storage, "e", "a"), STATUS_OK);
    assert_int_equal(used(limits, "ann"),
                     store_past_get(limits->storage, "a").bytes_on_disk + record);
    assert_true(used(limits, "ann") > record);
    create(limits->storage, "over", NULL, "ann", 5, true, false);
    store_wait_collected(limits->storage);
    storage_close(limits->storage);
    assert_int_equal(storage_repair(limits->folder, false, count_cb, &told, &changes, &err),
                     STATUS_OK);
    assert_int_equal(changes, 0);
    open_store(limits);
    free(past);
}

static enum status put(struct limits *limits, const struct storage_keep *keep)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_put(limits->storage, keep, store_wait_cb, &wait));
}

static enum status delete_object(struct limits *limits, const char *id)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(
        &wait, storage_object_delete(limits->storage, id, false, store_wait_cb, &wait));
}

static void assert_counts_hold(struct limits *limits, const struct storage_quota *quota)
{
    const uint64_t before = used(limits, quota->tenant);
    reopen(limits);
    assert_int_equal(used(limits, quota->tenant), before);
    assert_int_equal(storage_set_quotas(limits->storage, quota, 1), STATUS_OK);
}

/* Objects and items take of the key's quota, and give it back when they go. */
static void test_quota_of_kept(void **state)
{
    struct limits *limits = *state;
    static char words[3000];
    const struct storage_quota quota = {"ann", 100000};
    struct storage_item item = {.id = "i", .bytes = words, .size = 500};
    struct storage_object object = {
        .id = "o", .tenant = "ann", .memory = "a", .bytes = words, .size = 1000};
    struct storage_keep keep = {.object = &object, .lists = {{"o", &item, 1}, {"a", &item, 1}}};
    open_store(limits);
    assert_int_equal(storage_set_quotas(limits->storage, &quota, 1), STATUS_OK);
    create(limits->storage, "a", NULL, "ann", 0, false, false);
    create(limits->storage, "b", NULL, "bob", 0, false, false);
    assert_int_equal(put(limits, &keep), STATUS_OK);
    const uint64_t one = used(limits, "ann");
    assert_true(one > 2000 && one < 2500);
    assert_counts_hold(limits, &quota);
    /* Written over, it counts once; larger than half a page it takes whole ones. */
    object.size = 3000;
    keep = (struct storage_keep){.object = &object};
    assert_int_equal(put(limits, &keep), STATUS_OK);
    assert_true(used(limits, "ann") > one + 2900 && used(limits, "ann") < one + 3000);
    object.size = 1000;
    assert_int_equal(put(limits, &keep), STATUS_OK);
    assert_int_equal(used(limits, "ann"), one);
    /* Another's list is another's. */
    keep = (struct storage_keep){.lists = {{"b", &item, 1}}};
    assert_int_equal(put(limits, &keep), STATUS_OK);
    assert_int_equal(used(limits, "ann"), one);
    assert_true(used(limits, "bob") > 500);
    /* Up to the quota, and not further: neither objects nor items. */
    unsigned count = 0;
    enum status status;
    keep = (struct storage_keep){.object = &object};
    do
        snprintf(object.id, sizeof object.id, "o%u", count++);
    while (!(status = put(limits, &keep)));
    assert_int_equal(status, STATUS_KEY_QUOTA);
    assert_true(count > 60);
    assert_true(used(limits, "ann") <= 100000 && used(limits, "ann") > 98000);
    struct storage_object got;
    assert_int_equal(storage_object_get(limits->storage, object.id, &got), STATUS_NOT_FOUND);
    item.size = 2000;
    keep = (struct storage_keep){.lists = {{"a", &item, 1}}};
    assert_int_equal(put(limits, &keep), STATUS_KEY_QUOTA);
    keep = (struct storage_keep){.lists = {{"b", &item, 1}}};
    assert_int_equal(put(limits, &keep), STATUS_OK);
    /* Nor a turn that brings an object, and then the turn is not there either. */
    static const int32_t tokens[] = {1};
    keep = (struct storage_keep){.object = &object};
    const struct storage_commit commit = {.id = "a",
                                          .position = 1,
                                          .tokens = tokens,
                                          .token_count = 1,
                                          .text_bytes = 1,
                                          .snapshot = "s",
                                          .snapshot_bytes = 1,
                                          .keep = &keep};
    assert_int_equal(store_commit(limits->storage, &commit), STATUS_KEY_QUOTA);
    assert_int_equal(store_truncate(limits->storage, "a"), STATUS_OK);
    assert_int_equal(store_past_get(limits->storage, "a").token_count, 0);
    assert_counts_hold(limits, &quota);
    /* Deleting makes room, to the last byte. */
    while (count-- > 1) {
        snprintf(object.id, sizeof object.id, "o%u", count - 1);
        assert_int_equal(delete_object(limits, object.id), STATUS_OK);
    }
    assert_int_equal(used(limits, "ann"), one);
    assert_int_equal(store_commit(limits->storage, &commit), STATUS_OK);
    assert_int_equal(delete_object(limits, object.id), STATUS_OK);
    assert_int_equal(delete_object(limits, "o"), STATUS_OK);
    assert_int_equal(store_remove(limits->storage, "a"), STATUS_OK);
    store_wait_collected(limits->storage);
    assert_int_equal(used(limits, "ann"), 0);
    assert_counts_hold(limits, &quota);
}

/* Memories that hold nothing take of the key's quota, by their metadata, and so do larger metadata;
 * what is there may always become smaller, go, and be gone on with. */
static void test_quota_of_metadata(void **state)
{
    struct limits *limits = *state;
    static char large[4000];
    const struct storage_quota quota = {"ann", 20000};
    struct storage_memory_options options = {.tenant = "ann", .metadata = large};
    struct store_wait wait;
    char id[16];
    unsigned count = 0;
    enum status status;
    memset(large, 'm', sizeof large - 1);
    open_store(limits);
    assert_int_equal(storage_set_quotas(limits->storage, &quota, 1), STATUS_OK);
    create(limits->storage, "small", NULL, "ann", 0, false, false);
    const uint64_t record = used(limits, "ann");
    for (options.id = id;; count++) {
        snprintf(id, sizeof id, "m%u", count);
        store_wait_init(&wait);
        status = store_wait_finish(
            &wait, storage_memory_create(limits->storage, &options, store_wait_cb, &wait));
        if (status)
            break;
    }
    assert_int_equal(status, STATUS_KEY_QUOTA);
    assert_true(count >= 2 && count < 5);
    const uint64_t full = used(limits, "ann");
    assert_true(full <= 20000 && full - record >= count * (sizeof large - 1));
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(limits->storage, id, &memory), STATUS_NOT_FOUND);
    assert_counts_hold(limits, &quota);
    assert_int_equal(try_update(limits->storage, "small", large, NULL), STATUS_KEY_QUOTA);
    assert_int_equal(used(limits, "ann"), full);
    assert_int_equal(try_update(limits->storage, "m0", "{}", NULL), STATUS_OK);
    assert_true(used(limits, "ann") < full - sizeof large + 1000);
    assert_int_equal(try_update(limits->storage, "small", large, NULL), STATUS_OK);
    for (unsigned i = 0; i < count; i++) {
        snprintf(id, sizeof id, "m%u", i);
        assert_int_equal(store_remove(limits->storage, id), STATUS_OK);
    }
    assert_int_equal(try_update(limits->storage, "small", "{}", NULL), STATUS_OK);
    assert_int_equal(used(limits, "ann"), record);
    assert_counts_hold(limits, &quota);
}

/* The items in a memory's list take of its quota as its text does, over a restart too. */
static void test_memory_quota_of_items(void **state)
{
    struct limits *limits = *state;
    static char words[3000];
    struct store_past *past = calloc(1, sizeof *past);
    struct storage_item item = {.id = "i", .bytes = words, .size = 1500};
    const struct storage_object object = {
        .id = "o", .tenant = "ann", .memory = "a", .bytes = words, .size = 100};
    const struct storage_keep own = {.object = &object, .lists = {{"o", &item, 1}}};
    const struct storage_keep keep = {.lists = {{"a", &item, 1}}};
    limits->memory_quota = 200000;
    open_store(limits);
    create(limits->storage, "a", NULL, "ann", 0, false, false);
    const uint64_t record = used(limits, "ann");
    strcpy(past->id, "a");
    assert_int_equal(write_more(limits, past, 100), STATUS_OK);
    const uint64_t text = store_past_get(limits->storage, "a").bytes_on_disk;
    unsigned count = 0;
    while (!put(limits, &keep))
        count++;
    assert_int_equal(put(limits, &keep), STATUS_MEMORY_QUOTA);
    const uint64_t full = store_past_get(limits->storage, "a").bytes_on_disk;
    assert_true(full <= 200000 && full > 200000 - 2000);
    assert_true(full - text >= count * (uint64_t)1500 && full - text < count * (uint64_t)1700);
    assert_int_equal(used(limits, "ann"), full + record); /* both count the same */
    assert_int_equal(write_more(limits, past, 60), STATUS_MEMORY_QUOTA);
    reopen(limits);
    assert_int_equal(store_past_get(limits->storage, "a").bytes_on_disk, full);
    assert_int_equal(put(limits, &keep), STATUS_MEMORY_QUOTA);
    assert_int_equal(put(limits, &own), STATUS_OK); /* the list of an object is not the memory's */
    /* Without them there is room for as much text. */
    assert_int_equal(store_create(limits->storage, "b", "a"), STATUS_OK);
    strcpy(past->id, "b");
    assert_int_equal(write_more(limits, past, 60), STATUS_OK);
    store_past_assert(limits->storage, past);
    free(past);
}

/* Objects that nothing goes on from, the ids one behind the other; two are looked at at a time. */
static void assert_left_over(struct limits *limits, const char *expected)
{
    char ids[2][LIMITS_ID_BYTES], at[LIMITS_ID_BYTES] = "", all[1024] = "";
    size_t count;
    do {
        assert_int_equal(storage_object_left_over(limits->storage, 86400, 2, at, ids, &count),
                         STATUS_OK);
        for (size_t i = 0; i < count; i++)
            strcat(strcat(all, ids[i]), " ");
    } while (at[0]);
    assert_string_equal(all, expected);
}

/* An object stays as long as its memory, and a day longer when it was not made for it. */
static void test_left_over(void **state)
{
    struct limits *limits = *state;
    static const int32_t tokens[] = {1, 2, 3, 4, 5, 6, 7};
    static const char *const owners[] = {"a", "a", "b", "c", "a"};
    open_store(limits);
    assert_left_over(limits, "");
    create(limits->storage, "a", NULL, "ann", 0, false, false);
    create(limits->storage, "b", NULL, "ann", 7 * 86400, false, false);
    create(limits->storage, "c", NULL, "ann", 0, false, false);
    for (unsigned i = 0; i < 5; i++) {
        struct storage_memory memory = store_past_get(limits->storage, owners[i]);
        struct storage_object object = {.created_at = limits->wall, .made_memory = i == 4};
        const struct storage_keep keep = {.object = &object};
        const struct storage_commit commit = {.id = owners[i],
                                              .position = memory.token_count + 1,
                                              .tokens = tokens + memory.token_count,
                                              .token_count = 1,
                                              .text_bytes = memory.token_count + 1,
                                              .snapshot = "s",
                                              .snapshot_bytes = 1,
                                              .keep = &keep};
        snprintf(object.id, sizeof object.id, "o%u", i);
        strcpy(object.memory, owners[i]);
        assert_int_equal(store_commit(limits->storage, &commit), STATUS_OK);
    }
    /* One that came to nothing has no memory. */
    struct storage_object failed = {.id = "p", .created_at = limits->wall};
    const struct storage_keep keep = {.object = &failed};
    assert_int_equal(put(limits, &keep), STATUS_OK);
    assert_left_over(limits, "");
    pass(limits, 86400);
    assert_left_over(limits, "");
    pass(limits, 1);
    assert_left_over(limits, "p ");
    assert_int_equal(delete_object(limits, "p"), STATUS_OK);
    assert_int_equal(store_remove(limits->storage, "c"), STATUS_OK);
    assert_left_over(limits, "o3 ");
    /* Gone back to before the second: the first is still gone on from. */
    assert_int_equal(store_fork_at(limits->storage, "e", "a", 1, true), STATUS_OK);
    assert_int_equal(store_replace(limits->storage, "e", "a"), STATUS_OK);
    assert_left_over(limits, "o1 o3 ");
    pass(limits, 7 * 86400);
    assert_int_equal(expire(limits->storage, "b"), STATUS_OK);
    assert_left_over(limits, "o1 o2 o3 ");
    /* A clock that was set wrong ends nothing. */
    assert_int_equal(delete_object(limits, "o3"), STATUS_OK);
    limits->wall += 100 * 86400;
    assert_left_over(limits, "o1 o2 ");
    struct storage_object fresh = {.id = "q", .created_at = limits->wall - 100 * 86400};
    const struct storage_keep last = {.object = &fresh};
    assert_int_equal(put(limits, &last), STATUS_OK);
    assert_left_over(limits, "o1 o2 ");
}

/* ---- a full map under load ---- */

struct reader {
    pthread_t thread;
    struct storage *storage;
    const struct store_past *kept; /* never written again */
    bool stop;                     /* atomic */
    unsigned long reads, wrong;
};

static void *read_on(void *context)
{
    struct reader *reader = context;
    int32_t tokens[100];
    while (!__atomic_load_n(&reader->stop, __ATOMIC_ACQUIRE)) {
        const uint64_t from = reader->reads++ * 37 % (reader->kept->count - 100);
        uint64_t position;
        void *snapshot = NULL;
        size_t size;
        if (storage_read_tokens(reader->storage, reader->kept->id, from, 100, tokens) ||
            memcmp(tokens, reader->kept->tokens + from, sizeof tokens) != 0 ||
            storage_snapshot(reader->storage, reader->kept->id, &snapshot, &size, &position) ||
            position != reader->kept->count)
            reader->wrong++;
        free(snapshot);
    }
    return NULL;
}

/* Again and again the map is full, and is made larger so that a delete goes through. Those who read
 * meanwhile see what they saw before. */
static void test_full_under_load(void **state)
{
    struct limits *limits = *state;
    struct store_past *kept = calloc(1, sizeof *kept), *more = calloc(1, sizeof *more);
    struct reader readers[3];
    unsigned full = 0;
    limits->map_bytes = 2 * LIMITS_MIB;
    open_store(limits);
    strcpy(kept->id, "kept");
    assert_int_equal(store_create(limits->storage, "kept", NULL), STATUS_OK);
    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(write_more(limits, kept, 100), STATUS_OK);
    for (size_t i = 0; i < 3; i++) {
        readers[i] = (struct reader){.storage = limits->storage, .kept = kept, .reads = i * 1000};
        assert_int_equal(pthread_create(&readers[i].thread, NULL, read_on, &readers[i]), 0);
    }
    for (unsigned round = 0; round < 6; round++) {
        enum status status = STATUS_OK;
        char ids[16][LIMITS_ID_BYTES];
        unsigned count = 0;
        for (; !status && count < 16; count++) {
            *more = (struct store_past){0};
            snprintf(more->id, sizeof more->id, "more%u", count);
            memcpy(ids[count], more->id, sizeof more->id);
            status = store_create(limits->storage, more->id, NULL);
            while (!status && more->count + 200 < STORE_PAST_TOKENS)
                status = write_more(limits, more, 200);
        }
        assert_int_equal(status, STATUS_DISK_FULL);
        full += status == STATUS_DISK_FULL;
        while (count-- > 0) {
            status = store_remove(limits->storage, ids[count]);
            assert_true(status == STATUS_OK || status == STATUS_NOT_FOUND);
        }
        store_wait_collected(limits->storage);
    }
    for (size_t i = 0; i < 3; i++) {
        __atomic_store_n(&readers[i].stop, true, __ATOMIC_RELEASE);
        pthread_join(readers[i].thread, NULL);
        assert_int_equal(readers[i].wrong, 0);
        assert_true(readers[i].reads > i * 1000 + 100);
    }
    assert_int_equal(full, 6);
    store_past_assert(limits->storage, kept);
    free(kept);
    free(more);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clock),
        cmocka_unit_test_setup_teardown(test_expiry, setup, teardown),
        cmocka_unit_test_setup_teardown(test_expiry_settled, setup, teardown),
        cmocka_unit_test_setup_teardown(test_clock_jumps, setup, teardown),
        cmocka_unit_test_setup_teardown(test_memory_quota, setup, teardown),
        cmocka_unit_test_setup_teardown(test_key_quota, setup, teardown),
        cmocka_unit_test_setup_teardown(test_quota_settled, setup, teardown),
        cmocka_unit_test_setup_teardown(test_quota_of_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_quota_of_metadata, setup, teardown),
        cmocka_unit_test_setup_teardown(test_memory_quota_of_items, setup, teardown),
        cmocka_unit_test_setup_teardown(test_left_over, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_under_load, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
