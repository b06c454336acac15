/* kill -9 at random moments of appends, turns and rewinds. After each, the daemon is opened again,
 * nothing that was acknowledged may be missing, and the work goes on from the committed position.
 * At the end a daemon that was never killed does the same work: the memories must be the same, to
 * the byte and in what they answer.
 *
 * The work is a function of the seed alone: memory m is new, or a fork of memory m - 1; its
 * operations are appends of some KiB, turns and rewinds, taken in order. A kill that comes after
 * its operation is over does not happen and is not counted. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define MEMORIES_MAX 64
#define OPERATIONS 12 /* of one memory */
#define APPEND_MAX 40000
#define KILLS_MAX 4 /* of one operation: those that are aimed too early must not use up all */

struct operation {
    bool is_turn, is_rewind;
    uint64_t back;       /* of a rewind: tokens */
    uint32_t max_tokens; /* of a turn */
    struct buf text;     /* to append, or the turn's prompt */
};

struct memory {
    char id[LIMITS_ID_BYTES];
    uint64_t text_bytes, token_count;
    struct buf chunks, answer;
};

struct crash {
    uint64_t seed;
    unsigned long kills_wanted, kills, kills_append, kills_turn, kills_rewind, kills_start;
    unsigned long lost_answers;                 /* committed, but the kill took the answer */
    unsigned memory_count;                      /* made so far by the run with kills */
    uint64_t random;                            /* of the kills' moments */
    double append_s_per_byte, turn_s, rewind_s; /* how long they take, to aim at */
    char *folder;
    struct daemon killed, calm;
    struct memory with_kills[MEMORIES_MAX], without[MEMORIES_MAX];
};

static uint64_t draw(uint64_t *state, uint64_t below)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % below;
}

/* The same for the same seed, memory and index, in both runs. */
static void make_operation(const struct crash *crash, unsigned memory, unsigned index,
                           struct operation *operation)
{
    uint64_t state = crash->seed ^ ((uint64_t)memory << 32 | index) * 0xd6e8feb86659fd93u;
    buf_init(&operation->text);
    operation->is_turn = draw(&state, 3) == 0;
    operation->is_rewind = !operation->is_turn && draw(&state, 4) == 0;
    operation->back = draw(&state, 3000);
    operation->max_tokens = 1 + (uint32_t)draw(&state, 24);
    /* Appends of less than one block to several: kills fall within and between commits. */
    uint64_t size = operation->is_turn ? 1 + draw(&state, 200) : 1 + draw(&state, APPEND_MAX);
    if (operation->is_rewind)
        size = 0;
    for (uint64_t i = 0; i < size; i++) {
        char c = "etaoin shrdlu\ncmfwypvbgkjqxz,.-0123456789ETAOIN"[draw(&state, 47)];
        buf_append(&operation->text, &c, 1);
    }
}

/* ---- the killer ---- */

struct killer {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t over;
    bool is_over, has_killed;
    double delay_s;
    struct daemon *daemon;
};

