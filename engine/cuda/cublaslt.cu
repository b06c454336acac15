/* cublaslt.cu - matrix products through cuBLASLt, loaded when a device is opened: the daemon starts
 * without the library and then has no CUDA backend. */
#include <cublasLt.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/cuda.h"

#define WORKSPACE_BYTES ((size_t)32 << 20) /* what NVIDIA advises for Hopper */

struct choice { /* what cuBLASLt advised for one shape */
    uint32_t m, n, k;
    bool narrow; /* bf16 out */
    bool known;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_products {
    void *library;
    cublasLtHandle_t handle;
    char *workspace; /* [CUDA_LANES, WORKSPACE_BYTES] */
    struct choice *choices;
    size_t count, capacity;
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtMatmulDescCreate) product_create;
    decltype(&cublasLtMatmulDescDestroy) product_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) product_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) preference_create;
    decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
    decltype(&cublasLtMatmulAlgoGetHeuristic) advise;
    decltype(&cublasLtMatmul) multiply;
};

template <typename F> static void find(struct cuda_products *p, const char *name, F *out, bool *all)
{
    *out = (F)dlsym(p->library, name);
    *all = *all && *out;
}

static bool find_functions(struct cuda_products *p)
{
    bool all = true;
    find(p, "cublasLtCreate", &p->create, &all);
    find(p, "cublasLtDestroy", &p->destroy, &all);
    find(p, "cublasLtMatmulDescCreate", &p->product_create, &all);
    find(p, "cublasLtMatmulDescDestroy", &p->product_destroy, &all);
    find(p, "cublasLtMatmulDescSetAttribute", &p->product_set, &all);
    find(p, "cublasLtMatrixLayoutCreate", &p->layout_create, &all);
    find(p, "cublasLtMatrixLayoutDestroy", &p->layout_destroy, &all);
    find(p, "cublasLtMatmulPreferenceCreate", &p->preference_create, &all);
    find(p, "cublasLtMatmulPreferenceDestroy", &p->preference_destroy, &all);
    find(p, "cublasLtMatmulPreferenceSetAttribute", &p->preference_set, &all);
    find(p, "cublasLtMatmulAlgoGetHeuristic", &p->advise, &all);
    find(p, "cublasLtMatmul", &p->multiply, &all);
    return all;
}

enum status cuda_products_open(struct ops_context *x, struct error *err)
{
    struct cuda_products *p = (struct cuda_products *)calloc(1, sizeof *p);
    x->products = p;
    if (!p)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    char name[32];
    snprintf(name, sizeof name, "libcublasLt.so.%d", CUBLAS_VER_MAJOR);
    p->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!p->library)
        return error_set(err, STATUS_UNSUPPORTED,
                         "%s cannot be loaded: %s; install CUDA %d's cuBLAS or name its folder in "
                         "LD_LIBRARY_PATH",
                         name, dlerror(), CUBLAS_VER_MAJOR);
    if (!find_functions(p))
        return error_set(err, STATUS_UNSUPPORTED, "%s lacks a function that is needed", name);
    const cublasStatus_t status = p->create(&p->handle);
    if (status != CUBLAS_STATUS_SUCCESS)
        return error_set(err, STATUS_UNSUPPORTED, "cuBLASLt cannot start: status %d", (int)status);
    p->workspace = (char *)cuda_take(x, CUDA_LANES * WORKSPACE_BYTES);
    if (!p->workspace)
        return error_set(err, STATUS_NO_MEMORY, "out of GPU memory for cuBLASLt's workspace");
    return STATUS_OK;
}

void cuda_products_close(struct ops_context *x)
{
    struct cuda_products *p = x->products;
    if (!p)
        return;
    if (p->handle)
        p->destroy(p->handle);
    if (p->workspace)
        cudaFree(p->workspace);
    if (p->library)
        dlclose(p->library);
    free(p->choices);
    free(p);
    x->products = NULL;
}

/* Descriptors of one product; all NULL before they are made. cuBLASLt thinks in columns: a
 * row-major [rows, cols] matrix is its [cols, rows] with leading dimension cols. So out^T [n, m] is
 * (w's [k, n], transposed) times (x's [k, m]). */
struct descriptors {
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t w, x, out;
};

