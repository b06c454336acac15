/* model_config.c - see model_config.h. */
#include "proto/model_config.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* JSON has no Infinity, Python writes it all the same: a number too large to hold reads as one. */
static cJSON *parse_with_infinity(const char *json, size_t size)
{
    char *text = malloc(size + 1);
    if (!text)
        return NULL;
    memcpy(text, json, size);
    text[size] = 0;
    bool quoted = false;
    for (size_t i = 0; i < size; i++) {
        if (quoted && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            quoted = !quoted;
        else if (!quoted && size - i >= 8 && memcmp(text + i, "Infinity", 8) == 0)
            memcpy(text + i, "1e999   ", 8);
    }
    cJSON *root = cJSON_ParseWithLength(text, size);
    free(text);
    return root;
}

struct reader {
    const cJSON *root;
    struct error *err;
    enum status status; /* of the first failure */
};

static void fail(struct reader *r, enum status status, const char *key, const char *what)
{
    if (!r->status)
        r->status = error_set_param(r->err, status, key, "config.json: \"%s\" %s", key, what);
}

static uint32_t read_count(struct reader *r, const char *key, uint32_t min, uint32_t max,
                           int64_t fallback)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(r->root, key);
    if (!item || cJSON_IsNull(item)) {
        if (fallback < 0) {
            fail(r, STATUS_INVALID, key, "is missing");
            return min;
        }
        return (uint32_t)fallback;
    }
    const double value = cJSON_IsNumber(item) ? item->valuedouble : -1;
    if (!(value >= min && value <= max) || value != floor(value)) {
        if (!r->status)
            r->status = error_set_param(r->err, STATUS_INVALID, key,
                                        "config.json: \"%s\" must be a whole number from %u to %u",
                                        key, min, max);
        return min;
    }
    return (uint32_t)value;
}

static bool read_bool(struct reader *r, const char *key, bool fallback)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(r->root, key);
    if (!item || cJSON_IsNull(item))
        return fallback;
    if (!cJSON_IsBool(item))
        fail(r, STATUS_INVALID, key, "must be true or false");
    return cJSON_IsTrue(item);
}

/* An option whose only supported value is `wanted`. */
static void require_bool(struct reader *r, const char *key, bool wanted)
{
    if (read_bool(r, key, wanted) != wanted)
        fail(r, STATUS_UNSUPPORTED, key,
             wanted ? "must be true: false is not supported"
                    : "must be false: true is not supported");
}

static void require_text(struct reader *r, const char *key, const char *wanted)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(r->root, key);
    if (item && !cJSON_IsNull(item) &&
        !(cJSON_IsString(item) && strcmp(item->valuestring, wanted) == 0) && !r->status)
        r->status = error_set_param(r->err, STATUS_UNSUPPORTED, key,
                                    "config.json: \"%s\" must be \"%s\"", key, wanted);
}

static int32_t read_token(struct reader *r, const char *key, uint32_t vocab_size)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(r->root, key);
    if (!item || cJSON_IsNull(item))
        return -1;
    return (int32_t)read_count(r, key, 0, vocab_size - 1, -1);
}

static void read_model_type(struct reader *r)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(r->root, "model_type");
    if (!cJSON_IsString(type))
        fail(r, STATUS_INVALID, "model_type", "is missing");
    else if (strcmp(type->valuestring, "ramba") != 0 && strcmp(type->valuestring, "mamba2") != 0)
        fail(r, STATUS_UNSUPPORTED, "model_type", "must be \"ramba\" or \"mamba2\"");
    else if (!cJSON_HasObjectItem(r->root, "num_lower_layers"))
        fail(r, STATUS_UNSUPPORTED, "num_lower_layers",
             "is missing: a plain Mamba-2 model has no chunk memory");
}

