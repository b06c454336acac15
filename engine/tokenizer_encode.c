/* tokenizer_encode.c - text to tokens: added tokens, NFC, pre-tokens, BPE; and where to cut.
 * Source: Hugging Face `tokenizers`, whose order this follows: added tokens that are not
 * normalised, normalisation, added tokens that are, the GPT-2 pattern, merges by rank.
 *
 * Added tokens that are not special (GPT-NeoX has runs of spaces) are always recognised: they are
 * ordinary text that the model was trained on in this form. Special ones need parse_special. */
#include "engine/tokenizer_private.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "proto/base/assert.h"

/* Up to this many bytes a plain search for the best pair is faster than a heap. */
#define SHORT_PRE_TOKEN 40

/* One symbol of a pre-token during BPE; a doubly linked list over an array. */
struct symbol {
    int32_t id;
    uint32_t rank; /* of the merge with the next one, or TOKENIZER_NO_RANK */
    uint32_t previous, next;
};

#define NO_SYMBOL UINT32_MAX

struct encoder {
    const struct tokenizer *t;
    struct tokenizer_tokens *tokens;
    bool parse_special;
    pcre2_match_data *match;
    struct symbol *symbols;
    uint64_t *heap;          /* rank << 32 | position: the smallest rank first, then the leftmost */
    size_t heap_count, room; /* of symbols; the heap has three times as much */
};

static enum status push(struct tokenizer_tokens *tokens, int32_t id)
{
    if (tokens->count == tokens->capacity) {
        const size_t capacity = tokens->capacity ? tokens->capacity * 2 : 64;
        int32_t *ids = realloc(tokens->ids, capacity * sizeof *ids);
        if (!ids)
            return STATUS_NO_MEMORY;
        tokens->ids = ids;
        tokens->capacity = capacity;
    }
    tokens->ids[tokens->count++] = id;
    return STATUS_OK;
}

static uint32_t pair_rank(const struct tokenizer *t, int32_t left, int32_t right)
{
    const struct tokenizer_merge *merge = tokenizer_merge_find(t, left, right);
    return merge ? merge->rank : TOKENIZER_NO_RANK;
}

static enum status merge_short(struct encoder *e, const unsigned char *text, size_t size)
{
    const struct tokenizer *t = e->t;
    int32_t ids[SHORT_PRE_TOKEN];
    uint32_t ranks[SHORT_PRE_TOKEN]; /* ranks[i]: of ids[i] with ids[i + 1] */
    size_t count = size;
    for (size_t i = 0; i < size; i++)
        ids[i] = t->byte_ids[text[i]];
    for (size_t i = 0; i + 1 < count; i++)
        ranks[i] = pair_rank(t, ids[i], ids[i + 1]);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; i++)
            if (ranks[i] < ranks[best])
                best = i;
        if (ranks[best] == TOKENIZER_NO_RANK)
            break;
        ids[best] = tokenizer_merge_find(t, ids[best], ids[best + 1])->id;
        count--;
        memmove(ids + best + 1, ids + best + 2, (count - best - 1) * sizeof *ids);
        memmove(ranks + best, ranks + best + 1, (count - best) * sizeof *ranks);
        if (best > 0)
            ranks[best - 1] = pair_rank(t, ids[best - 1], ids[best]);
        if (best + 1 < count)
            ranks[best] = pair_rank(t, ids[best], ids[best + 1]);
    }
    enum status status = STATUS_OK;
    for (size_t i = 0; i < count && !status; i++)
        status = push(e->tokens, ids[i]);
    return status;
}

static void heap_push(struct encoder *e, uint64_t value)
{
    size_t at = e->heap_count++;
    while (at > 0 && e->heap[(at - 1) / 2] > value) {
        e->heap[at] = e->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    e->heap[at] = value;
}

static uint64_t heap_pop(struct encoder *e)
{
    const uint64_t least = e->heap[0], last = e->heap[--e->heap_count];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= e->heap_count)
            break;
        if (child + 1 < e->heap_count && e->heap[child + 1] < e->heap[child])
            child++;
        if (e->heap[child] >= last)
            break;
        e->heap[at] = e->heap[child];
        at = child;
    }
    e->heap[at] = last;
    return least;
}

