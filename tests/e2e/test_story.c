/* The story of the first page of the README, on the shipped model: a book with a fact hidden in
 * it, a question, kill -9, the same question, a fork, and the end. RAMBAD_STORY_TOKENS=1000000
 * tells it at that length (65536). */
#include <dirent.h>
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

#define TOKENS "65536"
#define SKIPPED 77 /* ctest shows it as such */
#define QUESTION "What is the secret code of Ada's locker?"

struct story {
    char *folder, model[512];
    struct buf book; /* several, one behind the other */
    uint64_t seed, tokens;
    struct daemon daemon;
};

/* splitmix64 */
static uint64_t draw(struct story *story, uint64_t below)
{
    uint64_t z = (story->seed += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % below;
}

static bool is_file(const char *path)
{
    struct stat stat_;
    return stat(path, &stat_) == 0 && S_ISREG(stat_.st_mode);
}

/* The model that deploy/run takes: RAMBAD_MODEL, engine/models/default, or the only folder. */
static bool find_model(char *out, size_t room)
{
    const char *named = getenv("RAMBAD_MODEL");
    char path[640];
    int found = 0;
    snprintf(out, room, "%s", named ? named : "engine/models/default");
    snprintf(path, sizeof path, "%s/config.json", out);
    if (named || is_file(path))
        return is_file(path);
    DIR *dir = opendir("engine/models");
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        snprintf(path, sizeof path, "engine/models/%.200s/config.json", entry->d_name);
        if (entry->d_name[0] != '.' && is_file(path)) {
            snprintf(out, room, "engine/models/%.200s", entry->d_name);
            found++;
        }
    }
    if (dir)
        closedir(dir);
    return found == 1;
}

/* Books that the shipped model was not trained on: enough for a million tokens. */
static bool read_books(struct buf *out)
{
    static const char *const names[] = {"dracula", "middlemarch", "great-expectations",
                                        "the-woman-in-white"};
    const char *shared = getenv("RAMBAD_SHARED");
    char path[1024], block[65536];
    size_t got;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/corpus/%s.txt", shared ? shared : "../shared", names[i]);
        FILE *file = fopen(path, "r");
        if (!file) {
            print_message("skipped: no book at %s; set RAMBAD_SHARED\n", path);
            return false;
        }
        while ((got = fread(block, 1, sizeof block, file)) > 0)
            buf_append(out, block, got);
        fclose(file);
    }
    return out->size > 0;
}

/* The next place behind `from` where a sentence has ended. */
static size_t sentence_end(const struct buf *book, size_t from)
{
    while (from + 2 < book->size && !(book->data[from] == '.' && book->data[from + 1] == ' '))
        from++;
    return from + 1;
}

