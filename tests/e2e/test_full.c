/* A store that is full: what does not fit is refused with 507 and a word on what to do, what was
 * acknowledged stays, and a delete makes room again. A folder that another daemon has. A file that
 * was cut short, or is while it is served. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define SERVE "serve --port 0 --model \"$1\" --data" /* and the folder */
#define UNREADABLE "data.mdb"

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

/* Runs `rambad` with these words in front of the folder; its output must name the folder. Returns
 * the exit code. */
static int run_on_folder(const struct full *full, const char *words, const char *expected)
{
    char command[200];
    struct buf output;
    buf_init(&output);
    snprintf(command, sizeof command, "\"$RAMBAD_BIN\" %s \"$0\" 2>&1", words);
    const char *const argv[] = {"/bin/sh",          "-c", command, full->daemon.data,
                                full->daemon.model, NULL};
    const int code = daemon_run(&full->daemon, argv, &output);
    if (!strstr(buf_text(&output), expected) || !strstr(buf_text(&output), full->daemon.data))
        fail_msg("%s: exit code %d: %s", words, code, buf_text(&output));
    buf_close(&output);
    return code;
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
    snprintf(path, sizeof path, "in use by process %d", (int)full->daemon.pid);
    assert_int_equal(run_on_folder(full, SERVE, path), 1);
    assert_int_equal(append(full, second, 41000, 100, &answer), 200);
    daemon_stop(&full->daemon);
    daemon_check(&full->daemon);
    buf_close(&answer);
}

static void cut(const struct full *full, off_t size)
{
    char path[1100];
    snprintf(path, sizeof path, "%s/data.mdb", full->daemon.data);
    assert_int_equal(truncate(path, size), 0);
}

/* Half of the file is gone: whoever needs the rest ends with a message, not with a crash. */
static void test_cut(void **state)
{
    struct full *full = *state;
    char id[LIMITS_ID_BYTES], path[160], line[8192];
    struct buf answer;
    int how;
    buf_init(&answer);
    /* In a store of its own, where nothing is left to do that would make the file long again. */
    daemon_init(&full->daemon, MODEL, full->folder, "cut");
    daemon_start(&full->daemon);
    daemon_create_memory(&full->daemon, NULL, id);
    assert_int_equal(append(full, id, 0, 3000, &answer), 200);
    daemon_stop(&full->daemon); /* what it had in RAM is gone */
    daemon_start(&full->daemon);
    cut(full, 8192);
    snprintf(path, sizeof path, "/v1/memories/%s/chunks?from=0&limit=100", id);
    assert_int_equal(daemon_call(&full->daemon, "GET", path, NULL, NULL, 0, &answer), 0);
    assert_int_equal(waitpid(full->daemon.pid, &how, 0), full->daemon.pid);
    full->daemon.pid = 0;
    if (!WIFEXITED(how) || WEXITSTATUS(how) != 1) {
        daemon_print_log(&full->daemon);
        fail_msg("the daemon ended with %s %d", WIFEXITED(how) ? "exit code" : "signal",
                 WIFEXITED(how) ? WEXITSTATUS(how) : WTERMSIG(how));
    }
    FILE *log = fopen(full->daemon.log, "r");
    bool told = false;
    assert_non_null(log);
    while (fgets(line, sizeof line, log))
        told |= strstr(line, UNREADABLE) && strstr(line, full->daemon.data);
    fclose(log);
    assert_true(told);
    assert_int_equal(run_on_folder(full, "check", UNREADABLE), 1);
    assert_int_equal(run_on_folder(full, "repair", UNREADABLE), 1);
    assert_int_equal(run_on_folder(full, SERVE, UNREADABLE), 1);
    cut(full, 1000); /* not even the first page */
    assert_int_equal(run_on_folder(full, "check", "cannot open the store"), 1);
    assert_int_equal(run_on_folder(full, SERVE, "cannot open the store"), 1);
    buf_close(&answer);
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
    if (!full)
        return 1;
    full->folder = store_helper_folder();
    daemon_init(&full->daemon, MODEL, full->folder, "data");
    full->daemon.flags = flags;
    buf_init(&full->text);
    daemon_write_book(&full->text, 60000);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_full, NULL, teardown, full),
        cmocka_unit_test_prestate_setup_teardown(test_cut, NULL, teardown, full),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    store_helper_remove(full->folder);
    buf_close(&full->text);
    free(full);
    return failed;
}