static void *killer_main(void *context)
{
    struct killer *killer = context;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    uint64_t ns = (uint64_t)until.tv_nsec + (uint64_t)(killer->delay_s * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_mutex_lock(&killer->mutex);
    int late = 0;
    while (!killer->is_over && !late)
        late = pthread_cond_timedwait(&killer->over, &killer->mutex, &until);
    if (!killer->is_over) {
        daemon_kill(killer->daemon);
        killer->has_killed = true;
    }
    pthread_mutex_unlock(&killer->mutex);
    return NULL;
}

static void killer_start(struct killer *killer, struct daemon *daemon, double delay_s)
{
    *killer = (struct killer){.delay_s = delay_s, .daemon = daemon};
    pthread_mutex_init(&killer->mutex, NULL);
    pthread_cond_init(&killer->over, NULL);
    assert_int_equal(pthread_create(&killer->thread, NULL, killer_main, killer), 0);
}

/* The operation is over. True when it was cut. */
static bool killer_end(struct killer *killer)
{
    pthread_mutex_lock(&killer->mutex);
    killer->is_over = true;
    pthread_cond_signal(&killer->over);
    pthread_mutex_unlock(&killer->mutex);
    pthread_join(killer->thread, NULL);
    return killer->has_killed;
}

/* ---- operations ---- */

/* Sends what of an operation begins at `done`; `at` is where the memory stands, or shall stand
 * after a rewind. Returns the HTTP status, 0 when the daemon died first. `answer` holds what came
 * until then: of an append, its events. */
static int send_operation(const struct daemon *daemon, const char *id,
                          const struct operation *operation, uint64_t done, uint64_t at,
                          struct buf *answer)
{
    char path[160];
    answer->size = 0;
    if (operation->is_rewind) {
        char to[64];
        snprintf(path, sizeof path, "/v1/memories/%s/rewind", id);
        snprintf(to, sizeof to, "{\"to\":%llu}", (unsigned long long)at);
        return daemon_call(daemon, "POST", path, "application/json", to, strlen(to), answer);
    }
    if (!operation->is_turn) {
        snprintf(path, sizeof path, "/v1/memories/%s/append?offset=%llu", id,
                 (unsigned long long)at);
        return daemon_append(daemon, path, operation->text.data + done, operation->text.size - done,
                             answer);
    }
    struct buf body;
    buf_init(&body);
    client_json_write_completion(
        &body, &(struct client_completion_request){.memory = id,
                                                   .memory_write = true,
                                                   .prompt = operation->text.data,
                                                   .prompt_size = operation->text.size,
                                                   .max_tokens = operation->max_tokens,
                                                   .seed = -1});
    int code = daemon_call(daemon, "POST", "/v1/completions", "application/json", body.data,
                           body.size, answer);
    buf_close(&body);
    return code;
}

/* The largest text_bytes that an append's events told before they broke off. */
static uint64_t acknowledged(const struct buf *events)
{
    uint64_t most = 0;
    for (size_t i = 0; i < events->size;) {
        const char *line = events->data + i;
        const char *end = memchr(line, '\n', events->size - i);
        if (!end)
            break; /* a line without its end was not told */
        struct client_append append;
        size_t size = (size_t)(end - line);
        if (size > 6 && memcmp(line, "data: ", 6) == 0 &&
            client_json_append(line + 6, size - 6, &append) == STATUS_OK &&
            append.text_bytes > most)
            most = append.text_bytes;
        i += size + 1;
    }
    return most;
}

static void restart(struct crash *crash)
{
    /* Now and then death comes before the store is open. */
    while (draw(&crash->random, 8) == 0) {
        daemon_spawn(&crash->killed);
        usleep((useconds_t)draw(&crash->random, 150000));
        daemon_kill(&crash->killed);
        crash->kills_start++;
    }
    daemon_start(&crash->killed);
}

static double aim(struct crash *crash, const struct operation *operation, uint64_t left)
{
    double likely =
        operation->is_turn ? crash->turn_s : crash->append_s_per_byte * (double)left + 0.005;
    return likely * 1.3 * (double)draw(&crash->random, 1000000) / 1e6;
}

/* The position that a rewind goes to. */
static uint64_t rewind_target(const struct memory *memory, const struct operation *operation)
{
    return memory->token_count > operation->back ? memory->token_count - operation->back : 0;
}

/* A rewind happens or does not happen; it may be asked for again. */
static void survive_rewind(struct crash *crash, struct memory *memory,
                           const struct operation *operation)
{
    const uint64_t target = rewind_target(memory, operation);
    struct buf answer;
    buf_init(&answer);
    for (unsigned kills = 0;;) {
        struct killer killer;
        bool armed = crash->kills < crash->kills_wanted && kills < KILLS_MAX;
        if (armed)
            killer_start(&killer, &crash->killed,
                         crash->rewind_s * 1.3 * (double)draw(&crash->random, 1000000) / 1e6);
        double start = daemon_now();
        int code = send_operation(&crash->killed, memory->id, operation, 0, target, &answer);
        double seconds = daemon_now() - start;
        bool cut = armed && killer_end(&killer);
        if (code != 200 && !cut) {
            daemon_print_log(&crash->killed);
            fail_msg("HTTP %d: %s", code, buf_text(&answer));
        }
        if (cut) {
            crash->kills++;
            crash->kills_rewind++;
            kills++;
            restart(crash);
        } else {
            crash->rewind_s += 0.2 * (seconds - crash->rewind_s);
        }
        struct client_memory now = daemon_get_memory(&crash->killed, memory->id);
        if (now.token_count == target) {
            crash->lost_answers += code != 200;
            memory->text_bytes = now.text_bytes;
            memory->token_count = now.token_count;
            break;
        }
        assert_int_not_equal(code, 200);
        assert_int_equal(now.token_count, memory->token_count);
        assert_int_equal(now.text_bytes, memory->text_bytes);
    }
    buf_close(&answer);
}

/* Brings one operation to its end through any number of kills. */
static void survive(struct crash *crash, struct memory *memory, const struct operation *operation)
{
    struct buf answer;
    uint64_t before = memory->text_bytes, done = 0;
    unsigned kills = 0;
    buf_init(&answer);
    for (;;) {
        struct killer killer;
        uint64_t left = operation->text.size - done;
        bool armed = crash->kills < crash->kills_wanted && kills < KILLS_MAX;
        if (armed)
            killer_start(&killer, &crash->killed, aim(crash, operation, left));
        double start = daemon_now();
        int code =
            send_operation(&crash->killed, memory->id, operation, done, before + done, &answer);
        double seconds = daemon_now() - start;
        bool cut = armed && killer_end(&killer);
        if (code != 200 && !cut) {
            daemon_print_log(&crash->killed);
            fail_msg("HTTP %d: %s", code, buf_text(&answer));
        }
        if (cut) {
            crash->kills++;
            kills++;
            *(operation->is_turn ? &crash->kills_turn : &crash->kills_append) += 1;
            restart(crash);
        } else if (operation->is_turn) {
            crash->turn_s += 0.2 * (seconds - crash->turn_s);
        } else {
            crash->append_s_per_byte += 0.2 * (seconds / (double)left - crash->append_s_per_byte);
        }
        struct client_memory now = daemon_get_memory(&crash->killed, memory->id);
        bool whole = operation->is_turn ? now.text_bytes >= before + operation->text.size
                                        : now.text_bytes == before + operation->text.size;
        /* Nothing acknowledged is lost, nothing is there twice, and a turn is there whole or not
         * at all. */
        if (code == 200)
            assert_true(whole);
        if (!operation->is_turn) {
            assert_true(now.text_bytes >= acknowledged(&answer));
            assert_true(now.text_bytes >= before + done);
            assert_true(now.text_bytes <= before + operation->text.size);
            done = now.text_bytes - before;
        } else if (!whole) {
            assert_int_equal(now.text_bytes, before);
            assert_int_equal(now.token_count, memory->token_count);
        }
        if (whole) {
            crash->lost_answers += code != 200;
            memory->text_bytes = now.text_bytes;
            memory->token_count = now.token_count;
            break;
        }
    }
    buf_close(&answer);
}

static void do_once(const struct crash *crash, struct memory *memory,
                    const struct operation *operation)
{
    struct buf answer;
    buf_init(&answer);
    uint64_t at = operation->is_rewind ? rewind_target(memory, operation) : memory->text_bytes;
    int code = send_operation(&crash->calm, memory->id, operation, 0, at, &answer);
    if (code != 200)
        print_message("HTTP %d: %s\n", code, buf_text(&answer));
    assert_int_equal(code, 200);
    struct client_memory now = daemon_get_memory(&crash->calm, memory->id);
    memory->text_bytes = now.text_bytes;
    memory->token_count = now.token_count;
    buf_close(&answer);
}

static void create(const struct daemon *daemon, struct memory *memories, unsigned m)
{
    struct memory *memory = &memories[m];
    bool is_fork = m % 2 == 1;
    daemon_create_memory(daemon, is_fork ? memories[m - 1].id : NULL, memory->id);
    struct client_memory now = daemon_get_memory(daemon, memory->id);
    memory->text_bytes = now.text_bytes;
    memory->token_count = now.token_count;
    assert_int_equal(now.text_bytes, is_fork ? memories[m - 1].text_bytes : 0);
}

/* What a memory holds and what it says, for the comparison. */
static void read_back(const struct daemon *daemon, struct memory *memory)
{
    struct buf body;
    buf_init(&body);
    daemon_read_chunks(daemon, memory->id, &memory->chunks);
    client_json_write_completion(&body, &(struct client_completion_request){.memory = memory->id,
                                                                            .prompt = "What now?",
                                                                            .prompt_size = 9,
                                                                            .max_tokens = 32,
                                                                            .seed = -1});
    assert_int_equal(daemon_call(daemon, "POST", "/v1/completions", "application/json", body.data,
                                 body.size, &memory->answer),
                     200);
    buf_close(&body);
}

static void compare(const struct memory *a, const struct memory *b, unsigned m)
{
    struct client_completion x, y;
    assert_int_equal(a->text_bytes, b->text_bytes);
    assert_int_equal(a->token_count, b->token_count);
    assert_int_equal(a->chunks.size, b->chunks.size);
    assert_memory_equal(a->chunks.data, b->chunks.data, a->chunks.size);
    assert_int_equal(client_json_completion(a->answer.data, a->answer.size, &x), STATUS_OK);
    assert_int_equal(client_json_completion(b->answer.data, b->answer.size, &y), STATUS_OK);
    assert_string_equal(x.text, y.text);
    assert_string_equal(x.finish_reason, y.finish_reason);
    client_json_completion_close(&x);
    client_json_completion_close(&y);
    print_message("memory %u: %llu tokens, the same in both runs\n", m,
                  (unsigned long long)a->token_count);
}

static void test_crash(void **state)
{
    struct crash *crash = *state;
    double start = daemon_now();
    daemon_start(&crash->killed);
    while (crash->kills < crash->kills_wanted && crash->memory_count < MEMORIES_MAX) {
        unsigned m = crash->memory_count++;
        create(&crash->killed, crash->with_kills, m);
        for (unsigned i = 0; i < OPERATIONS; i++) {
            struct operation operation;
            make_operation(crash, m, i, &operation);
            if (operation.is_rewind)
                survive_rewind(crash, &crash->with_kills[m], &operation);
            else
                survive(crash, &crash->with_kills[m], &operation);
            buf_close(&operation.text);
        }
        print_message("%lu kills, %u memories, %.0f s\n", crash->kills, crash->memory_count,
                      daemon_now() - start);
    }
    assert_int_equal(crash->kills, crash->kills_wanted);
    for (unsigned m = 0; m < crash->memory_count; m++)
        read_back(&crash->killed, &crash->with_kills[m]);
    daemon_stop(&crash->killed);
    daemon_check(&crash->killed);
    print_message("seed %llu: %lu kills, %lu in appends, %lu in turns, %lu in rewinds, and %lu "
                  "while opening; "
                  "%lu answers were lost after their commit\n",
                  (unsigned long long)crash->seed, crash->kills, crash->kills_append,
                  crash->kills_turn, crash->kills_rewind, crash->kills_start, crash->lost_answers);

    daemon_start(&crash->calm);
    for (unsigned m = 0; m < crash->memory_count; m++) {
        create(&crash->calm, crash->without, m);
        for (unsigned i = 0; i < OPERATIONS; i++) {
            struct operation operation;
            make_operation(crash, m, i, &operation);
            do_once(crash, &crash->without[m], &operation);
            buf_close(&operation.text);
        }
        read_back(&crash->calm, &crash->without[m]);
        compare(&crash->with_kills[m], &crash->without[m], m);
    }
    daemon_stop(&crash->calm);
    daemon_check(&crash->calm);
}

static int teardown(void **state)
{
    struct crash *crash = *state;
    daemon_kill(&crash->killed);
    daemon_kill(&crash->calm);
    return 0;
}

int main(void)
{
    struct crash *crash = calloc(1, sizeof *crash);
    char path[1024];
    const char *seed = getenv("RAMBAD_SEED"), *kills = getenv("RAMBAD_CRASH_KILLS");
    if (!crash)
        return 1;
    if (seed)
        crash->seed = strtoull(seed, NULL, 10);
    else if (getrandom(&crash->seed, sizeof crash->seed, 0) != sizeof crash->seed)
        return 1;
    crash->kills_wanted = kills ? strtoul(kills, NULL, 10) : 200;
    crash->random = crash->seed + 1;
    crash->append_s_per_byte = 2e-5;
    crash->turn_s = 0.05;
    crash->rewind_s = 0.3;
    print_message("RAMBAD_SEED=%llu RAMBAD_CRASH_KILLS=%lu\n", (unsigned long long)crash->seed,
                  crash->kills_wanted);
    crash->folder = store_helper_folder();
    snprintf(path, sizeof path, "%s/killed", crash->folder);
    mkdir(path, 0700);
    daemon_init(&crash->killed, MODEL, path);
    snprintf(path, sizeof path, "%s/calm", crash->folder);
    mkdir(path, 0700);
    daemon_init(&crash->calm, MODEL, path);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_crash, NULL, teardown, crash),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    store_helper_remove(crash->folder);
    for (unsigned m = 0; m < MEMORIES_MAX; m++)
        for (int run = 0; run < 2; run++) {
            struct memory *memory = run ? &crash->without[m] : &crash->with_kills[m];
            buf_close(&memory->chunks);
            buf_close(&memory->answer);
        }
    free(crash);
    return failed;
}
