/* Any place of a memory's past: forks and rewinds to turns whose snapshot is kept, and to others by
 * reading the tokens again. Each must answer as the memory did when it stood there, before and
 * after a kill -9. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define TURNS 9 /* more than keep their snapshot */
/* Of what is appended first: more than a block. It is read again some thirty times. */
#ifdef __SANITIZE_THREAD__
#define WORDS 3600
#else
#define WORDS 6000
#endif

struct past {
    char *folder;
    struct daemon daemon;
    char id[LIMITS_ID_BYTES];
    uint64_t position[TURNS]; /* after each turn */
    struct client_completion answer[TURNS];
};

static int call(const struct past *past, const char *method, const char *path, const char *body,
                struct buf *answer)
{
    answer->size = 0;
    return daemon_call(&past->daemon, method, path, body ? "application/json" : NULL, body,
                       body ? strlen(body) : 0, answer);
}

/* Asks the memory to go on; its turn when `write`. */
static struct client_completion ask(const struct past *past, const char *id, const char *prompt,
                                    bool write)
{
    return daemon_complete(&past->daemon, id, prompt, 40, write);
}

static void assert_stands_at(const struct past *past, const char *id, unsigned turn)
{
    struct client_completion now = ask(past, id, "What now?", false);
    assert_int_equal(daemon_get_memory(&past->daemon, id).token_count, past->position[turn]);
    assert_int_equal(now.text_size, past->answer[turn].text_size);
    assert_memory_equal(now.text, past->answer[turn].text, now.text_size);
    client_json_completion_close(&now);
}

static struct client_memory fork_at(const struct past *past, const char *id, uint64_t at)
{
    char body[200];
    struct client_memory memory;
    struct buf answer;
    buf_init(&answer);
    snprintf(body, sizeof body, "{\"from\":\"%s\",\"at\":%llu}", id, (unsigned long long)at);
    int code = call(past, "POST", "/v1/memories", body, &answer);
    if (code != 201)
        fail_msg("HTTP %d: %s", code, buf_text(&answer));
    assert_int_equal(client_json_memory(answer.data, answer.size, &memory), STATUS_OK);
    assert_string_equal(memory.parent, id);
    assert_int_equal(memory.token_count, at);
    buf_close(&answer);
    return memory;
}

static int rewind_to(const struct past *past, const char *id, uint64_t to, struct buf *answer)
{
    char path[160], body[64];
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", id);
    snprintf(body, sizeof body, "{\"to\":%llu}", (unsigned long long)to);
    return call(past, "POST", path, body, answer);
}

static void remove_memory(const struct past *past, const char *id)
{
    char path[160];
    struct buf answer;
    buf_init(&answer);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    assert_int_equal(call(past, "DELETE", path, NULL, &answer), 200);
    buf_close(&answer);
}

/* An append of some blocks, then turns. */
static void live(struct past *past)
{
    char prompt[64];
    struct buf text;
    buf_init(&text);
    daemon_create_memory(&past->daemon, NULL, past->id);
    daemon_write_book(&text, WORDS);
    daemon_append_text(&past->daemon, past->id, text.data, text.size);
    for (unsigned i = 0; i < TURNS; i++) {
        if (i > 0) {
            snprintf(prompt, sizeof prompt, "And then, number %u, what did it say?", i);
            struct client_completion turn = ask(past, past->id, prompt, true);
            client_json_completion_close(&turn);
        }
        past->position[i] = daemon_get_memory(&past->daemon, past->id).token_count;
        past->answer[i] = ask(past, past->id, "What now?", false);
    }
    buf_close(&text);
}

static void test_turns(struct past *past)
{
    char path[160], want[160];
    struct buf answer;
    buf_init(&answer);
    snprintf(path, sizeof path, "/v1/memories/%s/turns?limit=3", past->id);
    assert_int_equal(call(past, "GET", path, NULL, &answer), 200);
    for (unsigned i = 0; i < 3; i++) {
        snprintf(want, sizeof want, "\"position\":%llu,\"parent\":%llu,",
                 (unsigned long long)past->position[TURNS - 1 - i],
                 (unsigned long long)past->position[TURNS - 2 - i]);
        assert_non_null(strstr(buf_text(&answer), want));
    }
    assert_non_null(strstr(buf_text(&answer), "\"has_more\":true"));
    /* A long append is one turn, and the oldest. */
    snprintf(path, sizeof path, "/v1/memories/%s/turns?from=%llu", past->id,
             (unsigned long long)past->position[0]);
    assert_int_equal(call(past, "GET", path, NULL, &answer), 200);
    snprintf(want, sizeof want,
             "{\"object\":\"list\",\"data\":[{\"object\":\"memory.turn\","
             "\"position\":%llu,\"parent\":null,",
             (unsigned long long)past->position[0]);
    assert_true(strncmp(buf_text(&answer), want, strlen(want)) == 0);
    assert_non_null(strstr(buf_text(&answer), "\"snapshot\":false"));
    assert_non_null(strstr(buf_text(&answer), "\"has_more\":false"));
    buf_close(&answer);
}

