/* Pages of the past by themselves: what is pinned together is pinned once, what is unread is known
 * and read once, and memory grows ahead of need but never beyond its capacity. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/memory.h"
#include "engine/ref/ref.h"

#define PAGE_BYTES 64
#define PAGES_MOST 1000

/* A past whose chunks hold their index; `lost` is damaged. */
struct past {
    uint64_t lost;
    size_t reads;
};

static enum status read_past(void *context, const struct chunk_read *reads, size_t count)
{
    struct past *past = context;
    past->reads += count;
    for (size_t i = 0; i < count; i++) {
        if (reads[i].key.index == past->lost)
            return STATUS_CORRUPT;
        memset(reads[i].kv, (int)reads[i].key.index, PAGE_BYTES);
    }
    return STATUS_OK;
}

struct bed {
    struct memory memory;
    struct past past;
    struct chunk_io io;
    uint64_t stamp;
    struct memory_page *list[PAGES_MOST];
    struct memory_pins pins;
    const void *data[PAGES_MOST];
};

static void open_bed(struct bed *bed, size_t capacity)
{
    *bed = (struct bed){.past.lost = UINT64_MAX, .io.read = read_past};
    bed->io.context = &bed->past;
    bed->pins.pages = bed->list;
    assert_int_equal(memory_open(&bed->memory, ops_ref(), NULL, PAGE_BYTES, capacity, 64, 0),
                     STATUS_OK);
}

static bool pin(struct bed *bed, uint64_t branch, const uint64_t *chunks, size_t count)
{
    return memory_pin_chunks(&bed->memory, branch, chunks, count, bed->stamp, bed->data,
                             &bed->pins);
}

static enum status load(struct bed *bed)
{
    return memory_load(&bed->memory, &bed->io, bed->pins.pages, bed->pins.unread);
}

static void let_go(struct bed *bed)
{
    while (bed->pins.count)
        memory_page_unpin(&bed->memory, bed->pins.pages[--bed->pins.count]);
    bed->pins.unread = 0;
    bed->stamp++;
}

/* What was pinned last has come. */
static void holds(const struct bed *bed, const uint64_t *chunks, size_t count)
{
    for (size_t i = 0; i < count; i++)
        assert_int_equal(*(const uint8_t *)bed->data[i], chunks[i]);
}

static size_t free_pages(const struct memory *memory)
{
    size_t count = 0;
    for (const struct memory_page *page = memory->free_pages; page; page = page->next)
        count++;
    return count;
}

static void what_is_unread_is_read_once(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 100);
    bed.stamp = 1;
    const uint64_t first[] = {2, 5, 7}, then[] = {1, 2, 5, 6, 7, 9}, shared[] = {5, 9, 10};
    assert_true(pin(&bed, 1, first, 3));
    assert_int_equal(bed.pins.unread, 3);
    assert_int_equal(load(&bed), STATUS_OK);
    holds(&bed, first, 3);
    let_go(&bed);
    assert_true(pin(&bed, 1, then, 6));
    assert_int_equal(bed.pins.count, 6);
    assert_int_equal(bed.pins.unread, 3);
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(bed.pins.pages[i]->unread, i < 3);
    /* Another sequence of the same past: its pages are found, and pinned when they are new. */
    assert_true(pin(&bed, 1, shared, 3));
    assert_int_equal(bed.pins.count, 7);
    assert_int_equal(bed.pins.unread, 4);
    assert_int_equal(bed.memory.pinned, 7);
    assert_int_equal(load(&bed), STATUS_OK);
    holds(&bed, shared, 3);
    assert_int_equal(bed.past.reads, 3 + 4);
    assert_int_equal(bed.memory.hits, 3);
    assert_int_equal(bed.memory.misses, 7);
    /* And another past, whose chunks have the same numbers. */
    assert_true(pin(&bed, 2, first, 3));
    assert_int_equal(bed.pins.count, 10);
    let_go(&bed);
    assert_int_equal(bed.memory.pinned, 0);
    memory_close(&bed.memory);
}

static void what_cannot_be_read_is_gone(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 100);
    bed.stamp = 1;
    const uint64_t first[] = {3, 4}, then[] = {3, 4, 8, 11};
    assert_true(pin(&bed, 1, first, 2));
    assert_int_equal(load(&bed), STATUS_OK);
    let_go(&bed);
    bed.past.lost = 11;
    assert_true(pin(&bed, 1, then, 4));
    assert_int_equal(load(&bed), STATUS_CORRUPT);
    let_go(&bed);
    assert_int_equal(bed.memory.pinned, 0);
    assert_int_equal(bed.memory.free, free_pages(&bed.memory));
    assert_true(pin(&bed, 1, then, 4));
    assert_int_equal(bed.pins.unread, 2); /* those that were here still are */
    let_go(&bed);
    memory_close(&bed.memory);
}

static void no_more_is_pinned_than_fits(void **state)
{
    (void)state;
    struct bed bed;
    uint64_t chunks[PAGES_MOST];
    for (size_t i = 0; i < PAGES_MOST; i++)
        chunks[i] = 3 * i;
    open_bed(&bed, 300);
    bed.stamp = 1;
    assert_true(pin(&bed, 1, chunks, 300));
    assert_int_equal(load(&bed), STATUS_OK);
    let_go(&bed);
    assert_int_equal(memory_room(&bed.memory), 300);
    assert_false(pin(&bed, 1, chunks + 200, 301));
    assert_int_equal(bed.pins.count, 300);
    assert_int_equal(bed.memory.evictions, 200);
    let_go(&bed);
    assert_int_equal(bed.memory.pinned, 0);
    memory_close(&bed.memory);
}

static void memory_grows_ahead(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 300);
    for (uint64_t i = 0; i < 500; i++) {
        bed.stamp = i + 1;
        memory_grow_ahead(&bed.memory);
        const size_t allocated = bed.memory.allocated;
        assert_true(allocated <= 300);
        assert_true(pin(&bed, 1, &i, 1));
        assert_int_equal(bed.memory.allocated, allocated);
        assert_int_equal(bed.memory.free, free_pages(&bed.memory));
        assert_int_equal(load(&bed), STATUS_OK);
        let_go(&bed);
    }
    assert_int_equal(bed.memory.allocated, 300);
    assert_int_equal(bed.memory.evictions, 200);
    memory_close(&bed.memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_unread_is_read_once),
        cmocka_unit_test(what_cannot_be_read_is_gone),
        cmocka_unit_test(no_more_is_pinned_than_fits),
        cmocka_unit_test(memory_grows_ahead),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
