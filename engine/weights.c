/* weights.c - see weights.h. */
#include "engine/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/base/hash.h"
#include "proto/safetensors.h"

struct weights_file {
    char name[256];
    void *map;
    size_t size;
    struct safetensors header;
    bool *used; /* [header.count] */
};

struct weights_private {
    struct weights_file *files;
    size_t file_count;
    struct ops_encoder_layer *encoder;
    void **copies; /* tensors that had to be copied to be aligned, or made at random */
    size_t copy_count;
};

struct loader {
    const struct model_config *config;
    struct weights *weights;
    uint64_t random; /* state of the generator; 0: read files */
    struct error *err;
    enum status status; /* of the first failure */
};

static enum status map_file(const char *folder, const char *name, struct weights_file *file,
                            struct error *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    snprintf(file->name, sizeof file->name, "%s", name);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_set(err, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO, "%s: %s", path,
                         strerror(errno));
    struct stat info;
    enum status status = STATUS_OK;
    if (fstat(fd, &info) || info.st_size < 8) {
        status = error_set(err, STATUS_INVALID, "%s: not a safetensors file", path);
    } else {
        file->size = (size_t)info.st_size;
        file->map = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (file->map == MAP_FAILED) {
            file->map = NULL;
            status = error_set(err, STATUS_IO, "%s: %s", path, strerror(errno));
        }
    }
    close(fd);
    if (!status) {
        struct error inner;
        status = safetensors_parse(file->map, file->size, file->size, &file->header, &inner);
        if (status)
            return error_set(err, status, "%s: %.400s", path, inner.message);
        file->used = calloc(file->header.count + 1, sizeof *file->used);
        if (!file->used)
            status = STATUS_NO_MEMORY;
    }
    return status;
}

static char *read_text(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rbe");
    if (!file)
        return NULL;
    char *text = NULL;
    if (!fseek(file, 0, SEEK_END)) {
        const long end = ftell(file);
        rewind(file);
        text = end >= 0 ? malloc((size_t)end + 1) : NULL;
        if (text && fread(text, 1, (size_t)end, file) != (size_t)end) {
            free(text);
            text = NULL;
        }
        *size = text ? (size_t)end : 0;
    }
    fclose(file);
    return text;
}

static enum status map_folder(const char *folder, struct weights_private *p, struct error *err)
{
    char path[4096];
    size_t size = 0;
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    char *index = read_text(path, &size);
    char **names = NULL;
    char single[] = "model.safetensors";
    char *one[] = {single};
    size_t count = 1;
    enum status status = STATUS_OK;
    if (index) {
        status = safetensors_parse_index(index, size, &names, &count, err);
        free(index);
        if (status)
            return status;
    }
    p->files = calloc(count, sizeof *p->files);
    if (!p->files)
        status = STATUS_NO_MEMORY;
    for (size_t i = 0; i < count && !status; i++) {
        p->file_count++;
        status = map_file(folder, names ? names[i] : one[i], &p->files[i], err);
    }
    for (size_t i = 0; names && i < count; i++)
        free(names[i]);
    free(names);
    return status;
}

/* Keeps memory that a tensor points to. */
static void *keep(struct loader *l, size_t size)
{
    struct weights_private *p = l->weights->mapped;
    void **grown = realloc(p->copies, (p->copy_count + 1) * sizeof *grown);
    if (grown)
        p->copies = grown;
    void *memory = grown ? aligned_alloc(64, (size + 63) / 64 * 64) : NULL;
    if (!memory) {
        l->status = error_set(l->err, STATUS_NO_MEMORY, "out of memory for the weights");
        return NULL;
    }
    p->copies[p->copy_count++] = memory;
    return memory;
}