static void read_mamba(struct reader *r, struct model_config *c)
{
    c->inner_size = c->hidden_size * read_count(r, "expand", 1, 16, 2);
    c->mamba_head_dim = read_count(r, "head_dim", 1, 1024, 64);
    c->mamba_heads = c->inner_size / c->mamba_head_dim;
    if (c->mamba_heads * c->mamba_head_dim != c->inner_size)
        fail(r, STATUS_INVALID, "head_dim", "does not divide expand * hidden_size");
    if (read_count(r, "num_heads", 1, 65536, c->mamba_heads) != c->mamba_heads)
        fail(r, STATUS_INVALID, "num_heads", "is not expand * hidden_size / head_dim");
    c->state_size = read_count(r, "state_size", 1, 1024, 128);
    c->state_groups = read_count(r, "n_groups", 1, 256, 1);
    if (c->mamba_heads % c->state_groups)
        fail(r, STATUS_INVALID, "n_groups", "does not divide the number of Mamba heads");
    c->conv_kernel = read_count(r, "conv_kernel", 2, 16, 4);
    c->conv_size = c->inner_size + 2 * c->state_groups * c->state_size;
    c->proj_size = c->inner_size + c->conv_size + c->mamba_heads;
    c->use_bias = read_bool(r, "use_bias", false);
    c->use_conv_bias = read_bool(r, "use_conv_bias", true);
    require_text(r, "hidden_act", "silu");
    require_bool(r, "rms_norm", true);
    c->norm_epsilon = 1e-5f;
    const cJSON *epsilon = cJSON_GetObjectItemCaseSensitive(r->root, "layer_norm_epsilon");
    if (cJSON_IsNumber(epsilon) && epsilon->valuedouble > 0 && epsilon->valuedouble < 1)
        c->norm_epsilon = (float)epsilon->valuedouble;
    else if (epsilon)
        fail(r, STATUS_INVALID, "layer_norm_epsilon", "must be a number between 0 and 1");
    c->dt_min = 0;
    c->dt_max = INFINITY;
    const cJSON *limit = cJSON_GetObjectItemCaseSensitive(r->root, "time_step_limit");
    if (limit && !cJSON_IsNull(limit)) {
        const cJSON *low = cJSON_GetArrayItem(limit, 0), *high = cJSON_GetArrayItem(limit, 1);
        if (!cJSON_IsArray(limit) || cJSON_GetArraySize(limit) != 2 || !cJSON_IsNumber(low) ||
            !cJSON_IsNumber(high) || !(low->valuedouble >= 0) ||
            !(high->valuedouble >= low->valuedouble)) {
            fail(r, STATUS_INVALID, "time_step_limit", "must be two numbers, the lower one first");
            return;
        }
        c->dt_min = (float)low->valuedouble;
        c->dt_max = (float)high->valuedouble;
    }
}

static void read_memory(struct reader *r, struct model_config *c)
{
    c->chunk_tokens = read_count(r, "chunk_size", 1, 256, 64);
    c->topk = read_count(r, "chunk_topk", 1, 64, 8);
    c->heads = read_count(r, "num_attention_heads", 1, 1024, -1);
    c->head_dim = c->hidden_size / c->heads;
    if (c->head_dim * c->heads != c->hidden_size || c->head_dim % 2)
        fail(r, STATUS_INVALID, "num_attention_heads", "must cut hidden_size into even heads");
    c->kv_heads = read_count(r, "num_kv_heads", 1, c->heads, 1);
    if (c->heads % c->kv_heads)
        fail(r, STATUS_INVALID, "num_kv_heads", "does not divide num_attention_heads");
    c->retrieval_dim = read_count(r, "retrieval_dim", 1, 16384, c->hidden_size);
    c->retrieval_heads = read_bool(r, "singlehead_retrieval", false) ? 1 : c->kv_heads;
    if (c->retrieval_dim % c->retrieval_heads)
        fail(r, STATUS_INVALID, "retrieval_dim", "is not a multiple of the retrieval heads");
    c->encoder_layers = read_count(r, "encoder_layers", 0, 64, 1);
    c->encoder_kv_heads = read_count(r, "num_key_value_heads", 1, c->heads, c->heads);
    if (c->heads % c->encoder_kv_heads)
        fail(r, STATUS_INVALID, "num_key_value_heads", "does not divide num_attention_heads");
    c->encoder_mlp_size = (uint32_t)((uint64_t)c->hidden_size * 8 / 3) / 64 * 64;
    if (c->encoder_layers && !c->encoder_mlp_size)
        fail(r, STATUS_INVALID, "hidden_size", "is too small for the chunk encoder");
    c->encoder_prenorm = c->encoder_layers > 0 && read_bool(r, "enc_prenorm", false);
    c->qk_norm = read_bool(r, "enable_qk_norm", false);
    c->landmark_norm = read_bool(r, "enable_lmk_norm", false);
    c->softmax_weights = read_bool(r, "enable_softmax", false);
    c->softmax1 = read_bool(r, "enable_softmax1", false);
    c->pos_decay = c->softmax_weights && read_bool(r, "enable_pos_decay", false);
    c->mask_slide_window = read_bool(r, "mask_slide_window", false);
    if (c->mask_slide_window) {
        const char *key =
            cJSON_HasObjectItem(r->root, "slide_window") ? "slide_window" : "sliding_window";
        c->slide_window = read_count(r, key, 0, 1u << 20, -1);
        if (c->slide_window < c->chunk_tokens)
            fail(r, STATUS_UNSUPPORTED, key,
                 "must not be under chunk_size: a token would read a chunk before its end");
    }
    double theta = 10000;
    const cJSON *rope = cJSON_GetObjectItemCaseSensitive(r->root, "rope_theta");
    if (cJSON_IsNumber(rope))
        theta = rope->valuedouble;
    if (theta != 10000)
        fail(r, STATUS_UNSUPPORTED, "rope_theta", "must be 10000");
}

