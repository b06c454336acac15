/* What a model's folder may hold: the published configurations and every refusal of config.json by
 * name; checkpoints in one file or in shards give the same numbers, and any other is refused with
 * the tensor named. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/session.h"
#include "proto/base/buf.h"
#include "proto/safetensors.h"
#include "tests/lib/chunk_ram.h"
#include "tests/lib/golden.h"
#include "tests/lib/store_helper.h"

#define MODEL "tests/golden/encoder1-kv1-gqa-bf16"
#define TOKENS 150

/* ---- config.json ---- */

static void read_file(const char *path, struct buf *out)
{
    char block[65536];
    size_t got;
    FILE *file = fopen(path, "rb");
    if (!file)
        fail_msg("no %s", path);
    while ((got = fread(block, 1, sizeof block, file)) > 0)
        buf_append(out, block, got);
    fclose(file);
}

static void check_published(const char *path, uint64_t parameters, uint32_t mamba_layers)
{
    struct buf text;
    struct model_config config;
    struct error err = {0};
    buf_init(&text);
    read_file(path, &text);
    if (model_config_parse(text.data, text.size, &config, &err))
        fail_msg("%s: %s", path, err.message);
    assert_int_equal(config.mamba_count, mamba_layers);
    assert_int_equal(config.chunk_tokens, 64);
    assert_int_equal(config.topk, 8);
    const uint64_t count = model_config_parameters(&config);
    print_message("%s: %llu parameters\n", path, (unsigned long long)count);
    assert_true(count > parameters * 9 / 10 && count < parameters * 11 / 10);
    buf_close(&text);
}

static void published_configurations_are_read(void **state)
{
    (void)state;
    check_published("tests/bench/ramba-370m/config.json", 390000000, 48);
    const char *path = golden_shared("published/ramba-3b/config.json");
    FILE *file = fopen(path, "r");
    if (!file) {
        print_message("the 3B configuration is not at %s (set RAMBAD_SHARED)\n", path);
        return;
    }
    fclose(file);
    check_published(path, 3000000000, 64);
}

/* `text` with the value of `key` replaced, or the key added. */
static void with_value(const struct buf *text, const char *key, const char *value, struct buf *out)
{
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *begin = text->data, *at = strstr(begin, quoted);
    out->size = 0;
    if (!at) {
        const char *brace = strchr(begin, '{');
        assert_non_null(brace);
        buf_append(out, begin, (size_t)(brace - begin) + 1);
        buf_append_text(out, quoted);
        buf_append_text(out, value);
        buf_append_text(out, ",");
        buf_append_text(out, brace + 1);
        return;
    }
    at += strlen(quoted);
    buf_append(out, begin, (size_t)(at - begin));
    buf_append_text(out, value);
    buf_append_text(out, at + strcspn(at, ",}\n"));
}

