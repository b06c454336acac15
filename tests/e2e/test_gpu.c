/* A GPU that fails under the daemon, at a launch, a copy or an allocation: the daemon says so and
 * ends, every answer it gave before was right, and started again it holds what it acknowledged.
 * Exits with 77 where there is no GPU; RAMBAD_BIN may name a daemon on the emulated one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define FIRST_WORDS 120
#define SECOND_WORDS 60
#define ASK "and then the"
#define TOKENS 12
#define TRIES 12 /* rounds of calls within which the fault has come */
#define END_SECONDS 60

static const char *const flags[] = {"--backend", "cuda", "--threads", "1", NULL};

/* A daemon and what it should say. */
struct bed {
    struct daemon daemon;
    char id[LIMITS_ID_BYTES];
    struct buf text;      /* all that the memory is told */
    size_t first;         /* bytes told before the fault */
    char *before, *after; /* answers with the first part alone, and with all of it */
    bool whole;           /* the second part was acknowledged */
};

/* The greedy answer; NULL when the connection broke. Freed by the caller. */
static char *answer(const struct bed *bed)
{
    struct buf body, out;
    struct client_completion completion;
    char *text = NULL;
    buf_init(&body);
    buf_init(&out);
    const struct client_completion_request request = {.memory = bed->id,
                                                      .prompt = ASK,
                                                      .prompt_size = strlen(ASK),
                                                      .max_tokens = TOKENS,
                                                      .seed = -1};
    client_json_write_completion(&body, &request);
    const int status = daemon_call(&bed->daemon, "POST", "/v1/completions", "application/json",
                                   body.data, body.size, &out);
    if (status) {
        if (status != 200)
            fail_msg("status %d: %.*s", status, (int)out.size, out.data);
        assert_int_equal(client_json_completion(out.data, out.size, &completion), STATUS_OK);
        text = strdup(completion.text);
        assert_non_null(text);
        client_json_completion_close(&completion);
    }
    buf_close(&body);
    buf_close(&out);
    return text;
}

/* Whether the daemon still answers; what it says is right. */
static bool asks_well(const struct bed *bed)
{
    char *text = answer(bed);
    if (text)
        assert_string_equal(text, bed->whole ? bed->after : bed->before);
    free(text);
    return text != NULL;
}

/* The second part of the text; false: the connection broke. */
static bool tell_rest(struct bed *bed)
{
    char path[LIMITS_ID_BYTES + 64];
    struct buf out;
    buf_init(&out);
    snprintf(path, sizeof path, "/v1/memories/%s/append?offset=%zu", bed->id, bed->first);
    const int status = daemon_call(&bed->daemon, "POST", path, "text/plain",
                                   bed->text.data + bed->first, bed->text.size - bed->first, &out);
    buf_close(&out);
    assert_true(status == 200 || status == 0);
    bed->whole = status == 200;
    return bed->whole;
}

static int wait_for_end(struct daemon *daemon)
{
    int how = 0;
    for (double begin = daemon_now(); waitpid(daemon->pid, &how, WNOHANG) == 0; usleep(2000))
        if (daemon_now() - begin > END_SECONDS)
            fail_msg("the daemon does not end");
    daemon->pid = 0;
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
}

/* Whether the log says so since `from`. */
static bool says(const struct daemon *daemon, size_t from, const char *what)
{
    struct buf log;
    buf_init(&log);
    daemon_read_file(daemon->log, &log);
    buf_append(&log, "", 1);
    const bool found = from < log.size && strstr(log.data + from, what);
    buf_close(&log);
    return found;
}

static size_t log_size(const struct daemon *daemon)
{
    struct buf log;
    buf_init(&log);
    daemon_read_file(daemon->log, &log);
    const size_t size = log.size;
    buf_close(&log);
    return size;
}

