/* The engine against golden vectors: what the published code computes (RAMBAD_SHARED), and what the
 * PyTorch reference computes for every option (tests/golden, shipped model included). Logits to
 * 1e-4 of the largest, picks exactly but for ties, weights to 1e-4; the tokens go in one by one and
 * in slices of random sizes. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/bf16.h"
#include "engine/ops.h"
#include "engine/session.h"
#include "tests/lib/chunk_ram.h"
#include "tests/lib/golden.h"

/* What fp32 sums in another order make of logits (relative to the largest) and of weights, and how
 * close scores must be to be picked either way. */
#define TOLERANCE 1e-4
/* What a GPU makes of a model in bf16 is held against the naive computation in the same precision
 * (below), which errs by something of its own for each model: by the roundings, and by picks of
 * these small random models that go the other way and move every logit behind them. So no bound
 * follows on the worst logit; the root mean square error, relative to that of the logits, may be
 * twice the naive one's: the same number of roundings, of which none must fall alike. */
#define BF16_TIMES 2
#define BF16_FLIPS 50 /* one pick in so many may go the other way */

static size_t folders_checked; /* 0: everything was skipped */
static bool states_bf16;       /* recurrent states, of the engine and of what it is held against */

struct bed {
    const struct golden *golden;
    struct chunk_ram ram;
    struct engine *engine;
    struct engine_session *session;
    const int64_t *ids;
    size_t length;
    const int64_t *logit_positions; /* NULL: every position */
    size_t logit_count;
    bool rounded; /* to bf16 */
    double worst_logit, worst_weight, largest, off_squares, squares;
    size_t ties, flips, checked_picks, checked_logits;
};

/* ---- the naive computation in bf16 ----
 * ref, with its matrices, and the inputs of every product with one, rounded to bf16, and all else
 * in fp32: what the CUDA backend says of itself. The linker sends the two functions here. */

static bool naive;
static void *rounded_matrices[512];
static size_t rounded_count;

void __real_ref_linear(const struct ops_tensor *weight, const struct ops_tensor *bias,
                       const float *x, float *out);
void __wrap_ref_linear(const struct ops_tensor *weight, const struct ops_tensor *bias,
                       const float *x, float *out);
const struct ops *__real_ops_ref(void);
const struct ops *__wrap_ops_ref(void);

void __wrap_ref_linear(const struct ops_tensor *weight, const struct ops_tensor *bias,
                       const float *x, float *out)
{
    float *rounded = naive ? malloc((weight->cols + 1) * sizeof *rounded) : NULL;
    assert_true(rounded || !naive);
    for (uint32_t i = 0; naive && i < weight->cols; i++)
        rounded[i] = bf16_to_float(bf16_from_float(x[i]));
    __real_ref_linear(weight, bias, naive ? rounded : x, out);
    free(rounded);
}

static enum status round_matrix(struct ops_context *context, struct ops_tensor *tensor,
                                struct error *err)
{
    (void)context, (void)err;
    if (tensor->rows == 1 || tensor->dtype == OPS_BF16)
        return STATUS_OK;
    const size_t count = (size_t)tensor->rows * tensor->cols;
    uint16_t *rounded = malloc((count + 1) * sizeof *rounded);
    assert_true(rounded && rounded_count < sizeof rounded_matrices / sizeof *rounded_matrices);
    for (size_t i = 0; i < count; i++)
        rounded[i] = bf16_from_float(((const float *)tensor->data)[i]);
    rounded_matrices[rounded_count++] = rounded;
    tensor->data = rounded;
    tensor->dtype = OPS_BF16;
    return STATUS_OK;
}

const struct ops *__wrap_ops_ref(void)
{
    static struct ops table;
    table = *__real_ops_ref();
    if (naive)
        table.place = round_matrix;
    return &table;
}

/* ---- one model against its golden ---- */

/* Index of `position` among the kept logits, or -1. */
static long logit_row(const struct bed *bed, size_t position)
{
    if (!bed->logit_positions)
        return (long)position;
    for (size_t i = 0; i < bed->logit_count; i++)
        if ((size_t)bed->logit_positions[i] == position)
            return (long)i;
    return -1;
}