/* Looks up the pair that begins at symbol `at` and puts it in the heap. */
static void rank_pair(struct encoder *e, uint32_t at)
{
    struct symbol *symbol = &e->symbols[at];
    symbol->rank = symbol->next == NO_SYMBOL
                       ? TOKENIZER_NO_RANK
                       : pair_rank(e->t, symbol->id, e->symbols[symbol->next].id);
    if (symbol->rank != TOKENIZER_NO_RANK)
        heap_push(e, (uint64_t)symbol->rank << 32 | at);
}

static enum status reserve(struct encoder *e, size_t size)
{
    if (size <= e->room)
        return STATUS_OK;
    free(e->symbols);
    free(e->heap);
    e->room = 0;
    e->symbols = malloc(size * sizeof *e->symbols);
    /* One entry a pair at first, and at most two more with each of the size - 1 merges. */
    e->heap = malloc(3 * size * sizeof *e->heap);
    if (!e->symbols || !e->heap)
        return STATUS_NO_MEMORY;
    e->room = size;
    return STATUS_OK;
}

static enum status merge_long(struct encoder *e, const unsigned char *text, size_t size)
{
    enum status status = reserve(e, size);
    if (status)
        return status;
    struct symbol *s = e->symbols;
    const uint32_t count = (uint32_t)size;
    for (uint32_t i = 0; i < count; i++)
        s[i] = (struct symbol){.id = e->t->byte_ids[text[i]],
                               .previous = i > 0 ? i - 1 : NO_SYMBOL,
                               .next = i + 1 < count ? i + 1 : NO_SYMBOL};
    e->heap_count = 0;
    for (uint32_t i = 0; i < count; i++)
        rank_pair(e, i);
    while (e->heap_count > 0) {
        const uint64_t top = heap_pop(e);
        const uint32_t at = (uint32_t)top, rank = (uint32_t)(top >> 32);
        if (s[at].rank != rank)
            continue; /* One of the two has been merged with another since. */
        const uint32_t gone = s[at].next;
        s[at].id = tokenizer_merge_find(e->t, s[at].id, s[gone].id)->id;
        s[at].next = s[gone].next;
        s[gone].rank = TOKENIZER_NO_RANK;
        if (s[at].next != NO_SYMBOL)
            s[s[at].next].previous = at;
        rank_pair(e, at);
        if (s[at].previous != NO_SYMBOL)
            rank_pair(e, s[at].previous);
    }
    for (uint32_t i = 0; i != NO_SYMBOL && !status; i = s[i].next)
        status = push(e->tokens, s[i].id);
    return status;
}

/* Cuts valid UTF-8 into pre-tokens. */
static enum status encode_plain(struct encoder *e, const char *text, size_t size)
{
    enum status status = STATUS_OK;
    for (size_t at = 0; at < size && !status;) {
        const int found = pcre2_match(e->t->pattern, (PCRE2_SPTR)text, size, at, PCRE2_NO_UTF_CHECK,
                                      e->match, NULL);
        if (found == PCRE2_ERROR_NOMEMORY)
            return STATUS_NO_MEMORY;
        if (found < 0)
            return STATUS_INTERNAL; /* The pattern matches any character, so this is a limit. */
        const size_t end = pcre2_get_ovector_pointer(e->match)[1];
        ASSERT(end > at && end <= size);
        const unsigned char *piece = (const unsigned char *)text + at;
        if (end - at <= SHORT_PRE_TOKEN)
            status = merge_short(e, piece, end - at);
        else
            status = merge_long(e, piece, end - at);
        at = end;
    }
    return status;
}

/* The longest added token at the start of `text`, or NULL. */
static const struct tokenizer_added *match_added(const struct encoder *e,
                                                 const struct tokenizer_trie *trie,
                                                 const char *text, size_t size)
{
    const struct tokenizer_added *best = NULL;
    int32_t node = 0;
    for (size_t i = 0; i < size; i++) {
        node = tokenizer_trie_step(trie, node, (unsigned char)text[i]);
        if (node < 0)
            break;
        const int32_t added = trie->nodes[node].added;
        if (added >= 0 && (e->parse_special || !e->t->added[added].special))
            best = &e->t->added[added];
    }
    return best;
}

static enum status encode_normalized(struct encoder *e, const char *text, size_t size);