/* A new memory with the first part of the text, and the answers of a GPU that does not fail. */
static char *begin(struct bed *bed)
{
    char *folder = store_helper_folder(), other[LIMITS_ID_BYTES];
    *bed = (struct bed){0};
    daemon_init(&bed->daemon, MODEL, folder, "data");
    bed->daemon.flags = flags;
    buf_init(&bed->text);
    daemon_write_book(&bed->text, FIRST_WORDS);
    bed->first = bed->text.size;
    daemon_write_book(&bed->text, SECOND_WORDS);
    daemon_start(&bed->daemon);
    daemon_create_memory(&bed->daemon, NULL, bed->id);
    daemon_append_text(&bed->daemon, bed->id, bed->text.data, bed->first);
    bed->before = answer(bed);
    memcpy(other, bed->id, sizeof other);
    daemon_create_memory(&bed->daemon, other, bed->id);
    assert_true(tell_rest(bed));
    bed->after = answer(bed);
    memcpy(bed->id, other, sizeof other);
    bed->whole = false;
    assert_non_null(bed->before);
    assert_non_null(bed->after);
    daemon_stop(&bed->daemon);
    return folder;
}

static void end(struct bed *bed, char *folder)
{
    daemon_end(&bed->daemon, folder);
    buf_close(&bed->text);
    free(bed->before);
    free(bed->after);
}

static void spawn_with(struct daemon *daemon, const char *fault)
{
    setenv("RAMBAD_CUDA_FAULT", fault, 1);
    daemon_spawn(daemon);
    unsetenv("RAMBAD_CUDA_FAULT");
}

static void await_ready(struct daemon *daemon)
{
    struct buf body;
    buf_init(&body);
    while (daemon_call(daemon, "GET", "/health/ready", NULL, NULL, 0, &body) != 200) {
        assert_int_equal(kill(daemon->pid, 0), 0);
        usleep(2000);
    }
    buf_close(&body);
}

static void check_fault(struct bed *bed, const char *fault)
{
    const size_t from = log_size(&bed->daemon);
    const bool had_all = bed->whole;
    bool alive = true;
    spawn_with(&bed->daemon, fault);
    await_ready(&bed->daemon);
    for (int i = 0; i < TRIES && alive; i++) {
        alive = asks_well(bed);
        if (alive && i == 1 && !bed->whole)
            alive = tell_rest(bed);
    }
    if (alive)
        fail_msg("%s: nothing failed", fault);
    assert_int_equal(wait_for_end(&bed->daemon), 1);
    assert_true(says(&bed->daemon, from, "\"engine_broken\""));
    assert_true(says(&bed->daemon, from, "the GPU failed in"));
    daemon_start(&bed->daemon);
    const struct client_memory memory = daemon_get_memory(&bed->daemon, bed->id);
    assert_true(memory.text_bytes == bed->first || memory.text_bytes == bed->text.size);
    assert_true(memory.text_bytes == bed->text.size || !bed->whole);
    bed->whole = memory.text_bytes == bed->text.size;
    assert_true(bed->whole || !had_all);
    assert_true(asks_well(bed));
    daemon_stop(&bed->daemon);
    print_message("%s: ended, and came back\n", fault);
}

static void test_faults(void **state)
{
    (void)state;
    /* While it resumes from a snapshot, brings pages from the disk, computes, copies, and writes.
     */
    static const char *const faults[] = {"launch:1:unpack", "launch:1:copy_pages", "launch:60",
                                         "copy:30",         "launch:300",          "launch:1:pack"};
    struct bed bed;
    char *folder = begin(&bed);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        check_fault(&bed, faults[i]);
    end(&bed, folder);
}

/* Without the memory that it needs at its start it does not start. */
static void test_refuses(void **state)
{
    (void)state;
    struct daemon daemon;
    char *folder = store_helper_folder();
    daemon_init(&daemon, MODEL, folder, "data");
    daemon.flags = flags;
    spawn_with(&daemon, "alloc:3");
    assert_int_equal(wait_for_end(&daemon), 1);
    assert_true(says(&daemon, 0, "memory"));
    store_helper_remove(folder);
}

static bool has_gpu(void)
{
    struct daemon daemon;
    char *folder = store_helper_folder();
    bool there = true;
    daemon_init(&daemon, MODEL, folder, "data");
    daemon.flags = (const char *const[]){"--backend", "cuda", "--host-memory", "1", NULL};
    daemon_spawn(&daemon); /* it ends: so little memory does not do */
    (void)wait_for_end(&daemon);
    there = !says(&daemon, 0, "no NVIDIA GPU") && !says(&daemon, 0, "no CUDA backend");
    store_helper_remove(folder);
    return there;
}

int main(void)
{
    if (!has_gpu()) {
        printf("SKIPPED: no GPU\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_refuses),
                                       cmocka_unit_test(test_faults)};
    daemon_choose_tests();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
