/* Responses and a conversation against a daemon that is killed at any moment: what was acknowledged
 * is there to the byte and is gone on from, what was not is there whole or not at all. RAMBAD_SEED
 * and RAMBAD_CRASH_KILLS repeat a run or make it long. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"

#define KILLS 12
#define MOST_MS 400 /* between a start and the kill */

static struct daemon daemon_;
static char *folder;
static uint64_t seed, state;
static unsigned long kills = KILLS;
static const char *const flags[] = {"--threads", "1", "--keep-snapshots", "2", NULL};

/* What was acknowledged. */
static struct kept {
    char id[LIMITS_ID_BYTES];
    char *json; /* as it was answered; NULL: it was only queued */
} * kept;
static size_t kept_count, kept_capacity, turns;
static char last[LIMITS_ID_BYTES]; /* of the chain */
static double last_tokens;
static char conversation[LIMITS_ID_BYTES];

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

/* The answer to a POST; NULL: the daemon was killed over it. */
static cJSON *post(const char *path, const char *body)
{
    struct buf out;
    buf_init(&out);
    const int status = daemon_call(&daemon_, "POST", path, "application/json", body,
                                   body ? strlen(body) : 0, &out);
    if (status && status != 200)
        fail_msg("%s %s: HTTP %d %s", path, body, status, buf_text(&out));
    cJSON *json = status ? cJSON_Parse(buf_text(&out)) : NULL;
    buf_close(&out);
    return json;
}

static cJSON *get(const char *path)
{
    struct buf out;
    buf_init(&out);
    const int status = daemon_call(&daemon_, "GET", path, NULL, NULL, 0, &out);
    if (status != 200)
        fail_msg("%s: HTTP %d %s", path, status, buf_text(&out));
    cJSON *json = cJSON_Parse(buf_text(&out));
    buf_close(&out);
    assert_non_null(json);
    return json;
}

static void keep(const cJSON *response, bool queued)
{
    if (kept_count == kept_capacity) {
        kept_capacity = kept_capacity ? 2 * kept_capacity : 64;
        kept = realloc(kept, kept_capacity * sizeof *kept);
        assert_non_null(kept);
    }
    struct kept *k = &kept[kept_count++];
    snprintf(k->id, sizeof k->id, "%s", answer_text(response, "id"));
    k->json = queued ? NULL : cJSON_PrintUnformatted(response);
}

/* One request of any kind; false when it was cut off. */
static bool ask(void)
{
    char body[512], previous[128] = "";
    const uint64_t kind = draw(4);
    const size_t old = kept_count ? (size_t)draw(kept_count) : 0;
    if (kind == 0 && last[0])
        snprintf(previous, sizeof previous, ",\"previous_response_id\":\"%s\"", last);
    else if (kind == 1 && kept_count) /* a fork */
        snprintf(previous, sizeof previous, ",\"previous_response_id\":\"%s\"", kept[old].id);
    else if (kind == 2)
        snprintf(previous, sizeof previous, ",\"conversation\":\"%s\"", conversation);
    const bool background = kind == 3;
    snprintf(body, sizeof body,
             "{\"input\":\"Tell me of %llu.\",\"temperature\":0,\"max_output_tokens\":%d%s%s%s}",
             (unsigned long long)draw(1000), 4 + (int)draw(20), previous,
             background ? ",\"background\":true" : "",
             draw(3) ? "" : ",\"instructions\":\"Be brief.\"");
    /* What is forked may be one in the background that has not ended, or not well. */
    struct buf out;
    buf_init(&out);
    const int status = daemon_call(&daemon_, "POST", "/v1/responses", "application/json", body,
                                   strlen(body), &out);
    cJSON *response = status == 200 ? cJSON_Parse(buf_text(&out)) : NULL;
    const bool refused = kind == 1 && (status == 404 || status == 409);
    if (status && status != 200 && !refused)
        fail_msg("%s: HTTP %d %s", body, status, buf_text(&out));
    buf_close(&out);
    if (!response)
        return refused;
    keep(response, background);
    turns += kind == 2;
    if (!background && kind < 2) {
        snprintf(last, sizeof last, "%s", answer_text(response, "id"));
        last_tokens = answer_number(response, "usage.total_tokens");
        /* Without its instructions it is that much shorter where it is gone on from. */
        if (cJSON_IsString(answer_at(response, "instructions")))
            last_tokens = 0;
    }
    cJSON_Delete(response);
    return true;
}

