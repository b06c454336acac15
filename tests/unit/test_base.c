/* proto/base: numbers as text against printf's, and lists that move whole. */
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "proto/base/buf.h"
#include "proto/base/list.h"

static void test_numbers(void **state)
{
    (void)state;
    struct buf out;
    char decimal[32], hex[32];
    buf_init(&out);
    for (int bit = 0; bit <= 64; bit++)
        for (uint64_t near = 0; near < 3; near++) {
            const uint64_t value = (bit < 64 ? UINT64_C(1) << bit : 0) + near - 1;
            snprintf(decimal, sizeof decimal, "%" PRIu64, value);
            snprintf(hex, sizeof hex, "%016" PRIx64, value);
            out.size = 0;
            buf_append_number(&out, value, 10, 1);
            assert_string_equal(buf_text(&out), decimal);
            out.size = 0;
            buf_append_number(&out, value, 16, 16);
            assert_string_equal(buf_text(&out), hex);
        }
    buf_close(&out);
}

/* The list holds these nodes of the array, in this order, whichever way it is read. */
static void assert_holds(const struct list *list, const struct list *nodes, size_t count)
{
    const struct list *at = list->next, *back = list->prev;
    for (size_t i = 0; i < count; i++, at = at->next, back = back->prev) {
        assert_ptr_equal(at, &nodes[i]);
        assert_ptr_equal(back, &nodes[count - 1 - i]);
    }
    assert_ptr_equal(at, list);
    assert_ptr_equal(back, list);
}

static void test_lists(void **state)
{
    (void)state;
    for (size_t first = 0; first <= 2; first++)
        for (size_t second = 0; second <= 2; second++) {
            struct list nodes[4], a, b, all;
            list_init(&a);
            list_init(&b);
            for (size_t i = 0; i < first + second; i++)
                list_push_back(i < first ? &a : &b, &nodes[i]);
            list_append_all(&a, &b);
            assert_holds(&a, nodes, first + second);
            assert_true(list_empty(&b));
            list_take_all(&a, &all);
            assert_holds(&all, nodes, first + second);
            assert_true(list_empty(&a));
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_lists),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
