/* Clients that send their whole history each time, against the real daemon: a turn reads only what
 * is new in it, and says what a server would say that keeps nothing; branches and edits find their
 * place; no key finds another's; kill -9 and eviction cost time at most. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "engine/models/ramba-20m"
#define SYSTEM                                                                                   \
    "You keep the lighthouse of Marrow. You answer in few words, in plain English, and you say " \
    "nothing that nobody told you. The village lies on the other side of the bay, where the "    \
    "boats are. Anna lives in the mill. Tom lives in the old tower with two ravens."

static struct daemon kept, fresh; /* one with the cache, one without */
static char *folder, *other, ann[64], bob[64], keys[1100];
static const char *const kept_flags[] = {"--threads",      "1",   "--keys", keys,
                                         "--prefix-cache", "64M", NULL};
static const char *const fresh_flags[] = {"--threads", "1", "--prefix-cache", "0", NULL};

static cJSON *ask(const struct daemon *daemon, const char *path, const char *body)
{
    return wire_call_json(daemon, "POST", path, body, 200);
}

/* ---- a client's history ---- */

static void say(cJSON *history, const char *role, const char *text)
{
    cJSON *message = cJSON_CreateObject();
    cJSON_AddStringToObject(message, "role", role);
    cJSON_AddStringToObject(message, "content", text);
    cJSON_AddItemToArray(history, message);
}

static cJSON *begin(const char *first)
{
    cJSON *history = cJSON_CreateArray();
    say(history, "system", SYSTEM);
    say(history, "user", first);
    return history;
}

static char *body_of(const cJSON *history, double temperature, int seed, int max_tokens)
{
    cJSON *body = cJSON_CreateObject();
    cJSON_AddItemToObject(body, "messages", cJSON_Duplicate(history, true));
    cJSON_AddNumberToObject(body, "temperature", temperature);
    cJSON_AddNumberToObject(body, "seed", seed);
    cJSON_AddNumberToObject(body, "max_tokens", max_tokens);
    cJSON_AddBoolToObject(body, "logprobs", true);
    char *text = cJSON_PrintUnformatted(body);
    assert_non_null(text);
    cJSON_Delete(body);
    return text;
}

struct said {
    double prompt, cached, completion;
    bool stopped;
    char text[1024];
};

/* Asks the server that keeps and the one that does not: token by token the same. */
static struct said turn(const char *key, const cJSON *history, double temperature, int seed)
{
    char *body = body_of(history, temperature, seed, 24);
    const double before = wire_metric(&kept, "rambad_prefill_tokens_total");
    kept.key = key;
    cJSON *answer = ask(&kept, "/v1/chat/completions", body);
    cJSON *expected = ask(&fresh, "/v1/chat/completions", body);
    const cJSON *tokens = answer_at(answer, "choices.0.logprobs.content");
    const cJSON *others = answer_at(expected, "choices.0.logprobs.content");
    struct said said = {
        .prompt = answer_number(answer, "usage.prompt_tokens"),
        .cached = answer_number(answer, "usage.prompt_tokens_details.cached_tokens"),
        .completion = answer_number(answer, "usage.completion_tokens"),
        .stopped = strcmp(answer_text(answer, "choices.0.finish_reason"), "stop") == 0};
    snprintf(said.text, sizeof said.text, "%s", answer_text(answer, "choices.0.message.content"));
    assert_int_equal(cJSON_GetArraySize(tokens), cJSON_GetArraySize(others));
    for (int i = 0; i < cJSON_GetArraySize(tokens); i++)
        assert_string_equal(answer_text(cJSON_GetArrayItem(tokens, i), "token"),
                            answer_text(cJSON_GetArrayItem(others, i), "token"));
    assert_string_equal(said.text, answer_text(expected, "choices.0.message.content"));
    assert_true(said.prompt == answer_number(expected, "usage.prompt_tokens"));
    assert_true(answer_number(expected, "usage.prompt_tokens_details.cached_tokens") == 0);
    /* The figure is what was read. */
    assert_true(wire_metric(&kept, "rambad_prefill_tokens_total") - before ==
                said.prompt - said.cached);
    cJSON_Delete(answer);
    cJSON_Delete(expected);
    free(body);
    return said;
}