static void test_bookmarks(struct past *past)
{
    char path[160], body[160];
    struct buf answer;
    buf_init(&answer);
    snprintf(path, sizeof path, "/v1/memories/%s/turns", past->id);
    snprintf(body, sizeof body, "{\"position\":%llu,\"bookmark\":\"a good place\"}",
             (unsigned long long)past->position[TURNS - 3]);
    assert_int_equal(call(past, "POST", path, body, &answer), 200);
    assert_non_null(strstr(buf_text(&answer), "\"bookmark\":\"a good place\""));
    snprintf(body, sizeof body, "{\"position\":%llu}",
             (unsigned long long)past->position[TURNS - 3]);
    assert_int_equal(call(past, "POST", path, body, &answer), 200);
    assert_non_null(strstr(buf_text(&answer), "\"bookmark\":null"));
    snprintf(body, sizeof body, "{\"position\":%llu,\"bookmark\":\"too late\"}",
             (unsigned long long)past->position[0]);
    assert_int_equal(call(past, "POST", path, body, &answer), 409);
    assert_int_equal(call(past, "POST", path, "{\"position\":1,\"bookmark\":\"x\"}", &answer), 404);
    assert_int_equal(call(past, "POST", path, "{\"bookmark\":\"x\"}", &answer), 400);
    snprintf(path, sizeof path, "/v1/memories/%s/turns?position=%llu", past->id,
             (unsigned long long)past->position[TURNS - 1]);
    assert_int_equal(call(past, "DELETE", path, NULL, &answer), 409);
    buf_close(&answer);
}

static void test_refusals(struct past *past)
{
    char body[160];
    struct buf answer;
    buf_init(&answer);
    snprintf(body, sizeof body, "{\"from\":\"%s\",\"at\":%llu}", past->id,
             (unsigned long long)past->position[TURNS - 1] + 1);
    assert_int_equal(call(past, "POST", "/v1/memories", body, &answer), 400);
    assert_int_equal(call(past, "POST", "/v1/memories", "{\"at\":5}", &answer), 400);
    assert_int_equal(call(past, "POST", "/v1/memories", "{\"from\":\"mem_0\",\"at\":5}", &answer),
                     404);
    assert_int_equal(rewind_to(past, "mem_0", 5, &answer), 404);
    assert_int_equal(rewind_to(past, past->id, past->position[TURNS - 1] + 1, &answer), 400);
    buf_close(&answer);
}

/* The same from the command line: a fork at the oldest turn that is listed, rewound to its start.
 */
static void test_commands(struct past *past)
{
    char at[32], id[LIMITS_ID_BYTES];
    struct buf out;
    buf_init(&out);
    const char *const turns[] = {"turns", past->id, NULL};
    assert_int_equal(daemon_ramba(&past->daemon, turns, &out), 0);
    for (unsigned i = 0; i < TURNS; i++) {
        snprintf(at, sizeof at, " %llu ", (unsigned long long)past->position[i]);
        assert_non_null(strstr(buf_text(&out), at));
    }
    snprintf(at, sizeof at, "%llu", (unsigned long long)past->position[0]);
    const char *const fork[] = {"fork", past->id, "--at", at, NULL};
    out.size = 0;
    assert_int_equal(daemon_ramba(&past->daemon, fork, &out), 0);
    assert_true(out.size > 1 && out.size <= sizeof id);
    memcpy(id, out.data, out.size);
    id[out.size - 1] = 0;
    assert_stands_at(past, id, 0);
    const char *const rewind[] = {"rewind", id, "7", NULL};
    assert_int_equal(daemon_ramba(&past->daemon, rewind, &out), 0);
    assert_int_equal(daemon_get_memory(&past->daemon, id).token_count, 7);
    const char *const too_far[] = {"rewind", id, "8", NULL};
    assert_int_equal(daemon_ramba(&past->daemon, too_far, &out), 1);
    remove_memory(past, id);
    buf_close(&out);
}

