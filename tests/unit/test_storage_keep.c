/* Objects and lists of items: there with their turn and only with it, listed in both directions,
 * gone with what they belong to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/lib/store_helper.h"
#include "tests/lib/store_past.h"

/* An object that says `text`, made for memory "a". */
static struct storage_object object_of(const char *id, const char *text)
{
    struct storage_object object = {
        .made_memory = true, .created_at = 12, .bytes = text, .size = strlen(text)};
    snprintf(object.id, sizeof object.id, "%s", id);
    strcpy(object.memory, "a");
    strcpy(object.tenant, "ann");
    return object;
}

static struct storage_item item_of(const char *text)
{
    struct storage_item item = {.bytes = text, .size = strlen(text)};
    snprintf(item.id, sizeof item.id, "i-%s", text);
    return item;
}

/* A turn of `count` tokens that leads memory "a" to `position`. */
static enum status commit(struct storage *storage, uint64_t position, size_t count, bool settles,
                          const struct storage_keep *keep)
{
    static const int32_t tokens[STORE_PAST_CHUNK] = {1, 2, 3, 4};
    const struct storage_commit write = {.id = "a",
                                         .position = position,
                                         .tokens = tokens,
                                         .token_count = count,
                                         .text_bytes = position,
                                         .snapshot = "snapshot",
                                         .snapshot_bytes = 8,
                                         .settles = settles,
                                         .keep = keep};
    return store_commit(storage, &write);
}

/* The turn to `position` with an object of that id, and an item for memory "a" and for it. */
static enum status commit_object(struct storage *storage, uint64_t position, size_t count,
                                 const char *id)
{
    const struct storage_object object = object_of(id, id);
    const struct storage_item items[] = {item_of(id), item_of("x")};
    const struct storage_keep keep = {.object = &object, .lists = {{id, items, 2}}};
    return commit(storage, position, count, position == count, &keep);
}

static enum status put(struct storage *storage, const struct storage_keep *keep)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_put(storage, keep, store_wait_cb, &wait));
}

static enum status delete_object(struct storage *storage, const char *id, bool with_memory)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait,
                             storage_object_delete(storage, id, with_memory, store_wait_cb, &wait));
}

static void assert_object(struct storage *storage, const char *id, uint64_t position,
                          bool reachable)
{
    struct storage_object object;
    assert_int_equal(storage_object_get(storage, id, &object), STATUS_OK);
    assert_string_equal(object.id, id);
    assert_string_equal(object.bytes, id);
    assert_int_equal(object.size, strlen(id));
    assert_string_equal(object.tenant, "ann");
    assert_string_equal(object.memory, "a");
    assert_int_equal(object.created_at, 12);
    assert_int_equal(object.position, position);
    assert_int_equal(object.reachable, reachable);
    assert_true(object.made_memory);
    storage_object_close(&object);
}

static void assert_no_object(struct storage *storage, const char *id)
{
    struct storage_object object;
    assert_int_equal(storage_object_get(storage, id, &object), STATUS_NOT_FOUND);
}

/* The texts of a page, with a space behind each, and whether there are others. */
static void assert_list(struct storage *storage, const char *owner, const char *after, bool newest,
                        size_t limit, const char *texts, bool more)
{
    struct storage_item items[8];
    char seen[256] = "";
    size_t count;
    bool has_more;
    assert_int_equal(
        storage_item_list(storage, owner, after, newest, limit, items, &count, &has_more),
        STATUS_OK);
    for (size_t i = 0; i < count; i++) {
        char id[LIMITS_ID_BYTES];
        snprintf(id, sizeof id, "i-%s", (const char *)items[i].bytes);
        assert_string_equal(items[i].id, id);
        snprintf(seen + strlen(seen), sizeof seen - strlen(seen), "%s ",
                 (const char *)items[i].bytes);
    }
    storage_items_close(items, count);
    assert_string_equal(seen, texts);
    assert_int_equal(has_more, more);
}