static void answer_and_ask(cJSON *history, const struct said *said, const char *next)
{
    say(history, "assistant", said->text);
    say(history, "user", next);
}

static int setup(void **state)
{
    (void)state;
    folder = store_helper_folder();
    snprintf(keys, sizeof keys, "%.1000s/keys", folder);
    daemon_init(&kept, MODEL, folder, "data");
    daemon_new_key(&kept, "ann", keys, ann);
    daemon_new_key(&kept, "bob", keys, bob);
    kept.flags = kept_flags;
    kept.key = ann;
    daemon_start(&kept);
    other = daemon_begin(&fresh, MODEL, fresh_flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&kept, folder);
    daemon_end(&fresh, other);
    return 0;
}

/* ---- the tests ---- */

static const char *const questions[] = {"Who lives in the tower?", "And in the mill?",
                                        "Where are the boats?", "Who has ravens?",
                                        "What is across the bay?"};
#define QUESTIONS (sizeof questions / sizeof *questions)

/* Each turn reads the last message, and of the answer before it the one token that ended it. */
static void converse(double temperature, int seed)
{
    char first[128];
    snprintf(first, sizeof first, "This is talk %d at %.1f. %s", seed, temperature, questions[0]);
    cJSON *history = begin(first);
    struct said last = turn(ann, history, temperature, seed);
    size_t exact = 0;
    for (size_t i = 1; i < QUESTIONS; i++) {
        answer_and_ask(history, &last, questions[i]);
        const struct said said = turn(ann, history, temperature, seed + (int)i);
        /* Where the text is read in other tokens than were said, it is read anew. */
        assert_true(said.cached <= last.prompt + last.completion - 1);
        exact += said.cached == last.prompt + last.completion - 1;
        assert_true(said.cached > 0);
        last = said;
    }
    if (temperature == 0)
        assert_int_equal(exact, QUESTIONS - 1);
    cJSON_Delete(history);
}

static void test_turns(void **state)
{
    (void)state;
    converse(0, 1);
    converse(0.6, 2);
    converse(1, 3);
}

/* A history that is changed somewhere goes on from what comes before. */
static void test_edits(void **state)
{
    (void)state;
    cJSON *history = begin("The key of the boat house is under the stone. Remember it.");
    struct said said[QUESTIONS];
    for (size_t i = 0; i < QUESTIONS; i++) {
        said[i] = turn(ann, history, 0, 0);
        answer_and_ask(history, &said[i], questions[i]);
    }
    const double first = said[0].prompt + said[0].completion - 1;
    assert_true(said[1].cached == first); /* this answer is read in the tokens that were said */
    const char *const others[] = {"Where is it?", "Who has it?", "What is it?"};
    cJSON *edited = NULL;
    bool exact = false; /* whether an answer is read in the tokens that were said: one must be */
    for (size_t i = 0; i < 3 && !exact; i++) {
        cJSON_Delete(edited);
        edited = cJSON_CreateArray();
        for (int k = 0; k < 3; k++)
            cJSON_AddItemToArray(edited, cJSON_Duplicate(cJSON_GetArrayItem(history, k), true));
        say(edited, "user", others[i]);
        const struct said branch = turn(ann, edited, 0, 0);
        assert_true(i == 0 ? branch.cached == first : branch.cached >= first);
        answer_and_ask(edited, &branch, "And the boat?");
        const double cached = turn(ann, edited, 0, 0).cached;
        assert_true(cached >= first && cached <= branch.prompt + branch.completion - 1);
        exact = cached == branch.prompt + branch.completion - 1;
    }
    assert_true(exact);
    /* The first one goes on as if there were no other; an answer is drawn again. */
    const double whole = said[QUESTIONS - 1].prompt + said[QUESTIONS - 1].completion - 1;
    assert_true(turn(ann, history, 0, 0).cached == whole);
    assert_true(turn(ann, history, 1, 5).cached == whole);
    /* What the client makes of an answer is what counts. */
    cJSON *rewritten = cJSON_Duplicate(edited, true);
    cJSON_SetValuestring(cJSON_GetObjectItem(cJSON_GetArrayItem(rewritten, 4), "content"),
                         "Under the stone, of course, since you put it there.");
    assert_true(turn(ann, rewritten, 0, 0).cached == first);
    cJSON_Delete(rewritten);
    cJSON_Delete(edited);
    cJSON_Delete(history);
}

