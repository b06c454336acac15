/* The tokenizer on a small file of its own: merges, NFC, added tokens, bytes that are not UTF-8,
 * decoding, cuts, and everything that a tokenizer.json is refused for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/tokenizer.h"
#include "proto/base/buf.h"

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true}"
#define ADDED(id, text, special, normalized)                                          \
    "{\"id\":" id ",\"content\":\"" text "\",\"single_word\":false,\"lstrip\":false," \
    "\"rstrip\":false,\"normalized\":" normalized ",\"special\":" special "}"
#define VOCAB "\"ab\":300,\"abc\":301,\"bc\":302,\"aa\":303,\"\\u0120\\u0120\":304,\"cc\":305"
#define MERGES "[\"b c\",\"a b\",[\"ab\",\"c\"],\"a a\",[\"\\u0120\",\"\\u0120\"],\"c c\"]"
#define ADDED_TOKENS                                      \
    "[" ADDED("310", "<|e|>", "true", "false") "," ADDED( \
        "311", "<|e|><|", "true", "false") "," ADDED("312", "   ", "false", "true") "]"

/* A tokenizer.json in parts, so that a test may spoil one. */
struct parts {
    const char *top, *normalizer, *pre_tokenizer, *model, *vocab, *merges, *added;
    int missing_byte; /* left out of the alphabet; -1: none */
};

static const struct parts good = {.top = "",
                                  .normalizer = "null",
                                  .pre_tokenizer = BYTE_LEVEL,
                                  .model = "\"type\":\"BPE\",",
                                  .vocab = VOCAB,
                                  .merges = MERGES,
                                  .added = ADDED_TOKENS,
                                  .missing_byte = -1};

static void write_json(const struct parts *parts, struct buf *json)
{
    int next = 256;
    buf_append_format(json,
                      "{%s\"added_tokens\":%s,\"normalizer\":%s,\"pre_tokenizer\":%s,"
                      "\"post_processor\":null,\"decoder\":" BYTE_LEVEL ",\"model\":{%s\"vocab\":{",
                      parts->top, parts->added, parts->normalizer, parts->pre_tokenizer,
                      parts->model);
    for (int byte = 0; byte < 256; byte++) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
        if (byte != parts->missing_byte)
            buf_append_format(json, "\"\\u%04x\":%d,", printable ? byte : next, byte);
        next += !printable;
    }
    buf_append_format(json, "%s},\"merges\":%s}}", parts->vocab, parts->merges);
}

static enum status try_open(const struct parts *parts, struct tokenizer **out, struct error *err)
{
    struct buf json;
    buf_init(&json);
    write_json(parts, &json);
    const enum status status = tokenizer_open_memory(json.data, json.size, out, err);
    buf_close(&json);
    return status;
}

static struct tokenizer *open_parts(const struct parts *parts)
{
    struct tokenizer *t = NULL;
    struct error err = {0};
    if (try_open(parts, &t, &err))
        fail_msg("%s", err.message);
    return t;
}

static void expect_special(const struct tokenizer *t, const char *text, size_t size, bool special,
                           const int32_t *want, size_t count)
{
    struct tokenizer_tokens tokens = {0};
    assert_int_equal(tokenizer_encode(t, text, size, special, &tokens), STATUS_OK);
    for (size_t i = 0; i < count && i < tokens.count; i++)
        if (tokens.ids[i] != want[i])
            fail_msg("\"%s\": token %zu is %d, not %d", text, i, (int)tokens.ids[i], (int)want[i]);
    assert_int_equal(tokens.count, count);
    tokenizer_tokens_close(&tokens);
}

#define EXPECT(t, text, special, ...)                                                         \
    do {                                                                                      \
        const int32_t want[] = {__VA_ARGS__};                                                 \
        expect_special(t, text, sizeof(text) - 1, special, want, sizeof want / sizeof *want); \
    } while (0)

static void merges_go_by_rank(void **state)
{
    (void)state;
    struct tokenizer *t = open_parts(&good);
    EXPECT(t, "abc", false, 'a', 302); /* "b c" is of lower rank than "a b" */
    EXPECT(t, "ab", false, 300);
    EXPECT(t, "aaa", false, 303, 'a');
    EXPECT(t, "aaaab", false, 303, 'a', 300); /* "a b" first, then "a a" from the left */
    EXPECT(t, "x ab's", false, 'x', ' ', 300, '\'', 's');
    EXPECT(t, "a  ab", false, 'a', ' ', ' ', 300);
    EXPECT(t, "a  ", false, 'a', 304);
    assert_int_equal(tokenizer_vocab_size(t), 313);
    tokenizer_close(t);
}