/* One standard normal number, by Box and Muller, from a SplitMix64 state. */
static float random_normal(uint64_t *state)
{
    double u[2];
    for (int i = 0; i < 2; i++) {
        uint64_t z = (*state += 0x9e3779b97f4a7c15u);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        u[i] = ((double)((z ^ z >> 31) >> 11) + 0.5) / 9007199254740992.0;
    }
    return (float)(sqrt(-2 * log(u[0])) * cos(2 * 3.14159265358979323846 * u[1]));
}

static uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Random weights that keep activations near one: matrices scaled by their width, norms at one,
 * time steps and decays in the range that trained models have. */
static void make_random(struct loader *l, const char *name, struct ops_tensor *out)
{
    const size_t count = (size_t)out->rows * out->cols;
    uint16_t *data = keep(l, count * 2);
    if (!data)
        return;
    float scale = out->rows == 1 ? 0.1f : 1 / sqrtf((float)out->cols), offset = 0;
    if (strstr(name, "norm") || strstr(name, "mixer.D")) {
        scale = 0;
        offset = 1;
    } else if (strstr(name, "dt_bias")) {
        scale *= 10;
        offset = -4.5f;
    } else if (strstr(name, "A_log")) {
        scale *= 5;
        offset = 1.5f;
    }
    /* A table of normals is cheap to draw from; a billion logarithms are not. */
    float table[4096];
    for (size_t i = 0; i < 4096; i++)
        table[i] = random_normal(&l->random);
    uint64_t state = l->random;
    for (size_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        data[i] = to_bf16(offset + table[state >> 52] * scale);
    }
    l->random = state | 1;
    out->data = data;
    out->dtype = OPS_BF16;
}

static void find(struct loader *l, const char *name, const struct safetensors_entry **entry,
                 struct weights_file **file)
{
    struct weights_private *p = l->weights->mapped;
    *entry = NULL;
    for (size_t i = 0; i < p->file_count && !*entry; i++) {
        *entry = safetensors_find(&p->files[i].header, name);
        if (*entry) {
            *file = &p->files[i];
            p->files[i].used[*entry - p->files[i].header.entries] = true;
        }
    }
}

/* Whether the entry's shape is [rows, cols] when axes of length one are left out. */
static bool same_shape(const struct safetensors_entry *entry, uint32_t rows, uint32_t cols)
{
    uint64_t want[2], got[SAFETENSORS_RANK_MAX];
    size_t want_count = 0, got_count = 0;
    if (rows > 1)
        want[want_count++] = rows;
    if (cols > 1)
        want[want_count++] = cols;
    for (uint32_t i = 0; i < entry->rank; i++)
        if (entry->shape[i] != 1)
            got[got_count++] = entry->shape[i];
    return got_count == want_count && memcmp(got, want, want_count * sizeof *want) == 0;
}

static void check_finite(struct loader *l, const char *name, const struct ops_tensor *t)
{
    const size_t count = (size_t)t->rows * t->cols;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = 0;
        if (t->dtype == OPS_FP32)
            memcpy(&bits, (const char *)t->data + 4 * i, 4);
        else
            bits = (uint32_t)((const uint16_t *)t->data)[i] << 16;
        if ((bits & 0x7f800000u) == 0x7f800000u) {
            l->status = error_set(l->err, STATUS_INVALID,
                                  "tensor \"%s\" holds infinite or undefined numbers", name);
            return;
        }
    }
}

static void load(struct loader *l, struct ops_tensor *out, uint32_t rows, uint32_t cols,
                 const char *format, ...) __attribute__((format(printf, 5, 6)));

