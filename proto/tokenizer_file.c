/* tokenizer_file.c - see tokenizer_file.h.
 * Source: the serialisation of Hugging Face `tokenizers`. A key that is not known could change the
 * tokens, so it is refused like a known one with a value that is not implemented. */
#include "proto/tokenizer_file.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct reader {
    struct tokenizer_file *file;
    struct error *err;
    enum status status; /* of the first failure */
};

static void fail(struct reader *r, enum status status, const char *where, const char *what)
{
    if (!r->status)
        r->status = error_set(r->err, status, "tokenizer.json: \"%.80s\" %s", where, what);
}

static const cJSON *get(const cJSON *object, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(object, key);
}

static bool absent(const cJSON *item)
{
    return !item || cJSON_IsNull(item);
}

/* Refuses every key of `object` that is not in `known`, a list that ends in NULL. */
static void allow_keys(struct reader *r, const cJSON *object, const char *const *known)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, object)
    {
        size_t i = 0;
        while (known[i] && strcmp(item->string, known[i]) != 0)
            i++;
        if (!known[i])
            fail(r, STATUS_UNSUPPORTED, item->string, "is not a key that is supported");
    }
}

static bool read_bool(struct reader *r, const cJSON *object, const char *key, bool fallback)
{
    const cJSON *item = get(object, key);
    if (absent(item))
        return fallback;
    if (!cJSON_IsBool(item))
        fail(r, STATUS_INVALID, key, "must be true or false");
    return cJSON_IsTrue(item);
}

static void require_false(struct reader *r, const cJSON *object, const char *key)
{
    if (read_bool(r, object, key, false))
        fail(r, STATUS_UNSUPPORTED, key, "must be false: true is not supported");
}

static void require_absent(struct reader *r, const cJSON *object, const char *key)
{
    const cJSON *item = get(object, key);
    if (!absent(item) && !(cJSON_IsString(item) && !item->valuestring[0]))
        fail(r, STATUS_UNSUPPORTED, key, "must be null: a value is not supported");
}

static bool read_id(struct reader *r, const cJSON *item, const char *where, int32_t *id)
{
    const double value = cJSON_IsNumber(item) ? item->valuedouble : -1;
    if (!(value >= 0 && value <= TOKENIZER_FILE_ID_MAX) || value != floor(value)) {
        if (!r->status)
            r->status = error_set(r->err, STATUS_INVALID,
                                  "tokenizer.json: the id of \"%.80s\" must be a whole number from "
                                  "0 to %d",
                                  where, TOKENIZER_FILE_ID_MAX);
        return false;
    }
    *id = (int32_t)value;
    return true;
}

/* The "type" of a component, or NULL when there is no component. */
static const char *component_type(struct reader *r, const cJSON *root, const char *key)
{
    const cJSON *item = get(root, key);
    if (absent(item))
        return NULL;
    const cJSON *type = get(item, "type");
    if (!cJSON_IsObject(item) || !cJSON_IsString(type)) {
        fail(r, STATUS_INVALID, key, "must be null or an object with a \"type\"");
        return NULL;
    }
    return type->valuestring;
}

static void refuse_type(struct reader *r, const char *key, const char *type)
{
    if (!r->status)
        r->status = error_set(r->err, STATUS_UNSUPPORTED,
                              "tokenizer.json: %s of type \"%.80s\" is not supported", key, type);
}

static void read_normalizer(struct reader *r, const cJSON *root)
{
    static const char *const known[] = {"type", NULL};
    const char *type = component_type(r, root, "normalizer");
    if (!type)
        return;
    if (strcmp(type, "NFC") != 0) {
        refuse_type(r, "normalizer", type);
        return;
    }
    allow_keys(r, get(root, "normalizer"), known);
    r->file->normalizer = TOKENIZER_FILE_NORMALIZER_NFC;
}

static const char *const byte_level_keys[] = {"type", "add_prefix_space", "trim_offsets",
                                              "use_regex", NULL};