/* Long pre-tokens go through a heap, short ones do not: both must merge alike. */
static void long_pre_tokens_merge_like_short_ones(void **state)
{
    (void)state;
    struct tokenizer *t = open_parts(&good);
    for (size_t size = 30; size < 60; size++) {
        char text[64];
        struct tokenizer_tokens tokens = {0};
        for (size_t i = 0; i < size; i++)
            text[i] = "abcaacbb"[(i * i + i / 3) % 8];
        /* Greedy by rank, done anew on bytes: every "bc", then "ab", then "aa", then "cc". */
        int32_t want[64];
        size_t count = size;
        for (size_t i = 0; i < size; i++)
            want[i] = (unsigned char)text[i];
        const int32_t rules[][3] = {
            {'b', 'c', 302}, {'a', 'b', 300}, {300, 'c', 301}, {'a', 'a', 303}, {'c', 'c', 305}};
        for (size_t r = 0; r < 5; r++)
            for (size_t i = 0; i + 1 < count; i++)
                if (want[i] == rules[r][0] && want[i + 1] == rules[r][1]) {
                    want[i] = rules[r][2];
                    memmove(want + i + 1, want + i + 2, (count - i - 2) * sizeof *want);
                    count--;
                }
        assert_int_equal(tokenizer_encode(t, text, size, false, &tokens), STATUS_OK);
        assert_int_equal(tokens.count, count);
        assert_memory_equal(tokens.ids, want, count * sizeof *want);
        tokenizer_tokens_close(&tokens);
    }
    tokenizer_close(t);
}

static void special_tokens_cannot_be_forged(void **state)
{
    (void)state;
    struct tokenizer *t = open_parts(&good);
    EXPECT(t, "a<|e|>", true, 'a', 310);
    EXPECT(t, "a<|e|>", false, 'a', '<', '|', 'e', '|', '>');
    EXPECT(t, "<|e|><|e|>", true, 311, 'e', '|', '>'); /* the longest at the leftmost place */
    EXPECT(t, "<|e|><x", true, 310, '<', 'x');
    EXPECT(t, "b    c", false, 'b', 312, ' ', 'c'); /* not special: ordinary text */
    EXPECT(t, "b    c", true, 'b', 312, ' ', 'c');
    assert_int_equal(tokenizer_added_id(t, "<|e|>"), 310);
    assert_int_equal(tokenizer_added_id(t, "   "), 312);
    assert_int_equal(tokenizer_added_id(t, "ab"), -1);
    assert_true(tokenizer_is_special(t, 310));
    assert_false(tokenizer_is_special(t, 312));
    assert_false(tokenizer_is_special(t, 305));
    assert_false(tokenizer_is_special(t, -1));
    assert_false(tokenizer_is_special(t, 313));
    tokenizer_close(t);
}

static void nfc_only_where_the_file_says(void **state)
{
    (void)state;
    struct tokenizer *plain = open_parts(&good);
    struct parts parts = good;
    parts.normalizer = "{\"type\":\"NFC\"}";
    struct tokenizer *nfc = open_parts(&parts);
    EXPECT(plain, "e\xcc\x81", false, 'e', 0xcc, 0x81);
    EXPECT(nfc, "e\xcc\x81", false, 0xc3, 0xa9);
    /* U+0307 and U+0323 out of order, and what does not compose. */
    EXPECT(nfc, "q\xcc\x87\xcc\xa3", false, 'q', 0xcc, 0xa3, 0xcc, 0x87);
    EXPECT(nfc, "\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab", false, 0xed, 0x95, 0x9c);
    EXPECT(nfc, "\xff\xcc\x81", false, 0xff, 0xcc, 0x81);
    tokenizer_close(plain);
    tokenizer_close(nfc);
}

/* Marks in the worst order: ordering and merging must stay far from quadratic, and right. */
static void a_long_run_of_marks_is_no_trap(void **state)
{
    (void)state;
    struct parts parts = good;
    parts.normalizer = "{\"type\":\"NFC\"}";
    struct tokenizer *t = open_parts(&parts);
    struct tokenizer_tokens tokens = {0};
    struct buf text;
    enum { PAIRS = 200000 };
    buf_init(&text);
    for (int i = 0; i < PAIRS; i++)
        buf_append_text(&text, "\xcc\x87\xcc\xa3"); /* classes 230 and 220 */
    assert_int_equal(tokenizer_encode(t, text.data, text.size, false, &tokens), STATUS_OK);
    assert_int_equal(tokens.count, 4 * PAIRS);
    for (size_t i = 0; i < PAIRS; i++)
        assert_true(tokens.ids[2 * i + 1] == 0xa3 && tokens.ids[2 * (PAIRS + i) + 1] == 0x87);
    tokenizer_tokens_close(&tokens);
    buf_close(&text);
    tokenizer_close(t);
}

