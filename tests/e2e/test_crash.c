/* kill -9 at random moments of what several clients do at once: appends, turns, rewinds, creations,
 * forks that are deleted again. After each kill the daemon is opened again, nothing that was
 * acknowledged may be missing, and the work goes on from the committed positions. At the end a
 * daemon that was never killed does the same work, one operation after the other: the memories must
 * be the same, to the byte and in what they answer, and there must be no others.
 *
 * The work is a function of the seed alone: each client writes memories one behind the other, every
 * second of them a fork of the one before; the operations of a memory are taken in order. A round
 * is one operation of every client, side by side, with at most one kill; one that comes after the
 * round is over does not happen and is not counted.
 *
 * RAMBAD_CRASH_KILLS=2000 asks for the long form; RAMBAD_CRASH_STORES=16 shares the kills out to so
 * many stores side by side, each with a seed of its own: the first has RAMBAD_SEED, the next the
 * number behind it. A store that failed is repeated alone with its seed and its kills. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define CLIENTS 3
#define MEMORIES_MAX 1024
#define STORES_MAX 256
#define OPERATIONS 12 /* of one memory, its creation included */
#define APPEND_MAX 24000
#define KILLS_MAX 4 /* of one operation: those that are aimed too early must not use up all */

enum kind { CREATE, APPEND, TURN, REWIND, COPY, KINDS };
static const char *const kind_names[KINDS] = {"creations", "appends", "turns", "rewinds", "copies"};

struct operation {
    enum kind kind;
    char key[64];        /* Idempotency-Key of a creation or copy: it happens once */
    uint64_t back;       /* of a rewind: tokens */
    uint32_t max_tokens; /* of a turn */
    struct buf text;     /* to append, or the turn's prompt */
};

struct memory {
    char id[LIMITS_ID_BYTES];
    uint64_t text_bytes, token_count;
    struct buf chunks;
    struct client_completion answer;
};

/* One of those who write at once: where its work stands. */
struct client {
    pthread_t thread;
    const struct daemon *daemon;
    unsigned memory, index; /* its operation: of that memory, that one */
    struct operation operation;
    struct memory *past, *parent; /* what it writes to; of a creation: forks, NULL: nothing */
    uint64_t before, done;        /* bytes of text before the operation, and of it so far */
    unsigned kills;               /* of this operation */
    int code;                     /* the round's answer */
    double seconds;
    struct buf answer;
    char id[LIMITS_ID_BYTES]; /* of what a creation made */
};

