/* tokenizer.c - opening, looking up and decoding; encoding is in tokenizer_encode.c. */
#include "engine/tokenizer_private.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "proto/base/buf.h"
#include "proto/base/hash.h"
#include "proto/tokenizer_file.h"

#define FILE_BYTES_MAX ((size_t)256 << 20) /* vocabularies of 2^18 tokens take 20 MiB */

/* White space is written out because the engines disagree on \s: PCRE2 counts U+180E, JavaScript
 * U+FEFF. This is Unicode's White_Space, which Hugging Face's own engine uses. */
#define WHITE                                                                       \
    "\\t-\\r\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}" \
    "\\x{205f}\\x{3000}"
#define PATTERN                                                                       \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" WHITE "\\p{L}\\p{N}]+|[" WHITE \
    "]+(?![^" WHITE "])|[" WHITE "]+"

/* Texts of the file's vocabulary to ids; lives during open only. */
struct text_index {
    const struct tokenizer_file_entry *entries;
    uint32_t *slots; /* index + 1, 0: free */
    size_t mask;
};

struct opening {
    struct tokenizer *t;
    struct tokenizer_file file;
    struct text_index index;
    struct error *err;
};

static size_t table_size(size_t count)
{
    size_t size = 16;
    while (size < count * 2)
        size *= 2;
    return size;
}

static int32_t index_find(const struct text_index *index, const char *text, size_t size)
{
    for (size_t at = hash64(text, size, 0) & index->mask; index->slots[at];
         at = (at + 1) & index->mask) {
        const struct tokenizer_file_entry *entry = &index->entries[index->slots[at] - 1];
        if (strncmp(entry->text, text, size) == 0 && !entry->text[size])
            return entry->id;
    }
    return -1;
}

static enum status build_index(struct opening *o)
{
    const struct tokenizer_file *file = &o->file;
    size_t size = table_size(file->vocab_count);
    o->index = (struct text_index){.entries = file->vocab, .mask = size - 1};
    o->index.slots = calloc(size, sizeof *o->index.slots);
    if (!o->index.slots)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < file->vocab_count; i++) {
        const char *text = file->vocab[i].text;
        const size_t length = strlen(text);
        if (index_find(&o->index, text, length) >= 0)
            return error_set(o->err, STATUS_INVALID, "tokenizer.json: token \"%.80s\" occurs twice",
                             text);
        size_t at = hash64(text, length, 0) & o->index.mask;
        while (o->index.slots[at])
            at = (at + 1) & o->index.mask;
        o->index.slots[at] = (uint32_t)i + 1;
    }
    return STATUS_OK;
}

/* GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in order, for U+0100 and
 * on. */
static bool byte_is_printable(int byte)
{
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

static int32_t character_of_byte(int byte)
{
    if (byte_is_printable(byte))
        return byte;
    int32_t character = 256;
    for (int b = 0; b < byte; b++)
        character += !byte_is_printable(b);
    return character;
}

struct alphabet {
    int16_t bytes[512]; /* character to byte, -1: not in the alphabet */
};

static void alphabet_init(struct alphabet *alphabet)
{
    memset(alphabet->bytes, 0xff, sizeof alphabet->bytes);
    for (int byte = 0; byte < 256; byte++)
        alphabet->bytes[character_of_byte(byte)] = (int16_t)byte;
}

/* Writes the bytes that a vocabulary text stands for to `out` (room for strlen(text)). A text with
 * a character outside of the alphabet stands for itself, as in Hugging Face's decoder. */
static bool text_to_bytes(const struct alphabet *alphabet, const char *text, char *out,
                          size_t *size)
{
    const size_t length = strlen(text);
    const utf8proc_uint8_t *bytes = (const utf8proc_uint8_t *)text;
    bool plain = false;
    *size = 0;
    for (size_t i = 0; i < length;) {
        utf8proc_int32_t character;
        utf8proc_ssize_t step =
            utf8proc_iterate(bytes + i, (utf8proc_ssize_t)(length - i), &character);
        if (step <= 0)
            return false;
        if (character >= 512 || alphabet->bytes[character] < 0)
            plain = true;
        else
            out[(*size)++] = (char)alphabet->bytes[character];
        i += (size_t)step;
    }
    if (plain) {
        memcpy(out, text, length);
        *size = length;
    }
    return true;
}

static bool text_is_utf8(const char *text)
{
    const size_t length = strlen(text);
    utf8proc_int32_t character;
    utf8proc_ssize_t step;
    for (size_t i = 0; i < length; i += (size_t)step) {
        step = utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(length - i),
                                &character);
        if (step <= 0)
            return false;
    }
    return true;
}