/* Bytes of these books to one token, measured on a memory that is deleted again. */
static double bytes_per_token(struct story *story)
{
    char id[LIMITS_ID_BYTES], path[128];
    struct buf answer;
    const size_t sample = 32768;
    buf_init(&answer);
    daemon_create_memory(&story->daemon, NULL, id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    assert_int_equal(daemon_call(&story->daemon, "POST", path, "text/plain",
                                 story->book.data + story->book.size / 2, sample, &answer),
                     200);
    struct client_memory memory = daemon_get_memory(&story->daemon, id);
    assert_int_equal(memory.text_bytes, sample);
    assert_true(memory.token_count > 0);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    assert_int_equal(daemon_call(&story->daemon, "DELETE", path, NULL, NULL, 0, &answer), 200);
    buf_close(&answer);
    return (double)sample / (double)memory.token_count;
}

/* A stretch of the books from a random place with the fact at a random depth. */
static void write_text(struct story *story, const char *path, const char *fact)
{
    size_t size = (size_t)((double)story->tokens * 1.02 * bytes_per_token(story));
    assert_true(size + 8192 < story->book.size);
    size_t from = sentence_end(&story->book, draw(story, story->book.size - size - 4096));
    size_t depth = draw(story, size - 4096);
    size_t at = sentence_end(&story->book, from + depth);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fwrite(story->book.data + from, 1, at - from, file);
    fputs(fact, file);
    fwrite(story->book.data + at, 1, from + size - at, file);
    assert_int_equal(fclose(file), 0);
    print_message("text: %zu bytes, the fact at %.1f%% of it\n", size,
                  100 * (double)(at - from) / (double)size);
}

static void ramba(struct story *story, struct buf *out, const char *const *arguments)
{
    out->size = 0;
    int code = daemon_ramba(&story->daemon, arguments, out);
    if (code)
        daemon_print_log(&story->daemon);
    assert_int_equal(code, 0);
    while (out->size && out->data[out->size - 1] == '\n')
        out->size--;
    buf_text(out);
}

static double ask(struct story *story, const char *memory, struct buf *answer)
{
    double start = daemon_now();
    ramba(story, answer, (const char *const[]){"ask", memory, QUESTION, NULL});
    return daemon_now() - start;
}

static void test_story(void **state)
{
    struct story *story = *state;
    char path[1024], number[16], fact[96];
    struct buf out, first, again;
    buf_init(&out);
    buf_init(&first);
    buf_init(&again);
    snprintf(number, sizeof number, "%llu", 1000000 + (unsigned long long)draw(story, 9000000));
    snprintf(fact, sizeof fact, " The secret code of Ada's locker is %s.", number);

    daemon_start(&story->daemon);
    snprintf(path, sizeof path, "%s/book.txt", story->folder);
    write_text(story, path, fact);
    double start = daemon_now();
    ramba(story, &out, (const char *const[]){"append", "--new", "--name", "story", path, NULL});
    double append_s = daemon_now() - start;
    char id[LIMITS_ID_BYTES];
    snprintf(id, sizeof id, "%s", buf_text(&out));
    struct client_memory memory = daemon_get_memory(&story->daemon, id);
    print_message("append: %llu tokens in %.1f s, %.0f tokens/s\n",
                  (unsigned long long)memory.token_count, append_s,
                  (double)memory.token_count / append_s);
    assert_true(memory.token_count >= story->tokens);
    double ask_s = ask(story, id, &first);
    print_message("asked in %.2f s: %s\n", ask_s, buf_text(&first));
    assert_non_null(strstr(buf_text(&first), number));

    daemon_kill(&story->daemon);
    double ready_s = daemon_start(&story->daemon);
    double resume_s = ask(story, id, &again);
    print_message("after kill -9: ready in %.2f s, asked in %.2f s\n", ready_s, resume_s);
    assert_string_equal(buf_text(&again), buf_text(&first));
    /* Reading the book again would take as long as it took; a resume takes a small part. */
    assert_true(ready_s + resume_s < append_s / 4 + 1);
    struct client_memory after = daemon_get_memory(&story->daemon, id);
    assert_int_equal(after.token_count, memory.token_count); /* asking left no trace */

    ramba(story, &out, (const char *const[]){"fork", "story", "--name", "copy", NULL});
    char copy[LIMITS_ID_BYTES];
    snprintf(copy, sizeof copy, "%s", buf_text(&out));
    assert_string_not_equal(copy, id);
    ramba(story, &out, (const char *const[]){"rm", id, NULL});
    ask(story, copy, &again);
    assert_string_equal(buf_text(&again), buf_text(&first));
    assert_int_equal(daemon_ramba(&story->daemon, (const char *const[]){"show", id, NULL}, &out),
                     4); /* no such memory */
    ramba(story, &out, (const char *const[]){"rm", "copy", NULL});
    ramba(story, &out, (const char *const[]){"ls", NULL});
    assert_int_equal(out.size, 0);
    daemon_stop(&story->daemon);
    daemon_check(&story->daemon);
    buf_close(&out);
    buf_close(&first);
    buf_close(&again);
}

static int teardown(void **state)
{
    struct story *story = *state;
    daemon_kill(&story->daemon);
    return 0;
}

int main(void)
{
    struct story story = {.seed = 0};
    const char *seed = getenv("RAMBAD_SEED");
    buf_init(&story.book);
    if (seed)
        story.seed = strtoull(seed, NULL, 10);
    else if (getrandom(&story.seed, sizeof story.seed, 0) != sizeof story.seed)
        return 1;
    const char *tokens = getenv("RAMBAD_STORY_TOKENS");
    story.tokens = strtoull(tokens ? tokens : TOKENS, NULL, 10);
    print_message("RAMBAD_SEED=%llu\n", (unsigned long long)story.seed);
    if (!find_model(story.model, sizeof story.model)) {
        print_message("skipped: no model at %s; set RAMBAD_MODEL\n", story.model);
        return SKIPPED;
    }
    if (!read_books(&story.book))
        return SKIPPED;
    story.folder = store_helper_folder();
    daemon_init(&story.daemon, story.model, story.folder, "data");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_story, NULL, teardown, &story),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    store_helper_remove(story.folder);
    buf_close(&story.book);
    return failed;
}