static void read_pre_tokenizer(struct reader *r, const cJSON *root)
{
    const char *type = component_type(r, root, "pre_tokenizer");
    const cJSON *item = get(root, "pre_tokenizer");
    if (!type) {
        fail(r, STATUS_UNSUPPORTED, "pre_tokenizer", "must be ByteLevel: none is not supported");
        return;
    }
    if (strcmp(type, "ByteLevel") != 0) {
        refuse_type(r, "pre_tokenizer", type);
        return;
    }
    allow_keys(r, item, byte_level_keys);
    /* Without the key Hugging Face puts a space in front. */
    if (read_bool(r, item, "add_prefix_space", true))
        fail(r, STATUS_UNSUPPORTED, "add_prefix_space", "must be false: true is not supported");
    if (!read_bool(r, item, "use_regex", true))
        fail(r, STATUS_UNSUPPORTED, "use_regex", "must be true: false is not supported");
}

/* ByteLevel as a post-processor or decoder changes no id: its options are about offsets. */
static void check_byte_level(struct reader *r, const cJSON *root, const char *key)
{
    const char *type = component_type(r, root, key);
    if (!type)
        return;
    if (strcmp(type, "ByteLevel") != 0)
        refuse_type(r, key, type);
    else
        allow_keys(r, get(root, key), byte_level_keys);
}

static void read_vocab(struct reader *r, const cJSON *model)
{
    const cJSON *vocab = get(model, "vocab"), *item;
    if (!cJSON_IsObject(vocab) || !vocab->child) {
        fail(r, STATUS_INVALID, "vocab", "must be an object of tokens and their ids");
        return;
    }
    size_t count = 0;
    cJSON_ArrayForEach(item, vocab) count++;
    r->file->vocab = malloc(count * sizeof *r->file->vocab);
    if (!r->file->vocab) {
        fail(r, STATUS_NO_MEMORY, "vocab", "does not fit into memory");
        return;
    }
    cJSON_ArrayForEach(item, vocab)
    {
        struct tokenizer_file_entry *entry = &r->file->vocab[r->file->vocab_count];
        if (!read_id(r, item, item->string, &entry->id))
            return;
        entry->text = item->string;
        r->file->vocab_count++;
    }
}

/* "a b" as one text, or ["a", "b"]; the text is cut in two where it lies. */
static bool read_merge(const cJSON *item, struct tokenizer_file_merge *merge)
{
    if (cJSON_IsString(item)) {
        char *space = strchr(item->valuestring, ' ');
        if (!space || strchr(space + 1, ' '))
            return false;
        *space = 0;
        merge->left = item->valuestring;
        merge->right = space + 1;
    } else {
        const cJSON *left = cJSON_IsArray(item) ? item->child : NULL;
        const cJSON *right = left ? left->next : NULL;
        if (!cJSON_IsString(left) || !cJSON_IsString(right) || right->next)
            return false;
        merge->left = left->valuestring;
        merge->right = right->valuestring;
    }
    return merge->left[0] && merge->right[0];
}

static void read_merges(struct reader *r, const cJSON *model)
{
    const cJSON *merges = get(model, "merges"), *item;
    if (!cJSON_IsArray(merges)) {
        fail(r, STATUS_INVALID, "merges", "must be a list of pairs of tokens");
        return;
    }
    size_t count = 0;
    cJSON_ArrayForEach(item, merges) count++;
    r->file->merges = malloc((count + 1) * sizeof *r->file->merges);
    if (!r->file->merges) {
        fail(r, STATUS_NO_MEMORY, "merges", "do not fit into memory");
        return;
    }
    cJSON_ArrayForEach(item, merges)
    {
        if (!read_merge(item, &r->file->merges[r->file->merge_count])) {
            fail(r, STATUS_INVALID, "merges", "must hold \"a b\" or [\"a\", \"b\"] alone");
            return;
        }
        r->file->merge_count++;
    }
}