static void check_logits(struct bed *bed, size_t position)
{
    const long row = logit_row(bed, position);
    if (row < 0)
        return;
    const size_t v = engine_get_info(bed->engine)->config->vocab_size;
    const float *want = golden_floats(bed->golden, "logits", NULL) + (size_t)row * v;
    for (size_t i = 0; i < v; i++) {
        const double off = fabs((double)session_logits(bed->session)[i] - (double)want[i]);
        if (!(off <= bed->worst_logit)) /* a NaN is the worst of all */
            bed->worst_logit = off;
        bed->off_squares += off * off;
        bed->squares += (double)want[i] * (double)want[i];
    }
    bed->checked_logits++;
}

/* The picks of one head at one position against the golden's. */
static void check_head(struct bed *bed, const struct engine_step_item *item, uint32_t group,
                       uint32_t head, const int64_t *chunks, const float *weights, float margin)
{
    const struct model_config *c = engine_get_info(bed->engine)->config;
    const uint32_t own = c->retrieval_heads == 1 ? 0 : head;
    for (uint32_t j = 0; j < c->topk; j++) {
        const struct engine_pick *found = NULL;
        for (uint32_t i = 0; i < item->pick_count && !found; i++)
            if (item->picks[i].group == group && item->picks[i].head == own &&
                item->picks[i].chunk == (uint64_t)chunks[j])
                found = &item->picks[i];
        if (weights[j] == 0)
            continue;
        if (!found && ((double)margin < TOLERANCE || weights[j] < 1e-30f)) {
            bed->ties++;
            return;
        }
        if (!found && bed->rounded) {
            bed->flips++;
            return;
        }
        assert_non_null(found);
        const double off = fabs((double)found->weight - (double)weights[j]);
        if (!(off <= bed->worst_weight))
            bed->worst_weight = off;
        bed->checked_picks++;
    }
}

static void check_picks(struct bed *bed, const struct engine_step_item *item, size_t position)
{
    const struct model_config *c = engine_get_info(bed->engine)->config;
    uint32_t group = 0;
    for (uint32_t layer = 0; layer < c->layer_count; layer++) {
        if (c->layers[layer] != MODEL_LAYER_RETRIEVAL)
            continue;
        char name[64];
        snprintf(name, sizeof name, "layer%u.picks", layer);
        size_t count;
        const int64_t *picks = golden_integers(bed->golden, name, &count);
        snprintf(name, sizeof name, "layer%u.weights", layer);
        const float *weights = golden_floats(bed->golden, name, NULL);
        snprintf(name, sizeof name, "layer%u.margin", layer);
        const float *margins = golden_floats(bed->golden, name, NULL);
        assert_non_null(picks);
        assert_non_null(weights);
        const size_t heads = count / bed->length / c->topk;
        for (uint32_t head = 0; head < heads; head++) {
            const size_t at = position * heads + head;
            check_head(bed, item, group, head, picks + at * c->topk, weights + at * c->topk,
                       margins ? margins[at] : 1);
        }
        group++;
    }
}

/* Runs the whole sequence in slices of at most `longest` tokens, random above one. */
static void run(struct bed *bed, size_t longest, uint64_t seed)
{
    const struct chunk_range range = {.branch = 1, .first = 0};
    struct error err;
    assert_int_equal(engine_session_create(bed->engine, &range, 1, NULL, 0, &bed->session, &err),
                     STATUS_OK);
    size_t at = 0;
    while (at < bed->length) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t n = 1 + (size_t)(seed >> 40) % longest;
        n = n < bed->length - at ? n : bed->length - at;
        int32_t tokens[256];
        for (size_t i = 0; i < n; i++)
            tokens[i] = (int32_t)bed->ids[at + i];
        struct engine_step_item item = {.session = bed->session,
                                        .tokens = tokens,
                                        .token_count = (uint32_t)n,
                                        .want_logits = true,
                                        .want_picks = true};
        assert_int_equal(engine_step(bed->engine, &item, 1), STATUS_OK);
        assert_int_equal(item.status, STATUS_OK);
        chunk_ram_acknowledge(&bed->ram, bed->engine);
        at += n;
        check_logits(bed, at - 1);
        check_picks(bed, &item, at - 1);
    }
    engine_session_forget(bed->session, 0);
    engine_session_destroy(bed->session);
    chunk_ram_cut(&bed->ram, 0);
}

