/* Which pages questions read, and which policy of replacement would have had them in RAM.
 *
 *   bench_picks MODEL_FOLDER BOOK... [--tokens N] [--questions N] [--seed N]
 *
 * Reads each book but the last into a memory of its own, with facts put in between its lines; then
 * asks questions of several kinds, four at once, of memories drawn by how often they are asked;
 * then goes on asking while the last book is read. Every pin and every new page of the engine is
 * recorded (the linker wraps engine/memory.h's two calls), and the record is replayed through each
 * policy at several budgets. Prints hit rates of what the questions read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "proto/base/hash.h"
#include "tests/lib/chunk_ram.h"

#define FACTS 16 /* of a memory */
#define KINDS 6
#define SEATS 4 /* questions at once */
#define BRANCHES 4096
#define CHUNKS 65536 /* of a branch */

static uint64_t seed = 1;

static uint64_t draw(uint64_t below)
{
    seed = hash64(&seed, sizeof seed, 5);
    return seed % below;
}

/* ---- the record ---- */

enum access_kind { MADE, READ, COUNTED }; /* COUNTED: a question's read */

struct access {
    uint32_t page;
    uint8_t kind, phase;
};

static struct access *accesses;
static size_t access_count, access_room;
static uint32_t *page_names[BRANCHES], page_count; /* dense names of pages, from 1 */
static bool is_asking;
static uint8_t phase;

static uint32_t name_of(struct chunk_key key)
{
    ASSERT(key.branch < BRANCHES && key.index < CHUNKS);
    if (!page_names[key.branch])
        page_names[key.branch] = calloc(CHUNKS, sizeof(uint32_t));
    uint32_t *name = &page_names[key.branch][key.index];
    if (!*name)
        *name = ++page_count;
    return *name;
}

static void note(struct chunk_key key, enum access_kind kind)
{
    if (access_count == access_room) {
        access_room = access_room ? 2 * access_room : 1u << 20;
        accesses = realloc(accesses, access_room * sizeof *accesses);
        ASSERT(accesses);
    }
    accesses[access_count++] = (struct access){name_of(key), (uint8_t)kind, phase};
}

struct memory_page *__real_memory_page_pin(struct memory *memory, struct chunk_key key,
                                           uint64_t stamp, bool *added);
struct memory_page *__wrap_memory_page_pin(struct memory *memory, struct chunk_key key,
                                           uint64_t stamp, bool *added);
struct memory_page *__wrap_memory_page_pin(struct memory *memory, struct chunk_key key,
                                           uint64_t stamp, bool *added)
{
    struct memory_page *page = __real_memory_page_pin(memory, key, stamp, added);
    if (page && *added) /* once for all rows that share it */
        note(key, is_asking ? COUNTED : READ);
    return page;
}

struct memory_page *__real_memory_page_create(struct memory *memory, struct chunk_key key);
struct memory_page *__wrap_memory_page_create(struct memory *memory, struct chunk_key key);
struct memory_page *__wrap_memory_page_create(struct memory *memory, struct chunk_key key)
{
    struct memory_page *page = __real_memory_page_create(memory, key);
    if (page)
        note(key, MADE);
    return page;
}

/* ---- policies ---- */

/* Pages as nodes of lists; list heads behind the last page. */
struct lists {
    uint32_t *next, *previous;
};

static void list_start(struct lists *l, uint32_t head)
{
    l->next[head] = l->previous[head] = head;
}

static void take_out(struct lists *l, uint32_t page)
{
    l->next[l->previous[page]] = l->next[page];
    l->previous[l->next[page]] = l->previous[page];
}

static void put_last(struct lists *l, uint32_t head, uint32_t page)
{
    l->previous[page] = l->previous[head];
    l->next[page] = head;
    l->next[l->previous[head]] = page;
    l->previous[head] = page;
}

enum place { NOWHERE, MAIN, SMALL, GHOST };

struct cache {
    struct lists lists;
    uint8_t *place, *used;
    uint32_t main, small, ghost; /* heads */
    size_t room, main_count, small_count, ghost_count;
    bool new_is_cold;
};

