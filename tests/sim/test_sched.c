/* A day of mixed traffic through the scheduler, against a model of an engine, in seconds: nobody
 * starves, queues stay bounded, running sequences never wait longer than they may, keys get their
 * weights' parts, and who is sent away is told the truth.
 *
 * The engine's times are those of a 370M model on two cores, with noise and drift; the scheduler
 * has to find them out. RAMBAD_SEED repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include <cmocka.h>

#include "server/sched.h"

#define DAY 86400.0
#define MAX_STALL 0.25
#define QUEUE 64
#define QUEUE_TOKENS 60000
#define RUNNING 16
#define SESSION ((uint64_t)50 << 20)
#define MEMORY (40 * SESSION)

#define LEARN_STEPS 200 /* until then the times are being found out */
#define STARVED_S 900.0 /* no entry waits longer for its start, nor a prefill for its next rows */

enum kind { CHAT, LONG_PROMPT, LONG_ANSWER, UPLOAD };

/* Clients of one key: how many, what they want, and how long they think between. */
struct crowd {
    const char *key;
    double weight;
    enum kind kind;
    int clients;
    double think; /* mean seconds */
    bool busy_hours_only;
};

static const struct crowd crowds[] = {
    {"chats", 1, CHAT, 30, 0.01, true},
    {"readers", 2, LONG_PROMPT, 40, 0.01, true},
    {"writers", 4, LONG_ANSWER, 60, 0.01, true},
    {"uploads", 1, UPLOAD, 6, 1, false},
    {"rare", 1, CHAT, 2, 60, false},
    {"chats", 1, UPLOAD, 1, 600, false},
};
#define CROWDS (sizeof crowds / sizeof *crowds)
#define CLIENTS 256

struct client {
    struct sched_entry entry;
    const struct crowd *crowd;
    enum { THINKING, SENT_AWAY, WAITING, RUNNING_NOW } state;
    double next;     /* THINKING, SENT_AWAY: when it comes */
    double deadline; /* 0: none */
    double since;    /* of its state */
    double served;   /* when it last had a token or rows */
    uint32_t prompt, answer, choices;
    double feed; /* tokens a second that an upload brings; 0: all at once */
    double brought;
    uint32_t refusals;
    uint64_t starts; /* of others, when it was sent away */
};

static struct client clients[CLIENTS];
static int client_count;
static struct sched sched;
static struct sched_gate gate;
static uint64_t seed, state;
static double now;

static struct {
    uint64_t steps, arrivals, starts, finished, expired, refused, retries, retries_true;
    double stall, queued, unfed; /* the longest */
    double rare_queued, rare_count;
    uint64_t late;
} seen;

static double uniform(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) / 9007199254740992.0;
}

static uint32_t between(uint32_t low, uint32_t high)
{
    return low + (uint32_t)(uniform() * (high - low + 1));
}

static bool is_busy(double at)
{
    const double hour = at / 3600;
    return (hour >= 9 && hour < 11) || (hour >= 14 && hour < 16);
}

/* ---- the engine's model ---- */

static double step_seconds(uint32_t decodes, uint32_t rows)
{
    const double hour = now / 3600;
    const double drift = 0.9 + 0.3 * (hour < 12 ? hour : 24 - hour) / 12;
    const double noise = 0.95 + 0.1 * uniform();
    return (0.001 + (decodes ? 0.016 + 0.0025 * decodes : 0) + (rows ? 0.012 + 0.0016 * rows : 0)) *
           drift * noise;
}

/* ---- clients ---- */

static void think(struct client *c)
{
    c->state = THINKING;
    c->refusals = 0;
    c->next = now + c->crowd->think * (0.5 + uniform());
    if (c->crowd->busy_hours_only && !is_busy(c->next)) {
        const double hour = c->next / 3600;
        c->next = (hour < 9 ? 9 : hour < 14 ? 14 : 1e9) * 3600 + uniform();
    }
}