struct crash {
    uint64_t seed;
    unsigned long kills_wanted, kills, kills_start, cut[KINDS], done[KINDS];
    unsigned long lost_answers; /* committed, but the kill took the answer */
    uint64_t random;            /* of the kills' moments */
    double likely[KINDS];       /* seconds of an operation (an append: of a byte), to aim at */
    char *folder;
    struct daemon killed, calm;
    struct client clients[CLIENTS];
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
    uint64_t size = 0, what = draw(&state, 12);
    *operation = (struct operation){.kind = what < 4 ? TURN : what < 9 ? APPEND : COPY};
    if (index == 0)
        operation->kind = CREATE;
    else if (what >= 10)
        operation->kind = REWIND;
    buf_init(&operation->text);
    snprintf(operation->key, sizeof operation->key, "%u-%u", memory, index);
    operation->back = draw(&state, 3000);
    operation->max_tokens = 1 + (uint32_t)draw(&state, 24);
    /* Appends of less than one block to several: kills fall within and between commits. */
    if (operation->kind == TURN)
        size = 1 + draw(&state, 200);
    else if (operation->kind == APPEND)
        size = 1 + draw(&state, APPEND_MAX);
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

/* The position that a rewind goes to. */
static uint64_t rewind_target(const struct memory *memory, const struct operation *operation)
{
    return memory->token_count > operation->back ? memory->token_count - operation->back : 0;
}

/* A memory, or a fork of `from`, made once however often it is asked for. */
static int send_creation(struct client *client, const char *from)
{
    struct buf body;
    struct client_memory made;
    buf_init(&body);
    client_json_write_create(&body, from, 0, NULL);
    int code = daemon_call_once(client->daemon, client->operation.key, "/v1/memories",
                                "application/json", body.data, body.size, &client->answer);
    if (code == 201 &&
        client_json_memory(client->answer.data, client->answer.size, &made) == STATUS_OK)
        memcpy(client->id, made.id, sizeof client->id);
    else if (code == 201)
        code = 0;
    buf_close(&body);
    return code == 201 ? 200 : code;
}

/* A fork that is deleted again. */
static int send_copy(struct client *client)
{
    char path[160];
    int code = send_creation(client, client->past->id);
    if (code != 200) /* 404: an earlier try came as far as its deletion */
        return code == 404 && client->kills ? 200 : code;
    client->answer.size = 0;
    snprintf(path, sizeof path, "/v1/memories/%s", client->id);
    code = daemon_call(client->daemon, "DELETE", path, NULL, NULL, 0, &client->answer);
    return code == 404 && client->kills ? 200 : code;
}

static int send_turn(struct client *client)
{
    struct buf body;
    buf_init(&body);
    client_json_write_completion(
        &body, &(struct client_completion_request){.memory = client->past->id,
                                                   .memory_write = true,
                                                   .prompt = client->operation.text.data,
                                                   .prompt_size = client->operation.text.size,
                                                   .max_tokens = client->operation.max_tokens,
                                                   .seed = -1});
    int code = daemon_call(client->daemon, "POST", "/v1/completions", "application/json", body.data,
                           body.size, &client->answer);
    buf_close(&body);
    return code;
}

/* Sends what is left of the client's operation. Returns 200, another HTTP status, or 0 when the
 * daemon died first. The answer is what came until then: of an append, its events. */
static int send_operation(struct client *client)
{
    const struct operation *operation = &client->operation;
    char path[160], to[64];
    client->answer.size = 0;
    switch (operation->kind) {
    case CREATE:
        return send_creation(client, client->parent ? client->parent->id : NULL);
    case COPY:
        return send_copy(client);
    case TURN:
        return send_turn(client);
    case REWIND:
        snprintf(path, sizeof path, "/v1/memories/%s/rewind", client->past->id);
        snprintf(to, sizeof to, "{\"to\":%llu}",
                 (unsigned long long)rewind_target(client->past, operation));
        return daemon_call(client->daemon, "POST", path, "application/json", to, strlen(to),
                           &client->answer);
    default:
        snprintf(path, sizeof path, "/v1/memories/%s/append?offset=%llu", client->past->id,
                 (unsigned long long)(client->before + client->done));
        return daemon_append(client->daemon, path, operation->text.data + client->done,
                             operation->text.size - client->done, &client->answer);
    }
}

static void *client_main(void *context)
{
    struct client *client = context;
    double start = daemon_now();
    client->code = send_operation(client);
    client->seconds = daemon_now() - start;
    return NULL;
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

/* How long what is left of a client's operation takes, as far as one has seen. */
static double likely(const struct crash *crash, const struct client *client)
{
    enum kind kind = client->operation.kind;
    double left = (double)(client->operation.text.size - client->done);
    return kind == APPEND ? crash->likely[kind] * left + 0.005 : crash->likely[kind];
}

static void learn(struct crash *crash, const struct client *client)
{
    enum kind kind = client->operation.kind;
    double seen = client->seconds;
    if (kind == APPEND)
        seen /= (double)(client->operation.text.size - client->done);
    crash->likely[kind] += 0.2 * (seen - crash->likely[kind]);
}

/* What is there of the client's operation after a round, whole or in part: nothing acknowledged is
 * lost, nothing is there twice, and all but an append is there whole or not at all. Returns whether
 * the operation is over. */
static bool look(struct client *client)
{
    struct memory *past = client->past;
    const struct operation *operation = &client->operation;
    bool is_good = client->code == 200, whole = is_good;
    if (operation->kind == CREATE && is_good)
        memcpy(past->id, client->id, sizeof past->id);
    if (!past->id[0])
        return false;
    struct client_memory now = daemon_get_memory(client->daemon, past->id);
    uint64_t before = client->before;
    switch (operation->kind) {
    case APPEND:
        assert_true(now.text_bytes >= acknowledged(&client->answer));
        assert_true(now.text_bytes >= before + client->done);
        assert_true(now.text_bytes <= before + operation->text.size);
        client->done = now.text_bytes - before;
        whole = client->done == operation->text.size;
        break;
    case TURN:
        whole = now.text_bytes >= before + operation->text.size;
        break;
    case REWIND:
        whole = now.token_count == rewind_target(past, operation);
        break;
    default:
        break;
    }
    if (is_good)
        assert_true(whole);
    if (!whole && operation->kind != APPEND) {
        assert_int_equal(now.text_bytes, before);
        assert_int_equal(now.token_count, past->token_count);
    }
    if (operation->kind == CREATE || operation->kind == COPY)
        assert_int_equal(now.text_bytes, client->parent && operation->kind == CREATE
                                             ? client->parent->text_bytes
                                             : before);
    if (whole) {
        past->text_bytes = now.text_bytes;
        past->token_count = now.token_count;
    }
    return whole;
}

/* The client's next operation, or one of its next memory. */
static void take_operation(struct crash *crash, struct client *client, struct memory *memories)
{
    buf_close(&client->operation.text);
    make_operation(crash, client->memory, client->index, &client->operation);
    bool is_fork = client->memory / CLIENTS % 2 == 1;
    client->past = &memories[client->memory];
    client->parent = is_fork ? client->past - CLIENTS : NULL;
    client->before = client->past->text_bytes;
    client->done = 0;
    client->kills = 0;
}

static void go_on(struct client *client)
{
    if (++client->index < OPERATIONS)
        return;
    client->index = 0;
    client->memory += CLIENTS;
}

/* One operation of each client at once, and perhaps a kill. */
static void run_round(struct crash *crash)
{
    struct killer killer;
    const struct client *aimed_at = &crash->clients[draw(&crash->random, CLIENTS)];
    bool armed = crash->kills < crash->kills_wanted;
    for (unsigned c = 0; c < CLIENTS; c++)
        armed = armed && crash->clients[c].kills < KILLS_MAX;
    if (armed)
        killer_start(&killer, &crash->killed,
                     likely(crash, aimed_at) * 1.3 * (double)draw(&crash->random, 1000000) / 1e6);
    for (unsigned c = 0; c < CLIENTS; c++)
        assert_int_equal(
            pthread_create(&crash->clients[c].thread, NULL, client_main, &crash->clients[c]), 0);
    for (unsigned c = 0; c < CLIENTS; c++)
        pthread_join(crash->clients[c].thread, NULL);
    bool killed = armed && killer_end(&killer);
    for (unsigned c = 0; c < CLIENTS; c++) {
        struct client *client = &crash->clients[c];
        if (client->code != 200 && !(killed && client->code == 0)) {
            daemon_print_log(&crash->killed);
            fail_msg("%s: HTTP %d: %s", kind_names[client->operation.kind], client->code,
                     buf_text(&client->answer));
        }
        if (client->code == 200)
            learn(crash, client);
    }
    if (killed) {
        crash->kills++;
        restart(crash);
    }
    for (unsigned c = 0; c < CLIENTS; c++) {
        struct client *client = &crash->clients[c];
        enum kind kind = client->operation.kind;
        bool whole = look(client);
        if (client->code != 200) {
            client->kills++;
            crash->cut[kind]++;
            crash->lost_answers += whole;
        }
        if (!whole)
            continue;
        crash->done[kind]++;
        go_on(client);
        take_operation(crash, client, crash->with_kills);
    }
}

/* The memory's operations up to `end`, on the daemon that is not killed. */
static void do_calmly(struct crash *crash, unsigned m, unsigned end)
{
    struct client client = {.daemon = &crash->calm, .memory = m};
    buf_init(&client.operation.text);
    buf_init(&client.answer);
    for (client.index = 0; client.index < end; client.index++) {
        take_operation(crash, &client, crash->without);
        client.code = send_operation(&client);
        if (client.code != 200)
            print_message("HTTP %d: %s\n", client.code, buf_text(&client.answer));
        assert_int_equal(client.code, 200);
        assert_true(look(&client));
    }
    buf_close(&client.operation.text);
    buf_close(&client.answer);
}

/* What a memory holds and what it says, for the comparison. */
static void read_back(const struct daemon *daemon, struct memory *memory)
{
    daemon_read_chunks(daemon, memory->id, &memory->chunks);
    memory->answer = daemon_complete(daemon, memory->id, "What now?", 32, false);
}

static void compare(const struct memory *a, const struct memory *b)
{
    assert_int_equal(a->text_bytes, b->text_bytes);
    assert_int_equal(a->token_count, b->token_count);
    assert_int_equal(a->chunks.size, b->chunks.size);
    assert_memory_equal(a->chunks.data, b->chunks.data, a->chunks.size);
    assert_string_equal(a->answer.text, b->answer.text);
    assert_string_equal(a->answer.finish_reason, b->answer.finish_reason);
}

static void report(const struct crash *crash)
{
    print_message("seed %llu: %lu kills, and %lu while opening; ", (unsigned long long)crash->seed,
                  crash->kills, crash->kills_start);
    for (int kind = 0; kind < KINDS; kind++)
        print_message("%lu of %lu %s cut, ", crash->cut[kind], crash->done[kind], kind_names[kind]);
    print_message("%lu answers lost after their commit\n", crash->lost_answers);
}

static void test_crash(void **state)
{
    struct crash *crash = *state;
    double start = daemon_now();
    unsigned memory_count = 0;
    daemon_start(&crash->killed);
    for (unsigned c = 0; c < CLIENTS; c++) {
        struct client *client = &crash->clients[c];
        client->daemon = &crash->killed;
        client->memory = c;
        take_operation(crash, client, crash->with_kills);
    }
    for (unsigned rounds = 0; crash->kills < crash->kills_wanted; rounds++) {
        run_round(crash);
        for (unsigned c = 0; c < CLIENTS; c++)
            assert_true(crash->clients[c].memory < MEMORIES_MAX);
        if (rounds % 64 == 63)
            print_message("%lu kills, %u rounds, %.0f s\n", crash->kills, rounds + 1,
                          daemon_now() - start);
    }
    run_round(crash); /* without a kill: what they cut short comes to its end */
    for (unsigned m = 0; m < MEMORIES_MAX; m++)
        if (crash->with_kills[m].id[0]) {
            read_back(&crash->killed, &crash->with_kills[m]);
            memory_count++;
        }
    wire_wait_metric(&crash->killed, "rambad_memories", memory_count);
    daemon_stop(&crash->killed);
    daemon_check(&crash->killed);
    report(crash);

    daemon_start(&crash->calm);
    for (unsigned m = 0; m < MEMORIES_MAX; m++) {
        if (!crash->with_kills[m].id[0])
            continue;
        const struct client *client = &crash->clients[m % CLIENTS];
        do_calmly(crash, m, m == client->memory ? client->index : OPERATIONS);
        read_back(&crash->calm, &crash->without[m]);
        compare(&crash->with_kills[m], &crash->without[m]);
    }
    print_message("%u memories, the same in a run without kills; %.0f s\n", memory_count,
                  daemon_now() - start);
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

/* One store's run, from an empty folder. Returns whether it failed; then the folder stays. */
static bool run_store(struct crash *crash)
{
    crash->random = crash->seed + 1;
    memcpy(crash->likely, (double[KINDS]){0.01, 2e-5, 0.05, 0.3, 0.02}, sizeof crash->likely);
    for (unsigned c = 0; c < CLIENTS; c++) {
        buf_init(&crash->clients[c].answer);
        buf_init(&crash->clients[c].operation.text);
    }
    print_message("RAMBAD_SEED=%llu RAMBAD_CRASH_KILLS=%lu\n", (unsigned long long)crash->seed,
                  crash->kills_wanted);
    crash->folder = store_helper_folder();
    daemon_init(&crash->killed, MODEL, crash->folder, "killed");
    daemon_init(&crash->calm, MODEL, crash->folder, "calm");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_crash, NULL, teardown, crash),
    };
    const bool failed = cmocka_run_group_tests(tests, NULL, NULL) != 0;
    if (failed)
        print_message("what it left is in %s\n", crash->folder);
    else
        store_helper_remove(crash->folder);
    for (unsigned m = 0; m < MEMORIES_MAX; m++)
        for (int run = 0; run < 2; run++) {
            struct memory *memory = run ? &crash->without[m] : &crash->with_kills[m];
            buf_close(&memory->chunks);
            client_json_completion_close(&memory->answer);
        }
    for (unsigned c = 0; c < CLIENTS; c++) {
        buf_close(&crash->clients[c].answer);
        buf_close(&crash->clients[c].operation.text);
    }
    return failed;
}

/* ---- several stores side by side, a process each ---- */

static pid_t start_store(struct crash *crash, FILE *output)
{
    const pid_t parent = getpid();
    fflush(NULL);
    const pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent || dup2(fileno(output), STDOUT_FILENO) < 0 ||
        dup2(fileno(output), STDERR_FILENO) < 0)
        _exit(126);
    exit(run_store(crash));
}