static void load(struct loader *l, struct ops_tensor *out, uint32_t rows, uint32_t cols,
                 const char *format, ...)
{
    char name[256];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    if (l->status)
        return;
    out->rows = rows;
    out->cols = cols;
    if (l->random) {
        make_random(l, name, out);
        l->weights->bytes += (size_t)rows * cols * 2;
        return;
    }
    const struct safetensors_entry *entry;
    struct weights_file *file = NULL;
    find(l, name, &entry, &file);
    if (!entry) {
        l->status = error_set(l->err, STATUS_INVALID,
                              "the checkpoint has no tensor \"%s\" [%u, %u]", name, rows, cols);
        return;
    }
    if (entry->dtype != SAFETENSORS_BF16 && entry->dtype != SAFETENSORS_F32) {
        l->status = error_set(l->err, STATUS_UNSUPPORTED,
                              "%s: tensor \"%s\" is %s; convert it to BF16 or F32", file->name,
                              name, entry->dtype_name);
        return;
    }
    if (!same_shape(entry, rows, cols)) {
        char shape[128] = "";
        size_t at = 0;
        for (uint32_t i = 0; i < entry->rank && at < sizeof shape - 24; i++)
            at += (size_t)snprintf(shape + at, sizeof shape - at, i ? ", %llu" : "%llu",
                                   (unsigned long long)entry->shape[i]);
        l->status = error_set(l->err, STATUS_INVALID,
                              "%s: tensor \"%s\" has shape [%s], config.json asks for [%u, %u]",
                              file->name, name, shape, rows, cols);
        return;
    }
    out->dtype = entry->dtype == SAFETENSORS_F32 ? OPS_FP32 : OPS_BF16;
    out->data = (const char *)file->map + entry->offset;
    if (entry->offset % (out->dtype == OPS_FP32 ? 4 : 2)) {
        void *copy = keep(l, entry->size);
        if (!copy)
            return;
        memcpy(copy, out->data, entry->size);
        out->data = copy;
    }
    struct weights *w = l->weights;
    const size_t edge = entry->size < 4096 ? entry->size : 4096;
    const uint32_t shape[3] = {rows, cols, (uint32_t)out->dtype};
    w->hash = hash64(name, strlen(name), w->hash);
    w->hash = hash64(shape, sizeof shape, w->hash);
    w->hash = hash64(out->data, edge, w->hash);
    w->hash = hash64((const char *)out->data + entry->size - edge, edge, w->hash);
    w->bytes += entry->size;
    if (rows == 1) /* vectors are cheap to look through; matrices would page the whole file in */
        check_finite(l, name, out);
}

static void load_mamba(struct loader *l, uint32_t i, struct ops_mamba_weights *w)
{
    const struct model_config *c = l->config;
    const uint32_t d = c->hidden_size;
    load(l, &w->norm, 1, d, "backbone.layers.%u.norm.weight", i);
    load(l, &w->in_proj, c->proj_size, d, "backbone.layers.%u.mixer.in_proj.weight", i);
    load(l, &w->conv_weight, c->conv_size, c->conv_kernel, "backbone.layers.%u.mixer.conv1d.weight",
         i);
    if (c->use_conv_bias)
        load(l, &w->conv_bias, 1, c->conv_size, "backbone.layers.%u.mixer.conv1d.bias", i);
    load(l, &w->dt_bias, 1, c->mamba_heads, "backbone.layers.%u.mixer.dt_bias", i);
    load(l, &w->a_log, 1, c->mamba_heads, "backbone.layers.%u.mixer.A_log", i);
    load(l, &w->d, 1, c->mamba_heads, "backbone.layers.%u.mixer.D", i);
    load(l, &w->gate_norm, 1, c->inner_size, "backbone.layers.%u.mixer.norm.weight", i);
    load(l, &w->out_proj, d, c->inner_size, "backbone.layers.%u.mixer.out_proj.weight", i);
    if (c->use_bias) {
        load(l, &w->in_proj_bias, 1, c->proj_size, "backbone.layers.%u.mixer.in_proj.bias", i);
        load(l, &w->out_proj_bias, 1, d, "backbone.layers.%u.mixer.out_proj.bias", i);
    }
}