static cublasStatus_t describe(const struct cuda_products *p, bool wide, bool narrow, uint32_t n,
                               uint32_t k, uint32_t m, struct descriptors *d)
{
    const cudaDataType_t type = wide ? CUDA_R_32F : CUDA_R_16BF;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cublasStatus_t status = p->product_create(&d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!status)
        status =
            p->product_set(d->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    if (!status)
        status = p->layout_create(&d->w, type, k, n, k);
    if (!status)
        status = p->layout_create(&d->x, type, k, m, k);
    if (!status)
        status = p->layout_create(&d->out, narrow ? CUDA_R_16BF : CUDA_R_32F, n, m, n);
    return status;
}

static void forget(const struct cuda_products *p, struct descriptors *d)
{
    if (d->product)
        p->product_destroy(d->product);
    if (d->w)
        p->layout_destroy(d->w);
    if (d->x)
        p->layout_destroy(d->x);
    if (d->out)
        p->layout_destroy(d->out);
}

/* The alignment that every row of `bytes` bytes has in a buffer aligned to 256. */
static uint32_t row_alignment(size_t bytes)
{
    const size_t low = bytes & (~bytes + 1);
    return low < 256 ? (uint32_t)low : 256;
}

/* What cuBLASLt advises for the shape, asked once; NULL after a failure. Alignments are those of
 * any row, so that the choice depends on nothing but the shape. */
static const struct choice *choose(struct ops_context *x, const struct descriptors *d, bool narrow,
                                   uint32_t n, uint32_t k, uint32_t m)
{
    struct cuda_products *p = x->products;
    for (size_t i = 0; i < p->count; i++)
        if (p->choices[i].m == m && p->choices[i].n == n && p->choices[i].k == k &&
            p->choices[i].narrow == narrow)
            return &p->choices[i];
    if (p->count == p->capacity) {
        const size_t capacity = p->capacity ? 2 * p->capacity : 64;
        struct choice *grown = (struct choice *)realloc(p->choices, capacity * sizeof *grown);
        if (!grown) {
            cuda_fail(x, STATUS_NO_MEMORY, "out of memory for cuBLASLt's choices");
            return NULL;
        }
        p->choices = grown;
        p->capacity = capacity;
    }
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t result;
    memset(&result, 0, sizeof result);
    int found = 0;
    const uint32_t in = row_alignment((size_t)k * (x->wide ? 4 : 2));
    const uint32_t out = row_alignment((size_t)n * (narrow ? 2 : 4));
    cublasStatus_t status = p->preference_create(&preference);
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        uint32_t value;
    } aligned[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 256},
                   {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, in},
                   {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out},
                   {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out}};
    for (size_t i = 0; i < sizeof aligned / sizeof *aligned && !status; i++)
        status = p->preference_set(preference, aligned[i].attribute, &aligned[i].value,
                                   sizeof aligned[i].value);
    const uint64_t workspace = WORKSPACE_BYTES;
    if (!status)
        status = p->preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                   sizeof workspace);
    if (!status)
        status = p->advise(p->handle, d->product, d->w, d->x, d->out, d->out, preference, 1,
                           &result, &found);
    if (preference)
        p->preference_destroy(preference);
    const bool known = !status && found;
    if (status && status != CUBLAS_STATUS_NOT_SUPPORTED) {
        cuda_fail(x, STATUS_INTERNAL,
                  "cuBLASLt failed to plan a product of [%u, %u] and [%u, %u]: status %d", m, k, n,
                  k, (int)status);
        return NULL;
    }
    p->choices[p->count] = (struct choice){m, n, k, narrow, known, result.algo};
    return &p->choices[p->count++];
}

bool cuda_product(struct ops_context *x, const void *w, uint32_t n, uint32_t k, const void *in,
                  uint32_t m, void *out, enum cuda_sum how)
{
    struct cuda_products *p = x->products;
    const bool narrow = how == CUDA_NARROW && !x->wide;
    if (x->failed || !m || !n)
        return true;
    struct descriptors d = {};
    cublasStatus_t status = describe(p, x->wide, narrow, n, k, m, &d);
    const struct choice *choice = status ? NULL : choose(x, &d, narrow, n, k, m);
    const bool known = !choice || choice->known;
    const float one = 1, before = how == CUDA_ADD ? 1 : 0;
    if (choice && known)
        status = p->multiply(p->handle, d.product, &one, w, d.w, in, d.x, &before, out, d.out, out,
                             d.out, &choice->algorithm, p->workspace + x->lane * WORKSPACE_BYTES,
                             WORKSPACE_BYTES, x->stream);
    if (status)
        cuda_fail(x, STATUS_INTERNAL,
                  "cuBLASLt failed in a product of [%u, %u] and [%u, %u]: "
                  "status %d",
                  m, k, n, k, (int)status);
    forget(p, &d);
    return known;
}
