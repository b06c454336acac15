/* Every op of the CUDA backend against ref, on ragged shapes with random numbers: one line for each
 * check with its seed, so that a failure can be run again alone (--seed N --only NAME). Exits with
 * 77 where there is no GPU. Also: nothing in a batch changes another sequence's bits, a small pool
 * of device pages changes nothing, and an injected failure is reported, never computed around. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/kernel/cuda/checks.h"

static struct model_config make_config(uint32_t d, uint32_t heads, uint32_t kv_heads, uint32_t n,
                                       uint32_t groups, uint32_t chunk, uint32_t topk)
{
    struct model_config c = {.hidden_size = d,
                             .vocab_size = 517,
                             .inner_size = 2 * d,
                             .mamba_head_dim = d >= 256 ? 64 : 32,
                             .state_size = n,
                             .state_groups = groups,
                             .conv_kernel = 4,
                             .norm_epsilon = 1e-5f,
                             .dt_max = INFINITY,
                             .use_conv_bias = true,
                             .chunk_tokens = chunk,
                             .topk = topk,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = d / heads,
                             .retrieval_dim = d,
                             .retrieval_heads = kv_heads,
                             .encoder_layers = 1,
                             .encoder_kv_heads = kv_heads,
                             .encoder_mlp_size = (uint32_t)((uint64_t)d * 8 / 3) / 64 * 64};
    c.mamba_heads = c.inner_size / c.mamba_head_dim;
    c.conv_size = c.inner_size + 2 * groups * n;
    c.proj_size = c.inner_size + c.conv_size + c.mamba_heads;
    return c;
}

struct job {
    const char *name;
    struct model_config config;
    uint32_t max_rows;
    bool small_pool;   /* a device pool of just what one row reads */
    bool chunks_alone; /* nothing but what chunks become */
};

static void check_scans(struct bed *b)
{
    const uint32_t rows[] = {1, 37, 10, 9, 150, 1, 3};
    const uint64_t chunks[] = {300, 700, 0, 1, 520, 2049, b->config.topk};
    check_retrieve(b, rows, chunks, b->config.hidden_size >= 1024 ? 3 : 7);
}

/* A pool of device pages of pool_bytes, or as many as the backend likes: 0. */
static bool open_job(struct bed *b, const struct job *job, uint64_t seed, size_t pool_bytes)
{
    struct error err = {0};
    b->name = job->name;
    b->seed = seed;
    b->config = job->config;
    const bool opened = !bed_open(b, job->max_rows, pool_bytes, &err);
    if (!opened) {
        printf("FAIL %s: cannot open: %s\n", job->name, err.message);
        failures++;
    }
    return opened;
}

/* Retrieval with landmarks in fp8, which is all that differs then. */
static void run_fp8(const struct job *job, uint64_t seed)
{
    struct bed b = {.fp8 = true};
    if (!open_job(&b, job, seed, 0))
        return;
    check_scans(&b);
    bed_close(&b);
}

static bool is_emulated(const struct bed *b)
{
    return strstr(b->cuda->describe(b->cuda_context), "emulated");
}

/* Segments of few rows, of one row each, and of any length. */
static void check_segments(struct bed *b, uint32_t max_rows)
{
    const bool large = b->config.hidden_size >= 1024;
    const uint32_t few[] = {1, 1, 5, 1, 3};
    const uint32_t many[] = {1, 64, 7, 9, 300, 1, 65, 2, 63};
    check_mamba(b, few, 5);
    uint32_t single[CHECK_SEGMENTS];
    for (uint32_t i = 0; i < CHECK_SEGMENTS; i++)
        single[i] = 1;
    check_mamba(b, single, large ? 11 : 40);
    if (large && !b->wide && !is_emulated(b)) { /* each chooses products of another form */
        check_mamba(b, single, 27);
        check_mamba(b, single, 50);
        check_mamba(b, single, 128);
    }
    check_mamba(b, large ? many + 1 : many, large ? 3 : 9);
    const uint32_t longest[] = {max_rows - 70, 70};
    if (max_rows > 512)
        check_mamba(b, longest, 2);
}

/* Mamba-2 blocks with states in bf16, or the refusal of shapes that have no such form. */
static void run_states(const struct job *job, bool wide, uint64_t seed)
{
    struct bed b = {.wide = wide, .states_bf16 = true, .config = job->config};
    struct error err = {0};
    if (job->config.state_size == 64 || job->config.state_size == 128) {
        if (!open_job(&b, job, seed, 0))
            return;
        check_segments(&b, job->max_rows);
        bed_close(&b);
        return;
    }
    const bool refused = bed_open(&b, job->max_rows, 0, &err) == STATUS_INVALID;
    checks++;
    failures += !refused;
    printf("%-4s %-4s %-30s states in bf16: %s\n", refused ? "ok" : "FAIL", wide ? "fp32" : "bf16",
           job->name, err.message);
}

static void run_job(const struct job *job, bool wide, bool brief, uint64_t seed)
{
    struct bed b = {.wide = wide};
    const struct model_config *c = &job->config;
    const size_t page = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim * (wide ? 4 : 2);
    const size_t least = c->retrieval_heads * c->topk > 16 ? c->retrieval_heads * c->topk : 16;
    if (!open_job(&b, job, seed, job->small_pool ? least * ((page + 255) / 256 * 256) : 0))
        return;
    if (job->chunks_alone) {
        check_encode(&b, 18, 67);
        bed_close(&b);
        return;
    }
    const bool large = c->hidden_size >= 1024;
    check_ends(&b);
    check_many_logits(&b, 20);
    if (c->vocab_size > 16000) { /* tiles for all multiprocessors of an H200 */
        check_many_logits(&b, 45);
        check_many_logits(&b, 128);
    }
    check_pack(&b);
    check_segments(&b, job->max_rows);
    check_encode(&b, large ? 2 : 18, large && is_emulated(&b) ? 0 : 67);
    check_scans(&b);
    if (!wide)
        check_draw(&b);
    /* Many rows go in groups, the larger the fewer multiprocessors there are. */
    check_hsa(&b, large ? 45 : 33, is_emulated(&b) ? 12 : 97);
    check_hsa(&b, 1, 3);
    if (!wide && !brief && !is_emulated(&b) && c->chunk_tokens == 64 && c->topk == 8)
        check_hsa_often(&b, 16411, 20);
    bed_close(&b);
}