static uint32_t pop(struct cache *c, uint32_t head, size_t *count)
{
    const uint32_t page = c->lists.next[head];
    take_out(&c->lists, page);
    --*count;
    return page;
}

static void push(struct cache *c, uint32_t head, size_t *count, uint32_t page, enum place place)
{
    put_last(&c->lists, head, page);
    c->place[page] = (uint8_t)place;
    ++*count;
}

static bool lru(struct cache *c, uint32_t page, bool made)
{
    const bool hit = c->place[page] == MAIN;
    if (hit)
        take_out(&c->lists, page);
    else if (c->main_count == c->room)
        c->place[pop(c, c->main, &c->main_count)] = NOWHERE;
    c->main_count -= hit;
    push(c, c->main, &c->main_count, page, MAIN);
    if (made && c->new_is_cold && !hit) { /* to the other end: the first to go, unless it is read */
        take_out(&c->lists, page);
        put_last(&c->lists, c->lists.next[c->main], page);
    }
    return hit;
}

static bool clock_(struct cache *c, uint32_t page, bool made)
{
    (void)made;
    if (c->place[page] == MAIN) {
        c->used[page] = 1;
        return true;
    }
    while (c->main_count == c->room) {
        const uint32_t old = pop(c, c->main, &c->main_count);
        if (c->used[old]) {
            c->used[old] = 0;
            push(c, c->main, &c->main_count, old, MAIN);
        } else {
            c->place[old] = NOWHERE;
        }
    }
    push(c, c->main, &c->main_count, page, MAIN);
    return false;
}

/* A quarter for what is new, names of half as many as fit for what left it. */
static bool two_queues(struct cache *c, uint32_t page, bool made)
{
    const enum place place = (enum place)c->place[page];
    (void)made;
    if (place == MAIN) {
        take_out(&c->lists, page);
        put_last(&c->lists, c->main, page);
        return true;
    }
    if (place == SMALL)
        return true;
    if (place == GHOST) {
        take_out(&c->lists, page);
        c->ghost_count--;
    }
    if (c->main_count + c->small_count == c->room) {
        if (c->small_count > c->room / 4 || !c->main_count) {
            push(c, c->ghost, &c->ghost_count, pop(c, c->small, &c->small_count), GHOST);
            if (c->ghost_count > c->room / 2)
                c->place[pop(c, c->ghost, &c->ghost_count)] = NOWHERE;
        } else {
            c->place[pop(c, c->main, &c->main_count)] = NOWHERE;
        }
    }
    if (place == GHOST)
        push(c, c->main, &c->main_count, page, MAIN);
    else
        push(c, c->small, &c->small_count, page, SMALL);
    return false;
}

static void s3_evict(struct cache *c)
{
    while (c->small_count > c->room / 10 || !c->main_count) {
        const uint32_t old = pop(c, c->small, &c->small_count);
        if (c->used[old] > 1) {
            c->used[old] = 0;
            push(c, c->main, &c->main_count, old, MAIN);
            if (!c->small_count)
                break;
            continue;
        }
        push(c, c->ghost, &c->ghost_count, old, GHOST);
        if (c->ghost_count > c->room)
            c->place[pop(c, c->ghost, &c->ghost_count)] = NOWHERE;
        return;
    }
    for (;;) {
        const uint32_t old = pop(c, c->main, &c->main_count);
        if (!c->used[old]) {
            c->place[old] = NOWHERE;
            return;
        }
        c->used[old]--;
        push(c, c->main, &c->main_count, old, MAIN);
    }
}

static bool s3_fifo(struct cache *c, uint32_t page, bool made)
{
    const enum place place = (enum place)c->place[page];
    (void)made;
    if (place == MAIN || place == SMALL) {
        c->used[page] = (uint8_t)(c->used[page] < 3 ? c->used[page] + 1 : 3);
        return true;
    }
    if (place == GHOST) {
        take_out(&c->lists, page);
        c->ghost_count--;
    }
    while (c->main_count + c->small_count >= c->room)
        s3_evict(c);
    c->used[page] = 0;
    if (place == GHOST)
        push(c, c->main, &c->main_count, page, MAIN);
    else
        push(c, c->small, &c->small_count, page, SMALL);
    return false;
}

