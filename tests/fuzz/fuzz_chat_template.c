/* fuzz_chat_template.c - any bytes as a tokenizer_config.json and as a template; and any messages
 * through each template that is known, which must keep what is said apart from its own tokens.
 *
 * Input: a byte that chooses the template and what is done, then the file, or, for messages, texts
 * each behind a byte that chooses who says it and how long it is. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "server/chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MESSAGES 16
#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true}"

static const char *const added[] = {
    "<|im_start|>",        "<|im_end|>",        "<s>",        "</s>",          "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>",         "<start_of_turn>",
    "<end_of_turn>",       "<|system|>",        "<|user|>",   "<|assistant|>", "<|end|>"};

/* Bytes, and the tokens of all templates. */
static const struct tokenizer *get_tokenizer(void)
{
    static struct tokenizer *tokenizer;
    struct error err = {0};
    struct buf json;
    int next = 256;
    if (tokenizer)
        return tokenizer;
    buf_init(&json);
    buf_append_text(&json, "{\"added_tokens\":[");
    for (size_t i = 0; i < sizeof added / sizeof *added; i++)
        buf_append_format(&json,
                          "%s{\"id\":%zu,\"content\":\"%s\",\"single_word\":false,"
                          "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                          "\"special\":true}",
                          i ? "," : "", 300 + i, added[i]);
    buf_append_text(&json, "],\"normalizer\":null,\"pre_tokenizer\":" BYTE_LEVEL
                           ",\"post_processor\":null,\"decoder\":" BYTE_LEVEL
                           ",\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (int byte = 0; byte < 256; byte++) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
        buf_append_format(&json, "%s\"\\u%04x\":%d", byte ? "," : "", printable ? byte : next,
                          byte);
        next += !printable;
    }
    buf_append_text(&json, "},\"merges\":[]}}");
    ASSERT(!tokenizer_open_memory(json.data, json.size, &tokenizer, &err));
    buf_close(&json);
    return tokenizer;
}

static void read_files(const char *text, size_t size)
{
    struct chat_template_config config;
    chat_template_read_config(text, size, &config);
    ASSERT(config.chat_template < CHAT_TEMPLATE_COUNT);
    ASSERT(strlen(config.bos) < sizeof config.bos && strlen(config.eos) < sizeof config.eos);
    const enum chat_template found = chat_template_recognize(text, size);
    ASSERT(found != CHAT_TEMPLATE_NONE && found < CHAT_TEMPLATE_COUNT);
}

static size_t specials(const struct tokenizer_tokens *tokens)
{
    size_t count = 0;
    for (size_t i = 0; i < tokens->count; i++)
        count += tokens->ids[i] >= 300;
    return count;
}

static void say(const struct chat *chat, struct chat_message *messages, size_t count)
{
    struct tokenizer_tokens tokens = {0}, silent = {0};
    struct error err = {0};
    size_t bytes = 0, expected = 0, none = 0;
    const enum status status = chat_check(chat, messages, count, &err);
    ASSERT(status == STATUS_OK || status == STATUS_INVALID);
    ASSERT((status != STATUS_OK) == (err.message[0] != 0));
    if (status)
        return;
    ASSERT(!chat_encode(chat, messages, count, false, true, &tokens, &bytes));
    for (size_t i = 0; i < tokens.count; i++) {
        size_t size;
        tokenizer_bytes(chat->tokenizer, tokens.ids[i], &size);
        expected += size;
    }
    ASSERT(bytes == expected);
    /* The template's own tokens are as many as where nobody says anything. */
    for (size_t i = 0; i < count; i++)
        messages[i].size = 0;
    ASSERT(!chat_encode(chat, messages, count, false, true, &silent, &none));
    ASSERT(specials(&silent) == specials(&tokens));
    tokenizer_tokens_close(&tokens);
    tokenizer_tokens_close(&silent);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    struct chat_message messages[MESSAGES];
    struct chat chat;
    struct error err = {0};
    size_t count = 0, at = 1;
    if (!size)
        return 0;
    char *exact = malloc(size); /* reading past the end is seen */
    ASSERT(exact);
    memcpy(exact, data + 1, size - 1);
    if (data[0] < 64) {
        read_files(exact, size - 1);
        free(exact);
        return 0;
    }
    free(exact);
    const enum chat_template kind =
        CHAT_TEMPLATE_CHATML + data[0] % (CHAT_TEMPLATE_COUNT - CHAT_TEMPLATE_CHATML);
    ASSERT(!chat_open("/nowhere", chat_template_name(kind), get_tokenizer(), &chat, &err));
    while (at < size && count < MESSAGES) {
        const size_t wanted = data[at] / 4u, left = size - at - 1;
        const size_t n = wanted < left ? wanted : left;
        messages[count] =
            (struct chat_message){roles[data[at] % 4 < 3 ? data[at] % 4 : 1], malloc(n + 1), n};
        ASSERT(messages[count].text);
        memcpy(messages[count++].text, data + at + 1, n);
        at += 1 + n;
    }
    if (count)
        say(&chat, messages, count);
    for (size_t i = 0; i < count; i++)
        free(messages[i].text);
    return 0;
}