/* Takes out the added tokens of one stage and hands on what lies between them. */
static enum status encode_stage(struct encoder *e, enum tokenizer_stage stage, const char *text,
                                size_t size)
{
    const struct tokenizer_trie *trie = &e->t->tries[stage];
    enum status status = STATUS_OK;
    size_t from = 0, at = 0;
    while (at <= size && !status) {
        const struct tokenizer_added *added = NULL;
        if (at < size) {
            if (trie->first[(unsigned char)text[at]])
                added = match_added(e, trie, text + at, size - at);
            if (!added) {
                at++;
                continue;
            }
        }
        if (at > from)
            status = stage == TOKENIZER_RAW ? encode_normalized(e, text + from, at - from)
                                            : encode_plain(e, text + from, at - from);
        if (!added)
            break;
        if (!status)
            status = push(e->tokens, added->id);
        at += added->size;
        from = at;
    }
    return status;
}

/* All characters under U+0300 are their own NFC and combine with none of each other. */
static bool is_nfc_by_sight(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)text[i] >= 0xcc)
            return false;
    return true;
}

static int combining_class(utf8proc_int32_t character)
{
    return utf8proc_get_property(character)->combining_class;
}

/* Canonical order of one run of combining marks, stable. A counting sort, because utf8proc's own
 * exchange sort is quadratic and a document may be one long run. */
static void order_marks(utf8proc_int32_t *marks, size_t count, utf8proc_int32_t *spare)
{
    size_t starts[257] = {0};
    for (size_t i = 0; i < count; i++)
        starts[combining_class(marks[i]) + 1]++;
    for (size_t i = 1; i < 257; i++)
        starts[i] += starts[i - 1];
    for (size_t i = 0; i < count; i++)
        spare[starts[combining_class(marks[i])]++] = marks[i];
    memcpy(marks, spare, count * sizeof *marks);
}

static void order_all(utf8proc_int32_t *characters, size_t count, utf8proc_int32_t *spare)
{
    for (size_t i = 0; i < count;) {
        size_t end = i;
        while (end < count && combining_class(characters[end]) > 0)
            end++;
        if (end - i > 1)
            order_marks(characters + i, end - i, spare);
        i = end > i ? end : i + 1;
    }
}

/* Canonical decomposition in canonical order into `*out` (malloc), with as much room again behind
 * it as it is long. */
static enum status decompose(const char *text, size_t size, utf8proc_int32_t **out, size_t *count)
{
    const utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    size_t room = size + 64;
    utf8proc_int32_t *characters = malloc(2 * room * sizeof *characters);
    *count = 0;
    *out = characters;
    if (!characters)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < size;) {
        utf8proc_int32_t character;
        int boundary = 0;
        i += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + i,
                                      (utf8proc_ssize_t)(size - i), &character);
        if (room - *count < 32) { /* No canonical decomposition is nearly as long. */
            utf8proc_int32_t *grown = realloc(characters, 4 * room * sizeof *characters);
            if (!grown)
                return STATUS_NO_MEMORY;
            *out = characters = grown;
            room *= 2;
        }
        const utf8proc_ssize_t more = utf8proc_decompose_char(
            character, characters + *count, (utf8proc_ssize_t)(room - *count), options, &boundary);
        if (more < 0 || (size_t)more > room - *count)
            return STATUS_INTERNAL;
        *count += (size_t)more;
    }
    order_all(characters, *count, characters + room);
    return STATUS_OK;
}