static const struct policy {
    const char *name;
    bool (*access)(struct cache *cache, uint32_t page, bool made);
    bool new_is_cold;
} policies[] = {{"LRU", lru, false},
                {"LRU, new ones cold", lru, true},
                {"CLOCK", clock_, false},
                {"2Q", two_queues, false},
                {"S3-FIFO", s3_fifo, false}};
#define POLICIES (sizeof policies / sizeof *policies)

struct rate {
    uint64_t hits[2], reads[2]; /* of questions alone; beside an append */
};

static struct rate replay(const struct policy *policy, size_t room)
{
    const size_t nodes = (size_t)page_count + 4;
    struct rate rate = {0};
    struct cache c = {.room = room, .new_is_cold = policy->new_is_cold};
    c.lists.next = calloc(nodes, sizeof(uint32_t));
    c.lists.previous = calloc(nodes, sizeof(uint32_t));
    c.place = calloc(nodes, 1);
    c.used = calloc(nodes, 1);
    c.main = page_count + 1;
    c.small = page_count + 2;
    c.ghost = page_count + 3;
    list_start(&c.lists, c.main);
    list_start(&c.lists, c.small);
    list_start(&c.lists, c.ghost);
    for (size_t i = 0; i < access_count; i++) {
        const struct access *a = &accesses[i];
        const bool hit = policy->access(&c, a->page, a->kind == MADE);
        if (a->kind != COUNTED)
            continue;
        rate.reads[a->phase == 2]++;
        rate.hits[a->phase == 2] += hit;
    }
    free(c.lists.next);
    free(c.lists.previous);
    free(c.place);
    free(c.used);
    return rate;
}

/* What nobody can better: the page that is read again last, or never, goes. Kept as a heap of next
 * reads, whose entries may be out of date. */
struct due {
    uint64_t at;
    uint32_t page;
};

static void sift(struct due *heap, size_t count, size_t i)
{
    for (;;) {
        size_t largest = i;
        for (size_t child = 2 * i + 1; child <= 2 * i + 2 && child < count; child++)
            if (heap[child].at > heap[largest].at)
                largest = child;
        if (largest == i)
            return;
        const struct due swap = heap[i];
        heap[i] = heap[largest];
        heap[largest] = swap;
        i = largest;
    }
}

static struct rate replay_best(size_t room)
{
    uint64_t *next = malloc(access_count * sizeof *next);
    uint64_t *last = calloc((size_t)page_count + 1, sizeof *last); /* of the page; 0: not there */
    struct due *heap = malloc((access_count + 1) * sizeof *heap);
    size_t count = 0, held = 0;
    struct rate rate = {0};
    ASSERT(next && last && heap);
    for (size_t i = access_count; i-- > 0;) {
        next[i] = last[accesses[i].page] ? last[accesses[i].page] : UINT64_MAX;
        last[accesses[i].page] = i;
    }
    memset(last, 0, ((size_t)page_count + 1) * sizeof *last);
    for (size_t i = 0; i < access_count; i++) {
        const struct access *a = &accesses[i];
        const bool hit = last[a->page] != 0;
        if (a->kind == COUNTED) {
            rate.reads[a->phase == 2]++;
            rate.hits[a->phase == 2] += hit;
        }
        held += !hit;
        last[a->page] = next[i];
        size_t at = count++;
        heap[at] = (struct due){next[i], a->page};
        for (; at && heap[(at - 1) / 2].at < heap[at].at; at = (at - 1) / 2) {
            const struct due swap = heap[at];
            heap[at] = heap[(at - 1) / 2];
            heap[(at - 1) / 2] = swap;
        }
        while (held > room) {
            const struct due first = heap[0];
            heap[0] = heap[--count];
            sift(heap, count, 0);
            if (last[first.page] == first.at) {
                last[first.page] = 0;
                held--;
            }
        }
    }
    free(next);
    free(last);
    free(heap);
    return rate;
}

