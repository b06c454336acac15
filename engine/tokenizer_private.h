/* tokenizer_private.h - the tables that tokenizer.c builds and tokenizer_encode.c reads.
 * Thread: immutable after open, so any. Owned by struct tokenizer. */
#ifndef ENGINE_TOKENIZER_PRIVATE_H
#define ENGINE_TOKENIZER_PRIVATE_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "engine/tokenizer.h"

#define TOKENIZER_NO_RANK UINT32_MAX

/* One slot of an open hash table over pairs of ids; rank TOKENIZER_NO_RANK marks a free one. */
struct tokenizer_merge {
    int32_t left, right;
    uint32_t rank;
    int32_t id; /* what the pair becomes */
};

struct tokenizer_added {
    const char *content; /* NUL-terminated; into struct tokenizer's own copy */
    size_t size;
    int32_t id;
    bool special;
};

struct tokenizer_node {
    int32_t child, sibling; /* -1: none */
    int32_t added;          /* index of the added token that ends here, or -1 */
    unsigned char byte;
};

/* Added tokens by their bytes. Node 0 is the root. */
struct tokenizer_trie {
    struct tokenizer_node *nodes;
    int32_t count;
    size_t longest;  /* bytes */
    bool first[256]; /* bytes that a token begins with */
};

/* Which text an added token is looked for in. */
enum tokenizer_stage { TOKENIZER_RAW, TOKENIZER_NORMALIZED, TOKENIZER_STAGES };

struct tokenizer {
    int32_t vocab_size;
    size_t *starts; /* vocab_size + 1 offsets into bytes */
    char *bytes;
    bool *special;
    int32_t byte_ids[256];  /* -1 only for bytes that no UTF-8 text contains */
    int32_t replacement[3]; /* U+FFFD, for those */
    size_t replacement_count;
    struct tokenizer_merge *merges;
    uint32_t merge_mask;
    struct tokenizer_added *added;
    size_t added_count;
    char *added_text;
    struct tokenizer_trie tries[TOKENIZER_STAGES];
    bool nfc;
    pcre2_code *pattern;
};

/* The merge of two ids, or NULL. */
const struct tokenizer_merge *tokenizer_merge_find(const struct tokenizer *t, int32_t left,
                                                   int32_t right);
/* The child of `node` for `byte`, or -1. */
int32_t tokenizer_trie_step(const struct tokenizer_trie *trie, int32_t node, unsigned char byte);

#endif
