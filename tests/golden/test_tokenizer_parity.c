/* The tokenizer against Hugging Face's: tokenizer/vectors.txt holds texts in twelve scripts, emoji,
 * white space, code and mixtures with the ids that tokenizers.js gives them (tokenizer/make.mjs).
 * The same texts then go through tokenizer_cut, at every length and as streams of random blocks,
 * and must give the same tokens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/tokenizer.h"
#include "proto/base/buf.h"
#include "tests/lib/golden.h"

#define VECTORS "tests/golden/tokenizer/vectors.txt"
#define CASES_MAX 1024

static const char *const names[] = {"gpt2", "gpt-neox-20b"};

struct vector {
    char *text;
    size_t size;
    struct tokenizer_tokens ids[2]; /* in the order of names */
};

static struct vector vectors[CASES_MAX];
static size_t vector_count;
static uint64_t random_state = 0x2545f4914f6cdd1d;

static size_t random_below(size_t bound)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (size_t)(random_state >> 16) % bound;
}

static void read_text(struct vector *vector, const char *hex)
{
    const size_t length = strcspn(hex, "\n");
    assert_int_equal(length % 2, 0);
    vector->size = length / 2;
    vector->text = malloc(vector->size + 1); /* exact, so that reading behind the end is seen */
    for (size_t i = 0; i < vector->size; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        vector->text[i] = (char)byte;
    }
}

static void read_ids(struct tokenizer_tokens *tokens, char *text)
{
    tokens->ids = malloc((strlen(text) + 1) * sizeof *tokens->ids);
    for (char *word = strtok(text, " \n"); word; word = strtok(NULL, " \n"))
        tokens->ids[tokens->count++] = (int32_t)strtol(word, NULL, 10);
}

static int read_vectors(void **state)
{
    (void)state;
    char *line = NULL;
    size_t room = 0;
    FILE *file = fopen(VECTORS, "r");
    if (!file)
        return -1;
    while (getline(&line, &room, file) > 0) {
        assert_true(strncmp(line, "text ", 5) == 0 && vector_count < CASES_MAX);
        read_text(&vectors[vector_count], line + 5);
        for (size_t i = 0; i < 2; i++) {
            const size_t prefix = strlen(names[i]);
            assert_true(getline(&line, &room, file) > 0);
            assert_memory_equal(line, names[i], prefix);
            read_ids(&vectors[vector_count].ids[i], line + prefix);
        }
        vector_count++;
    }
    free(line);
    fclose(file);
    return 0;
}

static int free_vectors(void **state)
{
    (void)state;
    for (size_t i = 0; i < vector_count; i++) {
        free(vectors[i].text);
        tokenizer_tokens_close(&vectors[i].ids[0]);
        tokenizer_tokens_close(&vectors[i].ids[1]);
    }
    return 0;
}

static struct tokenizer *open_published(const char *name)
{
    char relative[256];
    struct tokenizer *tokenizer = NULL;
    struct error err = {0};
    snprintf(relative, sizeof relative, "published/%s/tokenizer.json", name);
    const char *path = golden_shared(relative);
    enum status status = tokenizer_open(path, &tokenizer, &err);
    if (status == STATUS_NOT_FOUND) {
        print_message("SKIPPED: no %s (set RAMBAD_SHARED)\n", path);
        skip();
    }
    if (status)
        fail_msg("%s", err.message);
    return tokenizer;
}

static void encode(const struct tokenizer *t, const char *text, size_t size, bool special,
                   struct tokenizer_tokens *tokens)
{
    assert_int_equal(tokenizer_encode(t, text, size, special, tokens), STATUS_OK);
}

static bool equal(const struct tokenizer_tokens *a, const struct tokenizer_tokens *b)
{
    return a->count == b->count &&
           (a->count == 0 || memcmp(a->ids, b->ids, a->count * sizeof *a->ids) == 0);
}

static void fail_at(const char *what, size_t index, const struct tokenizer_tokens *got,
                    const struct tokenizer_tokens *want)
{
    const struct vector *v = &vectors[index];
    size_t at = 0;
    while (at < got->count && at < want->count && got->ids[at] == want->ids[at])
        at++;
    fail_msg("%s: case %zu (line %zu), token %zu: got %d, want %d; text \"%.*s\"", what, index,
             3 * index + 1, at, at < got->count ? (int)got->ids[at] : -1,
             at < want->count ? (int)want->ids[at] : -1, (int)v->size, v->text);
}

static bool has_special(const struct vector *v)
{
    return memmem(v->text, v->size, "<|endoftext|>", 13) ||
           memmem(v->text, v->size, "<|padding|>", 11);
}

static void ids_are_hugging_faces(void **state)
{
    const size_t which = *(const size_t *)*state;
    struct tokenizer *t = open_published(names[which]);
    size_t ordinary = 0;
    for (size_t i = 0; i < vector_count; i++) {
        const struct vector *v = &vectors[i];
        struct tokenizer_tokens tokens = {0};
        encode(t, v->text, v->size, true, &tokens);
        if (!equal(&tokens, &v->ids[which]))
            fail_at(names[which], i, &tokens, &v->ids[which]);
        tokens.count = 0;
        encode(t, v->text, v->size, false, &tokens);
        if (!has_special(v) && !equal(&tokens, &v->ids[which]))
            fail_at("without special tokens", i, &tokens, &v->ids[which]);
        ordinary += !has_special(v);
        for (size_t j = 0; j < tokens.count; j++)
            assert_false(tokenizer_is_special(t, tokens.ids[j]));
        tokenizer_tokens_close(&tokens);
    }
    print_message("%s: %zu texts, %zu without special tokens\n", names[which], vector_count,
                  ordinary);
    assert_true(vector_count > 400 && ordinary > 300 && ordinary < vector_count);
    tokenizer_close(t);
}