static void test_with_its_turn(void **state)
{
    struct storage *storage = store_past_open(*state);
    assert_int_equal(store_create_ephemeral(storage, "a", NULL), STATUS_OK);
    assert_int_equal(commit_object(storage, 3, 3, "r1"), STATUS_OK);
    assert_int_equal(commit_object(storage, 9, 1, "r2"), STATUS_CONFLICT); /* a hole */
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    assert_no_object(storage, "r2");
    assert_list(storage, "r2", NULL, false, 8, "", false);
    assert_int_equal(commit_object(storage, 5, 2, "r2"), STATUS_OK);
    for (int i = 0; i < 2; i++) {
        assert_object(storage, "r1", 3, true);
        assert_object(storage, "r2", 5, true);
        assert_list(storage, "r1", NULL, false, 8, "r1 x ", false);
        /* It was ephemeral until its first turn, and outlives this. */
        assert_int_equal(store_past_get(storage, "a").token_count, 5);
        storage_close(storage);
        store_past_check(*state);
        storage = store_past_open(*state);
    }
    storage_close(storage);
}

static void test_lists(void **state)
{
    struct storage *storage = store_past_open(*state);
    const struct storage_item items[] = {item_of("1"), item_of("2"), item_of("3"), item_of("4")};
    const struct storage_item more[] = {item_of("5")};
    struct storage_keep keep = {.lists = {{"a", items, 4}, {"ab", more, 1}}};
    struct storage_item one;
    size_t count;
    bool has_more;
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "ab", NULL), STATUS_OK);
    assert_int_equal(put(storage, &keep), STATUS_OK);
    keep = (struct storage_keep){.lists = {{"a", more, 1}}};
    assert_int_equal(put(storage, &keep), STATUS_OK);
    assert_list(storage, "a", NULL, false, 8, "1 2 3 4 5 ", false);
    assert_list(storage, "a", NULL, true, 8, "5 4 3 2 1 ", false);
    assert_list(storage, "a", NULL, true, 2, "5 4 ", true);
    assert_list(storage, "a", "i-4", true, 3, "3 2 1 ", false);
    assert_list(storage, "a", "i-2", false, 2, "3 4 ", true);
    assert_list(storage, "a", "i-5", false, 2, "", false);
    assert_list(storage, "ab", NULL, true, 8, "5 ", false);
    assert_list(storage, "none", NULL, true, 8, "", false);
    assert_int_equal(storage_item_list(storage, "a", "i-none", true, 1, &one, &count, &has_more),
                     STATUS_NOT_FOUND);
    assert_int_equal(storage_item_get(storage, "a", "i-4", &one), STATUS_OK);
    assert_string_equal(one.bytes, "4");
    storage_items_close(&one, 1);
    assert_int_equal(storage_item_get(storage, "ab", "i-4", &one), STATUS_NOT_FOUND);
    assert_int_equal(store_remove(storage, "a"), STATUS_OK);
    assert_list(storage, "a", NULL, false, 8, "", false);
    assert_list(storage, "ab", NULL, true, 8, "5 ", false);
    storage_close(storage);
    store_past_check(*state);
}

static void test_deletes(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct storage_memory memory;
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(commit_object(storage, 3, 3, "r1"), STATUS_OK);
    assert_int_equal(commit_object(storage, 5, 2, "r2"), STATUS_OK);
    assert_int_equal(commit_object(storage, 6, 1, "r3"), STATUS_OK);
    assert_int_equal(delete_object(storage, "r2", true), STATUS_OK);
    assert_int_equal(delete_object(storage, "r2", true), STATUS_NOT_FOUND);
    assert_list(storage, "r2", NULL, false, 8, "", false);
    assert_object(storage, "r3", 6, true);
    assert_int_equal(delete_object(storage, "r1", true), STATUS_OK);
    assert_int_equal(store_past_get(storage, "a").token_count, 6);
    assert_int_equal(delete_object(storage, "r3", true), STATUS_OK);
    assert_int_equal(storage_memory_get(storage, "a", &memory), STATUS_NOT_FOUND);
    /* Kept when it is in use. */
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(commit_object(storage, 3, 3, "r4"), STATUS_OK);
    assert_int_equal(delete_object(storage, "r4", false), STATUS_OK);
    assert_int_equal(store_past_get(storage, "a").token_count, 3);
    /* An object goes with the memory that was made for it; another outlives its own, but nothing
     * leads on from it. */
    assert_int_equal(commit_object(storage, 5, 2, "r5"), STATUS_OK);
    struct storage_object object = object_of("r6", "r6");
    const struct storage_keep keep = {.object = &object};
    object.made_memory = false;
    assert_int_equal(commit(storage, 6, 1, false, &keep), STATUS_OK);
    assert_int_equal(store_remove(storage, "a"), STATUS_OK);
    assert_no_object(storage, "r5");
    assert_list(storage, "r5", NULL, false, 8, "", false);
    assert_int_equal(storage_object_get(storage, "r6", &object), STATUS_OK);
    assert_false(object.reachable);
    storage_object_close(&object);
    assert_int_equal(delete_object(storage, "r6", true), STATUS_OK);
    storage_close(storage);
    store_past_check(*state);
}

