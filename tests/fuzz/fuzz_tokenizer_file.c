/* fuzz_tokenizer_file.c - any bytes as a tokenizer.json, and any bytes encoded by what opens.
 *
 * Input: the JSON, then, behind the last zero byte, a text. A file of the whole byte alphabet is
 * too long for a fuzzer to come upon, so a "vocab" of "" has the harness put the alphabet in its
 * place; the entries that follow stand behind it. */
#include <stdlib.h>
#include <string.h>

#include "engine/tokenizer.h"
#include "proto/base/assert.h"
#include "proto/base/buf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define VOCAB_MARK "\"vocab\":{\"\":0"

static void append_alphabet(struct buf *json)
{
    int next = 256;
    buf_append_text(json, "\"vocab\":{");
    for (int byte = 0; byte < 256; byte++) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
        buf_append_format(json, "%s\"\\u%04x\":%d", byte ? "," : "", printable ? byte : next, byte);
        next += !printable;
    }
}

static void fill_in(struct buf *json, const uint8_t *data, size_t size)
{
    const char *mark = size ? memmem(data, size, VOCAB_MARK, strlen(VOCAB_MARK)) : NULL;
    const size_t before = mark ? (size_t)(mark - (const char *)data) : size;
    buf_append(json, data, before);
    if (!mark)
        return;
    append_alphabet(json);
    buf_append(json, mark + strlen(VOCAB_MARK), size - before - strlen(VOCAB_MARK));
}

static void check_tokens(const struct tokenizer *t, const struct tokenizer_tokens *tokens,
                         bool special)
{
    struct tokenizer_decoder decoder;
    struct buf out;
    buf_init(&out);
    tokenizer_decoder_init(&decoder);
    for (size_t i = 0; i < tokens->count; i++) {
        ASSERT(tokens->ids[i] >= 0 && tokens->ids[i] < tokenizer_vocab_size(t));
        ASSERT(special || !tokenizer_is_special(t, tokens->ids[i]));
        tokenizer_decode(t, &decoder, tokens->ids[i], true, &out);
    }
    tokenizer_decode_end(&decoder, &out);
    buf_close(&out);
}

static void use(const struct tokenizer *t, const char *text, size_t size)
{
    for (int special = 0; special < 2; special++) {
        struct tokenizer_tokens tokens = {0};
        ASSERT(tokenizer_encode(t, text, size, special, &tokens) == STATUS_OK);
        check_tokens(t, &tokens, special);
        tokenizer_tokens_close(&tokens);
    }
    for (size_t end = 1; end <= size; end++) {
        const size_t cut = tokenizer_cut(t, text, end);
        ASSERT(cut > 0 && cut <= end);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *zero = size ? memrchr(data, 0, size) : NULL;
    const size_t json_size = zero ? (size_t)(zero - data) : size;
    const size_t text_size = zero ? size - json_size - 1 : 0;
    struct buf json;
    struct tokenizer *t = NULL;
    struct error err = {0};
    buf_init(&json);
    fill_in(&json, data, json_size);
    char *exact = malloc(json.size + 1); /* no slack behind the end, so that reading it is seen */
    char *text = malloc(text_size + 1);
    ASSERT(exact && text);
    exact = realloc(exact, json.size ? json.size : 1);
    if (json.size > 0)
        memcpy(exact, json.data, json.size);
    if (text_size > 0)
        memcpy(text, zero + 1, text_size);
    const enum status status = tokenizer_open_memory(exact, json.size, &t, &err);
    ASSERT(status == STATUS_OK || status == STATUS_INVALID || status == STATUS_UNSUPPORTED);
    ASSERT((status == STATUS_OK) == (t != NULL) && (status == STATUS_OK) == !err.message[0]);
    if (t)
        use(t, text, text_size < 300 ? text_size : 300);
    tokenizer_close(t);
    free(exact);
    free(text);
    buf_close(&json);
    return 0;
}