/* Runs a model over its golden's tokens; what it was off by is then in `*bed`. */
static void measure(const char *model, const char *golden_folder, enum engine_backend backend,
                    enum engine_dtype dtype, struct bed *bed)
{
    struct golden golden;
    assert_true(golden_open(golden_folder, &golden));
    *bed = (struct bed){.golden = &golden, .rounded = dtype == ENGINE_DTYPE_BF16 || states_bf16};
    chunk_ram_init(&bed->ram);
    struct engine_options options = {.model_path = model,
                                     .backend = backend,
                                     .host_memory_bytes = (size_t)64 << 20,
                                     .memory_dtype = dtype,
                                     .states_bf16 = states_bf16,
                                     .io = chunk_ram_io(&bed->ram)};
    struct error err = {0};
    const enum status status = engine_open(&options, &bed->engine, &err);
    if (status == STATUS_UNSUPPORTED && backend == ENGINE_BACKEND_CUDA) {
        print_message("SKIPPED: %s\n", err.message);
        golden_close(&golden);
        chunk_ram_close(&bed->ram);
        skip();
    }
    if (status)
        fail_msg("%s", err.message);
    chunk_ram_attach(&bed->ram, bed->engine);
    bed->ids = golden_integers(&golden, "input_ids", &bed->length);
    bed->logit_positions = golden_integers(&golden, "logit_positions", &bed->logit_count);
    size_t count;
    const float *logits = golden_floats(&golden, "logits", &count);
    for (size_t i = 0; i < count; i++)
        bed->largest = fmax(bed->largest, fabs((double)logits[i]));
    run(bed, 1, 1);
    run(bed, 200, 2); /* by the naive computation too: the same rows are compared as often */
    run(bed, 40, 3);
    printf("%s, %s%s: logits within %.1e of the largest (%zu rows), %zu picks, %zu ties, weights "
           "within %.1e\n",
           golden_folder, naive ? "naive bf16, " : "", engine_get_info(bed->engine)->backend,
           bed->worst_logit / bed->largest, bed->checked_logits, bed->checked_picks, bed->ties,
           bed->worst_weight);
    assert_true(bed->checked_logits > 0 && bed->checked_picks > 0);
    engine_close(bed->engine);
    chunk_ram_close(&bed->ram);
    golden_close(&golden);
}

/* What the naive computation with as few bits is off by, of a typical logit. */
static double naive_error(const char *model, const char *golden_folder, enum engine_dtype dtype)
{
    struct bed bed;
    naive = dtype == ENGINE_DTYPE_BF16;
    measure(model, golden_folder, ENGINE_BACKEND_REF, dtype, &bed);
    naive = false;
    while (rounded_count)
        free(rounded_matrices[--rounded_count]);
    printf("  naive: %.1e of a typical logit, %zu picks flipped\n",
           sqrt(bed.off_squares / bed.squares), bed.flips);
    return sqrt(bed.off_squares / bed.squares);
}

static void check_folder(const char *model, const char *golden_folder, enum engine_backend backend,
                         enum engine_dtype dtype)
{
    struct bed bed;
    measure(model, golden_folder, backend, dtype, &bed);
    folders_checked++;
    if (bed.rounded) {
        const double error = sqrt(bed.off_squares / bed.squares);
        printf("  rounded to bf16%s: %.1e of a typical logit, %zu picks flipped\n",
               states_bf16 ? ", states too" : "", error, bed.flips);
        assert_true(error <= BF16_TIMES * naive_error(model, golden_folder, dtype));
        assert_true(bed.flips * BF16_FLIPS <= bed.checked_picks);
    } else {
        assert_true(bed.worst_logit <= TOLERANCE * bed.largest);
        assert_true(bed.worst_weight <= TOLERANCE);
    }
}

static const char *const own[] = {"encoder1-kv1-gqa-bf16",
                                  "encoder2-qknorm-softmax1-prenorm",
                                  "noencoder-kv2-groups2-bias",
                                  "slidewindow-kv4-lmknorm-softmax",
                                  "softmax-singlehead-lmknorm-posdecay",
                                  "wide-stickbreaking-topk8"};
static const char *const published[] = {"encoder1-kv1", "encoder2-groups2-qknorm-softmax1",
                                        "noencoder-kv2", "softmax-singlehead-lmknorm-posdecay"};

static const char *const levels[] = {"portable", "avx2", "avx512"};

static bool small; /* without the shipped model */

static void check_own(enum engine_backend backend, enum engine_dtype dtype)
{
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        char folder[256];
        snprintf(folder, sizeof folder, "tests/golden/%s", own[i]);
        check_folder(folder, folder, backend, dtype);
    }
    if (!small)
        check_folder("engine/models/ramba-20m", "tests/golden/shipped", backend, dtype);
}