/* Talks that begin alike and were never the same: the third shares what the second found shared. */
static void test_shared(void **state)
{
    (void)state;
    const char *firsts[] = {"Is it cold there?", "Do you see whales?", "How old is the lamp?"};
    double cached = 0;
    for (size_t i = 0; i < 3; i++) {
        cJSON *history = begin(firsts[i]);
        cached = turn(bob, history, 0, 0).cached;
        if (i == 0)
            assert_true(cached == 0);
        cJSON_Delete(history);
    }
    assert_true(cached >= 64);
}

static void test_stranger(void **state)
{
    (void)state;
    cJSON *history = begin("A secret that is mine alone: the lamp's key is under the third stair.");
    const struct said said = turn(ann, history, 0, 0);
    answer_and_ask(history, &said, "Where is the key?");
    assert_true(turn(bob, history, 0, 0).cached < 200); /* what bob's own talks began with */
    assert_true(turn(ann, history, 0, 0).cached == said.prompt + said.completion - 1);
    /* Nobody has a memory of it. */
    cJSON *list = wire_call_json(&kept, "GET", "/v1/memories", NULL, 200);
    assert_int_equal(cJSON_GetArraySize(answer_at(list, "data")), 0);
    assert_true(wire_metric(&kept, "rambad_prefix_entries") > 0);
    assert_true(wire_metric(&kept, "rambad_memories") == 0);
    cJSON_Delete(list);
    cJSON_Delete(history);
}

/* Several answers to one prompt, a completion of plain text, and what cannot be resumed. */
static void test_forms(void **state)
{
    (void)state;
    char text[2048], body[4096];
    double cached[4];
    snprintf(text, sizeof text, "%s It was a dark night. %s", SYSTEM, SYSTEM);
    const char *fields[] = {"\"max_tokens\":8", "\"max_tokens\":8,\"n\":3,\"seed\":4",
                            "\"max_tokens\":2,\"logprobs\":1,\"echo\":true",
                            "\"max_tokens\":2,\"retrieval\":true"};
    for (size_t i = 0; i < 4; i++) {
        snprintf(body, sizeof body, "{\"prompt\":\"%s\",\"temperature\":%d,%s}", text, i == 1,
                 fields[i]);
        cJSON *answer = ask(&kept, "/v1/completions", body);
        cJSON *expected = ask(&fresh, "/v1/completions", body);
        const cJSON *choice, *choices = answer_at(answer, "choices");
        int index = 0;
        cJSON_ArrayForEach(choice, choices)
        {
            char path[64];
            snprintf(path, sizeof path, "choices.%d.text", index++);
            assert_string_equal(answer_text(choice, "text"), answer_text(expected, path));
        }
        if (i ==
            3) { /* the passages that were read are those of the prompt, wherever it was read */
            const char *path = "choices.0.retrieval.0.chunks.0.text";
            assert_string_equal(answer_text(answer, path), answer_text(expected, path));
        }
        cached[i] = answer_number(answer, "usage.prompt_tokens_details.cached_tokens");
        if (i == 1) /* all of the prompt, and nothing read */
            assert_true(cached[1] == answer_number(answer, "usage.prompt_tokens"));
        cJSON_Delete(answer);
        cJSON_Delete(expected);
    }
    assert_true(cached[0] == 0 && cached[2] == 0);
}

/* ---- stored responses that carry the whole history ---- */