static enum status encode_normalized(struct encoder *e, const char *text, size_t size)
{
    if (!e->t->nfc || is_nfc_by_sight(text, size))
        return encode_stage(e, TOKENIZER_NORMALIZED, text, size);
    utf8proc_int32_t *characters = NULL;
    char *normal = NULL;
    size_t count, length = 0;
    enum status status = decompose(text, size, &characters, &count);
    if (!status) {
        const utf8proc_ssize_t composed = utf8proc_normalize_utf32(
            characters, (utf8proc_ssize_t)count, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        normal = composed < 0 ? NULL : malloc((size_t)composed * 4 + 1);
        count = composed < 0 ? 0 : (size_t)composed;
        status = normal ? STATUS_OK : STATUS_NO_MEMORY;
    }
    for (size_t i = 0; i < count && !status; i++)
        length += (size_t)utf8proc_encode_char(characters[i], (utf8proc_uint8_t *)normal + length);
    if (!status)
        status = encode_stage(e, TOKENIZER_NORMALIZED, normal, length);
    free(characters);
    free(normal);
    return status;
}

/* Size of the valid UTF-8 character at the start of `text`, or 0. */
static size_t character_at(const char *text, size_t size, utf8proc_int32_t *character)
{
    const utf8proc_ssize_t step = utf8proc_iterate(
        (const utf8proc_uint8_t *)text, size < 4 ? (utf8proc_ssize_t)size : 4, character);
    return step > 0 ? (size_t)step : 0;
}

static enum status encode_invalid(struct encoder *e, unsigned char byte)
{
    const struct tokenizer *t = e->t;
    if (t->byte_ids[byte] >= 0)
        return push(e->tokens, t->byte_ids[byte]);
    enum status status = STATUS_OK;
    for (size_t i = 0; i < t->replacement_count && !status; i++)
        status = push(e->tokens, t->replacement[i]);
    return status;
}

enum status tokenizer_encode(const struct tokenizer *t, const char *text, size_t size,
                             bool parse_special, struct tokenizer_tokens *tokens)
{
    struct encoder e = {.t = t, .tokens = tokens, .parse_special = parse_special};
    const size_t before = tokens->count;
    if (size > INT32_MAX)
        return STATUS_TOO_LARGE;
    e.match = pcre2_match_data_create(1, NULL);
    enum status status = e.match ? STATUS_OK : STATUS_NO_MEMORY;
    for (size_t at = 0; at < size && !status;) {
        size_t end = at, step = 1;
        utf8proc_int32_t character;
        while (end < size && step > 0) {
            step = (unsigned char)text[end] < 0x80
                       ? 1
                       : character_at(text + end, size - end, &character);
            end += step;
        }
        if (end > at)
            status = encode_stage(&e, TOKENIZER_RAW, text + at, end - at);
        if (step == 0 && !status)
            status = encode_invalid(&e, (unsigned char)text[end++]);
        at = end;
    }
    pcre2_match_data_free(e.match);
    free(e.symbols);
    free(e.heap);
    if (status)
        tokens->count = before;
    return status;
}

void tokenizer_tokens_close(struct tokenizer_tokens *tokens)
{
    free(tokens->ids);
    *tokens = (struct tokenizer_tokens){0};
}

/* What the pattern makes of a character. */
enum kind {
    KIND_BYTE, /* not UTF-8: a token of its own */
    KIND_WHITE,
    KIND_LETTER,
    KIND_NUMBER,
    KIND_OTHER,
    KIND_MARK,   /* KIND_OTHER, unless normalisation makes it part of a letter */
    KIND_UNKNOWN /* not white; assigned in a later Unicode than the one of utf8proc */
};

struct glyph {
    size_t start;
    enum kind kind;
    utf8proc_int32_t character;
};

static bool is_white(utf8proc_int32_t c)
{
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

static enum kind kind_of(utf8proc_int32_t character)
{
    if (is_white(character))
        return KIND_WHITE;
    switch (utf8proc_category(character)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return KIND_LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return KIND_NUMBER;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
        return KIND_MARK;
    case UTF8PROC_CATEGORY_CN:
        return KIND_UNKNOWN;
    default:
        return KIND_OTHER;
    }
}

/* The character or invalid byte that ends at `end` > 0. */
static struct glyph glyph_before(const char *text, size_t end)
{
    struct glyph glyph = {.start = end - 1, .kind = KIND_BYTE};
    for (size_t back = 1; back <= 4 && back <= end; back++) {
        utf8proc_int32_t character;
        if (character_at(text + end - back, back, &character) == back) {
            glyph = (struct glyph){end - back, kind_of(character), character};
            break;
        }
    }
    return glyph;
}

/* Where a character begins that the text ends in the middle of, or `size`. */
static size_t complete_size(const char *text, size_t size)
{
    static const char *const fill[] = {"\x80", "\x90", "\xa0"};
    for (size_t back = 1; back < 4 && back <= size; back++) {
        const unsigned char lead = (unsigned char)text[size - back];
        if (lead < 0x80)
            break;
        if (lead < 0xc0)
            continue;
        /* It may still become a character if some continuation makes it one. */
        for (size_t i = 0; i < 3; i++) {
            char whole[4];
            utf8proc_int32_t character;
            memset(whole, 0x80, sizeof whole);
            memcpy(whole, text + size - back, back);
            if (back == 1)
                whole[1] = fill[i][0];
            if (character_at(whole, 4, &character) > back)
                return size - back;
        }
        break;
    }
    return size;
}

/* Whether an added token of `trie` lies, or with more text may come to lie, across `cut`. */
static bool added_crosses(const struct tokenizer_trie *trie, const char *text, size_t size,
                          size_t cut)
{
    const size_t reach = trie->longest > 0 ? trie->longest - 1 : 0;
    for (size_t from = cut > reach ? cut - reach : 0; from < cut; from++) {
        if (!trie->first[(unsigned char)text[from]])
            continue;
        int32_t node = 0;
        size_t i = from;
        for (; i < size && node >= 0; i++) {
            node = tokenizer_trie_step(trie, node, (unsigned char)text[i]);
            if (node >= 0 && i >= cut && trie->nodes[node].added >= 0)
                return true;
        }
        if (node >= 0 && trie->nodes[node].child >= 0)
            return true;
    }
    return false;
}

/* Whether the pattern always has a border between two characters that are not both white, given
 * whether `a`, if it is white, begins its run. */
static bool pattern_border(const struct tokenizer *t, const struct glyph *a, const struct glyph *b,
                           bool a_begins)
{
    if (a->kind == KIND_BYTE || b->kind == KIND_BYTE)
        return true;
    if (b->kind == KIND_WHITE)
        return true;           /* Nothing but white space has white space behind its start. */
    if (a->kind == KIND_WHITE) /* In a longer run, the border before the last one decides. */
        return a->character != ' ' && a_begins;
    if (a->kind == KIND_UNKNOWN || b->kind == KIND_UNKNOWN)
        return false;
    if (t->nfc && a->kind == KIND_MARK)
        return b->kind == KIND_NUMBER;
    const enum kind left = a->kind == KIND_MARK ? KIND_OTHER : a->kind;
    const enum kind right = b->kind == KIND_MARK ? KIND_OTHER : b->kind;
    if (a->character == '\'' && right == KIND_LETTER)
        return false; /* It may be 's, 't and so on. */
    return left != right;
}

/* Characters that normalisation may change by, or join with, what is in front of them. */
static bool joins_backward(const struct glyph *glyph)
{
    return glyph->kind == KIND_MARK || glyph->kind == KIND_UNKNOWN ||
           (glyph->character >= 0x1160 && glyph->character <= 0x11ff); /* Hangul vowels, finals */
}

static bool may_begin_added(const struct tokenizer *t, char byte)
{
    return t->tries[TOKENIZER_RAW].first[(unsigned char)byte] ||
           t->tries[TOKENIZER_NORMALIZED].first[(unsigned char)byte];
}

/* Goes back from the end to the first place that is a border whatever follows. */
size_t tokenizer_cut(const struct tokenizer *t, const char *text, size_t size)
{
    const size_t end = complete_size(text, size);
    struct glyph c = {.start = end, .kind = KIND_WHITE}; /* behind b; unknown at first */
    if (end == 0)
        return size;
    struct glyph b = glyph_before(text, end);
    while (b.start > 0) {
        const struct glyph a = glyph_before(text, b.start);
        const bool a_begins = a.start == 0 || glyph_before(text, a.start).kind != KIND_WHITE;
        bool border;
        if (a.kind == KIND_WHITE && b.kind == KIND_WHITE) /* The last one of a run stands alone. */
            border =
                c.kind != KIND_WHITE && c.kind != KIND_BYTE && !may_begin_added(t, text[c.start]);
        else
            border = pattern_border(t, &a, &b, a_begins);
        if (border && !(t->nfc && joins_backward(&b)) &&
            !added_crosses(&t->tries[TOKENIZER_RAW], text, size, b.start) &&
            !added_crosses(&t->tries[TOKENIZER_NORMALIZED], text, size, b.start))
            return b.start;
        c = b;
        b = a;
    }
    return end;
}
