/* The writer's queue and its groups: full, in order, beside readers, and what a map without room
 * does to one item and not to its neighbours. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/store_tree.h"

#define S STORE_TREE_CHUNK
#define KV STORE_TREE_KV
#define LANDMARK STORE_TREE_LANDMARK

struct busy_gate { /* holds the writer thread inside a callback */
    pthread_mutex_t mutex;
    int answered;
};

static void gate_cb(void *context, enum status status)
{
    struct busy_gate *gate = context;
    (void)status;
    pthread_mutex_lock(&gate->mutex);
    gate->answered++;
    pthread_mutex_unlock(&gate->mutex);
}

/* A full queue says so, accepts again after callbacks, and close answers everything. */
static void test_full_queue(void **state)
{
    struct storage_options options = store_tree_options(*state);
    struct storage *storage;
    struct error err;
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    options.queue_bytes = 50000;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = store_tree_branch(storage, "a");
    struct busy_gate gate = {.answered = 0};
    pthread_mutex_init(&gate.mutex, NULL);
    pthread_mutex_lock(&gate.mutex); /* the first callback waits here */
    size_t room = storage_append_room(storage), accepted = 0;
    assert_true(room > 40 && room < 90);
    enum status status;
    while ((status = storage_append(storage, a, accepted, kv, landmark, gate_cb, &gate)) ==
           STATUS_OK)
        accepted++;
    assert_int_equal(status, STATUS_BUSY);
    assert_true(accepted >= room);
    assert_int_equal(storage_append_room(storage), 0);
    /* What was promised when there was room is taken though others have filled it. */
    for (int i = 0; i < 3; i++)
        assert_int_equal(
            storage_append_promised(storage, a, accepted++, kv, landmark, gate_cb, &gate),
            STATUS_OK);
    assert_int_equal(storage_append_room(storage), 0);
    assert_int_equal(storage_append(storage, a, accepted, kv, landmark, gate_cb, &gate),
                     STATUS_BUSY);
    assert_int_equal(storage_memory_delete(storage, "b", gate_cb, &gate), STATUS_BUSY);
    /* One that nobody waits for always is: nobody would ask again. */
    assert_int_equal(storage_memory_delete(storage, "b", NULL, NULL), STATUS_OK);
    pthread_mutex_unlock(&gate.mutex);
    /* A write larger than the queue is not locked out for ever. */
    unsigned char *snapshot = calloc(1, 200000);
    struct storage_commit commit = {.id = "a", .snapshot = snapshot, .snapshot_bytes = 200000};
    while ((status = storage_commit(storage, &commit, gate_cb, &gate)) == STATUS_BUSY)
        usleep(1000);
    assert_int_equal(status, STATUS_OK);
    accepted++;
    storage_close(storage);
    assert_int_equal(gate.answered, accepted);
    pthread_mutex_destroy(&gate.mutex);
    free(snapshot);
}

struct order {
    uint64_t next;
    bool wrong;
};
struct ordered {
    struct order *order;
    uint64_t number;
};

static void order_cb(void *context, enum status status)
{
    struct ordered *one = context;
    if (one->order->next != one->number || status != STATUS_OK)
        one->order->wrong = true;
    one->order->next++;
}

/* Answers come in the order of the queue, across branches and kinds. */
static void test_order_of_answers(void **state)
{
    enum { COUNT = 5000 };
    struct storage *storage = store_tree_open(*state);
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    struct order order = {0};
    struct ordered *items = calloc(COUNT, sizeof *items);
    uint64_t next[3] = {0}, branches[3];
    static const char *const ids[3] = {"a", "b", "c"};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(store_create(storage, ids[i], NULL), STATUS_OK);
        branches[i] = store_tree_branch(storage, ids[i]);
    }
    for (uint64_t i = 0; i < COUNT; i++) {
        size_t b = (size_t)(i * i % 7) % 3;
        items[i] = (struct ordered){&order, i};
        if (i % 97 == 0)
            assert_int_equal(
                storage_memory_update(storage, ids[b], "{}", NULL, order_cb, &items[i]), STATUS_OK);
        else
            assert_int_equal(
                storage_append(storage, branches[b], next[b]++, kv, landmark, order_cb, &items[i]),
                STATUS_OK);
    }
    storage_close(storage);
    assert_int_equal(order.next, COUNT);
    assert_false(order.wrong);
    free(items);
    store_past_check(*state);
}

/* Readers and the writer at once, for the thread sanitizer as much as for the values. */
struct racer {
    struct storage *storage;
    uint64_t branch;
    uint64_t committed; /* atomic */
    bool failed;
};

static void *race_reader(void *context)
{
    struct racer *racer = context;
    unsigned char got[KV], want[KV];
    for (uint64_t end = 0, i = 0; end < 400; i++) {
        end = __atomic_load_n(&racer->committed, __ATOMIC_ACQUIRE);
        if (end == 0)
            continue;
        uint64_t index = i * 7919 % end;
        struct storage_read read = {racer->branch, index, got};
        store_fill(want, KV, racer->branch, index);
        if (storage_read_chunks(racer->storage, &read, 1) || memcmp(got, want, KV) != 0)
            racer->failed = true;
        struct storage_memory memory;
        if (storage_memory_get(racer->storage, "a", &memory))
            racer->failed = true;
        else
            storage_memory_close(&memory);
    }
    return NULL;
}