static void decode_all(const struct tokenizer *t, const int32_t *ids, size_t count, bool special,
                       struct buf *out)
{
    struct tokenizer_decoder decoder;
    tokenizer_decoder_init(&decoder);
    buf_init(out);
    for (size_t i = 0; i < count; i++)
        tokenizer_decode(t, &decoder, ids[i], special, out);
    tokenizer_decode_end(&decoder, out);
}

static void any_bytes_are_encoded(void **state)
{
    (void)state;
    struct tokenizer *t = open_parts(&good);
    uint32_t random = 1;
    EXPECT(t,
           "ab\xff"
           "ab\xc3",
           false, 300, 0xff, 300, 0xc3);
    EXPECT(t, "\xed\xa0\x80", false, 0xed, 0xa0, 0x80); /* a surrogate is not UTF-8 */
    EXPECT(t, "\0a", false, 0, 'a');
    expect_special(t, "", 0, false, NULL, 0);
    for (int round = 0; round < 2000; round++) {
        char text[40], back[256];
        struct tokenizer_tokens tokens = {0};
        size_t size = 0;
        for (size_t i = 0; i < sizeof text; i++) {
            random = random * 1664525 + 1013904223;
            text[i] = (char)(random >> 24);
            if (random >> 23 & 1)
                text[i] = "ab c\xe2\x82\xac\xcc\x81"[(random >> 10) % 9];
        }
        assert_int_equal(tokenizer_encode(t, text, sizeof text, false, &tokens), STATUS_OK);
        for (size_t i = 0; i < tokens.count; i++) {
            size_t part;
            const char *bytes = tokenizer_bytes(t, tokens.ids[i], &part);
            assert_true(size + part <= sizeof text);
            memcpy(back + size, bytes, part);
            size += part;
        }
        assert_int_equal(size, sizeof text);
        assert_memory_equal(back, text, size);
        tokenizer_tokens_close(&tokens);
    }
    tokenizer_close(t);
}

/* GPT-NeoX has no token for the bytes that UTF-8 never contains. */
static void a_missing_byte_becomes_the_replacement(void **state)
{
    (void)state;
    struct parts parts = good;
    parts.missing_byte = 0xff;
    struct tokenizer *t = open_parts(&parts);
    EXPECT(t,
           "a\xff"
           "b",
           false, 'a', 0xef, 0xbf, 0xbd, 'b');
    tokenizer_close(t);
}

static void expect_text(const struct tokenizer *t, const int32_t *ids, size_t count, bool special,
                        const char *want)
{
    struct buf out;
    decode_all(t, ids, count, special, &out);
    assert_string_equal(buf_text(&out), want);
    buf_close(&out);
}

#define EXPECT_TEXT(t, special, text, ...)                            \
    do {                                                              \
        const int32_t ids[] = {__VA_ARGS__};                          \
        expect_text(t, ids, sizeof ids / sizeof *ids, special, text); \
    } while (0)

#define FFFD "\xef\xbf\xbd"

static void decoding_replaces_what_is_no_character(void **state)
{
    (void)state;
    struct tokenizer *t = open_parts(&good);
    EXPECT_TEXT(t, false, "\xe2\x82\xac", 0xe2, 0x82, 0xac);
    EXPECT_TEXT(t, false, FFFD "a", 0xe2, 0x82, 'a'); /* one for a character cut short */
    EXPECT_TEXT(t, false, FFFD FFFD FFFD, 0xed, 0xa0, 0x80);
    EXPECT_TEXT(t, false, FFFD FFFD, 0xc0, 0x80);
    EXPECT_TEXT(t, false, FFFD FFFD FFFD FFFD, 0xf4, 0x90, 0x80, 0x80);
    EXPECT_TEXT(t, false, FFFD "\xf0\x9f\x98\x80", 0xf0, 0xf0, 0x9f, 0x98, 0x80);
    EXPECT_TEXT(t, false, FFFD, 0xf0, 0x9f, 0x98);
    EXPECT_TEXT(t, false, "abc   ", 301, 310, 312, 5000, -1);
    EXPECT_TEXT(t, true, "abc<|e|>   ", 301, 310, 312);
    /* Nothing is given out before a character is whole. */
    struct tokenizer_decoder decoder;
    struct buf out;
    buf_init(&out);
    tokenizer_decoder_init(&decoder);
    const int32_t ids[] = {0xf0, 0x9f, 0x98, 0x80};
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(out.size, 0);
        tokenizer_decode(t, &decoder, ids[i], false, &out);
    }
    assert_int_equal(out.size, 4);
    buf_close(&out);
    tokenizer_close(t);
}