static void check_published(enum engine_backend backend)
{
    struct golden golden;
    char folder[512];
    snprintf(folder, sizeof folder, "%s", golden_shared("published/goldens/encoder1-kv1"));
    if (!golden_open(folder, &golden)) {
        print_message("SKIPPED: no published goldens at %s (set RAMBAD_SHARED)\n", folder);
        skip();
    }
    golden_close(&golden);
    for (size_t i = 0; i < sizeof published / sizeof *published; i++) {
        char name[256];
        snprintf(name, sizeof name, "published/goldens/%s", published[i]);
        snprintf(folder, sizeof folder, "%s", golden_shared(name));
        check_folder(folder, folder, backend, ENGINE_DTYPE_FP32);
    }
}

static void ref_matches_the_reference(void **state)
{
    (void)state;
    check_own(ENGINE_BACKEND_REF, ENGINE_DTYPE_FP32);
}

static void ref_matches_the_published_code(void **state)
{
    (void)state;
    check_published(ENGINE_BACKEND_REF);
}

/* Every set of kernels that this processor runs; where one is missing, a lesser one is repeated. */
static void cpu_matches_the_reference(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
        setenv("RAMBAD_CPU", levels[i], 1);
        check_own(ENGINE_BACKEND_CPU, ENGINE_DTYPE_FP32);
    }
    unsetenv("RAMBAD_CPU");
}

static void cpu_matches_the_published_code(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
        setenv("RAMBAD_CPU", levels[i], 1);
        check_published(ENGINE_BACKEND_CPU);
    }
    unsetenv("RAMBAD_CPU");
}

static void cuda_matches_the_reference(void **state)
{
    (void)state;
    check_own(ENGINE_BACKEND_CUDA, ENGINE_DTYPE_FP32);
}

static void cuda_in_bf16_is_near_the_reference(void **state)
{
    (void)state;
    check_own(ENGINE_BACKEND_CUDA, ENGINE_DTYPE_BF16);
}

/* Around the tests of states in bf16: a test may end early. */
static int begin_states_bf16(void **state)
{
    (void)state;
    states_bf16 = true;
    return 0;
}

static int end_states_bf16(void **state)
{
    (void)state;
    states_bf16 = false;
    return 0;
}

static void cpu_with_states_in_bf16_is_near_the_reference(void **state)
{
    (void)state;
    check_own(ENGINE_BACKEND_CPU, ENGINE_DTYPE_FP32);
}

/* CUDA keeps them for states of 64 and 128. */
static void cuda_with_states_in_bf16_is_near_the_reference(void **state)
{
    (void)state;
    const char *folder = "tests/golden/wide-stickbreaking-topk8";
    check_folder(folder, folder, ENGINE_BACKEND_CUDA, ENGINE_DTYPE_BF16);
    if (!small)
        check_folder("engine/models/ramba-20m", "tests/golden/shipped", ENGINE_BACKEND_CUDA,
                     ENGINE_DTYPE_BF16);
}

static void cuda_matches_the_published_code(void **state)
{
    (void)state;
    check_published(ENGINE_BACKEND_CUDA);
}

#define WITH_STATES_BF16(test) \
    cmocka_unit_test_setup_teardown(test, begin_states_bf16, end_states_bf16)

/* `cuda`: the CUDA backend alone; `cuda small`: without the shipped model. */
int main(int argc, char **argv)
{
    const struct CMUnitTest cuda[] = {
        cmocka_unit_test(cuda_matches_the_reference),
        cmocka_unit_test(cuda_in_bf16_is_near_the_reference),
        WITH_STATES_BF16(cuda_with_states_in_bf16_is_near_the_reference),
        cmocka_unit_test(cuda_matches_the_published_code),
    };
    small = argc > 2 && strcmp(argv[2], "small") == 0;
    if (argc > 1 && strcmp(argv[1], "cuda") == 0) {
        const int failed = cmocka_run_group_tests(cuda, NULL, NULL);
        return failed || folders_checked ? failed : 77; /* 77: skipped */
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ref_matches_the_reference),
        cmocka_unit_test(ref_matches_the_published_code),
        cmocka_unit_test(cpu_matches_the_reference),
        cmocka_unit_test(cpu_matches_the_published_code),
        WITH_STATES_BF16(cpu_with_states_in_bf16_is_near_the_reference),
        cmocka_unit_test(cuda_matches_the_reference),
        cmocka_unit_test(cuda_in_bf16_is_near_the_reference),
        WITH_STATES_BF16(cuda_with_states_in_bf16_is_near_the_reference),
        cmocka_unit_test(cuda_matches_the_published_code),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