static void other_configurations_are_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *key, *value, *param; /* param: the key that the error names */
        enum status status;
    } cases[] = {
        {"model_type", "\"llama\"", "model_type", STATUS_UNSUPPORTED},
        {"hidden_act", "\"gelu\"", "hidden_act", STATUS_UNSUPPORTED},
        {"rms_norm", "false", "rms_norm", STATUS_UNSUPPORTED},
        {"rope_theta", "1000000", "rope_theta", STATUS_UNSUPPORTED},
        {"hidden_size", "\"64\"", "hidden_size", STATUS_INVALID},
        {"hidden_size", "-64", "hidden_size", STATUS_INVALID},
        {"hidden_size", "64.5", "hidden_size", STATUS_INVALID},
        {"num_kv_heads", "3", "num_kv_heads", STATUS_INVALID},
        {"num_attention_heads", "7", "num_attention_heads", STATUS_INVALID},
        {"chunk_topk", "0", "chunk_topk", STATUS_INVALID},
        {"chunk_topk", "65", "chunk_topk", STATUS_INVALID},
        {"chunk_size", "100000", "chunk_size", STATUS_INVALID},
        {"head_dim", "48", "head_dim", STATUS_INVALID},
        {"n_groups", "3", "n_groups", STATUS_INVALID},
        {"num_upper_groups", "3", "num_upper_layers", STATUS_INVALID},
        {"layer_norm_epsilon", "0", "layer_norm_epsilon", STATUS_INVALID},
        {"time_step_limit", "3", "time_step_limit", STATUS_INVALID},
        {"use_bias", "1", "use_bias", STATUS_INVALID},
        {"eos_token_id", "256", "eos_token_id", STATUS_INVALID},
        {"vocab_size", "0", "vocab_size", STATUS_INVALID},
    };
    struct buf text, changed;
    struct model_config config;
    buf_init(&text);
    buf_init(&changed);
    read_file(MODEL "/config.json", &text);
    buf_text(&text);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error err = {0};
        with_value(&text, cases[i].key, cases[i].value, &changed);
        const enum status status = model_config_parse(changed.data, changed.size, &config, &err);
        if (status != cases[i].status || strcmp(err.param, cases[i].param) != 0 ||
            !strstr(err.message, cases[i].param))
            fail_msg("%s = %s: status %d, param \"%s\": %s", cases[i].key, cases[i].value,
                     (int)status, err.param, err.message);
    }
    struct error err = {0};
    assert_int_equal(model_config_parse("[]", 2, &config, &err), STATUS_INVALID);
    assert_int_equal(model_config_parse(text.data, text.size / 2, &config, &err), STATUS_INVALID);
    buf_close(&text);
    buf_close(&changed);
}

/* ---- checkpoints ---- */

struct checkpoint {
    struct buf file;
    struct safetensors header;
};

static void open_checkpoint(struct checkpoint *checkpoint)
{
    struct error err;
    buf_init(&checkpoint->file);
    read_file(MODEL "/model.safetensors", &checkpoint->file);
    if (safetensors_parse(checkpoint->file.data, checkpoint->file.size, checkpoint->file.size,
                          &checkpoint->header, &err))
        fail_msg("%s", err.message);
}

static void close_checkpoint(struct checkpoint *checkpoint)
{
    safetensors_close(&checkpoint->header);
    buf_close(&checkpoint->file);
}

/* What is changed of the tensor `name` on its way into a file; NULL fields: nothing. */
struct change {
    const char *name, *dtype, *new_name;
    bool drop, transpose;
    int64_t set_first; /* the bits of its first element; -1: as it is */
};

static void write_bytes(const char *folder, const char *name, const void *data, size_t size)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

