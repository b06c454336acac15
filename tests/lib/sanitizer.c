#include "tests/lib/sanitizer.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#if defined(__SANITIZE_THREAD__)
#define RUNTIME "__tsan_init"
#elif defined(__SANITIZE_ADDRESS__)
#define RUNTIME "__asan_init"
#endif

void sanitizer_preload(const char *library)
{
    char names[4096];
    const char *runtime = "";
    assert_non_null(library);
#ifdef RUNTIME
    Dl_info info = {0};
    assert_int_not_equal(dladdr(dlsym(RTLD_DEFAULT, RUNTIME), &info), 0);
    runtime = info.dli_fname;
#endif
    const int size = snprintf(names, sizeof names, "%s:%s", runtime, library);
    assert_true(size > 0 && (size_t)size < sizeof names);
    setenv("LD_PRELOAD", names, 1);
}

void sanitizer_preload_nothing(void)
{
    unsetenv("LD_PRELOAD");
}

void sanitizer_address_option(const char *option)
{
    char options[1024];
    const char *told = getenv("ASAN_OPTIONS");
    snprintf(options, sizeof options, "%s:%s", told ? told : "", option);
    setenv("ASAN_OPTIONS", options, 1);
}
