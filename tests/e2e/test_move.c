/* A memory moves: out of one daemon as a file, into another by the command line, and goes on there
 * token for token as if it had never moved. Files that are cut, altered or another model's are
 * refused, and the daemon goes on. One that a kill -9 meets on its way in is there whole or not at
 * all; RAMBAD_SEED repeats the moments. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define OTHER_MODEL "tests/golden/encoder1-kv1-gqa-bf16"
#define TURNS 3
#define KILLS 12

struct move {
    char *folder;
    struct daemon here, there, foreign, killed;
};

static struct client_completion ask(const struct daemon *daemon, const char *id, unsigned turn)
{
    char prompt[64];
    snprintf(prompt, sizeof prompt, "Question %u: what was it?", turn);
    return daemon_complete(daemon, id, prompt, 64, true);
}

static void fill(const struct daemon *daemon, const char *id)
{
    struct buf text;
    buf_init(&text);
    daemon_write_book(&text, 20000);
    daemon_append_text(daemon, id, text.data, text.size);
    buf_close(&text);
}

static int import(const struct daemon *daemon, const char *data, size_t size, struct buf *answer)
{
    answer->size = 0;
    return daemon_call(daemon, "POST", "/v1/memories/import", "application/octet-stream", data,
                       size, answer);
}

static void test_refusals(const struct move *move, struct buf *file)
{
    struct buf answer;
    buf_init(&answer);
    assert_int_equal(import(&move->there, file->data, file->size / 2, &answer), 400);
    assert_non_null(strstr(buf_text(&answer), "part "));
    assert_non_null(strstr(buf_text(&answer), "cut"));
    file->data[file->size / 3] ^= 4;
    assert_int_equal(import(&move->there, file->data, file->size, &answer), 400);
    assert_non_null(strstr(buf_text(&answer), "part "));
    file->data[file->size / 3] ^= 4;
    assert_int_equal(import(&move->foreign, file->data, file->size, &answer), 422);
    assert_non_null(strstr(buf_text(&answer), "wide-stickbreaking-topk8"));
    assert_int_equal(import(&move->there, NULL, 0, &answer), 400);
    answer.size = 0;
    assert_int_equal(daemon_call(&move->there, "GET", "/v1/memories", NULL, NULL, 0, &answer), 200);
    assert_non_null(strstr(buf_text(&answer), "\"data\":[]"));
    assert_int_equal(
        daemon_call(&move->here, "GET", "/v1/memories/mem_0/export", NULL, NULL, 0, &answer), 404);
    buf_close(&answer);
}

static void test_move(void **state)
{
    struct move *move = *state;
    char id[LIMITS_ID_BYTES], moved[LIMITS_ID_BYTES + 2], path[1024];
    struct buf file, again, answer;
    buf_init(&file);
    buf_init(&again);
    buf_init(&answer);
    daemon_start(&move->here);
    daemon_start(&move->there);
    daemon_start(&move->foreign);
    daemon_create_memory(&move->here, NULL, id);
    fill(&move->here, id);
    struct client_completion first = ask(&move->here, id, 0);
    client_json_completion_close(&first);

    snprintf(path, sizeof path, "%s/memory.ramba", move->folder);
    const char *const out[] = {"export", id, path, NULL};
    assert_int_equal(daemon_ramba(&move->here, out, &answer), 0);
    daemon_read_file(path, &file);
    print_message("a file of %zu bytes for %llu tokens\n", file.size,
                  (unsigned long long)daemon_get_memory(&move->here, id).token_count);
    test_refusals(move, &file);

    answer.size = 0;
    const char *const in[] = {"import", path, NULL};
    assert_int_equal(daemon_ramba(&move->there, in, &answer), 0);
    assert_true(answer.size < sizeof moved);
    memcpy(moved, answer.data, answer.size);
    moved[answer.size - 1] = 0; /* the line's end */
    struct client_memory a = daemon_get_memory(&move->here, id),
                         b = daemon_get_memory(&move->there, moved);
    assert_int_equal(a.token_count, b.token_count);
    assert_int_equal(a.text_bytes, b.text_bytes);
    /* The same bytes leave the other daemon, but for the day it was made. */
    char name[160];
    snprintf(name, sizeof name, "/v1/memories/%s/export", moved);
    assert_int_equal(daemon_call(&move->there, "GET", name, NULL, NULL, 0, &again), 200);
    assert_in_range(again.size, file.size - 64, file.size + 64);
    for (unsigned i = 1; i <= TURNS; i++) {
        struct client_completion x = ask(&move->here, id, i), y = ask(&move->there, moved, i);
        assert_int_equal(x.text_size, y.text_size);
        assert_memory_equal(x.text, y.text, x.text_size);
        client_json_completion_close(&x);
        client_json_completion_close(&y);
        if (i == 1) {
            daemon_kill(&move->there);
            daemon_start(&move->there);
        }
    }
    daemon_stop(&move->here);
    daemon_stop(&move->there);
    daemon_stop(&move->foreign);
    daemon_check(&move->here);
    daemon_check(&move->there);
    daemon_check(&move->foreign);
    buf_close(&file);
    buf_close(&again);
    buf_close(&answer);
}