/* A rewind with no snapshot of its place, as events: how far it is, then the memory. */
static void test_progress(struct past *past)
{
    char path[160], body[64];
    struct buf events;
    const struct client_memory fork = fork_at(past, past->id, past->position[0]);
    buf_init(&events);
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", fork.id);
    snprintf(body, sizeof body, "{\"to\":%llu}", (unsigned long long)fork.token_count - 3);
    assert_int_equal(daemon_append(&past->daemon, path, body, strlen(body), &events), 200);
    const char *text = buf_text(&events), *last = strstr(text, "data: {\"id\":");
    assert_non_null(last);
    assert_non_null(strstr(last, "\n\ndata: [DONE]\n\n"));
    const char *progress = strstr(text, "data: {\"object\":\"memory.replay.progress\"");
    assert_true(progress && progress < last);
    assert_int_equal(daemon_get_memory(&past->daemon, fork.id).token_count, fork.token_count - 3);
    /* What cannot be is refused with its status, before the stream begins. */
    snprintf(body, sizeof body, "{\"to\":%llu}", (unsigned long long)fork.token_count);
    assert_int_equal(daemon_append(&past->daemon, path, body, strlen(body), &events), 400);
    remove_memory(past, fork.id);
    buf_close(&events);
}

/* A memory that is deleted while it is being rewound stays deleted. */
struct rewinding {
    const struct past *past;
    const char *id;
    uint64_t to;
    int code;
};

static void *rewind_beside(void *context)
{
    struct rewinding *rewinding = context;
    struct buf answer;
    buf_init(&answer);
    rewinding->code = rewind_to(rewinding->past, rewinding->id, rewinding->to, &answer);
    buf_close(&answer);
    return NULL;
}

static void test_deleted_meanwhile(struct past *past)
{
    char path[160];
    pthread_t thread;
    struct buf answer;
    struct rewinding rewinding = {.past = past};
    buf_init(&answer);
    /* Again where the rewind was there first. */
    for (unsigned i = 0; i < 20 && rewinding.code != 404; i++) {
        const struct client_memory fork = fork_at(past, past->id, past->position[0]);
        rewinding.id = fork.id;
        rewinding.to = fork.token_count - 3;
        const double before = wire_metric(&past->daemon, "rambad_prefill_tokens_total");
        assert_int_equal(pthread_create(&thread, NULL, rewind_beside, &rewinding), 0);
        while (wire_metric(&past->daemon, "rambad_prefill_tokens_total") == before)
            usleep(1000); /* until it reads the tokens again */
        remove_memory(past, fork.id);
        pthread_join(thread, NULL);
        snprintf(path, sizeof path, "/v1/memories/%s", fork.id);
        assert_int_equal(call(past, "GET", path, NULL, &answer), 404);
    }
    assert_int_equal(rewinding.code, 404);
    buf_close(&answer);
}

static void test_past(void **state)
{
    struct past *past = *state;
    struct buf answer;
    buf_init(&answer);
    daemon_start(&past->daemon);
    live(past);
    test_turns(past);
    test_bookmarks(past);
    test_refusals(past);
    for (unsigned round = 0; round < 2; round++) {
        for (unsigned i = 0; i < TURNS; i++) {
            struct client_memory fork = fork_at(past, past->id, past->position[i]);
            assert_stands_at(past, fork.id, i);
            remove_memory(past, fork.id);
        }
        if (round == 0) {
            daemon_kill(&past->daemon);
            daemon_start(&past->daemon);
        }
    }
    test_commands(past);
    test_progress(past);
    test_deleted_meanwhile(past);
    /* Between turns too; and what goes on from there is what goes on from the memory itself. */
    struct client_memory fork = fork_at(past, past->id, past->position[3] + 17);
    assert_int_equal(rewind_to(past, past->id, past->position[3] + 17, &answer), 200);
    for (unsigned i = 0; i < 2; i++) {
        struct client_completion a = ask(past, past->id, "Go on.", true),
                                 b = ask(past, fork.id, "Go on.", true);
        assert_string_equal(a.text, b.text);
        client_json_completion_close(&a);
        client_json_completion_close(&b);
    }
    assert_int_equal(daemon_get_memory(&past->daemon, past->id).token_count,
                     daemon_get_memory(&past->daemon, fork.id).token_count);
    assert_int_equal(rewind_to(past, past->id, past->position[2], &answer), 200);
    assert_stands_at(past, past->id, 2);
    daemon_kill(&past->daemon);
    daemon_start(&past->daemon);
    assert_stands_at(past, past->id, 2);
    assert_int_equal(rewind_to(past, past->id, past->position[1], &answer), 200);
    assert_stands_at(past, past->id, 1);
    assert_int_equal(rewind_to(past, past->id, 0, &answer), 200);
    assert_int_equal(daemon_get_memory(&past->daemon, past->id).token_count, 0);
    remove_memory(past, past->id);
    remove_memory(past, fork.id);
    daemon_stop(&past->daemon);
    daemon_check(&past->daemon);
    buf_close(&answer);
}

