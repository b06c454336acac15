/* The log: lines of JSON, each with its time; every request under the id that it came with, and why
 * whatever had to be read again was not at hand. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define BEGINNING /* more tokens than are worth a place in the cache, and so is the rest */ \
    "Once upon a midnight dreary, while I pondered, weak and weary, over many a quaint and "
#define LONG_BUT_ITS_END \
    BEGINNING            \
    "curious volume of forgotten lore, while I nodded, nearly napping, suddenly there came a "
#define LONG_PROMPT LONG_BUT_ITS_END "tap"
#define LARGE_WORDS 2000 /* more chunks than one block of landmarks holds */

static struct daemon daemon_;
static char *folder;
static const char *const roomy[] = {"--threads", "1", NULL};
static const char *const talkative[] = {"--threads", "1", "--log-level", "debug", NULL};

/* The first line of this event for the request; NULL: there is none. Every line is looked at. */
static cJSON *find(const char *event, const char *request)
{
    char line[4096];
    cJSON *found = NULL;
    FILE *file = fopen(daemon_.log, "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file)) {
        cJSON *json = cJSON_Parse(line);
        if (!json)
            fail_msg("not JSON: %s", line);
        assert_int_equal(strlen(answer_text(json, "time")), strlen("2026-01-01T00:00:00.000Z"));
        (void)answer_text(json, "level");
        const char *id = cJSON_GetStringValue(answer_at(json, "request"));
        if (!found && strcmp(answer_text(json, "event"), event) == 0 && id &&
            strcmp(id, request) == 0)
            found = json;
        else
            cJSON_Delete(json);
    }
    fclose(file);
    return found;
}

static cJSON *wait_for(const char *event, const char *request)
{
    cJSON *json;
    for (double start = daemon_now(); !(json = find(event, request)); usleep(5000))
        if (daemon_now() - start > WIRE_SECONDS)
            fail_msg("the log has no %s of %s", event, request);
    return json;
}

/* A request under this id; the answer's status. */
static int ask(const char *id, const char *method, const char *path, const char *body)
{
    char headers[128];
    struct wire wire;
    struct wire_answer answer;
    snprintf(headers, sizeof headers, "Connection: close\r\nX-Request-Id: %s\r\n", id);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, method, path, headers, body, body ? strlen(body) : 0);
    const int status = wire_answer(&wire, &answer, false);
    wire_answer_close(&answer);
    wire_close(&wire);
    return status;
}

static void say(const char *id, const char *prompt, const char *fields)
{
    char body[1024];
    snprintf(body, sizeof body, "{\"prompt\":\"%s\",\"max_tokens\":2%s}", prompt, fields);
    assert_int_equal(ask(id, "POST", "/v1/completions", body), 200);
}

static void complete(const char *id, const char *fields)
{
    say(id, LONG_PROMPT, fields);
}

static void expect_miss(const char *event, const char *request, const char *reason,
                        const char *memory)
{
    cJSON *line = wait_for(event, request);
    assert_string_equal(answer_text(line, "level"), "info");
    assert_string_equal(answer_text(line, "reason"), reason);
    if (memory)
        assert_string_equal(answer_text(line, "memory"), memory);
    cJSON_Delete(line);
}

/* A part of what was said before can be gone on from, and a part is new. */
static void expect_hit(const char *request)
{
    cJSON *line = wait_for("prefix_hit", request);
    const double cached = answer_number(line, "cached_tokens");
    const double known = answer_number(line, "known_tokens");
    assert_true(0 < cached && cached < known);
    assert_true(known < answer_number(line, "prompt_tokens"));
    cJSON_Delete(line);
}

static void begin(const char *const *flags)
{
    folder = daemon_begin(&daemon_, MODEL, flags);
}

static void restart(const char *const *flags)
{
    daemon_stop(&daemon_);
    daemon_.flags = flags;
    daemon_start(&daemon_);
}

static void test_requests(void **state)
{
    (void)state;
    begin(talkative);
    assert_int_equal(ask("mine-1", "GET", "/v1/memories/mem_none", NULL), 404);
    assert_int_equal(ask("mine-2", "GET", "/v1/nowhere", NULL), 404);
    assert_int_equal(ask("not plain!", "GET", "/v1/models", NULL), 200);
    cJSON *line = wait_for("request", "mine-1");
    assert_string_equal(answer_text(line, "handler"), "memories_get");
    assert_string_equal(answer_text(line, "argument"), "mem_none");
    assert_true(answer_number(line, "status") == 404);
    assert_true(answer_number(line, "seconds") > 0);
    cJSON_Delete(line);
    cJSON_Delete(wait_for("request", "mine-2"));
    assert_null(find("request", "not plain!")); /* it has got another id */
    daemon_end(&daemon_, folder);
}