/* GPT-2 has no normaliser: the tokens decode to the text. */
static void decoding_gives_the_text(void **state)
{
    (void)state;
    struct tokenizer *t = open_published("gpt2");
    for (size_t i = 0; i < vector_count; i++) {
        const struct vector *v = &vectors[i];
        struct tokenizer_decoder decoder;
        struct buf out;
        buf_init(&out);
        tokenizer_decoder_init(&decoder);
        for (size_t j = 0; j < v->ids[0].count; j++)
            tokenizer_decode(t, &decoder, v->ids[0].ids[j], true, &out);
        tokenizer_decode_end(&decoder, &out);
        assert_int_equal(out.size, v->size);
        if (v->size > 0)
            assert_memory_equal(out.data, v->text, v->size);
        buf_close(&out);
    }
    tokenizer_close(t);
}

/* The last character border at or under `size`, which is what tokenizer_cut gives when the pattern
 * allows none: a cut there promises nothing. */
static size_t character_border(const struct vector *v, size_t size)
{
    while (size > 0 && size < v->size && ((unsigned char)v->text[size] & 0xc0) == 0x80)
        size--;
    return size;
}

static size_t check_every_cut(const struct tokenizer *t, size_t index, bool special)
{
    const struct vector *v = &vectors[index];
    struct tokenizer_tokens whole = {0}, parts = {0};
    size_t good = 0, last = 0;
    encode(t, v->text, v->size, special, &whole);
    for (size_t size = 1; size <= v->size; size++) {
        const size_t cut = tokenizer_cut(t, v->text, size);
        assert_true(cut > 0 && cut <= size);
        assert_int_equal(cut, tokenizer_cut(t, v->text, size));
        if (cut == character_border(v, size) || cut == size || cut == last)
            continue;
        parts.count = 0;
        encode(t, v->text, cut, special, &parts);
        encode(t, v->text + cut, v->size - cut, special, &parts);
        if (!equal(&parts, &whole)) {
            print_message("cut at %zu of %zu\n", cut, size);
            fail_at("cut in two", index, &parts, &whole);
        }
        good++;
        last = cut;
    }
    tokenizer_tokens_close(&whole);
    tokenizer_tokens_close(&parts);
    return good;
}

static void every_cut_keeps_the_tokens(void **state)
{
    const size_t which = *(const size_t *)*state;
    struct tokenizer *t = open_published(names[which]);
    size_t cuts = 0, bytes = 0;
    for (size_t i = 0; i < vector_count; i++) {
        cuts += check_every_cut(t, i, true);
        cuts += check_every_cut(t, i, false);
        bytes += 2 * vectors[i].size;
    }
    print_message("%s: %zu cuts in %zu bytes\n", names[which], cuts, bytes);
    assert_true(cuts > bytes / 20);
    tokenizer_close(t);
}

/* As the server reads a body: blocks of any size; what lies behind the cut waits for more. */
static void stream(const struct tokenizer *t, const struct buf *text, size_t block, size_t hold,
                   bool special, struct tokenizer_tokens *tokens)
{
    struct buf pending;
    buf_init(&pending);
    for (size_t at = 0; at < text->size;) {
        size_t size = 1 + random_below(block);
        size = size < text->size - at ? size : text->size - at;
        buf_append(&pending, text->data + at, size);
        at += size;
        if (pending.size < hold)
            continue;
        const size_t cut = tokenizer_cut(t, pending.data, pending.size);
        encode(t, pending.data, cut, special, tokens);
        buf_consume(&pending, cut);
    }
    encode(t, pending.data, pending.size, special, tokens);
    buf_close(&pending);
}

static void streams_give_the_same_tokens(void **state)
{
    const size_t which = *(const size_t *)*state;
    struct tokenizer *t = open_published(names[which]);
    static const size_t blocks[] = {1, 7, 100, 1500, 20000};
    for (int round = 0; round < 10; round++) {
        struct tokenizer_tokens whole = {0}, parts = {0};
        struct buf text;
        buf_init(&text);
        while (text.size < 60000) {
            const struct vector *v = &vectors[random_below(vector_count)];
            buf_append(&text, v->text, v->size);
            if (random_below(8) == 0) /* bytes that are not UTF-8 are part of a stream too */
                buf_append(&text, &"\xff\xc3\x80\xe2\x82\xf0\x9f"[random_below(6)], 1);
        }
        const bool special = round % 2;
        encode(t, text.data, text.size, special, &whole);
        /* No text of the vectors has a run without a border as long as what is held. */
        stream(t, &text, blocks[round / 2], 2000, special, &parts);
        if (!equal(&whole, &parts))
            fail_msg("%s: round %d differs", names[which], round);
        tokenizer_tokens_close(&whole);
        tokenizer_tokens_close(&parts);
        buf_close(&text);
    }
    tokenizer_close(t);
}

int main(void)
{
    static size_t gpt2 = 0, neox = 1;
    const struct CMUnitTest tests[] = {
        {"gpt2: ids", ids_are_hugging_faces, NULL, NULL, &gpt2},
        {"gpt-neox-20b: ids", ids_are_hugging_faces, NULL, NULL, &neox},
        cmocka_unit_test(decoding_gives_the_text),
        {"gpt2: every cut", every_cut_keeps_the_tokens, NULL, NULL, &gpt2},
        {"gpt-neox-20b: every cut", every_cut_keeps_the_tokens, NULL, NULL, &neox},
        {"gpt2: streams", streams_give_the_same_tokens, NULL, NULL, &gpt2},
        {"gpt-neox-20b: streams", streams_give_the_same_tokens, NULL, NULL, &neox},
    };
    return cmocka_run_group_tests(tests, read_vectors, free_vectors);
}