/* The snapshot of a memory as it lies on disk. */
static void read_snapshot(struct storage *storage, const char *id, void **snapshot, size_t *size)
{
    uint64_t position;
    assert_int_equal(storage_snapshot(storage, id, snapshot, size, &position), STATUS_OK);
}

/* Turns end with a rounded state, and what is read again is rounded where it was the first time: a
 * fork at a turn whose snapshot is gone, and one past another such turn, have to the bit the state
 * of a memory that stopped there. */
static void test_roundings(void **state)
{
    struct past *past = *state;
    char original[LIMITS_ID_BYTES], twin[LIMITS_ID_BYTES], path[160];
    char text[TURNS][64];
    uint64_t position[TURNS];
    struct buf answer;
    buf_init(&answer);
    daemon_start(&past->daemon);
    daemon_create_memory(&past->daemon, NULL, original);
    daemon_create_memory(&past->daemon, NULL, twin);
    for (unsigned i = 0; i < TURNS; i++) {
        snprintf(text[i], sizeof text[i], "Of turn %u it is said that %u is %u.", i, i * 771,
                 i * i);
        snprintf(path, sizeof path, "/v1/memories/%s/append", original);
        answer.size = 0;
        assert_int_equal(daemon_call(&past->daemon, "POST", path, "text/plain", text[i],
                                     strlen(text[i]), &answer),
                         200);
        position[i] = daemon_get_memory(&past->daemon, original).token_count;
        if (i > 3)
            continue;
        snprintf(path, sizeof path, "/v1/memories/%s/append", twin);
        assert_int_equal(daemon_call(&past->daemon, "POST", path, "text/plain", text[i],
                                     strlen(text[i]), &answer),
                         200);
    }
    /* Forget the snapshots before, so that the tokens of four turns are read again. */
    const struct client_memory fork = fork_at(past, original, position[3]);
    const struct client_memory again = fork_at(past, fork.id, position[3]);
    /* A fork between turns is rounded where it stands, and twice it is the same. */
    const struct client_memory one = fork_at(past, original, position[2] + 5),
                               two = fork_at(past, original, position[2] + 5);
    daemon_stop(&past->daemon);
    daemon_check(&past->daemon);
    struct storage *storage;
    struct error err = {0};
    const struct storage_options options = {.path = past->daemon.data, .read_only = true};
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    static const char *const pairs[] = {"turn", "fork", "between"};
    const char *const ids[][2] = {{twin, fork.id}, {fork.id, again.id}, {one.id, two.id}};
    for (size_t i = 0; i < 3; i++) {
        void *a, *b;
        size_t a_size, b_size;
        read_snapshot(storage, ids[i][0], &a, &a_size);
        read_snapshot(storage, ids[i][1], &b, &b_size);
        assert_int_equal(a_size, b_size);
        if (memcmp(a, b, a_size) != 0)
            fail_msg("%s: the snapshots differ", pairs[i]);
        free(a);
        free(b);
    }
    /* Behind each turn, and nowhere else, there is a mark. */
    int32_t tokens[1024];
    assert_true(position[TURNS - 1] <= 1024);
    assert_int_equal(storage_read_marked(storage, original, 0, (size_t)position[TURNS - 1], tokens),
                     STATUS_OK);
    for (uint64_t i = 0, turn = 0; i < position[TURNS - 1]; i++) {
        const bool ends = i + 1 == position[turn];
        assert_int_equal((tokens[i] & STORAGE_TOKEN_MARK) != 0, ends);
        turn += ends;
    }
    storage_close(storage);
    buf_close(&answer);
}

static int teardown(void **state)
{
    struct past *past = *state;
    daemon_kill(&past->daemon);
    return 0;
}

int main(void)
{
    struct past *past = calloc(1, sizeof *past);
    if (!past)
        return 1;
    past->folder = store_helper_folder();
    daemon_init(&past->daemon, MODEL, past->folder, "data");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_past, NULL, teardown, past),
        cmocka_unit_test_prestate_setup_teardown(test_roundings, NULL, teardown, past),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    store_helper_remove(past->folder);
    for (unsigned i = 0; i < TURNS; i++)
        client_json_completion_close(&past->answer[i]);
    free(past);
    return failed;
}