static void print_rate(const char *name, const struct rate *rates, size_t count, int which)
{
    printf("  %-20s", name);
    for (size_t i = 0; i < count; i++)
        printf("  %5.1f%%", 100.0 * (double)rates[i].hits[which] / (double)rates[i].reads[which]);
    printf("\n");
}

static void print_tables(void)
{
    static const unsigned shares[] = {128, 64, 32, 16, 8, 4, 2};
    enum { BUDGETS = sizeof shares / sizeof *shares };
    struct rate rates[POLICIES + 1][BUDGETS];
    for (size_t b = 0; b < BUDGETS; b++) {
        for (size_t p = 0; p < POLICIES; p++)
            rates[p][b] = replay(&policies[p], page_count / shares[b]);
        rates[POLICIES][b] = replay_best(page_count / shares[b]);
    }
    for (int which = 0; which < 2; which++) {
        printf(
            "hits of %llu reads by questions%s, by the share of %u pages that is in RAM\n  %-20s",
            (unsigned long long)rates[0][0].reads[which],
            which ? " while a book is read" : " alone", page_count, "");
        for (size_t b = 0; b < BUDGETS; b++)
            printf("   1/%-3u", shares[b]);
        printf("\n");
        for (size_t p = 0; p < POLICIES; p++)
            print_rate(policies[p].name, rates[p], BUDGETS, which);
        print_rate("the best there is", rates[POLICIES], BUDGETS, which);
    }
}

/* ---- memories with facts ---- */

struct fact {
    unsigned kind;
    char number[8], text[160], question[200];
};

struct book {
    struct engine_session *session;
    struct tokenizer_tokens tokens;
    size_t done;
    struct fact facts[FACTS];
};

static const char *const names[] = {"Ada",  "Bela", "Cora",  "Dora",  "Enid",  "Frank",
                                    "Gil",  "Hugo", "Ines",  "Jonas", "Karla", "Leo",
                                    "Mina", "Nora", "Oscar", "Paul"};

static void make_fact(struct fact *fact, unsigned i)
{
    const char *name = names[i % (sizeof names / sizeof *names)];
    fact->kind = i % KINDS;
    snprintf(fact->number, sizeof fact->number, "%07u", (unsigned)(1000000 + draw(9000000)));
    switch (fact->kind) {
    case 0:
        snprintf(fact->text, sizeof fact->text, "|The passkey is: %s|", fact->number);
        snprintf(fact->question, sizeof fact->question, "|What is the passkey? The passkey is:");
        break;
    case 1:
        snprintf(fact->text, sizeof fact->text,
                 "One of the special magic numbers for %s-stone is: %s.", name, fact->number);
        snprintf(fact->question, sizeof fact->question,
                 "\nWhat is the special magic number for %s-stone mentioned in the provided text? "
                 "The special magic number for %s-stone mentioned in the provided text is:",
                 name, name);
        break;
    case 2:
    case 3:
        snprintf(fact->text, sizeof fact->text, "The secret code of %s's locker is %s.", name,
                 fact->number);
        snprintf(fact->question, sizeof fact->question,
                 "\nQuestion: What is the secret code of %s's locker?\nAnswer:", name);
        break;
    case 4:
        snprintf(fact->question, sizeof fact->question,
                 "\nQuestion: What did %s say to the others about it?\nAnswer:", name);
        break;
    default:
        snprintf(fact->question, sizeof fact->question, "\n\n");
        break;
    }
}

static void make_book(const struct engine *engine, struct book *book, const char *path,
                      size_t token_max)
{
    struct buf text, with;
    FILE *file = fopen(path, "re");
    char block[65536];
    size_t got, at = 0;
    if (!file) {
        perror(path);
        exit(1);
    }
    buf_init(&text);
    buf_init(&with);
    while (text.size < token_max * 4 && (got = fread(block, 1, sizeof block, file)) > 0)
        buf_append(&text, block, got);
    fclose(file);
    for (unsigned i = 0; i < FACTS; i++) {
        size_t end = (i + 1) * (text.size / (FACTS + 1));
        make_fact(&book->facts[i], i);
        while (end < text.size && text.data[end] != '\n')
            end++;
        buf_append(&with, text.data + at, end - at);
        buf_append_format(&with, " %s", book->facts[i].text);
        at = end;
    }
    buf_append(&with, text.data + at, text.size - at);
    ASSERT(!tokenizer_encode(engine_tokenizer(engine), with.data, with.size, false, &book->tokens));
    if (book->tokens.count > token_max)
        book->tokens.count = token_max;
    buf_close(&text);
    buf_close(&with);
}