static void load_encoder_layer(struct loader *l, uint32_t i, uint32_t j,
                               struct ops_encoder_layer *w)
{
    const struct model_config *c = l->config;
    const uint32_t d = c->hidden_size, kv = c->encoder_kv_heads * c->head_dim;
    char p[64];
    snprintf(p, sizeof p, "backbone.layers.%u.encoder.layers.%u", i, j);
    load(l, &w->input_norm, 1, d, "%s.input_layernorm.weight", p);
    load(l, &w->q, d, d, "%s.self_attn.q_proj.weight", p);
    load(l, &w->q_bias, 1, d, "%s.self_attn.q_proj.bias", p);
    load(l, &w->k, kv, d, "%s.self_attn.k_proj.weight", p);
    load(l, &w->k_bias, 1, kv, "%s.self_attn.k_proj.bias", p);
    load(l, &w->v, kv, d, "%s.self_attn.v_proj.weight", p);
    load(l, &w->v_bias, 1, kv, "%s.self_attn.v_proj.bias", p);
    load(l, &w->o, d, d, "%s.self_attn.o_proj.weight", p);
    load(l, &w->q_norm, 1, c->head_dim, "%s.self_attn.q_norm.weight", p);
    load(l, &w->k_norm, 1, c->head_dim, "%s.self_attn.k_norm.weight", p);
    load(l, &w->post_norm, 1, d, "%s.post_attention_layernorm.weight", p);
    load(l, &w->gate, c->encoder_mlp_size, d, "%s.mlp.gate_proj.weight", p);
    load(l, &w->up, c->encoder_mlp_size, d, "%s.mlp.up_proj.weight", p);
    load(l, &w->down, d, c->encoder_mlp_size, "%s.mlp.down_proj.weight", p);
}

static void load_chunking(struct loader *l, uint32_t i, struct ops_chunking_weights *w)
{
    const struct model_config *c = l->config;
    const uint32_t d = c->hidden_size, kv = c->kv_heads * c->head_dim;
    if (c->encoder_layers) {
        load(l, &w->cls, 1, d, "backbone.layers.%u.cls_emb", i);
        if (c->encoder_prenorm)
            load(l, &w->enc_prenorm, 1, d, "backbone.layers.%u.enc_prenorm.weight", i);
        for (uint32_t j = 0; j < c->encoder_layers; j++)
            load_encoder_layer(l, i, j, &l->weights->mapped->encoder[j]);
        w->encoder = l->weights->mapped->encoder;
        load(l, &w->encoder_norm, 1, d, "backbone.layers.%u.encoder.norm.weight", i);
    } else {
        load(l, &w->norm, 1, d, "backbone.layers.%u.norm.weight", i);
    }
    load(l, &w->proj_k, kv, d, "backbone.layers.%u.proj_k.weight", i);
    load(l, &w->proj_v, kv, d, "backbone.layers.%u.proj_v.weight", i);
    load(l, &w->landmark, c->retrieval_dim, d, "backbone.layers.%u.lmk_ln.weight", i);
    if (c->qk_norm)
        load(l, &w->k_norm, 1, c->head_dim, "backbone.layers.%u.k_rmsnorm.weight", i);
}

static void load_retrieval(struct loader *l, uint32_t i, struct ops_retrieval_weights *w)
{
    const struct model_config *c = l->config;
    const uint32_t width = c->retrieval_dim / c->retrieval_heads;
    load(l, &w->pre_norm, 1, c->hidden_size, "backbone.layers.%u.pre_norm.weight", i);
    load(l, &w->query, c->retrieval_dim, c->hidden_size, "backbone.layers.%u.ln.weight", i);
    if (c->landmark_norm) {
        load(l, &w->q_norm, 1, width, "backbone.layers.%u.lmk_q_norm.weight", i);
        load(l, &w->k_norm, 1, width, "backbone.layers.%u.lmk_k_norm.weight", i);
    }
    if (c->pos_decay) {
        struct ops_tensor decay = {0};
        load(l, &decay, 1, 1, "backbone.layers.%u.pos_decay", i);
        if (!l->status && decay.dtype == OPS_FP32)
            memcpy(&w->pos_decay, decay.data, 4);
        else if (!l->status) {
            const uint32_t bits = (uint32_t) * (const uint16_t *)decay.data << 16;
            memcpy(&w->pos_decay, &bits, 4);
        }
    }
}