/* A safetensors file of the tensors [from, to) of the checkpoint. */
static void write_tensors(const struct checkpoint *checkpoint, size_t from, size_t to,
                          const struct change *change, const char *folder, const char *name)
{
    struct buf header, data, whole;
    buf_init(&header);
    buf_init(&data);
    buf_init(&whole);
    buf_append_text(&header, "{");
    for (size_t i = from; i < to; i++) {
        const struct safetensors_entry *entry = &checkpoint->header.entries[i];
        const bool hit = change && strcmp(change->name, entry->name) == 0;
        char line[512];
        if (hit && change->drop)
            continue;
        uint64_t shape[SAFETENSORS_RANK_MAX];
        memcpy(shape, entry->shape, sizeof shape);
        if (hit && change->transpose) {
            shape[0] = entry->shape[1];
            shape[1] = entry->shape[0];
        }
        snprintf(line, sizeof line, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[",
                 header.size > 1 ? "," : "",
                 hit && change->new_name ? change->new_name : entry->name,
                 hit && change->dtype ? change->dtype : entry->dtype_name);
        buf_append_text(&header, line);
        for (uint32_t j = 0; j < entry->rank; j++) {
            snprintf(line, sizeof line, j ? ",%llu" : "%llu", (unsigned long long)shape[j]);
            buf_append_text(&header, line);
        }
        snprintf(line, sizeof line, "],\"data_offsets\":[%zu,%zu]}", data.size,
                 data.size + (size_t)entry->size);
        buf_append_text(&header, line);
        buf_append(&data, checkpoint->file.data + entry->offset, (size_t)entry->size);
        if (hit && change->set_first >= 0) {
            const uint16_t bits = (uint16_t)change->set_first;
            memcpy(data.data + data.size - entry->size, &bits, sizeof bits);
        }
    }
    buf_append_text(&header, "}");
    const uint64_t size = header.size;
    buf_append(&whole, (const char *)&size, sizeof size);
    buf_append(&whole, header.data, header.size);
    buf_append(&whole, data.data, data.size);
    write_bytes(folder, name, whole.data, whole.size);
    buf_close(&header);
    buf_close(&data);
    buf_close(&whole);
}

/* A temporary folder with the model's config.json and tokenizer.json. */
static char *new_folder(void)
{
    char *folder = store_helper_folder();
    struct buf text;
    buf_init(&text);
    read_file(MODEL "/config.json", &text);
    write_bytes(folder, "config.json", text.data, text.size);
    text.size = 0;
    read_file(MODEL "/tokenizer.json", &text);
    write_bytes(folder, "tokenizer.json", text.data, text.size);
    buf_close(&text);
    return folder;
}

static enum status open_model(const char *folder, struct chunk_ram *ram, struct engine **engine,
                              struct error *err)
{
    *err = (struct error){0};
    const struct engine_options options = {.model_path = folder,
                                           .backend = ENGINE_BACKEND_REF,
                                           .host_memory_bytes = (size_t)64 << 20,
                                           .io = chunk_ram_io(ram)};
    return engine_open(&options, engine, err);
}

/* The logits after TOKENS tokens, over chunk borders; free them. */
static float *logits_of(const char *folder, size_t *count)
{
    struct chunk_ram ram;
    struct engine *engine;
    struct engine_session *session;
    struct error err;
    int32_t tokens[TOKENS];
    chunk_ram_init(&ram);
    if (open_model(folder, &ram, &engine, &err))
        fail_msg("%s", err.message);
    chunk_ram_attach(&ram, engine);
    const struct chunk_range range = {.branch = 1};
    if (engine_session_create(engine, &range, 1, NULL, 0, &session, &err))
        fail_msg("%s", err.message);
    for (int32_t i = 0; i < TOKENS; i++)
        tokens[i] = (i * 37 + 11) % 256;
    struct engine_step_item item = {
        .session = session, .tokens = tokens, .token_count = TOKENS, .want_logits = true};
    assert_int_equal(engine_step(engine, &item, 1), STATUS_OK);
    assert_int_equal(item.status, STATUS_OK);
    *count = engine_get_info(engine)->config->vocab_size;
    float *logits = malloc(*count * sizeof *logits);
    assert_non_null(logits);
    memcpy(logits, session->logits, *count * sizeof *logits);
    engine_session_destroy(session);
    engine_close(engine);
    chunk_ram_close(&ram);
    return logits;
}

static void write_index(const struct checkpoint *checkpoint, size_t half, const char *folder,
                        const char *second)
{
    struct buf index;
    buf_init(&index);
    buf_append_text(&index, "{\"metadata\":{},\"weight_map\":{");
    for (size_t i = 0; i < checkpoint->header.count; i++) {
        char line[512];
        snprintf(line, sizeof line, "%s\"%s\":\"%s\"", i ? "," : "",
                 checkpoint->header.entries[i].name,
                 i < half ? "model-00001-of-00002.safetensors" : second);
        buf_append_text(&index, line);
    }
    buf_append_text(&index, "}}");
    write_bytes(folder, "model.safetensors.index.json", index.data, index.size);
    buf_close(&index);
}

static void shards_are_one_model(void **state)
{
    (void)state;
    static const char second[] = "model-00002-of-00002.safetensors";
    struct checkpoint checkpoint;
    struct chunk_ram ram;
    struct engine *engine;
    struct error err;
    open_checkpoint(&checkpoint);
    char *folder = new_folder();
    const size_t half = checkpoint.header.count / 2;
    write_tensors(&checkpoint, 0, half, NULL, folder, "model-00001-of-00002.safetensors");
    write_index(&checkpoint, half, folder, second);

    chunk_ram_init(&ram);
    assert_int_not_equal(open_model(folder, &ram, &engine, &err),
                         STATUS_OK); /* a shard is absent */
    assert_non_null(strstr(err.message, second));
    chunk_ram_close(&ram);

    write_tensors(&checkpoint, half, checkpoint.header.count, NULL, folder, second);
    size_t count, whole_count;
    float *sharded = logits_of(folder, &count), *whole = logits_of(MODEL, &whole_count);
    assert_int_equal(count, whole_count);
    assert_memory_equal(sharded, whole, count * sizeof *whole);
    free(sharded);
    free(whole);

    write_index(&checkpoint, half, folder, "../elsewhere.safetensors");
    chunk_ram_init(&ram);
    assert_int_equal(open_model(folder, &ram, &engine, &err), STATUS_INVALID);
    chunk_ram_close(&ram);
    store_helper_remove(folder);
    close_checkpoint(&checkpoint);
}

static void other_checkpoints_are_refused_by_tensor(void **state)
{
    (void)state;
    static const char tensor[] = "backbone.layers.0.mixer.out_proj.weight";
    static const struct {
        struct change change;
        enum status status;
        const char *says;
    } cases[] = {
        {{.name = tensor, .drop = true, .set_first = -1}, STATUS_INVALID, "has no tensor"},
        {{.name = tensor, .transpose = true, .set_first = -1}, STATUS_INVALID, "has shape"},
        {{.name = tensor, .dtype = "F16", .set_first = -1}, STATUS_UNSUPPORTED, "convert it"},
        {{.name = tensor, .dtype = "I8", .set_first = -1}, STATUS_UNSUPPORTED, "convert it"},
        {{.name = tensor, .dtype = "F32", .set_first = -1}, STATUS_INVALID, ""},
        {{.name = "backbone.norm_f.weight", .set_first = 0x7f80}, STATUS_INVALID, "infinite"},
        {{.name = "backbone.norm_f.weight", .set_first = 0x7fc0}, STATUS_INVALID, "undefined"},
        {{.name = "backbone.norm_f.weight", .new_name = "backbone.norm_g.weight", .set_first = -1},
         STATUS_INVALID,
         "backbone.norm_f.weight"},
    };
    struct checkpoint checkpoint;
    struct chunk_ram ram;
    struct engine *engine;
    struct error err;
    open_checkpoint(&checkpoint);
    char *folder = new_folder();
    chunk_ram_init(&ram);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_tensors(&checkpoint, 0, checkpoint.header.count, &cases[i].change, folder,
                      "model.safetensors");
        const enum status status = open_model(folder, &ram, &engine, &err);
        if (status != cases[i].status || !strstr(err.message, cases[i].change.name) ||
            !strstr(err.message, cases[i].says))
            fail_msg("case %zu: status %d: %s", i, (int)status, err.message);
    }
    /* A tensor too many: the same names but one more layer in the file than in config.json. */
    struct buf text, changed;
    buf_init(&text);
    buf_init(&changed);
    read_file(MODEL "/config.json", &text);
    buf_text(&text);
    write_tensors(&checkpoint, 0, checkpoint.header.count, NULL, folder, "model.safetensors");
    with_value(&text, "num_upper_layers", "1", &changed);
    write_bytes(folder, "config.json", changed.data, changed.size);
    assert_int_equal(open_model(folder, &ram, &engine, &err), STATUS_UNSUPPORTED);
    assert_non_null(strstr(err.message, "has no place"));
    /* Cut anywhere. */
    write_bytes(folder, "config.json", text.data, text.size);
    const size_t cuts[] = {0, 7, 8, 100, checkpoint.file.size / 2, checkpoint.file.size - 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        write_bytes(folder, "model.safetensors", checkpoint.file.data, cuts[i]);
        assert_int_equal(open_model(folder, &ram, &engine, &err), STATUS_INVALID);
    }
    buf_close(&text);
    buf_close(&changed);
    chunk_ram_close(&ram);
    store_helper_remove(folder);
    close_checkpoint(&checkpoint);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_configurations_are_read),
        cmocka_unit_test(other_configurations_are_refused_by_name),
        cmocka_unit_test(shards_are_one_model),
        cmocka_unit_test(other_checkpoints_are_refused_by_tensor),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