static void read_model(struct reader *r, const cJSON *root)
{
    static const char *const known[] = {"type",
                                        "dropout",
                                        "unk_token",
                                        "continuing_subword_prefix",
                                        "fuse_unk",
                                        "byte_fallback",
                                        "ignore_merges",
                                        "end_of_word_suffix",
                                        "vocab",
                                        "merges",
                                        NULL};
    const cJSON *model = get(root, "model");
    if (!cJSON_IsObject(model)) {
        fail(r, STATUS_INVALID, "model", "must be an object");
        return;
    }
    /* Files as old as GPT-2's do not name the type; only BPE has merges. */
    const cJSON *type = get(model, "type");
    if (type && !cJSON_IsString(type))
        fail(r, STATUS_INVALID, "type", "of the model must be a text");
    else if (type ? strcmp(type->valuestring, "BPE") != 0 : !get(model, "merges"))
        refuse_type(r, "model", type ? type->valuestring : "");
    if (r->status)
        return;
    allow_keys(r, model, known);
    require_absent(r, model, "dropout");
    require_absent(r, model, "unk_token");
    require_absent(r, model, "continuing_subword_prefix");
    require_absent(r, model, "end_of_word_suffix");
    require_false(r, model, "byte_fallback");
    require_false(r, model, "ignore_merges");
    read_vocab(r, model);
    read_merges(r, model);
}

static void read_added_token(struct reader *r, const cJSON *item)
{
    static const char *const known[] = {"id",     "content",    "single_word", "lstrip",
                                        "rstrip", "normalized", "special",     NULL};
    struct tokenizer_file_added *added = &r->file->added[r->file->added_count];
    const cJSON *content = get(item, "content");
    if (!cJSON_IsObject(item) || !cJSON_IsString(content) || !content->valuestring[0]) {
        fail(r, STATUS_INVALID, "added_tokens", "must hold objects with a \"content\"");
        return;
    }
    allow_keys(r, item, known);
    require_false(r, item, "single_word");
    require_false(r, item, "lstrip");
    require_false(r, item, "rstrip");
    added->content = content->valuestring;
    added->special = read_bool(r, item, "special", false);
    added->normalized = read_bool(r, item, "normalized", !added->special);
    if (read_id(r, get(item, "id"), added->content, &added->id))
        r->file->added_count++;
}

static void read_added(struct reader *r, const cJSON *root)
{
    const cJSON *list = get(root, "added_tokens"), *item;
    if (absent(list))
        return;
    if (!cJSON_IsArray(list)) {
        fail(r, STATUS_INVALID, "added_tokens", "must be a list");
        return;
    }
    size_t count = 0;
    cJSON_ArrayForEach(item, list) count++;
    r->file->added = malloc((count + 1) * sizeof *r->file->added);
    if (!r->file->added) {
        fail(r, STATUS_NO_MEMORY, "added_tokens", "do not fit into memory");
        return;
    }
    cJSON_ArrayForEach(item, list)
    {
        read_added_token(r, item);
        if (r->status)
            return;
    }
}

static cJSON *parse_whole(const char *json, size_t size)
{
    const char *end = NULL;
    cJSON *root = cJSON_ParseWithLengthOpts(json, size, &end, false);
    while (root && end < json + size && strchr(" \t\r\n", *end) && *end)
        end++;
    if (root && end != json + size) {
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}

enum status tokenizer_file_parse(const char *json, size_t size, struct tokenizer_file *file,
                                 struct error *err)
{
    static const char *const known[] = {
        "version",       "truncation", "padding", "added_tokens",   "normalizer",
        "pre_tokenizer", "model",      "decoder", "post_processor", NULL};
    struct reader r = {.file = file, .err = err};
    memset(file, 0, sizeof *file);
    cJSON *root = size ? parse_whole(json, size) : NULL;
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        return error_set(err, STATUS_INVALID, "tokenizer.json: not a JSON object");
    }
    file->json = root;
    allow_keys(&r, root, known);
    require_absent(&r, root, "truncation");
    require_absent(&r, root, "padding");
    read_normalizer(&r, root);
    read_pre_tokenizer(&r, root);
    check_byte_level(&r, root, "post_processor");
    check_byte_level(&r, root, "decoder");
    if (!r.status)
        read_model(&r, root);
    if (!r.status)
        read_added(&r, root);
    if (r.status)
        tokenizer_file_close(file);
    return r.status;
}

void tokenizer_file_close(struct tokenizer_file *file)
{
    free(file->vocab);
    free(file->merges);
    free(file->added);
    cJSON_Delete(file->json);
    memset(file, 0, sizeof *file);
}