static void load_hsa(struct loader *l, uint32_t i, struct ops_hsa_weights *w)
{
    const struct model_config *c = l->config;
    const uint32_t d = c->hidden_size;
    load(l, &w->pre_norm, 1, d, "backbone.layers.%u.pre_norm.weight", i);
    load(l, &w->query, d, d, "backbone.layers.%u.q_proj.weight", i);
    load(l, &w->out, d, d, "backbone.layers.%u.o_proj.weight", i);
    if (c->qk_norm)
        load(l, &w->q_norm, 1, c->head_dim, "backbone.layers.%u.q_norm.weight", i);
}

static void load_all(struct loader *l)
{
    const struct model_config *c = l->config;
    struct weights *w = l->weights;
    load(l, &w->embeddings, c->vocab_size, c->hidden_size, "backbone.embeddings.weight");
    for (uint32_t i = 0; i < c->layer_count; i++) {
        w->layers[i].kind = (enum model_layer)c->layers[i];
        switch (w->layers[i].kind) {
        case MODEL_LAYER_MAMBA:
            load_mamba(l, i, &w->layers[i].mamba);
            if (i && w->layers[i - 1].kind == MODEL_LAYER_MAMBA)
                w->layers[i - 1].mamba.next_norm = &w->layers[i].mamba.norm;
            break;
        case MODEL_LAYER_CHUNKING:
            load_chunking(l, i, &w->layers[i].chunking);
            break;
        case MODEL_LAYER_RETRIEVAL:
            load_retrieval(l, i, &w->layers[i].retrieval);
            break;
        case MODEL_LAYER_HSA:
            load_hsa(l, i, &w->layers[i].hsa);
            break;
        }
    }
    load(l, &w->final_norm, 1, c->hidden_size, "backbone.norm_f.weight");
    const struct safetensors_entry *head;
    struct weights_file *file;
    find(l, "lm_head.weight", &head, &file);
    w->head = w->embeddings;
    if (!c->tie_word_embeddings && (head || l->random))
        load(l, &w->head, c->vocab_size, c->hidden_size, "lm_head.weight");
}

static enum status check_all_used(const struct weights_private *p, struct error *err)
{
    for (size_t i = 0; i < p->file_count; i++)
        for (size_t j = 0; j < p->files[i].header.count; j++)
            if (!p->files[i].used[j])
                return error_set(err, STATUS_UNSUPPORTED,
                                 "%s: tensor \"%.100s\" has no place in the configuration; "
                                 "does config.json belong to this checkpoint?",
                                 p->files[i].name, p->files[i].header.entries[j].name);
    return STATUS_OK;
}

enum status weights_open(const char *folder, const struct model_config *config,
                         uint64_t random_seed, struct weights *out, struct error *err)
{
    *out = (struct weights){0};
    out->mapped = calloc(1, sizeof *out->mapped);
    out->layers = calloc(config->layer_count, sizeof *out->layers);
    if (out->mapped)
        out->mapped->encoder = calloc(config->encoder_layers + 1, sizeof *out->mapped->encoder);
    struct loader l = {.config = config, .weights = out, .err = err};
    if (!out->mapped || !out->layers || !out->mapped->encoder)
        l.status = error_set(err, STATUS_NO_MEMORY, "out of memory for the weights");
    if (!l.status)
        l.status = map_folder(folder, out->mapped, err);
    if (l.status == STATUS_NOT_FOUND && random_seed) {
        l.status = STATUS_OK;
        out->mapped->file_count = 0;
        l.random = random_seed;
        out->hash = random_seed;
    }
    if (!l.status)
        load_all(&l);
    if (!l.status)
        l.status = check_all_used(out->mapped, err);
    if (l.status)
        weights_close(out);
    return l.status;
}