static void choose(struct client *c)
{
    static const struct {
        uint32_t prompt[2], answer[2];
    } sizes[] = {[CHAT] = {{10, 200}, {10, 60}},
                 [LONG_PROMPT] = {{500, 6000}, {1, 20}},
                 [LONG_ANSWER] = {{10, 60}, {100, 400}},
                 [UPLOAD] = {{5000, 400000}, {0, 0}}};
    const enum kind kind = c->crowd->kind;
    c->prompt = between(sizes[kind].prompt[0], sizes[kind].prompt[1]);
    c->answer = between(sizes[kind].answer[0], sizes[kind].answer[1]);
    c->choices = uniform() < 0.02 && kind == CHAT ? between(2, 16) : 1;
    c->feed = kind == UPLOAD && uniform() < 0.3 ? 100 + 400 * uniform() : 0;
    c->brought = 0;
    c->entry.bulk = kind == UPLOAD;
    c->entry.priority = uniform() < 0.2 ? (double)between(0, 40) - 20 : 0;
    c->entry.bytes = c->choices * SESSION;
    c->deadline = kind != UPLOAD && uniform() < 0.05 ? now + 5 + 40 * uniform() : 0;
    c->answer *= c->choices;
}

static void arrive(struct client *c)
{
    double retry;
    const bool again = c->state == SENT_AWAY;
    if (!again)
        choose(c);
    const uint64_t tokens = c->entry.bulk ? 0 : c->prompt;
    seen.arrivals++;
    seen.retries += again;
    seen.retries_true += again && seen.starts > c->starts;
    if (!sched_gate_enter(&gate, tokens, now, &retry)) {
        assert_true(retry > 0 && retry <= 3600);
        seen.refused++;
        c->refusals++;
        assert_true(c->refusals < 200); /* the promise is kept some day */
        c->state = SENT_AWAY;
        c->starts = seen.starts;
        c->next = now + retry;
        return;
    }
    assert_true(gate.requests <= QUEUE + RUNNING);
    assert_true(gate.tokens <= QUEUE_TOKENS || gate.requests == 1);
    c->entry.came = c->since = now;
    c->state = WAITING;
    sched_add(&sched, &c->entry, sched_share(&sched, c->crowd->key, c->crowd->weight));
}

static void leave(struct client *c)
{
    if (c->state == WAITING)
        sched_gate_leave(&gate, c->entry.bulk ? 0 : c->prompt);
    else
        sched_gate_end(&gate);
    sched_remove(&sched, &c->entry);
    think(c);
}

static void start_all(void)
{
    struct sched_entry *entry;
    while ((entry = sched_start(&sched))) {
        struct client *c = LIST_ENTRY(entry, struct client, entry);
        const double queued = now - c->since;
        assert_int_equal(c->state, WAITING);
        assert_true(!c->deadline || now < c->deadline);
        sched_gate_start(&gate, entry->bulk ? 0 : c->prompt, now);
        seen.starts++;
        /* Uploads may wait for one of their own key. */
        if (!entry->bulk || entry->share->bulk == 1)
            seen.queued = queued > seen.queued ? queued : seen.queued;
        if (strcmp(c->crowd->key, "rare") == 0) {
            seen.rare_queued += queued;
            seen.rare_count++;
        }
        c->state = RUNNING_NOW;
        c->since = c->served = now;
    }
    assert_true(sched.running_count <= RUNNING && sched.bytes <= MEMORY);
}

static void set_demand(struct client *c)
{
    const uint64_t border = 256 - (uint64_t)c->brought % 256;
    uint64_t here = c->prompt;
    if (c->feed > 0) {
        const double came = (now - c->since) * c->feed;
        here = came < c->brought ? 0 : (uint64_t)(came - c->brought);
        here = here < c->prompt ? here : c->prompt;
    }
    c->entry.rows_left = c->prompt;
    c->entry.rows = (uint32_t)(here < border ? here : border);
    c->entry.decodes = c->prompt ? 0 : c->answer < c->choices ? c->answer : c->choices;
    if (c->prompt && !here)
        c->served = now; /* it is the client who is slow */
}

static void take(const struct sched_pick *pick)
{
    struct client *c = LIST_ENTRY(pick->entry, struct client, entry);
    const double gap = now - c->served;
    if (pick->rows) {
        assert_true(pick->rows <= c->entry.rows && pick->rows <= 256);
        c->prompt -= pick->rows;
        c->brought += pick->rows;
        seen.unfed = gap > seen.unfed ? gap : seen.unfed;
    } else {
        assert_true(pick->decodes && pick->decodes <= c->entry.decodes);
        c->answer -= pick->decodes;
        if (seen.steps > LEARN_STEPS) {
            seen.stall = gap > seen.stall ? gap : seen.stall;
            seen.late += gap > MAX_STALL;
        }
    }
    c->served = now;
}