struct response {
    char id[LIMITS_ID_BYTES], text[1024];
    double input, cached, output;
};

static cJSON *respond_to(const struct daemon *daemon, const cJSON *history, const char *fields)
{
    char *input = cJSON_PrintUnformatted(history);
    struct buf body;
    buf_init(&body);
    buf_append_format(&body, "{\"input\":%s,\"temperature\":0,\"max_output_tokens\":24%s}", input,
                      fields);
    cJSON *answer = ask(daemon, "/v1/responses", buf_text(&body));
    buf_close(&body);
    free(input);
    return answer;
}

/* Asks both servers; they say the same, and the one that keeps nothing reads all of it. */
static struct response respond(const cJSON *history, const char *fields)
{
    struct response said;
    cJSON *answer = respond_to(&kept, history, fields);
    cJSON *expected = respond_to(&fresh, history, fields);
    snprintf(said.id, sizeof said.id, "%s", answer_text(answer, "id"));
    snprintf(said.text, sizeof said.text, "%s", answer_text(answer, "output.0.content.0.text"));
    said.input = answer_number(answer, "usage.input_tokens");
    said.cached = answer_number(answer, "usage.input_tokens_details.cached_tokens");
    said.output = answer_number(answer, "usage.output_tokens");
    assert_string_equal(said.text, answer_text(expected, "output.0.content.0.text"));
    assert_true(said.input == answer_number(expected, "usage.input_tokens"));
    assert_true(said.output == answer_number(expected, "usage.output_tokens"));
    assert_true(answer_number(expected, "usage.input_tokens_details.cached_tokens") == 0);
    cJSON_Delete(answer);
    cJSON_Delete(expected);
    return said;
}

/* The memory of a response: where it came to be, it has the whole talk. */
static void check_memory(const struct response *said, double tokens)
{
    char path[128];
    snprintf(path, sizeof path, "/v1/responses/%.*s", LIMITS_ID_BYTES - 1, said->id);
    cJSON *response = wire_call_json(&kept, "GET", path, NULL, 200);
    snprintf(path, sizeof path, "/v1/memories/%.39s", answer_text(response, "memory"));
    cJSON *memory = wire_call_json(&kept, "GET", path, NULL, 200);
    assert_true(answer_number(memory, "token_count") == tokens);
    cJSON_Delete(memory);
    cJSON_Delete(response);
}

static void delete_response(const struct response *said)
{
    char path[LIMITS_ID_BYTES + 32];
    struct wire_answer answer;
    snprintf(path, sizeof path, "/v1/responses/%.*s", LIMITS_ID_BYTES - 1, said->id);
    assert_int_equal(wire_call(&kept, "DELETE", path, NULL, &answer), 200);
    wire_answer_close(&answer);
}

/* Each has a memory of its own, and reads what is new alone. */
static void test_stored(void **state)
{
    (void)state;
    struct response said[QUESTIONS + 1];
    size_t count = 0;
    kept.key = ann;
    cJSON *history = begin("This is told to a server that stores. Who lives in the tower?");
    for (; count < QUESTIONS; count++) {
        if (count) {
            say(history, "assistant", said[count - 1].text);
            say(history, "user", questions[count]);
        }
        said[count] = respond(history, "");
        check_memory(&said[count], said[count].input + said[count].output);
        if (count)
            assert_true(said[count].cached == said[count - 1].input + said[count - 1].output);
    }
    /* A chat finds it too, and what is gone on from a response; no stranger does. */
    say(history, "assistant", said[count - 1].text);
    say(history, "user", "Is that all?");
    const double whole = said[count - 1].input + said[count - 1].output;
    assert_true(turn(ann, history, 0, 0).cached == whole);
    kept.key = bob;
    struct response strange = respond(history, "");
    assert_true(strange.cached < 200);
    delete_response(&strange);
    kept.key = ann;
    /* What it has found may be deleted; the memories that began with it stay whole. */
    for (size_t i = 0; i + 1 < QUESTIONS; i++)
        delete_response(&said[i]);
    said[count] = respond(history, "");
    assert_true(said[count].cached >= whole - 1);
    check_memory(&said[count], said[count].input + said[count].output);
    delete_response(&said[count - 1]);
    delete_response(&said[count]);
    for (size_t i = 0; i < 2; i++) { /* nothing of it is there, but what the chat left */
        cJSON *edited = begin(i ? "Hello?" : "This is told to a server that stores. Who are you?");
        const struct response last = respond(edited, "");
        delete_response(&last);
        cJSON_Delete(edited);
    }
    cJSON_Delete(history);
}