struct placing {
    struct ops_context *context;
    enum status (*place_cb)(struct ops_context *context, struct ops_tensor *tensor,
                            struct error *err);
    struct error *err;
    enum status status; /* of the first failure */
};

static void place(struct placing *p, struct ops_tensor *const *tensors, size_t count)
{
    for (size_t i = 0; i < count && !p->status; i++)
        if (tensors[i]->data)
            p->status = p->place_cb(p->context, tensors[i], p->err);
}

#define PLACE(p, ...)                                   \
    do {                                                \
        struct ops_tensor *const all[] = {__VA_ARGS__}; \
        place(p, all, sizeof all / sizeof *all);        \
    } while (0)

static void place_layer(struct placing *p, struct weights_layer *layer)
{
    struct ops_mamba_weights *m = &layer->mamba;
    struct ops_chunking_weights *c = &layer->chunking;
    struct ops_retrieval_weights *r = &layer->retrieval;
    struct ops_hsa_weights *h = &layer->hsa;
    switch (layer->kind) {
    case MODEL_LAYER_MAMBA:
        PLACE(p, &m->norm, &m->in_proj, &m->in_proj_bias, &m->conv_weight, &m->conv_bias,
              &m->dt_bias, &m->a_log, &m->d, &m->gate_norm, &m->out_proj, &m->out_proj_bias);
        break;
    case MODEL_LAYER_CHUNKING:
        PLACE(p, &c->cls, &c->enc_prenorm, &c->encoder_norm, &c->norm, &c->proj_k, &c->proj_v,
              &c->landmark, &c->k_norm);
        break;
    case MODEL_LAYER_RETRIEVAL:
        PLACE(p, &r->pre_norm, &r->query, &r->q_norm, &r->k_norm);
        break;
    case MODEL_LAYER_HSA:
        PLACE(p, &h->pre_norm, &h->query, &h->q_norm, &h->out);
        break;
    }
}

enum status weights_place(struct weights *weights, const struct model_config *config,
                          struct ops_context *context, struct error *err,
                          enum status (*place_cb)(struct ops_context *context,
                                                  struct ops_tensor *tensor, struct error *err))
{
    struct placing p = {.context = context, .place_cb = place_cb, .err = err};
    const bool tied = weights->head.data == weights->embeddings.data;
    PLACE(&p, &weights->embeddings, &weights->final_norm);
    if (!tied)
        PLACE(&p, &weights->head);
    for (uint32_t i = 0; i < config->layer_count; i++)
        place_layer(&p, &weights->layers[i]);
    for (uint32_t i = 0; i < config->encoder_layers; i++) {
        struct ops_encoder_layer *e = &weights->mapped->encoder[i];
        PLACE(&p, &e->input_norm, &e->q, &e->q_bias, &e->k, &e->k_bias, &e->v, &e->v_bias, &e->o,
              &e->q_norm, &e->k_norm, &e->post_norm, &e->gate, &e->up, &e->down);
    }
    if (tied)
        weights->head = weights->embeddings;
    return p.status;
}

void weights_close(struct weights *weights)
{
    struct weights_private *p = weights->mapped;
    for (size_t i = 0; p && i < p->file_count; i++) {
        if (p->files[i].map)
            munmap(p->files[i].map, p->files[i].size);
        safetensors_close(&p->files[i].header);
        free(p->files[i].used);
    }
    for (size_t i = 0; p && i < p->copy_count; i++)
        free(p->copies[i]);
    if (p) {
        free(p->files);
        free(p->copies);
        free(p->encoder);
    }
    free(p);
    free(weights->layers);
    *weights = (struct weights){0};
}