/* A memory that goes back takes along what lies behind, and what it says anew is not the old. */
static void test_rewind(void **state)
{
    struct storage *storage = store_past_open(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(commit_object(storage, 3, 3, "r1"), STATUS_OK);
    assert_int_equal(commit_object(storage, 5, 2, "r2"), STATUS_OK);
    struct storage_object other = object_of("o1", "o1");
    const struct storage_keep keep = {.object = &other};
    other.made_memory = false;
    assert_int_equal(commit(storage, 6, 1, false, &keep), STATUS_OK);
    assert_int_equal(store_fork_at(storage, "e", "a", 3, true), STATUS_OK);
    assert_int_equal(store_replace(storage, "e", "a"), STATUS_OK);
    assert_object(storage, "r1", 3, true);
    assert_no_object(storage, "r2");
    assert_int_equal(commit_object(storage, 6, 3, "r3"), STATUS_OK);
    assert_object(storage, "r1", 3, true);
    assert_object(storage, "r3", 6, true);
    /* It stands at a place that is there again, and is not the same. */
    assert_int_equal(storage_object_get(storage, "o1", &other), STATUS_OK);
    assert_int_equal(other.position, 6);
    assert_false(other.reachable);
    storage_object_close(&other);
    assert_int_equal(delete_object(storage, "r1", true), STATUS_OK);
    assert_int_equal(store_past_get(storage, "a").token_count, 6);
    storage_close(storage);
    store_past_check(*state);
}

/* A past that is told anew, with its list: all of it, or nothing. */
static void test_replace(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_wait wait;
    struct storage_item got[8];
    size_t count;
    bool more;
    const struct storage_item first[] = {item_of("1"), item_of("2")}, second[] = {item_of("3")};
    const struct storage_item anew[] = {item_of("1"), item_of("3")};
    struct storage_keep keep = {.lists = {{"a", first, 2}}};
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(commit(storage, 2, 2, false, NULL), STATUS_OK);
    assert_int_equal(commit(storage, 4, 2, false, &keep), STATUS_OK);
    keep = (struct storage_keep){.lists = {{"a", second, 1}}};
    assert_int_equal(commit(storage, 6, 2, false, &keep), STATUS_OK);
    for (int i = 0; i < 2; i++) { /* the first is another's name, and refused */
        const struct storage_memory_options options = {
            .id = "e", .from = "a", .at = 2, .ephemeral = true};
        store_wait_init(&wait);
        assert_int_equal(store_wait_finish(
                             &wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
                         STATUS_OK);
        static const int32_t tokens[] = {5, 6, 7};
        const struct storage_commit write = {.id = "e",
                                             .position = 5,
                                             .tokens = tokens,
                                             .token_count = 3,
                                             .text_bytes = 5,
                                             .snapshot = "anew",
                                             .snapshot_bytes = 4};
        assert_int_equal(store_commit(storage, &write), STATUS_OK);
        keep = (struct storage_keep){.lists = {{"a", anew, 2}}};
        store_wait_init(&wait);
        const enum status status =
            store_wait_finish(&wait, storage_memory_replace(storage, i ? "e" : "none", "a", 2,
                                                            &keep, store_wait_cb, &wait));
        assert_int_equal(status, i ? STATUS_OK : STATUS_NOT_FOUND);
        assert_list(storage, "a", NULL, false, 8, i ? "1 3 " : "1 2 3 ", false);
        assert_int_equal(store_past_get(storage, "a").token_count, i ? 5 : 6);
        if (!i)
            assert_int_equal(store_remove(storage, "e"), STATUS_OK);
    }
    assert_int_equal(storage_item_list(storage, "a", NULL, false, 8, got, &count, &more),
                     STATUS_OK);
    for (size_t i = 0; i < count; i++)
        assert_int_equal(got[i].position, 5);
    storage_items_close(got, count);
    storage_close(storage);
    store_past_check(*state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {STORE_TEST(test_with_its_turn), STORE_TEST(test_lists),
                                       STORE_TEST(test_deletes), STORE_TEST(test_rewind),
                                       STORE_TEST(test_replace)};
    return cmocka_run_group_tests_name("storage_keep", tests, NULL, NULL);
}