static size_t cut(const struct tokenizer *t, const char *text)
{
    return tokenizer_cut(t, text, strlen(text));
}

static void cuts_are_where_nothing_can_join(void **state)
{
    (void)state;
    struct tokenizer *t = open_parts(&good);
    assert_int_equal(cut(t, "hello world"), 5);
    assert_int_equal(cut(t, "hello world "), 11);
    assert_int_equal(cut(t, "hello"), 5);    /* none: the last character border */
    assert_int_equal(cut(t, "hell\xc3"), 4); /* which is not inside of a character */
    assert_int_equal(cut(t, "\xc3"), 1);
    assert_int_equal(cut(t, "ab12"), 2);
    assert_int_equal(cut(t, "abc'll"), 3); /* not behind the apostrophe */
    assert_int_equal(cut(t, "a\n\nb"), 2); /* the last of a run stands alone */
    assert_int_equal(cut(t, "a\nb"), 2);
    assert_int_equal(cut(t, "ab\n\n<"), 2); /* unless a special token follows */
    assert_int_equal(cut(t, "a<|e|>"), 1);
    assert_int_equal(cut(t, "a <|e"), 1);
    assert_int_equal(cut(t, "a.<|x b"), 5);
    assert_int_equal(cut(t, "abc\xff"), 3);
    assert_int_equal(cut(t, "abc\xff\xff"), 4);
    struct parts parts = good;
    parts.normalizer = "{\"type\":\"NFC\"}";
    struct tokenizer *nfc = open_parts(&parts);
    assert_int_equal(cut(t, "x e\xcc\x81"), 3);
    assert_int_equal(cut(nfc, "x e\xcc\x81"), 1); /* the mark belongs to its letter */
    assert_int_equal(cut(nfc, "x e\xcc\x81y"), 1);
    tokenizer_close(t);
    tokenizer_close(nfc);
}

static void refuse(const struct parts *parts, enum status want, const char *named)
{
    struct tokenizer *t = NULL;
    struct error err = {0};
    const enum status status = try_open(parts, &t, &err);
    if (status != want || t || !strstr(err.message, named))
        fail_msg("want %s about %s, got %s: %s", status_text(want), named, status_text(status),
                 err.message);
}

#define REFUSE(field, value, status, named) \
    do {                                    \
        struct parts spoiled = good;        \
        spoiled.field = (value);            \
        refuse(&spoiled, status, named);    \
    } while (0)
#define UNSUPPORTED(field, value, named) REFUSE(field, value, STATUS_UNSUPPORTED, named)
#define INVALID(field, value, named) REFUSE(field, value, STATUS_INVALID, named)