static void print_output(FILE *output)
{
    char line[1024];
    rewind(output);
    while (fgets(line, sizeof line, output))
        print_message("  %s", line);
}

/* What all of them did, counted by themselves in the memory that is shared. Returns how many
 * failed. */
static unsigned run_stores(struct crash *crashes, unsigned count)
{
    FILE *outputs[STORES_MAX];
    pid_t pids[STORES_MAX];
    struct crash sum = {.seed = crashes[0].seed};
    unsigned failed = 0;
    const double start = daemon_now();
    setenv("RAMBAD_THREADS", "1", 0); /* the stores share the machine, not each sequence's work */
    for (unsigned i = 0; i < count; i++) {
        outputs[i] = tmpfile();
        pids[i] = outputs[i] ? start_store(&crashes[i], outputs[i]) : -1;
    }
    for (unsigned i = 0; i < count; i++) {
        int how = 1;
        const bool ran = pids[i] > 0 && waitpid(pids[i], &how, 0) == pids[i];
        const bool is_good = ran && WIFEXITED(how) && WEXITSTATUS(how) == 0;
        print_message("store %u of %u, seed %llu: %s\n", i + 1, count,
                      (unsigned long long)crashes[i].seed, is_good ? "passed" : "FAILED");
        if (outputs[i])
            print_output(outputs[i]);
        failed += !is_good;
        sum.kills += crashes[i].kills;
        sum.kills_start += crashes[i].kills_start;
        sum.lost_answers += crashes[i].lost_answers;
        for (int kind = 0; kind < KINDS; kind++) {
            sum.cut[kind] += crashes[i].cut[kind];
            sum.done[kind] += crashes[i].done[kind];
        }
    }
    report(&sum);
    print_message("%u stores side by side, %u failed; %.0f s\n", count, failed,
                  daemon_now() - start);
    return failed;
}

static unsigned long setting(const char *name, unsigned long otherwise)
{
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : otherwise;
}

int main(void)
{
    const unsigned long kills = setting("RAMBAD_CRASH_KILLS", 60);
    const unsigned long stores = setting("RAMBAD_CRASH_STORES", 1);
    const char *text = getenv("RAMBAD_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 10) : 0;
    if (!text && getrandom(&seed, sizeof seed, 0) != sizeof seed)
        return 1;
    if (stores < 1 || stores > STORES_MAX) {
        print_message("RAMBAD_CRASH_STORES: 1 to %u\n", STORES_MAX);
        return 1;
    }
    struct crash *crashes = mmap(NULL, stores * sizeof *crashes, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (crashes == MAP_FAILED)
        return 1;
    for (unsigned long i = 0; i < stores; i++) {
        crashes[i].seed = seed + i;
        crashes[i].kills_wanted = kills / stores + (i < kills % stores);
    }
    if (stores > 1)
        print_message("RAMBAD_SEED=%llu RAMBAD_CRASH_KILLS=%lu RAMBAD_CRASH_STORES=%lu\n",
                      (unsigned long long)seed, kills, stores);
    return stores > 1 ? run_stores(crashes, (unsigned)stores) != 0 : run_store(crashes);
}