/* One turn of the engine's thread; false when there was nothing to do. */
static bool turn(void)
{
    for (int i = 0; i < client_count; i++) {
        struct client *c = &clients[i];
        if ((c->state == THINKING || c->state == SENT_AWAY) && c->next <= now)
            arrive(c);
        if (c->deadline && c->state >= WAITING && now >= c->deadline) {
            seen.expired++;
            leave(c);
        }
    }
    start_all();
    for (int i = 0; i < client_count; i++)
        if (clients[i].state == RUNNING_NOW)
            set_demand(&clients[i]);
    sched_plan(&sched);
    if (!sched.pick_count)
        return false;
    const double took = step_seconds(sched.step_decodes, sched.step_rows);
    assert_true(sched.step_decodes <= RUNNING && sched.step_rows <= 288);
    now += took;
    seen.steps++;
    for (uint32_t i = 0; i < sched.pick_count; i++)
        take(&sched.picks[i]);
    sched_done(&sched, took);
    for (int i = 0; i < client_count; i++) {
        struct client *c = &clients[i];
        if (c->state == RUNNING_NOW && !c->prompt && !c->answer) {
            seen.finished++;
            leave(c);
        }
    }
    return true;
}

static void rest(void)
{
    double next = now + 0.05; /* an upload may bring some */
    if (!sched.running_count) {
        next = 1e12;
        for (int i = 0; i < client_count; i++)
            if (clients[i].state < WAITING && clients[i].next < next)
                next = clients[i].next;
    }
    now = next > now ? next : now + 1e-6;
}

/* ---- fairness ---- */

#define KEYS 4 /* the first crowds, which always want more in busy hours */

static void totals(double out[KEYS])
{
    for (int i = 0; i < KEYS; i++)
        out[i] = sched_share(&sched, crowds[i].key, crowds[i].weight)->total;
}

static void check_parts(const double before[KEYS], const double after[KEYS])
{
    double least = 1e9, most = 0;
    for (int i = 0; i < KEYS; i++) {
        const double part = (after[i] - before[i]) / crowds[i].weight;
        print_message("  %-8s weight %g: %.0f s of the engine, %.1f by weight\n", crowds[i].key,
                      crowds[i].weight, after[i] - before[i], part);
        least = part < least ? part : least;
        most = part > most ? part : most;
    }
    assert_true(most <= 1.1 * least);
}

static void open_sched(void)
{
    const struct sched_options options = {.running_max = RUNNING,
                                          .slice_tokens = 256,
                                          .row_max = 288,
                                          .memory_bytes = MEMORY,
                                          .max_stall = MAX_STALL,
                                          .shared = true};
    sched_init(&sched, &options);
    sched_gate_init(&gate, QUEUE, QUEUE_TOKENS, RUNNING);
}

static void a_day(void **unused)
{
    (void)unused;
    double marks[2][KEYS];
    int window = 0;
    open_sched();
    for (size_t i = 0; i < CROWDS; i++)
        for (int j = 0; j < crowds[i].clients; j++) {
            clients[client_count] = (struct client){.crowd = &crowds[i]};
            think(&clients[client_count++]);
        }
    /* A quarter of an hour into each busy time its measure begins. */
    static const double begins[] = {9.25 * 3600, 14.25 * 3600};
    static const double ends[] = {10.95 * 3600, 15.95 * 3600};
    bool inside = false;
    while (now < DAY) {
        if (window < 2 && !inside && now >= begins[window]) {
            totals(marks[0]);
            inside = true;
        }
        if (window < 2 && inside && now >= ends[window]) {
            totals(marks[1]);
            check_parts(marks[0], marks[1]);
            inside = false;
            window++;
        }
        if (!turn())
            rest();
    }
    int waiting = 0, running = 0;
    for (int i = 0; i < client_count; i++) {
        waiting += clients[i].state == WAITING;
        running += clients[i].state == RUNNING_NOW;
        if (clients[i].state == RUNNING_NOW)
            assert_true(now - clients[i].served < STARVED_S);
    }
    assert_int_equal(waiting, sched.waiting_count);
    assert_int_equal(running, sched.running_count);
    assert_int_equal(waiting, gate.requests);
    print_message("  %llu steps, %llu arrivals, %llu finished, %llu past their deadline, %llu sent "
                  "away; of %llu that came again as told, %llu after something had moved\n",
                  (unsigned long long)seen.steps, (unsigned long long)seen.arrivals,
                  (unsigned long long)seen.finished, (unsigned long long)seen.expired,
                  (unsigned long long)seen.refused, (unsigned long long)seen.retries,
                  (unsigned long long)seen.retries_true);
    print_message("  longest: %.1f ms between tokens (%llu over), %.1f s in the queue, %.1f s for "
                  "rows; rare ones queued %.2f s\n",
                  1e3 * seen.stall, (unsigned long long)seen.late, seen.queued, seen.unfed,
                  seen.rare_queued / seen.rare_count);
    assert_true(seen.stall <= MAX_STALL);
    assert_true(seen.queued < STARVED_S && seen.unfed < STARVED_S);
    assert_true(seen.rare_queued / seen.rare_count < 2);
    assert_true(seen.finished > 10000 && seen.expired > 0 && seen.refused > 0);
    assert_true(10 * seen.retries_true >= 7 * seen.retries); /* what they were told was true */
    assert_int_equal(window, 2);
}