static bool text_is_ascii(const char *text)
{
    while (*text && (unsigned char)*text < 128)
        text++;
    return !*text;
}

/* Sizes the tables by id. */
static enum status allocate_ids(struct opening *o, size_t *text_size)
{
    struct tokenizer *t = o->t;
    int32_t largest = -1;
    *text_size = 1;
    for (size_t i = 0; i < o->file.vocab_count; i++) {
        largest = o->file.vocab[i].id > largest ? o->file.vocab[i].id : largest;
        *text_size += strlen(o->file.vocab[i].text);
    }
    for (size_t i = 0; i < o->file.added_count; i++) {
        largest = o->file.added[i].id > largest ? o->file.added[i].id : largest;
        *text_size += strlen(o->file.added[i].content);
    }
    t->vocab_size = largest + 1;
    t->starts = calloc((size_t)t->vocab_size + 1, sizeof *t->starts);
    t->special = calloc((size_t)t->vocab_size, sizeof *t->special);
    t->bytes = malloc(*text_size);
    return t->starts && t->special && t->bytes ? STATUS_OK : STATUS_NO_MEMORY;
}

static enum status id_taken(struct opening *o, int32_t id, const char *one, const char *other)
{
    return error_set(o->err, STATUS_INVALID,
                     "tokenizer.json: \"%.80s\" and \"%.80s\" share the id %d", one, other,
                     (int)id);
}

/* Fills `texts` by id; plain[id] is set where the text is an added token's and not of the byte
 * alphabet. */
static enum status place_texts(struct opening *o, const char **texts, bool *plain)
{
    for (size_t i = 0; i < o->file.vocab_count; i++) {
        const struct tokenizer_file_entry *entry = &o->file.vocab[i];
        if (texts[entry->id])
            return id_taken(o, entry->id, texts[entry->id], entry->text);
        texts[entry->id] = entry->text;
    }
    for (size_t i = 0; i < o->file.added_count; i++) {
        const struct tokenizer_file_added *added = &o->file.added[i];
        const char *other = texts[added->id];
        const int32_t in_vocab = index_find(&o->index, added->content, strlen(added->content));
        if (other && strcmp(other, added->content) != 0)
            return id_taken(o, added->id, other, added->content);
        if (plain[added->id] || (in_vocab >= 0 && in_vocab != added->id))
            return error_set(o->err, STATUS_INVALID,
                             "tokenizer.json: added token \"%.80s\" occurs twice", added->content);
        texts[added->id] = added->content;
        plain[added->id] = true;
        o->t->special[added->id] = added->special;
    }
    return STATUS_OK;
}

static enum status build_bytes(struct opening *o)
{
    struct tokenizer *t = o->t;
    struct alphabet alphabet;
    size_t text_size, at = 0;
    enum status status = allocate_ids(o, &text_size);
    if (status)
        return status;
    const char **texts = calloc((size_t)t->vocab_size, sizeof *texts);
    bool *plain = calloc((size_t)t->vocab_size, sizeof *plain);
    status = texts && plain ? place_texts(o, texts, plain) : STATUS_NO_MEMORY;
    alphabet_init(&alphabet);
    for (int32_t id = 0; id < t->vocab_size && !status; id++) {
        const char *text = texts[id];
        size_t size = 0;
        t->starts[id] = at;
        if (text && plain[id] && text_is_utf8(text)) {
            size = strlen(text);
            memcpy(t->bytes + at, text, size);
        } else if (text && (plain[id] || !text_to_bytes(&alphabet, text, t->bytes + at, &size))) {
            status = error_set(o->err, STATUS_INVALID,
                               "tokenizer.json: the text of token %d is not UTF-8", (int)id);
        }
        at += size;
    }
    t->starts[t->vocab_size] = at;
    free(texts);
    free(plain);
    return status;
}

static bool byte_occurs_in_utf8(int byte)
{
    return byte != 0xc0 && byte != 0xc1 && byte <= 0xf4;
}

/* A document must not be able to make a special token, by its bytes or by a merge. */
static enum status refuse_special(struct opening *o, int32_t id, const char *text)
{
    if (!o->t->special[id])
        return STATUS_OK;
    return error_set(o->err, STATUS_UNSUPPORTED,
                     "tokenizer.json: special token \"%.80s\" is one that plain text can give, "
                     "which is not supported",
                     text);
}