/* ---- kills ---- */

struct upload {
    pthread_t thread;
    const struct daemon *daemon;
    const struct buf *file;
    int code;
    double seconds;
};

static void *upload_main(void *context)
{
    struct upload *upload = context;
    struct buf answer;
    const double start = daemon_now();
    buf_init(&answer);
    upload->code =
        daemon_call(upload->daemon, "POST", "/v1/memories/import", "application/octet-stream",
                    upload->file->data, upload->file->size, &answer);
    upload->seconds = daemon_now() - start;
    buf_close(&answer);
    return NULL;
}

/* Deletes all memories. Each must be the one of the file; returns how many there were. */
static unsigned take_back(const struct daemon *daemon, const struct client_memory *expected,
                          const struct buf *chunks)
{
    struct client_memory_list list;
    struct buf answer;
    buf_init(&answer);
    assert_int_equal(daemon_call(daemon, "GET", "/v1/memories", NULL, NULL, 0, &answer), 200);
    assert_int_equal(client_json_memory_list(answer.data, answer.size, &list), STATUS_OK);
    const unsigned count = (unsigned)list.count;
    for (size_t i = 0; i < list.count; i++) {
        struct buf got;
        char path[160];
        buf_init(&got);
        assert_int_equal(list.items[i].token_count, expected->token_count);
        assert_int_equal(list.items[i].text_bytes, expected->text_bytes);
        daemon_read_chunks(daemon, list.items[i].id, &got);
        assert_int_equal(got.size, chunks->size);
        assert_memory_equal(got.data, chunks->data, got.size);
        snprintf(path, sizeof path, "/v1/memories/%s", list.items[i].id);
        got.size = 0;
        assert_int_equal(daemon_call(daemon, "DELETE", path, NULL, NULL, 0, &got), 200);
        buf_close(&got);
    }
    client_json_memory_list_close(&list);
    buf_close(&answer);
    return count;
}

static void test_kills(void **state)
{
    struct move *move = *state;
    const char *given = getenv("RAMBAD_SEED");
    char id[LIMITS_ID_BYTES], path[160];
    unsigned seed = 0, whole = 0, kills = 0;
    struct buf file, chunks;
    if (given)
        seed = (unsigned)strtoul(given, NULL, 10);
    else
        assert_int_equal(getrandom(&seed, sizeof seed, 0), sizeof seed);
    print_message("RAMBAD_SEED=%u\n", seed);
    buf_init(&file);
    buf_init(&chunks);
    daemon_start(&move->here);
    daemon_create_memory(&move->here, NULL, id);
    fill(&move->here, id);
    const struct client_memory memory = daemon_get_memory(&move->here, id);
    daemon_read_chunks(&move->here, id, &chunks);
    snprintf(path, sizeof path, "/v1/memories/%s/export", id);
    assert_int_equal(daemon_call(&move->here, "GET", path, NULL, NULL, 0, &file), 200);
    daemon_stop(&move->here);
    daemon_start(&move->killed);
    struct upload upload = {.daemon = &move->killed, .file = &file};
    upload_main(&upload); /* how long it takes, to aim at */
    assert_int_equal(upload.code, 201);
    assert_int_equal(take_back(&move->killed, &memory, &chunks), 1);
    double likely = upload.seconds;
    for (unsigned i = 0; i < KILLS; i++) {
        assert_int_equal(pthread_create(&upload.thread, NULL, upload_main, &upload), 0);
        usleep((useconds_t)(likely * 1.1e6 * (double)rand_r(&seed) / RAND_MAX));
        daemon_kill(&move->killed);
        pthread_join(upload.thread, NULL);
        daemon_start(&move->killed);
        const unsigned count = take_back(&move->killed, &memory, &chunks);
        assert_true(count <= 1 && (upload.code != 201 || count == 1));
        whole += count;
        kills += upload.code == 0;
    }
    print_message("%u imports cut by a kill of %u, %u there whole\n", kills, KILLS, whole);
    assert_true(kills > 0);
    wire_wait_metric(&move->killed, "rambad_branches_to_collect", 0);
    daemon_stop(&move->killed);
    daemon_check(&move->killed);
    buf_close(&file);
    buf_close(&chunks);
}

static int teardown(void **state)
{
    struct move *move = *state;
    daemon_kill(&move->here);
    daemon_kill(&move->there);
    daemon_kill(&move->foreign);
    daemon_kill(&move->killed);
    return 0;
}

int main(void)
{
    struct move *move = calloc(1, sizeof *move);
    if (!move)
        return 1;
    move->folder = store_helper_folder();
    daemon_init(&move->here, MODEL, move->folder, "here");
    daemon_init(&move->there, MODEL, move->folder, "there");
    daemon_init(&move->foreign, OTHER_MODEL, move->folder, "foreign");
    daemon_init(&move->killed, MODEL, move->folder, "killed");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_move, NULL, teardown, move),
        cmocka_unit_test_prestate_setup_teardown(test_kills, NULL, teardown, move),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    store_helper_remove(move->folder);
    free(move);
    return failed;
}
