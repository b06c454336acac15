/* A store that is full: what does not fit is refused with 507 and a word on what to do, what was
 * acknowledged stays, and a delete makes room again. And a folder that another daemon has. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"

struct full {
    char *folder;
    struct daemon daemon;
    struct buf text;
};

static int append(const struct full *full, const char *id, size_t from, size_t size,
                  struct buf *answer)
{
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    answer->size = 0;
    return daemon_call(&full->daemon, "POST", path, "text/plain", full->text.data + from, size,
                       answer);
}

/* Fills the memory until nothing more fits; what it holds then is a beginning of the text. */
static struct client_memory fill(const struct full *full, const char *id)
{
    struct buf answer, chunks;
    buf_init(&answer);
    buf_init(&chunks);
    int code = append(full, id, 0, full->text.size, &answer);
    if (code != 507)
        fail_msg("HTTP %d: %s", code, buf_text(&answer));
    assert_non_null(strstr(buf_text(&answer), "disk_full"));
    struct client_memory memory = daemon_get_memory(&full->daemon, id);
    assert_true(memory.text_bytes > 0 && memory.text_bytes < full->text.size);
    assert_int_equal(daemon_read_chunks(&full->daemon, id, &chunks), memory.chunk_count);
    buf_close(&answer);
    buf_close(&chunks);
    return memory;
}

static void test_full(void **state)
{
    struct full *full = *state;
    char first[LIMITS_ID_BYTES], second[LIMITS_ID_BYTES], path[160];
    struct buf answer;
    buf_init(&answer);
    daemon_start(&full->daemon);
    daemon_create_memory(&full->daemon, NULL, first);
    daemon_create_memory(&full->daemon, NULL, second);
    assert_int_equal(append(full, second, 0, 1000, &answer), 200);
    struct client_memory before = fill(full, first);
    /* Again and again it is refused, and stays; across a kill too. */
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(append(full, first, (size_t)before.text_bytes, 200000, &answer), 507);
        struct client_memory now = daemon_get_memory(&full->daemon, first);
        assert_true(now.text_bytes >= before.text_bytes);
        before = now;
        if (i == 1) {
            daemon_kill(&full->daemon);
            daemon_start(&full->daemon);
            now = daemon_get_memory(&full->daemon, first);
            assert_int_equal(now.text_bytes, before.text_bytes);
        }
    }
    snprintf(path, sizeof path, "/v1/memories/%s", first);
    answer.size = 0;
    assert_int_equal(daemon_call(&full->daemon, "DELETE", path, NULL, NULL, 0, &answer), 200);
    assert_int_equal(append(full, second, 1000, 40000, &answer), 200);
    assert_int_equal(daemon_get_memory(&full->daemon, second).text_bytes, 41000);

    /* The folder is taken: a second daemon says by whom, and leaves it alone. */
    struct buf output;
    buf_init(&output);
    const char *const again[] = {"/bin/sh",
                                 "-c",
                                 "\"$RAMBAD_BIN\" serve --port 0 --data \"$0\" "
                                 "--model \"$1\" 2>&1",
                                 full->daemon.data,
                                 full->daemon.model,
                                 NULL};
    assert_int_equal(daemon_run(&full->daemon, again, &output), 1);
    snprintf(path, sizeof path, "in use by process %d", (int)full->daemon.pid);
    assert_non_null(strstr(buf_text(&output), path));
    assert_int_equal(append(full, second, 41000, 100, &answer), 200);
    daemon_stop(&full->daemon);
    daemon_check(&full->daemon);
    buf_close(&answer);
    buf_close(&output);
}

static int teardown(void **state)
{
    struct full *full = *state;
    daemon_kill(&full->daemon);
    return 0;
}

int main(void)
{
    static const char *const flags[] = {"--map-size", "8M", NULL};
    struct full *full = calloc(1, sizeof *full);
    char path[1024];
    if (!full)
        return 1;
    full->folder = store_helper_folder();
    snprintf(path, sizeof path, "%s/data", full->folder);
    mkdir(path, 0700);
    daemon_init(&full->daemon, MODEL, path);
    full->daemon.flags = flags;
    buf_init(&full->text);
    for (unsigned i = 0; i < 60000; i++)
        buf_append_format(&full->text, "%u. ", i * i % 977);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_full, NULL, teardown, full),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    store_helper_remove(full->folder);
    buf_close(&full->text);
    free(full);
    return failed;
}