/* Instructions are read in front of all, and are not kept: neither is read again. */
static void test_instructed(void **state)
{
    (void)state;
    const char *fields =
        ",\"instructions\":\"Speak like a keeper of lighthouses, in few words, and "
        "never of yourself; whoever asks you is a stranger to the bay.\"";
    struct response first, second;
    kept.key = ann;
    cJSON *history = begin("I was told how you speak. Who lives in the tower?");
    first = respond(history, fields);
    say(history, "assistant", first.text);
    say(history, "user", questions[1]);
    const double before = wire_metric(&kept, "rambad_prefill_tokens_total");
    second = respond(history, fields);
    assert_true(second.cached >= first.input + first.output - 1);
    /* New in it are the question, read with and without instructions, and the answer, read once. */
    assert_true(wire_metric(&kept, "rambad_prefill_tokens_total") - before <
                2 * (second.input - second.cached) + second.output + 2);
    delete_response(&first);
    delete_response(&second);
    cJSON_Delete(history);
}

/* Killed at any moment, the next server says what is right, and mostly has not to read again. */
static void test_kills(void **state)
{
    (void)state;
    cJSON *history = begin("We will be interrupted often. Are you there?");
    struct said last = turn(ann, history, 0, 0);
    unsigned found = 0, seed = 20;
    for (unsigned i = 0; i < 6; i++) {
        answer_and_ask(history, &last, questions[i % QUESTIONS]);
        char *body = body_of(history, 0, 0, 24);
        struct wire wire;
        char headers[256];
        snprintf(headers, sizeof headers, "Authorization: Bearer %s\r\n", ann);
        wire_open(&wire, &kept); /* this one may get an answer or not */
        wire_ask(&wire, "POST", "/v1/chat/completions", headers, body, strlen(body));
        usleep((seed = seed * 1103515245 + 12345) / 65536 % 40 * 1000);
        daemon_kill(&kept);
        wire_close(&wire);
        free(body);
        daemon_start(&kept);
        last = turn(ann, history, 0, 0);
        found += last.cached > 0;
    }
    assert_true(found > 0);
    cJSON_Delete(history);
    /* In peace it finds all of it. */
    history = begin("Nobody will interrupt us now, I think. Are you there?");
    last = turn(ann, history, 0, 0);
    daemon_stop(&kept);
    daemon_start(&kept);
    answer_and_ask(history, &last, "And now?");
    assert_true(turn(ann, history, 0, 0).cached == last.prompt + last.completion - 1);
    cJSON_Delete(history);
}

/* A client that goes away leaves what was read. */
static void test_gone(void **state)
{
    (void)state;
    cJSON *history = begin("Tell me of the sea, of the wind, and of all that comes from over it. "
                           "Begin with the ships that you have seen from up there in spring, "
                           "their names and their colours, and what they carried; then the "
                           "birds, each of them, and where they go when the first frost is on "
                           "the rail; and do not stop before you have come to the whales.");
    char *body = body_of(history, 0, 0, 24);
    struct wire wire;
    char headers[256];
    const double before = wire_metric(&kept, "rambad_disconnects_total");
    snprintf(headers, sizeof headers, "Authorization: Bearer %s\r\n", bob);
    cJSON *long_body = cJSON_Parse(body);
    cJSON_AddBoolToObject(long_body, "stream", true);
    cJSON_AddBoolToObject(long_body, "ignore_eos", true);
    cJSON_SetNumberValue(cJSON_GetObjectItem(long_body, "max_tokens"), 4000);
    free(body);
    body = cJSON_PrintUnformatted(long_body);
    wire_open(&wire, &kept);
    wire_ask(&wire, "POST", "/v1/chat/completions", headers, body, strlen(body));
    assert_true(wire_wait_for(&wire, "\"content\""));
    wire_close(&wire);
    wire_wait_metric(&kept, "rambad_disconnects_total", before + 1);
    wire_wait_metric(&kept, "rambad_jobs_running", 0);
    const struct said said = turn(bob, history, 0, 0);
    assert_true(said.cached == said.prompt);
    cJSON_Delete(long_body);
    cJSON_Delete(history);
    free(body);
}