static void test_readers_and_writer(void **state)
{
    struct storage *storage = store_tree_open(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    struct racer racer = {.storage = storage, .branch = store_tree_branch(storage, "a")};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, race_reader, &racer), 0);
    for (uint64_t c = 0; c < 400; c += 20) {
        store_tree_write(storage, "a", (c + 20) * S);
        __atomic_store_n(&racer.committed, c + 20, __ATOMIC_RELEASE);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    assert_false(racer.failed);
    storage_close(storage);
}

/* The map fills up: what does not fit fails alone, reads go on, a delete goes through, and then
 * there is room again. */
static void test_map_full(void **state)
{
    struct storage_options options = store_tree_options(*state);
    struct storage *storage;
    struct error err;
    options.map_bytes = 4 * LIMITS_MIB;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    for (int round = 0; round < 5; round++) {
        assert_int_equal(store_create(storage, "small", NULL), STATUS_OK);
        store_tree_write(storage, "small", 500);
        uint64_t small = store_tree_branch(storage, "small");
        assert_int_equal(store_create(storage, "big", NULL), STATUS_OK);
        uint64_t big = store_tree_branch(storage, "big"), position = 0;
        enum status status = STATUS_OK;
        while (!status) {
            status = store_tree_append(storage, big, position / S, position / S + 50);
            if (!status)
                status = store_tree_commit(storage, "big", position + 50 * S);
            if (!status)
                position += 50 * S;
        }
        assert_int_equal(status, STATUS_DISK_FULL);
        print_message("round %d: full at %llu tokens\n", round, (unsigned long long)position);
        assert_true(position >= 2000 * S); /* 1.3 MB of chunks and tokens in 4 MiB */
        store_tree_assert(storage, "small", &(struct store_segment){small, 500}, 1);
        store_tree_assert(storage, "big", &(struct store_segment){big, position}, 1);
        assert_int_equal(store_truncate(storage, "big"), STATUS_OK);
        assert_int_equal(store_remove(storage, "big"), STATUS_OK);
        store_tree_write(storage, "small",
                         1500); /* at once, before anything was collected in peace */
        store_tree_assert(storage, "small", &(struct store_segment){small, 1500}, 1);
        assert_int_equal(store_remove(storage, "small"), STATUS_OK);
        store_wait_collected(storage);
        if (round % 2) {
            storage_close(storage);
            store_past_check(*state);
            assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
        }
    }
    storage_close(storage);
    store_past_check(*state);
}

/* In one group: the item that does not fit fails, its neighbours do not. */
static void test_bad_neighbour(void **state)
{
    struct storage_options options = store_tree_options(*state);
    struct storage *storage;
    struct error err;
    options.map_bytes = 4 * LIMITS_MIB;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "b", NULL), STATUS_OK);
    uint64_t a = store_tree_branch(storage, "a");
    unsigned char *snapshot = calloc(1, 8 * LIMITS_MIB), kv[KV], landmark[LANDMARK];
    struct storage_commit commit = {
        .id = "b", .snapshot = snapshot, .snapshot_bytes = 8 * LIMITS_MIB};
    struct store_wait waits[41], big;
    for (int i = 0; i < 41; i++)
        store_wait_init(&waits[i]);
    store_wait_init(&big);
    for (uint64_t i = 0; i < 40; i++) {
        store_fill(kv, sizeof kv, a, i);
        store_fill(landmark, sizeof landmark, ~a, i);
        if (i == 20)
            assert_int_equal(storage_commit(storage, &commit, store_wait_cb, &big), STATUS_OK);
        assert_int_equal(storage_append(storage, a, i, kv, landmark, store_wait_cb, &waits[i]),
                         STATUS_OK);
    }
    for (int i = 0; i < 40; i++)
        assert_int_equal(store_wait_finish(&waits[i], STATUS_OK), STATUS_OK);
    assert_int_equal(store_wait_finish(&big, STATUS_OK), STATUS_DISK_FULL);
    assert_int_equal(store_tree_commit(storage, "a", 40 * S), STATUS_OK);
    store_tree_assert(storage, "a", &(struct store_segment){a, 40 * S}, 1);
    /* What follows hears the same, until it is truncated. */
    assert_int_equal(store_tree_commit(storage, "b", 0), STATUS_DISK_FULL);
    assert_int_equal(store_truncate(storage, "b"), STATUS_OK);
    assert_int_equal(store_tree_commit(storage, "b", 0), STATUS_OK);
    storage_close(storage);
    free(snapshot);
    store_past_check(*state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORE_TEST(test_full_queue),         STORE_TEST(test_order_of_answers),
        STORE_TEST(test_readers_and_writer), STORE_TEST(test_map_full),
        STORE_TEST(test_bad_neighbour),
    };
    return cmocka_run_group_tests_name("storage_queue", tests, NULL, NULL);
}
