/* Many forks of a long memory: each costs less than one snapshot and no chunk, and answers as its
 * parent does; also after a kill -9, from disk, and after its parent is gone.
 *
 * RAMBAD_LONG=1: 1,000 forks of a million tokens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8" /* a token a byte */
#define QUESTION "What was the last number?"
#define APPEND_BYTES 100000

static unsigned fork_count = 150;
static size_t tokens = 60000;

static void write_book(const struct daemon *daemon, const char *id)
{
    struct buf text;
    buf_init(&text);
    for (uint64_t i = 0, done = 0; done < tokens; done += text.size) {
        text.size = 0;
        while (text.size < APPEND_BYTES && done + text.size < tokens)
            buf_append_format(&text, "%llu. ", (unsigned long long)(i++ * 7919 % 104729));
        daemon_append_text(daemon, id, text.data, text.size);
    }
    buf_close(&text);
}

static void assert_answers(const struct daemon *daemon, const char *id, const char *expected)
{
    struct client_completion said = daemon_complete(daemon, id, QUESTION, 24, false);
    if (strcmp(said.text, expected) != 0)
        fail_msg("%s says \"%s\", its parent \"%s\"", id, said.text, expected);
    client_json_completion_close(&said);
}

static void remove_memory(const struct daemon *daemon, const char *id)
{
    struct wire_answer answer;
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    assert_int_equal(wire_call(daemon, "DELETE", path, NULL, &answer), 200);
    wire_answer_close(&answer);
}

/* What one more turn of a memory takes: its snapshot, and next to nothing else. */
static uint64_t snapshot_bytes(const struct daemon *daemon, const char *from)
{
    char id[LIMITS_ID_BYTES];
    daemon_create_memory(daemon, from, id);
    assert_int_equal(daemon_get_memory(daemon, id).bytes_on_disk, 0);
    struct client_completion said = daemon_complete(daemon, id, "So?", 1, true);
    client_json_completion_close(&said);
    const uint64_t bytes = daemon_get_memory(daemon, id).bytes_on_disk;
    remove_memory(daemon, id);
    return bytes;
}

static void assert_no_chunks(const struct daemon *daemon)
{
    static const char script[] = "exec \"$RAMBAD_BIN\" check \"$0\"";
    const char *const argv[] = {"/bin/sh", "-c", script, daemon->data, NULL};
    struct buf out;
    buf_init(&out);
    assert_int_equal(daemon_run(daemon, argv, &out), 0);
    if (!strstr(buf_text(&out), " 0 chunks, 0 tokens"))
        fail_msg("%s", buf_text(&out));
    buf_close(&out);
}

static void test_forks(void **state)
{
    /* Little room for chunks, so that answers read them from disk. */
    static const char *const flags[] = {"--host-memory", "1M", NULL};
    char parent[LIMITS_ID_BYTES];
    char(*forks)[LIMITS_ID_BYTES] = calloc(fork_count, sizeof *forks);
    struct daemon daemon;
    char *folder = daemon_begin(&daemon, MODEL, flags);
    (void)state;
    const double start = daemon_now();
    daemon_create_memory(&daemon, NULL, parent);
    write_book(&daemon, parent);
    const struct client_memory memory = daemon_get_memory(&daemon, parent);
    assert_true(memory.token_count >= tokens);
    struct client_completion said = daemon_complete(&daemon, parent, QUESTION, 24, false);
    const double written = daemon_now();
    const uint64_t snapshot = snapshot_bytes(&daemon, parent);

    const double before = wire_metric(&daemon, "rambad_map_used_bytes");
    for (unsigned i = 0; i < fork_count; i++) /* some of forks, two deep and deeper */
        daemon_create_memory(&daemon, i % 10 || !i ? parent : forks[i / 2], forks[i]);
    const double each = (wire_metric(&daemon, "rambad_map_used_bytes") - before) / fork_count;
    print_message("%llu tokens: %llu bytes, a snapshot %llu; %u forks, %.0f bytes each\n",
                  (unsigned long long)memory.token_count, (unsigned long long)memory.bytes_on_disk,
                  (unsigned long long)snapshot, fork_count, each);
    assert_true(each < 1.1 * (double)snapshot);
    const double forked = daemon_now();
    for (unsigned i = 0; i < fork_count; i++) {
        const struct client_memory fork = daemon_get_memory(&daemon, forks[i]);
        assert_int_equal(fork.bytes_on_disk, 0);
        assert_int_equal(fork.token_count, memory.token_count);
        assert_int_equal(fork.chunk_count, memory.chunk_count);
        assert_answers(&daemon, forks[i], said.text);
    }
    const double asked = daemon_now();

    /* One that goes on pays for itself alone, and changes nothing for the others. */
    struct client_completion other = daemon_complete(&daemon, forks[1], "And then?", 8, true);
    client_json_completion_close(&other);
    assert_true(daemon_get_memory(&daemon, forks[1]).bytes_on_disk < 2 * snapshot);
    assert_answers(&daemon, forks[2], said.text);
    daemon_kill(&daemon);
    daemon_start(&daemon);
    remove_memory(&daemon, parent);
    for (unsigned i = 2; i < fork_count; i += fork_count / 20)
        assert_answers(&daemon, forks[i], said.text);
    assert_true(wire_metric(&daemon, "rambad_page_hits_total{tier=\"disk\"}") > 0);
    assert_true(wire_metric(&daemon, "rambad_page_read_bytes_total{tier=\"disk\"}") > 0);
    assert_true(wire_metric(&daemon, "rambad_page_read_seconds_total{tier=\"disk\"}") > 0);
    print_message("%.1f s to read it in, %.1f s to fork, %.1f s to ask each\n", written - start,
                  forked - written, asked - forked);
    /* With the last of them the chunks go too. */
    for (unsigned i = 0; i < fork_count; i++)
        remove_memory(&daemon, forks[i]);
    wire_wait_metric(&daemon, "rambad_branches_to_collect", 0);
    daemon_stop(&daemon);
    assert_no_chunks(&daemon);
    client_json_completion_close(&said);
    free(forks);
    daemon_end(&daemon, folder);
}

int main(void)
{
    if (getenv("RAMBAD_LONG")) {
        fork_count = 1000;
        tokens = 1000000;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_forks)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