/* The bytes that are kept come down to the budget. */
static void wait_for_budget(double bytes)
{
    const double start = daemon_now();
    while (wire_metric(&kept, "rambad_prefix_bytes") > bytes && daemon_now() < start + WIRE_SECONDS)
        usleep(10000);
    assert_true(wire_metric(&kept, "rambad_prefix_bytes") <= bytes);
}

static void start_again(const char *const *flags)
{
    daemon_stop(&kept);
    kept.flags = flags;
    daemon_start(&kept);
}

/* More than fits: the oldest go, and what is asked is answered all the same. */
static void hold_budget(unsigned mib)
{
    const double bytes = mib * 1048576.0;
    char size[16];
    snprintf(size, sizeof size, "%uM", mib);
    start_again(
        (const char *const[]){"--threads", "1", "--keys", keys, "--prefix-cache", size, NULL});
    wait_for_budget(bytes);
    for (int i = 0; i < 8; i++) {
        char first[64];
        snprintf(first, sizeof first, "This is talk number %d of many.", i);
        cJSON *history = begin(first);
        const struct said said = turn(ann, history, 0, i);
        answer_and_ask(history, &said, questions[0]);
        turn(ann, history, 0, i);
        cJSON_Delete(history);
    }
    assert_true(wire_metric(&kept, "rambad_prefix_evictions_total") > 0);
    wait_for_budget(bytes);
    /* A talk that is too large by itself keeps its last places. */
    cJSON *history = begin("This one is long.");
    struct said last = turn(ann, history, 0, 0);
    for (size_t i = 0; i < 2 * QUESTIONS; i++) {
        answer_and_ask(history, &last, questions[i % QUESTIONS]);
        const struct said said = turn(ann, history, 0, 0);
        assert_true(said.cached == last.prompt + last.completion - 1);
        last = said;
    }
    wait_for_budget(bytes);
    cJSON_Delete(history);
}

static void test_budget(void **state)
{
    (void)state;
    static const char *const nothing[] = {"--threads",      "1", "--keys", keys,
                                          "--prefix-cache", "0", NULL};
    kept.key = ann;
    hold_budget(8); /* here the talks stand on one that has the instructions' end */
    hold_budget(6);
    /* Told to keep nothing, it drops what there was. */
    start_again(nothing);
    assert_true(wire_metric(&kept, "rambad_prefix_entries") == 0);
    daemon_stop(&kept);
    struct buf out;
    const char *rambad = getenv("RAMBAD_BIN");
    buf_init(&out);
    assert_int_equal(daemon_run(&kept,
                                (const char *const[]){rambad ? rambad : "build/rambad", "check",
                                                      kept.data, NULL},
                                &out),
                     0);
    assert_memory_equal(buf_text(&out), "0 memories, ", 12);
    buf_close(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_turns),  cmocka_unit_test(test_edits),
        cmocka_unit_test(test_shared), cmocka_unit_test(test_stranger),
        cmocka_unit_test(test_forms),  cmocka_unit_test(test_gone),
        cmocka_unit_test(test_stored), cmocka_unit_test(test_instructed),
        cmocka_unit_test(test_kills),  cmocka_unit_test(test_budget)};
    daemon_choose_tests();
    return cmocka_run_group_tests_name("prefix", tests, setup, teardown);
}