/* ---- its parts ---- */

static void cuts(void **unused)
{
    (void)unused;
    assert_int_equal(sched_cut(256, 256), 256);
    assert_int_equal(sched_cut(300, 256), 256);
    assert_int_equal(sched_cut(255, 256), 192);
    assert_int_equal(sched_cut(1, 256), 64);
    assert_int_equal(sched_cut(1, 60), 60);
    assert_int_equal(sched_cut(64, 67), 67);    /* three rows alone would go another way */
    assert_int_equal(sched_cut(128, 135), 64);  /* and seven */
    assert_int_equal(sched_cut(128, 137), 128); /* nine do not */
    assert_int_equal(sched_cut(64, 72), 72);
    assert_int_equal(sched_cut(64, 73), 64);
    for (uint32_t left = 1; left <= 256; left++)
        for (uint32_t want = 1; want <= 256; want++) {
            const uint32_t n = sched_cut(want, left);
            assert_true(n == left ||
                        (n % LIMITS_CUT_TOKENS == 0 && n < left && left - n > LIMITS_CUT_REST));
            assert_true(n <= want || n <= LIMITS_CUT_TOKENS + LIMITS_CUT_REST);
        }
}

static struct sched_entry *add(struct sched_entry *entry, const char *key, double came,
                               double priority)
{
    *entry = (struct sched_entry){.came = came, .priority = priority, .bytes = SESSION};
    sched_add(&sched, entry, sched_share(&sched, key, 1));
    return entry;
}

static void orders(void **unused)
{
    (void)unused;
    static struct sched_entry a, b, c, big;
    open_sched();
    add(&a, "one", 1, 0);
    add(&b, "one", 2, -5); /* as if it had come at -3 */
    add(&c, "one", 3, 0);
    assert_ptr_equal(sched_start(&sched), &b);
    assert_ptr_equal(sched_start(&sched), &a);
    sched_remove(&sched, &b);
    assert_ptr_equal(sched_start(&sched), &c);
    assert_null(sched_start(&sched));
    sched_remove(&sched, &a);
    sched_remove(&sched, &c);
    /* A share that has had less goes first, whoever came first. */
    sched_share(&sched, "one", 1)->used = 10;
    sched_share(&sched, "two", 1)->used = 1;
    add(&a, "one", 1, -100);
    add(&b, "two", 5, 0);
    assert_ptr_equal(sched_start(&sched), &b);
    assert_ptr_equal(sched_start(&sched), &a);
    /* One that finds no room holds the others back. */
    add(&big, "two", 6, 0);
    add(&c, "two", 7, 0);
    big.bytes = MEMORY - SESSION;
    assert_false(sched_can_hold(&sched, big.bytes));
    big.bytes = MEMORY / 2;
    assert_true(sched_can_hold(&sched, big.bytes));
    sched_resize(&sched, &a, MEMORY / 2 + 1);
    assert_null(sched_start(&sched));
    sched_remove(&sched, &a);
    assert_ptr_equal(sched_start(&sched), &big);
    assert_ptr_equal(sched_start(&sched), &c);
}

/* Many bulk entries leave places for those that come and go. */
static void bulk_leaves_room(void **unused)
{
    (void)unused;
    static struct sched_entry uploads[RUNNING], chat;
    open_sched();
    for (int i = 0; i < RUNNING; i++) {
        add(&uploads[i], "one", 0, 0)->bulk = true;
    }
    int started = 0;
    while (sched_start(&sched))
        started++;
    assert_int_equal(started, RUNNING * 3 / 4);
    add(&chat, "one", 1, 0);
    assert_ptr_equal(sched_start(&sched), &chat);
}

/* What bulk takes while nobody else is there it does not owe to those who come; beside them it has
 * half of the time. */