/* What a prompt began with was not known, or is not at hand. */
static void test_prefix_misses(void **state)
{
    (void)state;
    static const char *const prefixes[] = {STORAGE_PREFIX};
    begin(talkative);
    complete("first", "");
    complete("second", "");
    expect_miss("prefix_miss", "first", "new", NULL);
    assert_null(find("prefix_miss", "second"));
    complete("echoes", ",\"echo\":true,\"logprobs\":1");
    expect_miss("prefix_miss", "echoes", "echo", NULL);
    /* The beginning was said, and has no end of its own to go on from; then it has. */
    say("parts", BEGINNING "dull", "");
    expect_miss("prefix_miss", "parts", "no_snapshot", NULL);
    say("parts-again", BEGINNING "slow", "");
    assert_null(find("prefix_miss", "parts-again"));
    /* Said once as far as the last word, with a snapshot of the beginning alone. */
    say("ends-otherwise", LONG_BUT_ITS_END "rap", "");
    expect_hit("ends-otherwise");
    complete("twice", ",\"n\":2"); /* each goes on alone, from what is on disk */
    assert_null(find("prefix_miss", "twice"));
    expect_miss("cache_miss", "twice", "prefix", NULL);
    assert_true(store_damage(daemon_.data, prefixes, 1) > 0);
    complete("broken", "");
    expect_miss("prefix_miss", "broken", "corrupt", NULL);
    daemon_kill(&daemon_); /* it would find the damage that it was done */
    store_helper_remove(folder);
}

/* A memory was not in RAM. */
static void test_memory_misses(void **state)
{
    (void)state;
    static const char *const narrow[] = {"--threads", "1", "--session-memory", "0", NULL};
    char id[LIMITS_ID_BYTES], named[128], path[128], body[256];
    struct wire writer;
    begin(roomy);
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(named, sizeof named, ",\"memory\":\"%s\"", id);
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", id);
    complete("writes", named);
    complete("goes-on", named);
    assert_null(find("cache_miss", "goes-on"));
    snprintf(body, sizeof body, "{\"prompt\":\"x\",\"max_tokens\":1000000,\"ignore_eos\":true%s}",
             named);
    wire_open(&writer, &daemon_);
    wire_ask(&writer, "POST", "/v1/completions", "", body, strlen(body));
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    snprintf(body, sizeof body, "%s,\"memory_write\":false", named);
    complete("beside-a-writer", body);
    expect_miss("cache_miss", "beside-a-writer", "in_use", id);
    wire_close(&writer);
    restart(narrow);
    complete("after-the-start", named);
    expect_miss("cache_miss", "after-the-start", "first_use", id);
    complete("without-room", named);
    expect_miss("cache_miss", "without-room", "evicted", id);
    restart(roomy);
    complete("in-ram", named);
    assert_int_equal(ask("rewinds", "POST", path, "{\"to\":1}"), 200);
    snprintf(named, sizeof named, ",\"memory\":\"%s\",\"memory_write\":false", id);
    complete("rewound", named);
    expect_miss("cache_miss", "rewound", "first_use", id);
    complete("asks-again", named); /* whoever asks first brings it to RAM */
    assert_null(find("cache_miss", "asks-again"));
    daemon_end(&daemon_, folder);
}

/* A memory that has no room in RAM even alone takes none from the others. */
static void test_too_large(void **state)
{
    (void)state;
    char small[LIMITS_ID_BYTES], large[LIMITS_ID_BYTES], ask_small[128], ask_large[128], bytes[32];
    const char *const flags[] = {"--threads", "1", "--session-memory", bytes, NULL};
    struct buf book;
    begin(roomy);
    daemon_create_memory(&daemon_, NULL, small);
    daemon_create_memory(&daemon_, NULL, large);
    snprintf(ask_small, sizeof ask_small, ",\"memory\":\"%s\",\"memory_write\":false", small);
    snprintf(ask_large, sizeof ask_large, ",\"memory\":\"%s\",\"memory_write\":false", large);
    daemon_append_text(&daemon_, small, BEGINNING, strlen(BEGINNING));
    wire_wait_metric(&daemon_, "rambad_sessions_idle", 1);
    snprintf(bytes, sizeof bytes, "%.0f", wire_metric(&daemon_, "rambad_sessions_idle_bytes"));
    buf_init(&book);
    daemon_write_book(&book, LARGE_WORDS);
    daemon_append_text(&daemon_, large, book.data, book.size);
    buf_close(&book);
    restart(flags);
    complete("small", ask_small);
    expect_miss("cache_miss", "small", "first_use", small);
    complete("large", ask_large);
    expect_miss("cache_miss", "large", "first_use", large);
    complete("large-again", ask_large);
    expect_miss("cache_miss", "large-again", "evicted", large);
    complete("small-again", ask_small);
    assert_null(find("cache_miss", "small-again"));
    daemon_end(&daemon_, folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_requests), cmocka_unit_test(test_prefix_misses),
        cmocka_unit_test(test_memory_misses), cmocka_unit_test(test_too_large)};
    return cmocka_run_group_tests_name("log", tests, NULL, NULL);
}
