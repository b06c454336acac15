/* tokenizer_file.h - a Hugging Face tokenizer.json as plain arrays, for engine/tokenizer.c.
 * Thread: any; a parsed file belongs to one thread at a time.
 * Owns the parsed JSON: every text in the struct points into it and dies with
 * tokenizer_file_close. Texts end in NUL and are not checked to be UTF-8. */
#ifndef PROTO_TOKENIZER_FILE_H
#define PROTO_TOKENIZER_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

/* Tables are indexed by id, so the largest id bounds their size; known vocabularies end at 2^18. */
#define TOKENIZER_FILE_ID_MAX ((1 << 22) - 1)

struct tokenizer_file_entry {
    const char *text; /* each byte of the token as one character of the GPT-2 byte alphabet */
    int32_t id;
};

struct tokenizer_file_merge {
    const char *left, *right; /* texts of vocabulary entries; the rank is the place in the list */
};

struct tokenizer_file_added {
    const char *content; /* plain text, not in the byte alphabet; never empty */
    int32_t id;
    bool special;
    bool normalized; /* looked for after normalisation, not before */
};

enum tokenizer_file_normalizer { TOKENIZER_FILE_NORMALIZER_NONE, TOKENIZER_FILE_NORMALIZER_NFC };

/* The pre-tokeniser is always ByteLevel with the GPT-2 pattern and no space put in front: nothing
 * else is accepted. */
struct tokenizer_file {
    struct tokenizer_file_entry *vocab;
    struct tokenizer_file_merge *merges;
    struct tokenizer_file_added *added;
    size_t vocab_count, merge_count, added_count;
    enum tokenizer_file_normalizer normalizer;
    struct cJSON *json;
};

/* Parses `json` (borrowed, any bytes). `*file` needs tokenizer_file_close only on STATUS_OK.
 * STATUS_INVALID: not JSON, or a part missing or of a wrong type. STATUS_UNSUPPORTED: a part that
 * is not implemented, named. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status tokenizer_file_parse(const char *json, size_t size,
                                                struct tokenizer_file *file, struct error *err);
void tokenizer_file_close(struct tokenizer_file *file);

#endif