static void bulk_owes_nothing(void **unused)
{
    (void)unused;
    static struct sched_entry upload, chat;
    double bulk = 0, other = 0;
    open_sched();
    add(&upload, "one", 0, 0)->bulk = true;
    assert_ptr_equal(sched_start(&sched), &upload);
    for (int i = 0; i < 2000; i++) {
        const bool is_chat = i >= 1000;
        if (i == 1000) {
            add(&chat, "one", 1, 0);
            assert_ptr_equal(sched_start(&sched), &chat);
        }
        upload.rows = 256;
        chat.decodes = is_chat;
        sched_plan(&sched);
        assert_true(sched.step_rows > 0 || is_chat);
        const double decoding = sched.step_decodes ? 0.02 : 0;
        const double reading = sched.step_rows * 0.0005;
        sched_done(&sched, decoding + reading);
        bulk += is_chat ? reading : 0;
        other += decoding;
        if (i == 1020) /* at once, not when it has made up for the time before */
            assert_true(bulk > 0.3 * other);
    }
    assert_true(bulk > 0.9 * other && bulk < 1.1 * other);
}

static void says_when(void **unused)
{
    (void)unused;
    double retry = 0;
    sched_gate_init(&gate, 2, 1000, 1);
    assert_true(sched_gate_enter(&gate, 5000, 0, &retry)); /* alone: whatever its size */
    sched_gate_start(&gate, 5000, 0);
    assert_true(sched_gate_enter(&gate, 600, 0, &retry));
    assert_false(sched_gate_enter(&gate, 600, 0, &retry)); /* too many tokens */
    assert_int_equal(gate.refused_tokens, 1);
    assert_true(sched_gate_enter(&gate, 100, 0, &retry));
    assert_false(sched_gate_enter(&gate, 1, 0, &retry));
    assert_int_equal(gate.refused_requests, 1);
    /* One starts every four seconds: that is what the next are told, one behind the other. */
    double at = 0;
    for (int i = 0; i < 50; i++) {
        sched_gate_end(&gate);
        sched_gate_start(&gate, gate.requests == 2 ? 600 : 100, at);
        at += 4;
        while (gate.requests < 2)
            assert_true(sched_gate_enter(&gate, gate.requests ? 100 : 600, at, &retry) ||
                        sched_gate_enter(&gate, 100, at, &retry));
        gate.tokens = 700;
    }
    gate.promised = 0;
    assert_false(sched_gate_enter(&gate, 100, at, &retry));
    assert_true(retry > 3.5 && retry < 4.5);
    assert_false(sched_gate_enter(&gate, 100, at, &retry));
    assert_true(retry > 7 && retry < 9);
    /* A queue that stands still does not promise what it did while it moved. */
    assert_false(sched_gate_enter(&gate, 100, at + 60, &retry));
    assert_true(retry > 55);
}

/* Short ones were the rule until a long one came, behind which nobody waited at first: who is sent
 * away comes again at intervals that grow with it. */
static void says_when_after_short_ones(void **unused)
{
    (void)unused;
    double retry = 0, at = 0;
    sched_gate_init(&gate, 2, 1000, 1);
    for (int i = 0; i < 50; i++, at += 0.01) {
        while (gate.requests < 2)
            assert_true(sched_gate_enter(&gate, 1, at, &retry));
        if (gate.running)
            sched_gate_end(&gate);
        sched_gate_start(&gate, 1, at);
    }
    sched_gate_end(&gate);
    sched_gate_start(&gate, 1, at);
    sched_gate_end(&gate);
    at += 10;
    assert_true(sched_gate_enter(&gate, 1, at, &retry)); /* alone, at once, and for long */
    sched_gate_start(&gate, 1, at);
    assert_true(sched_gate_enter(&gate, 1, at, &retry));
    assert_true(sched_gate_enter(&gate, 1, at, &retry));
    const double start = at;
    int tries = 0;
    for (; at < start + 8; tries++) {
        assert_false(sched_gate_enter(&gate, 1, at, &retry));
        at += retry;
    }
    assert_true(tries <= 12); /* from a hundredth of a second, doubled each time */
}

int main(void)
{
    const char *given = getenv("RAMBAD_SEED");
    if (given)
        seed = strtoull(given, NULL, 10);
    else if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
        return 1;
    state = seed;
    print_message("RAMBAD_SEED=%llu\n", (unsigned long long)seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cuts),
        cmocka_unit_test(orders),
        cmocka_unit_test(bulk_leaves_room),
        cmocka_unit_test(bulk_owes_nothing),
        cmocka_unit_test(says_when),
        cmocka_unit_test(says_when_after_short_ones),
        cmocka_unit_test(a_day),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