static enum status build_byte_ids(struct opening *o)
{
    for (int byte = 0; byte < 256; byte++) {
        char text[5] = {0};
        const utf8proc_ssize_t size =
            utf8proc_encode_char(character_of_byte(byte), (utf8proc_uint8_t *)text);
        const int32_t id = index_find(&o->index, text, (size_t)size);
        o->t->byte_ids[byte] = id;
        if (id < 0 && byte_occurs_in_utf8(byte))
            return error_set(o->err, STATUS_UNSUPPORTED,
                             "tokenizer.json: a vocabulary without the byte 0x%02x is not "
                             "supported",
                             (unsigned)byte);
        enum status status = id < 0 ? STATUS_OK : refuse_special(o, id, text);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static size_t merge_slot(const struct tokenizer *t, int32_t left, int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    key *= 0x9e3779b97f4a7c15u; /* Fibonacci hashing; the high bits are the mixed ones */
    size_t at = (size_t)(key >> 32) & t->merge_mask;
    while (t->merges[at].rank != TOKENIZER_NO_RANK &&
           (t->merges[at].left != left || t->merges[at].right != right))
        at = (at + 1) & t->merge_mask;
    return at;
}

const struct tokenizer_merge *tokenizer_merge_find(const struct tokenizer *t, int32_t left,
                                                   int32_t right)
{
    const struct tokenizer_merge *merge = &t->merges[merge_slot(t, left, right)];
    return merge->rank == TOKENIZER_NO_RANK ? NULL : merge;
}

static enum status add_merge(struct opening *o, size_t rank, struct buf *joined)
{
    const struct tokenizer_file_merge *merge = &o->file.merges[rank];
    const int32_t left = index_find(&o->index, merge->left, strlen(merge->left));
    const int32_t right = index_find(&o->index, merge->right, strlen(merge->right));
    joined->size = 0;
    buf_append_text(joined, merge->left);
    buf_append_text(joined, merge->right);
    const int32_t id = index_find(&o->index, joined->data, joined->size);
    if (left < 0 || right < 0 || id < 0)
        return error_set(o->err, STATUS_INVALID,
                         "tokenizer.json: merge \"%.80s %.80s\" is not of tokens of the vocabulary",
                         merge->left, merge->right);
    enum status status = refuse_special(o, id, buf_text(joined));
    if (!status) /* Of two equal merges the later one counts, as in Hugging Face's table. */
        o->t->merges[merge_slot(o->t, left, right)] = (struct tokenizer_merge){
            .left = left, .right = right, .rank = (uint32_t)rank, .id = id};
    return status;
}

static enum status build_merges(struct opening *o)
{
    const size_t size = table_size(o->file.merge_count);
    struct buf joined;
    enum status status = STATUS_OK;
    o->t->merge_mask = (uint32_t)size - 1;
    o->t->merges = malloc(size * sizeof *o->t->merges);
    if (!o->t->merges)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < size; i++)
        o->t->merges[i].rank = TOKENIZER_NO_RANK;
    buf_init(&joined);
    for (size_t i = 0; i < o->file.merge_count && !status; i++)
        status = add_merge(o, i, &joined);
    buf_close(&joined);
    return status;
}

int32_t tokenizer_trie_step(const struct tokenizer_trie *trie, int32_t node, unsigned char byte)
{
    int32_t child = trie->nodes[node].child;
    while (child >= 0 && trie->nodes[child].byte != byte)
        child = trie->nodes[child].sibling;
    return child;
}

/* `nodes` has room for one node a byte. */
static bool trie_add(struct tokenizer_trie *trie, const struct tokenizer_added *added,
                     int32_t index)
{
    int32_t node = 0;
    for (size_t i = 0; i < added->size; i++) {
        const unsigned char byte = (unsigned char)added->content[i];
        int32_t child = tokenizer_trie_step(trie, node, byte);
        if (child < 0) {
            child = trie->count++;
            trie->nodes[child] = (struct tokenizer_node){
                .child = -1, .sibling = trie->nodes[node].child, .added = -1, .byte = byte};
            trie->nodes[node].child = child;
        }
        node = child;
    }
    trie->first[(unsigned char)added->content[0]] = true;
    if (added->size > trie->longest)
        trie->longest = added->size;
    if (trie->nodes[node].added >= 0)
        return false;
    trie->nodes[node].added = index;
    return true;
}

static enum status allocate_added(struct opening *o)
{
    struct tokenizer *t = o->t;
    size_t size = 1;
    for (size_t i = 0; i < o->file.added_count; i++)
        size += strlen(o->file.added[i].content) + 1;
    if (size > INT32_MAX)
        return STATUS_NO_MEMORY; /* The nodes are numbered in 32 bits. */
    t->added_text = malloc(size);
    t->added = calloc(o->file.added_count + 1, sizeof *t->added);
    if (!t->added_text || !t->added)
        return STATUS_NO_MEMORY;
    for (int stage = 0; stage < TOKENIZER_STAGES; stage++) {
        struct tokenizer_trie *trie = &t->tries[stage];
        trie->nodes = malloc(size * sizeof *trie->nodes);
        if (!trie->nodes)
            return STATUS_NO_MEMORY;
        trie->nodes[trie->count++] =
            (struct tokenizer_node){.child = -1, .sibling = -1, .added = -1};
    }
    return STATUS_OK;
}

static enum status build_added(struct opening *o)
{
    struct tokenizer *t = o->t;
    enum status status = allocate_added(o);
    char *text = t->added_text;
    for (size_t i = 0; i < o->file.added_count && !status; i++) {
        const struct tokenizer_file_added *from = &o->file.added[i];
        struct tokenizer_added *added = &t->added[t->added_count];
        const bool late = from->normalized && t->nfc;
        /* Hugging Face normalises such a token's own text too, and a stream would have to be cut
         * by its normal form; no published file needs either. */
        if (late && !text_is_ascii(from->content))
            return error_set(o->err, STATUS_UNSUPPORTED,
                             "tokenizer.json: added token \"%.80s\" is normalized and not ASCII, "
                             "which is not supported",
                             from->content);
        *added = (struct tokenizer_added){.content = text,
                                          .size = strlen(from->content),
                                          .id = from->id,
                                          .special = from->special};
        memcpy(text, from->content, added->size + 1);
        text += added->size + 1;
        /* The two stages differ in order even where nothing is normalised. */
        if (!trie_add(&t->tries[from->normalized ? TOKENIZER_NORMALIZED : TOKENIZER_RAW], added,
                      (int32_t)t->added_count))
            status = error_set(o->err, STATUS_INVALID,
                               "tokenizer.json: added token \"%.80s\" occurs twice", from->content);
        t->added_count++;
    }
    return status;
}

static enum status compile_pattern(struct opening *o)
{
    int code;
    size_t offset;
    char message[120] = "";
    o->t->pattern = pcre2_compile((PCRE2_SPTR)PATTERN, PCRE2_ZERO_TERMINATED,
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &code, &offset, NULL);
    if (!o->t->pattern) {
        pcre2_get_error_message(code, (PCRE2_UCHAR *)message, sizeof message);
        return error_set(o->err, STATUS_INTERNAL, "tokenizer: pattern: %s", message);
    }
    /* Where there is no JIT for the machine, matching falls back to the interpreter. */
    (void)pcre2_jit_compile(o->t->pattern, PCRE2_JIT_COMPLETE);
    return STATUS_OK;
}

/* Some vocabularies lack the bytes that never occur in UTF-8; they are encoded as U+FFFD, which is
 * what they would decode to anyway. */
static enum status build_replacement(struct opening *o)
{
    struct tokenizer_tokens tokens = {0};
    enum status status = tokenizer_encode(o->t, "\xef\xbf\xbd", 3, false, &tokens);
    if (!status) {
        o->t->replacement_count = tokens.count;
        memcpy(o->t->replacement, tokens.ids, tokens.count * sizeof *tokens.ids);
    }
    tokenizer_tokens_close(&tokens);
    return status;
}

enum status tokenizer_open_memory(const char *json, size_t size, struct tokenizer **out,
                                  struct error *err)
{
    struct opening o = {.err = err};
    enum status status = tokenizer_file_parse(json, size, &o.file, err);
    if (status)
        return status;
    o.t = calloc(1, sizeof *o.t);
    status = o.t ? STATUS_OK : STATUS_NO_MEMORY;
    if (!status) {
        o.t->nfc = o.file.normalizer == TOKENIZER_FILE_NORMALIZER_NFC;
        status = build_index(&o);
    }
    if (!status)
        status = build_bytes(&o);
    if (!status)
        status = build_byte_ids(&o);
    if (!status)
        status = build_merges(&o);
    if (!status)
        status = build_added(&o);
    if (!status)
        status = compile_pattern(&o);
    if (!status)
        status = build_replacement(&o);
    free(o.index.slots);
    tokenizer_file_close(&o.file);
    if (status) {
        tokenizer_close(o.t);
        return status == STATUS_NO_MEMORY
                   ? error_set(err, status, "tokenizer.json: does not fit into memory")
                   : status;
    }
    *out = o.t;
    return STATUS_OK;
}

static enum status read_whole(FILE *file, const char *path, struct buf *text, struct error *err)
{
    char block[16384];
    size_t size;
    while ((size = fread(block, 1, sizeof block, file)) > 0) {
        buf_append(text, block, size);
        if (text->size > FILE_BYTES_MAX)
            return error_set(err, STATUS_INVALID, "%s: larger than %zu MiB", path,
                             FILE_BYTES_MAX >> 20);
    }
    if (ferror(file))
        return error_set(err, STATUS_IO, "%s: %s", path, strerror(errno));
    return STATUS_OK;
}

enum status tokenizer_open(const char *path, struct tokenizer **out, struct error *err)
{
    struct buf text;
    FILE *file = fopen(path, "rb");
    if (!file)
        return error_set(err, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO, "%s: %s", path,
                         strerror(errno));
    buf_init(&text);
    enum status status = read_whole(file, path, &text, err);
    fclose(file);
    if (!status)
        status = tokenizer_open_memory(text.data, text.size, out, err);
    buf_close(&text);
    return status;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t)
        return;
    free(t->starts);
    free(t->bytes);
    free(t->special);
    free(t->merges);
    free(t->added);
    free(t->added_text);
    for (int stage = 0; stage < TOKENIZER_STAGES; stage++)
        free(t->tries[stage].nodes);
    pcre2_code_free(t->pattern);
    free(t);
}