/* All that was acknowledged. */
static void check(void)
{
    char path[128];
    for (size_t i = 0; i < kept_count; i++) {
        snprintf(path, sizeof path, "/v1/responses/%s", kept[i].id);
        cJSON *response = get(path);
        if (kept[i].json) {
            char *json = cJSON_PrintUnformatted(response);
            assert_string_equal(json, kept[i].json);
            free(json);
        } else {
            const char *status = answer_text(response, "status");
            assert_true(strcmp(status, "completed") == 0 || strcmp(status, "incomplete") == 0 ||
                        strcmp(status, "failed") == 0);
        }
        cJSON_Delete(response);
    }
    if (last[0]) {
        char body[256];
        snprintf(body, sizeof body,
                 "{\"input\":\"And?\",\"store\":false,\"max_output_tokens\":1,"
                 "\"previous_response_id\":\"%s\"}",
                 last);
        cJSON *next = post("/v1/responses", body);
        assert_non_null(next);
        if (last_tokens > 0)
            assert_true(answer_number(next, "usage.input_tokens_details.cached_tokens") ==
                        last_tokens);
        cJSON_Delete(next);
    }
}

/* The items of the conversation come in pairs; a pair that was cut off is there or not. */
static void check_items(void)
{
    char path[256], after[64] = "";
    size_t count = 0;
    for (bool more = true; more;) {
        snprintf(path, sizeof path, "/v1/conversations/%s/items?order=asc&limit=100%s",
                 conversation, after);
        cJSON *list = get(path);
        const cJSON *item;
        cJSON_ArrayForEach(item, answer_at(list, "data"))
            assert_string_equal(answer_text(item, "role"), count++ % 2 ? "assistant" : "user");
        more = cJSON_IsTrue(answer_at(list, "has_more"));
        if (more)
            snprintf(after, sizeof after, "&after=%s", answer_text(list, "last_id"));
        cJSON_Delete(list);
    }
    assert_int_equal(count % 2, 0);
    assert_true(count >= 2 * turns);
    turns = count / 2; /* one more, or not: it counts from here */
}

static void *kill_later(void *context)
{
    usleep((useconds_t)(uintptr_t)context);
    daemon_kill(&daemon_);
    return NULL;
}

static void test_kills(void **unused)
{
    (void)unused;
    cJSON *made = post("/v1/conversations", "{}");
    snprintf(conversation, sizeof conversation, "%s", answer_text(made, "id"));
    cJSON_Delete(made);
    for (unsigned long i = 0; i < kills; i++) {
        pthread_t killer;
        const uintptr_t us = (uintptr_t)(1000 + draw(MOST_MS * 1000));
        assert_int_equal(pthread_create(&killer, NULL, kill_later, (void *)us), 0);
        while (ask())
            ;
        pthread_join(killer, NULL);
        daemon_start(&daemon_);
        check();
        check_items();
    }
    print_message("seed %llu: %lu kills, %zu responses acknowledged, %zu turns of a conversation\n",
                  (unsigned long long)seed, kills, kept_count, turns);
    assert_true(kept_count > 0);
    /* With all of them, and the conversation, goes everything. */
    char path[128];
    for (size_t i = 0; i < kept_count; i++) {
        struct buf out;
        buf_init(&out);
        snprintf(path, sizeof path, "/v1/responses/%s", kept[i].id);
        assert_int_equal(daemon_call(&daemon_, "DELETE", path, NULL, NULL, 0, &out), 200);
        free(kept[i].json);
        buf_close(&out);
    }
    free(kept);
}

static int setup(void **unused)
{
    (void)unused;
    const char *asked = getenv("RAMBAD_SEED"), *count = getenv("RAMBAD_CRASH_KILLS");
    if (asked)
        seed = strtoull(asked, NULL, 10);
    else if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
        return -1;
    state = seed | 1;
    if (count)
        kills = strtoul(count, NULL, 10);
    else if (getenv("RAMBAD_LONG"))
        kills = 50 * KILLS;
    print_message("RAMBAD_SEED=%llu RAMBAD_CRASH_KILLS=%lu\n", (unsigned long long)seed, kills);
    folder = daemon_begin(&daemon_, "engine/models/ramba-20m", flags);
    return 0;
}

static int teardown(void **unused)
{
    (void)unused;
    daemon_end(&daemon_, folder);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kills)};
    return cmocka_run_group_tests_name("responses_crash", tests, setup, teardown);
}