static void read_layers(struct reader *r, struct model_config *c)
{
    const uint32_t lower = read_count(r, "num_lower_layers", 1, 256, -1);
    const uint32_t upper = read_count(r, "num_upper_layers", 1, 128, -1);
    const uint32_t groups = read_count(r, "num_upper_groups", 1, 16, 1);
    const uint32_t per_hsa = read_count(r, "num_mamba_per_gca", 1, 128, 1);
    if (r->status)
        return;
    if (upper % groups || upper / groups % per_hsa) {
        fail(r, STATUS_INVALID, "num_upper_layers",
             "is not a multiple of num_upper_groups * num_mamba_per_gca");
        return;
    }
    c->group_count = groups;
    c->mamba_count = lower + upper;
    uint32_t at = 0;
    for (uint32_t i = 0; i < lower; i++)
        c->layers[at++] = MODEL_LAYER_MAMBA;
    c->layers[at++] = MODEL_LAYER_CHUNKING;
    for (uint32_t group = 0; group < groups; group++) {
        c->layers[at++] = MODEL_LAYER_RETRIEVAL;
        for (uint32_t i = 0; i < upper / groups; i++) {
            if (i % per_hsa == 0)
                c->layers[at++] = MODEL_LAYER_HSA;
            c->layers[at++] = MODEL_LAYER_MAMBA;
        }
    }
    c->layer_count = at;
}

enum status model_config_parse(const char *json, size_t size, struct model_config *config,
                               struct error *err)
{
    cJSON *root = parse_with_infinity(json, size);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        return error_set(err, STATUS_INVALID, "config.json is not a JSON object");
    }
    memset(config, 0, sizeof *config);
    struct reader r = {.root = root, .err = err};
    read_model_type(&r);
    config->hidden_size = read_count(&r, "hidden_size", 2, 16384, -1);
    config->vocab_size = read_count(&r, "vocab_size", 1, 1u << 24, -1);
    config->tie_word_embeddings = read_bool(&r, "tie_word_embeddings", true);
    config->bos_token = read_token(&r, "bos_token_id", config->vocab_size);
    config->eos_token = read_token(&r, "eos_token_id", config->vocab_size);
    if (!r.status)
        read_mamba(&r, config);
    if (!r.status)
        read_memory(&r, config);
    if (!r.status)
        read_layers(&r, config);
    cJSON_Delete(root);
    return r.status;
}

static uint64_t encoder_parameters(const struct model_config *c)
{
    const uint64_t d = c->hidden_size, kv = (uint64_t)c->encoder_kv_heads * c->head_dim;
    const uint64_t layer = (d + 1) * d + 2 * (d + 1) * kv + d * d + 2u * c->head_dim +
                           3 * d * c->encoder_mlp_size + 2 * d;
    return c->encoder_layers ? 2 * d + (c->encoder_prenorm ? d : 0) + c->encoder_layers * layer : d;
}

uint64_t model_config_parameters(const struct model_config *c)
{
    const uint64_t d = c->hidden_size;
    const uint64_t mamba = d + c->proj_size * (d + c->use_bias) +
                           c->conv_size * (uint64_t)(c->conv_kernel + c->use_conv_bias) +
                           3u * c->mamba_heads + c->inner_size +
                           d * (c->inner_size + (uint64_t)c->use_bias);
    const uint64_t kv = (uint64_t)c->kv_heads * c->head_dim;
    const uint64_t width = c->retrieval_dim / c->retrieval_heads;
    uint64_t total = d * c->vocab_size * (c->tie_word_embeddings ? 1 : 2) + d;
    for (uint32_t i = 0; i < c->layer_count; i++) {
        switch ((enum model_layer)c->layers[i]) {
        case MODEL_LAYER_MAMBA:
            total += mamba;
            break;
        case MODEL_LAYER_CHUNKING:
            total += encoder_parameters(c) + 2 * kv * d + d * c->retrieval_dim +
                     (c->qk_norm ? c->head_dim : 0);
            break;
        case MODEL_LAYER_RETRIEVAL:
            total += d + d * c->retrieval_dim + (c->landmark_norm ? 2 * width : 0) + c->pos_decay;
            break;
        case MODEL_LAYER_HSA:
            total += d + 2 * d * d + (c->qk_norm ? c->head_dim : 0);
            break;
        }
    }
    return total;
}