int32_t tokenizer_vocab_size(const struct tokenizer *t)
{
    return t->vocab_size;
}

int32_t tokenizer_added_id(const struct tokenizer *t, const char *text)
{
    for (size_t i = 0; i < t->added_count; i++)
        if (strcmp(t->added[i].content, text) == 0)
            return t->added[i].id;
    return -1;
}

const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *size)
{
    if (id < 0 || id >= t->vocab_size) {
        *size = 0;
        return "";
    }
    *size = t->starts[id + 1] - t->starts[id];
    return t->bytes + t->starts[id];
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->vocab_size && t->special[id];
}

void tokenizer_decoder_init(struct tokenizer_decoder *decoder)
{
    *decoder = (struct tokenizer_decoder){0};
}

/* Size of the character that `lead` begins, 0 when it begins none. */
static int character_size(unsigned char lead)
{
    if (lead < 0x80)
        return 1;
    if (lead >= 0xc2 && lead <= 0xdf)
        return 2;
    if (lead >= 0xe0 && lead <= 0xef)
        return 3;
    return lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
}

/* Whether `byte` may be the second, third or fourth of a character; the second excludes overlong
 * forms, surrogates and what lies over U+10FFFF. */
static bool may_follow(unsigned char lead, int at, unsigned char byte)
{
    unsigned char low = 0x80, high = 0xbf;
    if (at == 1 && lead == 0xe0)
        low = 0xa0;
    if (at == 1 && lead == 0xf0)
        low = 0x90;
    if (at == 1 && lead == 0xed)
        high = 0x9f;
    if (at == 1 && lead == 0xf4)
        high = 0x8f;
    return byte >= low && byte <= high;
}