/* The N-th launch, or allocation, fails: the op must say so and later ops must stay silent. */
static void check_fault(const struct model_config *c, const char *fault)
{
    struct bed b = {.name = fault, .config = *c};
    struct error err = {0};
    setenv("RAMBAD_CUDA_FAULT", fault, 1);
    const enum status status = bed_open(&b, 64, 0, &err);
    unsetenv("RAMBAD_CUDA_FAULT");
    bool passed;
    if (status) { /* an allocation of the opening itself */
        passed = status == STATUS_NO_MEMORY && err.message[0];
    } else {
        struct ops_tensor table_device;
        weight(&b, c->vocab_size, c->hidden_size, 0, 1, &table_device);
        const int32_t tokens[3] = {1, 2, 3};
        float *x = to_device(&b, NULL, 3 * c->hidden_size * sizeof *x);
        for (int i = 0; i < 3; i++)
            b.cuda->embed(b.cuda_context, &table_device, tokens, 3, x);
        passed = b.cuda->check(b.cuda_context, &err) != STATUS_OK && err.message[0];
        bed_close(&b);
    }
    checks++;
    failures += !passed;
    printf("%-4s bf16 fault %-24s %s: %s\n", passed ? "ok" : "FAIL", fault,
           status ? "open refused" : "reported", err.message);
}

static struct job jobs[8];
static size_t job_count;

static struct model_config *add_job(const char *name, struct model_config config, bool small_pool)
{
    jobs[job_count] = (struct job){name, config, 512, small_pool, false};
    return &jobs[job_count++].config;
}

static void make_jobs(void)
{
    add_job("d64, 4 heads, 1 kv", make_config(64, 4, 1, 16, 1, 16, 4), false);
    struct model_config *c =
        add_job("d96, norms, softmax1, 2 kv", make_config(96, 6, 2, 24, 2, 20, 5), true);
    c->qk_norm = c->softmax1 = c->landmark_norm = c->encoder_prenorm = c->use_bias = true;
    c->encoder_layers = 2;
    c = add_job("d128, no encoder, softmax", make_config(128, 4, 4, 17, 1, 13, 3), true);
    c->vocab_size = 5003;
    c->encoder_layers = 0;
    c->softmax_weights = c->pos_decay = c->mask_slide_window = true;
    c->slide_window = 5 * c->chunk_tokens;
    c->dt_min = 0.01f;
    c->dt_max = 0.2f;
    c = add_job("d256, one head picks, k 64", make_config(256, 4, 2, 128, 1, 64, 64), false);
    c->retrieval_heads = 1;
    jobs[job_count - 1].max_rows = 4500; /* a segment of more blocks than a round carries */
    c = add_job("d512, heads of 128, 2 kv", make_config(512, 4, 2, 64, 1, 64, 8), false);
    c->vocab_size = 17001;
    c = add_job("d512, 1 kv, no encoder", make_config(512, 8, 1, 64, 1, 64, 8), false);
    c->encoder_layers = 0;
    c->retrieval_dim = 256;
    jobs[job_count - 1].chunks_alone = true;
    add_job("370M", make_config(1024, 16, 1, 128, 1, 64, 8), false);
}

int main(int argc, char **argv)
{
    uint64_t seed = (uint64_t)time(NULL) % 100000;
    const char *only = NULL;
    bool large = true, narrow_only = false, brief = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
            seed = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[++i];
        else if (strcmp(argv[i], "--small") == 0)
            large = false;
        else if (strcmp(argv[i], "--narrow") == 0) /* fp32 left out */
            narrow_only = true;
        else if (strcmp(argv[i], "--brief") == 0) /* what takes long under a tool left out */
            brief = true;
    }
    make_jobs();
    struct bed b = {.config = jobs[0].config, .wide = true};
    struct error err = {0};
    const enum status status = bed_open(&b, 16, 0, &err);
    if (status == STATUS_UNSUPPORTED) {
        printf("SKIPPED: %s\n", err.message);
        return 77;
    }
    if (status) {
        printf("FAIL cannot open: %s\n", err.message);
        return 1;
    }
    printf("%s, seed %llu\n", b.cuda->describe(b.cuda_context), (unsigned long long)seed);
    bed_close(&b);
    for (size_t i = 0; i < job_count; i++)
        if ((!only || strstr(jobs[i].name, only)) && (large || jobs[i].config.hidden_size < 256)) {
            if (!narrow_only)
                run_job(&jobs[i], true, brief, seed + i);
            run_job(&jobs[i], false, brief, seed + i);
            if (jobs[i].chunks_alone)
                continue;
            run_fp8(&jobs[i], seed + i);
            if (!narrow_only)
                run_states(&jobs[i], true, seed + i);
            run_states(&jobs[i], false, seed + i);
        }
    const char *const faults[] = {"alloc:1", "alloc:7", "launch:1", "launch:3"};
    for (size_t i = 0; !only && i < sizeof faults / sizeof *faults; i++)
        check_fault(&jobs[0].config, faults[i]);
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