/* ---- questions ---- */

struct seat {
    struct engine_session *session;
    struct tokenizer_tokens prompt;
    const struct fact *fact;
    struct sampler *sampler;
    size_t done;
    int32_t token;
    unsigned generated, wanted, left; /* tokens; questions to the same memory */
    struct book *book;
    struct buf said;
};

static uint64_t branch_next = 64;
static unsigned asked[KINDS], right[KINDS];

static void sit_down(const struct engine *engine, struct seat *seat, struct book *books,
                     size_t book_count)
{
    if (!seat->left) { /* the first one is asked most */
        size_t b = 0;
        while (b + 1 < book_count && draw(2))
            b++;
        seat->book = &books[b];
        seat->left = 1 + (unsigned)draw(4);
    }
    seat->left--;
    seat->fact = &seat->book->facts[draw(FACTS)];
    seat->done = seat->generated = 0;
    seat->wanted = seat->fact->kind < 4 ? 12 : 48;
    seat->said.size = 0;
    seat->prompt = (struct tokenizer_tokens){0};
    ASSERT(branch_next < BRANCHES);
    ASSERT(!engine_session_fork(seat->book->session, branch_next++, &seat->session));
    ASSERT(!tokenizer_encode(engine_tokenizer(engine), seat->fact->question,
                             strlen(seat->fact->question), false, &seat->prompt));
}

static void stand_up(struct seat *seat)
{
    asked[seat->fact->kind]++;
    right[seat->fact->kind] += strstr(buf_text(&seat->said), seat->fact->number) != NULL;
    engine_session_destroy(seat->session);
    tokenizer_tokens_close(&seat->prompt);
    seat->session = NULL;
}

/* One step of all that is asked, and of what is read beside it (NULL: nothing). */
static void step(struct engine *engine, struct chunk_ram *ram, struct seat *seats,
                 struct book *reading)
{
    struct engine_step_item items[SEATS + 1] = {0};
    struct seat *who[SEATS];
    size_t count = 0;
    const uint32_t slice = engine_get_info(engine)->slice_tokens;
    for (size_t i = 0; i < SEATS; i++) {
        struct seat *seat = &seats[i];
        if (!seat->session)
            continue;
        const bool in_prompt = seat->done < seat->prompt.count;
        items[count] =
            (struct engine_step_item){.session = seat->session,
                                      .tokens = in_prompt ? seat->prompt.ids : &seat->token,
                                      .token_count = in_prompt ? (uint32_t)seat->prompt.count : 1,
                                      .sampler = seat->sampler};
        who[count++] = seat;
    }
    is_asking = true;
    if (count)
        ASSERT(!engine_step(engine, items, count));
    is_asking = false;
    for (size_t i = 0; i < count; i++) {
        struct seat *seat = who[i];
        size_t size;
        ASSERT(!items[i].status);
        seat->done = seat->prompt.count;
        seat->token = items[i].result.token;
        const char *bytes = tokenizer_bytes(engine_tokenizer(engine), seat->token, &size);
        buf_append(&seat->said, bytes, size);
        if (++seat->generated == seat->wanted)
            stand_up(seat);
    }
    if (reading && reading->done < reading->tokens.count) {
        const size_t left = reading->tokens.count - reading->done;
        struct engine_step_item item = {.session = reading->session,
                                        .tokens = reading->tokens.ids + reading->done,
                                        .token_count = left < slice ? (uint32_t)left : slice};
        ASSERT(!engine_step(engine, &item, 1) && !item.status);
        reading->done += item.token_count;
    }
    chunk_ram_acknowledge(ram, engine);
}