static void decode_byte(struct tokenizer_decoder *d, unsigned char byte, struct buf *out)
{
    if (d->pending_size > 0) {
        if (may_follow((unsigned char)d->pending[0], d->pending_size, byte)) {
            d->pending[d->pending_size++] = (char)byte;
            if (d->pending_size == character_size((unsigned char)d->pending[0])) {
                buf_append(out, d->pending, d->pending_size);
                d->pending_size = 0;
            }
            return;
        }
        tokenizer_decode_end(d, out);
    }
    const int size = character_size(byte);
    if (size == 1) {
        buf_append(out, &byte, 1);
    } else if (size > 1) {
        d->pending[0] = (char)byte;
        d->pending_size = 1;
    } else {
        buf_append_text(out, "\xef\xbf\xbd");
    }
}

void tokenizer_decode(const struct tokenizer *t, struct tokenizer_decoder *decoder, int32_t id,
                      bool keep_special, struct buf *out)
{
    size_t size;
    const char *bytes = tokenizer_bytes(t, id, &size);
    if (!keep_special && tokenizer_is_special(t, id))
        return;
    for (size_t i = 0; i < size; i++)
        decode_byte(decoder, (unsigned char)bytes[i], out);
}

void tokenizer_decode_end(struct tokenizer_decoder *decoder, struct buf *out)
{
    if (decoder->pending_size > 0)
        buf_append_text(out, "\xef\xbf\xbd");
    decoder->pending_size = 0;
}