static void what_is_not_implemented_is_named(void **state)
{
    (void)state;
    UNSUPPORTED(model, "\"type\":\"WordPiece\",", "WordPiece");
    UNSUPPORTED(model, "\"dropout\":0.1,", "dropout");
    UNSUPPORTED(model, "\"unk_token\":\"<unk>\",", "unk_token");
    UNSUPPORTED(model, "\"continuing_subword_prefix\":\"##\",", "continuing_subword_prefix");
    UNSUPPORTED(model, "\"end_of_word_suffix\":\"</w>\",", "end_of_word_suffix");
    UNSUPPORTED(model, "\"byte_fallback\":true,", "byte_fallback");
    UNSUPPORTED(model, "\"ignore_merges\":true,", "ignore_merges");
    UNSUPPORTED(model, "\"new_option\":1,", "new_option");
    UNSUPPORTED(normalizer, "{\"type\":\"NFKC\"}", "NFKC");
    UNSUPPORTED(pre_tokenizer, "null", "pre_tokenizer");
    UNSUPPORTED(pre_tokenizer, "{\"type\":\"Metaspace\"}", "Metaspace");
    UNSUPPORTED(pre_tokenizer, "{\"type\":\"ByteLevel\"}", "add_prefix_space");
    UNSUPPORTED(pre_tokenizer,
                "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}",
                "use_regex");
    UNSUPPORTED(top, "\"truncation\":{\"max_length\":5},", "truncation");
    UNSUPPORTED(top, "\"padding\":{},", "padding");
    UNSUPPORTED(top, "\"post_processor\":{\"type\":\"TemplateProcessing\"},", "TemplateProcessing");
    UNSUPPORTED(top, "\"decoder\":{\"type\":\"WordPiece\"},", "WordPiece");
    UNSUPPORTED(top, "\"novelty\":1,", "novelty");
    UNSUPPORTED(added, "[{\"id\":310,\"content\":\"x y\",\"lstrip\":true}]", "lstrip");
    UNSUPPORTED(added, "[{\"id\":310,\"content\":\"x y\",\"rstrip\":true}]", "rstrip");
    UNSUPPORTED(added, "[{\"id\":310,\"content\":\"x y\",\"single_word\":true}]", "single_word");
    UNSUPPORTED(added, "[" ADDED("97", "a", "true", "false") "]", "\"a\"");
    UNSUPPORTED(added, "[" ADDED("300", "ab", "true", "false") "]", "\"ab\"");
    UNSUPPORTED(missing_byte, 'q', "0x71");
    struct parts parts = good;
    parts.normalizer = "{\"type\":\"NFC\"}";
    parts.added = "[" ADDED("310", "x\xc3\xa9", "false", "true") "]";
    refuse(&parts, STATUS_UNSUPPORTED, "normalized");
}

static void what_is_malformed_is_invalid(void **state)
{
    (void)state;
    INVALID(vocab, "\"ab\":300,\"ab\":301", "ab");
    INVALID(vocab, "\"ab\":300,\"cd\":300", "cd");
    INVALID(vocab, "\"ab\":-1", "ab");
    INVALID(vocab, "\"ab\":1.5", "ab");
    INVALID(vocab, "\"ab\":5000000", "ab");
    INVALID(vocab, "\"ab\":\"300\"", "ab");
    INVALID(vocab, VOCAB ",\"\xff\":306", "UTF-8");
    INVALID(merges, "{}", "merges");
    INVALID(merges, "[\"a\"]", "merges");
    INVALID(merges, "[\"a b c\"]", "merges");
    INVALID(merges, "[\" b\"]", "merges");
    INVALID(merges, "[[\"a\"]]", "merges");
    INVALID(merges, "[[\"a\",\"b\",\"c\"]]", "merges");
    INVALID(merges, "[[\"a\",1]]", "merges");
    INVALID(merges, "[\"a z\"]", "a z");
    INVALID(added, "[{\"id\":310,\"content\":\"\"}]", "content");
    INVALID(added, "[{\"content\":\"x\"}]", "x");
    INVALID(added, "[5]", "added_tokens");
    INVALID(added, "5", "added_tokens");
    INVALID(added, "[" ADDED("300", "zz", "true", "false") "]", "zz");
    INVALID(added, "[" ADDED("310", "ab", "false", "false") "]", "ab");
    INVALID(added,
            "[" ADDED("310", "zz", "true", "false") "," ADDED("311", "zz", "true", "false") "]",
            "zz");
    INVALID(added, "[{\"id\":310,\"content\":\"zz\",\"special\":1}]", "special");
    INVALID(normalizer, "5", "normalizer");
    struct tokenizer *t = NULL;
    struct error err = {0};
    const char *const texts[] = {"", "{", "[]", "{} x", "{\"model\":", "nul", "\"\xff"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        assert_int_equal(tokenizer_open_memory(texts[i], strlen(texts[i]), &t, &err),
                         STATUS_INVALID);
    assert_int_equal(tokenizer_open("tests/no-such-file", &t, &err), STATUS_NOT_FOUND);
    assert_null(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merges_go_by_rank),
        cmocka_unit_test(long_pre_tokens_merge_like_short_ones),
        cmocka_unit_test(special_tokens_cannot_be_forged),
        cmocka_unit_test(nfc_only_where_the_file_says),
        cmocka_unit_test(a_long_run_of_marks_is_no_trap),
        cmocka_unit_test(any_bytes_are_encoded),
        cmocka_unit_test(a_missing_byte_becomes_the_replacement),
        cmocka_unit_test(decoding_replaces_what_is_no_character),
        cmocka_unit_test(cuts_are_where_nothing_can_join),
        cmocka_unit_test(what_is_not_implemented_is_named),
        cmocka_unit_test(what_is_malformed_is_invalid),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