static void ask_all(struct engine *engine, struct chunk_ram *ram, struct book *books,
                    size_t book_count, unsigned questions, struct book *reading)
{
    struct seat seats[SEATS] = {0};
    struct sampler_params params;
    sampler_params_default(&params);
    params.temperature = 0;
    for (size_t i = 0; i < SEATS; i++) {
        buf_init(&seats[i].said);
        ASSERT(!sampler_create(&params, (int32_t)engine_get_info(engine)->config->vocab_size,
                               &seats[i].sampler));
    }
    for (unsigned begun = 0, busy = 1; begun < questions || busy;) {
        busy = 0;
        for (size_t i = 0; i < SEATS; i++) {
            if (!seats[i].session && begun < questions) {
                sit_down(engine, &seats[i], books, book_count);
                begun++;
            }
            busy += seats[i].session != NULL;
        }
        step(engine, ram, seats, reading);
    }
    for (size_t i = 0; i < SEATS; i++) {
        buf_close(&seats[i].said);
        sampler_destroy(seats[i].sampler);
    }
}

int main(int argc, char **argv)
{
    enum { BOOKS = 32 };
    static struct book books[BOOKS];
    const char *paths[BOOKS];
    size_t book_count = 0, tokens = 65536;
    unsigned questions = 200;
    struct engine *engine;
    struct error err = {0};
    struct chunk_ram ram;
    for (int i = 2; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) != 0 && book_count < BOOKS)
            paths[book_count++] = argv[i];
        else if (i + 1 < argc && strcmp(argv[i], "--tokens") == 0)
            tokens = strtoul(argv[++i], NULL, 10);
        else if (i + 1 < argc && strcmp(argv[i], "--questions") == 0)
            questions = (unsigned)strtoul(argv[++i], NULL, 10);
        else if (i + 1 < argc && strcmp(argv[i], "--seed") == 0)
            seed = strtoull(argv[++i], NULL, 10);
        else
            book_count = 0, argc = 0;
    }
    if (book_count < 2) {
        fprintf(stderr, "bench_picks MODEL_FOLDER BOOK BOOK... [--tokens N] [--questions N] "
                        "[--seed N]\n");
        return 2;
    }
    printf("seed %llu, %zu tokens of each of %zu books, %u questions alone and %u beside\n",
           (unsigned long long)seed, tokens, book_count, questions, questions);
    chunk_ram_init(&ram);
    const struct engine_options options = {.model_path = argv[1],
                                           .backend = ENGINE_BACKEND_CPU,
                                           .threads = 1,
                                           .host_memory_bytes = (size_t)8 << 30,
                                           .io = chunk_ram_io(&ram)};
    if (engine_open(&options, &engine, &err)) {
        fprintf(stderr, "bench_picks: %s\n", err.message);
        return 1;
    }
    chunk_ram_attach(&ram, engine);
    struct seat nobody[SEATS] = {0};
    for (size_t i = 0; i < book_count; i++) {
        const struct chunk_range range = {.branch = i + 1};
        make_book(engine, &books[i], paths[i], tokens);
        ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &books[i].session, &err));
        while (i + 1 < book_count && books[i].done < books[i].tokens.count)
            step(engine, &ram, nobody, &books[i]);
    }
    phase = 1;
    ask_all(engine, &ram, books, book_count - 1, questions, NULL);
    phase = 2;
    ask_all(engine, &ram, books, book_count - 1, questions, &books[book_count - 1]);
    static const char *const kinds[KINDS] = {"passkey", "magic number", "locker",
                                             "locker",  "open",         "going on"};
    for (unsigned k = 0; k < KINDS; k++)
        printf("%s %u%s", kinds[k], asked[k], k + 1 < KINDS ? ", " : " asked\n");
    printf("right of those with an answer: %u of %u\n", right[0] + right[1] + right[2] + right[3],
           asked[0] + asked[1] + asked[2] + asked[3]);
    print_tables();
    for (size_t i = 0; i < book_count; i++) {
        engine_session_destroy(books[i].session);
        tokenizer_tokens_close(&books[i].tokens);
    }
    for (size_t i = 0; i < BRANCHES; i++)
        free(page_names[i]);
    free(accesses);
    engine_close(engine);
    chunk_ram_close(&ram);
    return 0;
}
