/* API keys: the hash against published vectors, the file's lines, who is let in. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "proto/base/sha256.h"
#include "server/auth.h"

/* sha256("abc"): a key that is three characters short of secret, for the file alone. */
#define ABC "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
#define EMPTY "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

static char path[32];
static struct error err;

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    fclose(file);
}

static int make_file(void **state)
{
    (void)state;
    strcpy(path, "/tmp/rambad-keys-XXXXXX");
    const int fd = mkstemp(path);
    err = (struct error){0};
    return fd < 0 ? -1 : close(fd);
}

static int remove_file(void **state)
{
    (void)state;
    return unlink(path);
}

static void assert_hash(const char *data, size_t size, const char *hex)
{
    unsigned char hash[SHA256_BYTES];
    char text[2 * SHA256_BYTES + 1];
    sha256(data, size, hash);
    for (size_t i = 0; i < SHA256_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", hash[i]);
    assert_string_equal(text, hex);
}

/* The examples of FIPS 180-4, and lengths about the border of a block. */
static void test_sha256(void **state)
{
    (void)state;
    char *million = malloc(1000000);
    assert_non_null(million);
    memset(million, 'a', 1000000);
    assert_hash("", 0, EMPTY + 7);
    assert_hash("abc", 3, ABC + 7);
    assert_hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56,
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    assert_hash(million, 1000000,
                "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    assert_hash(million, 55, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318");
    assert_hash(million, 64, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
    free(million);
}

static void test_check(void **state)
{
    (void)state;
    struct auth *auth;
    char name[LIMITS_ID_BYTES];
    write_file("# who may\n\nann " ABC " # until May\n  bob\t" EMPTY "\n");
    assert_int_equal(auth_open(path, "a key of one's own", &auth, &err), STATUS_OK);
    assert_true(auth_is_required(auth));
    assert_true(auth_check(auth, "Bearer abc", name));
    assert_string_equal(name, "ann");
    assert_true(auth_check(auth, "bearer  abc ", name));
    assert_true(auth_check(auth, "Bearer a key of one's own", name));
    assert_string_equal(name, "environment");
    static const char *const wrong[] = {"",          "Bearer", "Bearer abd",  "Bearer abc d",
                                        "Basic abc", "abc",    "Bearer " ABC, "Bearerabc",
                                        "Bearer ann"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (auth_check(auth, wrong[i], name))
            fail_msg("%s was let in", wrong[i]);
    assert_int_equal(auth_weight(auth, "ann"), 1);
    write_file("ann " EMPTY "\nann " EMPTY " weight=7\nbob " ABC " weight=1000 # much\n");
    assert_int_equal(auth_reload(auth, &err), STATUS_OK);
    assert_int_equal(auth_weight(auth, "ann"), 7);
    assert_int_equal(auth_weight(auth, "bob"), 1000);
    assert_int_equal(auth_weight(auth, "environment"), 1);
    static const char *const no_weights[] = {"weight=0",  "weight=1001", "weight=",    "weight=x",
                                             "weight=1x", "weight=-1",   "weight=1 1", "1"};
    for (size_t i = 0; i < sizeof no_weights / sizeof *no_weights; i++) {
        char line[256];
        snprintf(line, sizeof line, "ann " EMPTY " %s\n", no_weights[i]);
        write_file(line);
        assert_int_equal(auth_reload(auth, &err), STATUS_INVALID);
    }
    write_file("ann " EMPTY "\n");
    assert_int_equal(auth_reload(auth, &err), STATUS_OK);
    assert_false(auth_check(auth, "Bearer abc", name));
    assert_true(auth_check(auth, "Bearer a key of one's own", name));
    write_file("ann " ABC "\nbob\n"); /* what is wrong changes nothing */
    assert_int_equal(auth_reload(auth, &err), STATUS_INVALID);
    assert_non_null(strstr(err.message, "line 2"));
    assert_false(auth_check(auth, "Bearer abc", name));
    auth_close(auth);
}

static void test_refusals(void **state)
{
    (void)state;
    struct auth *auth;
    static const char *const files[] = {"",
                                        "# nobody\n",
                                        "ann\n",
                                        "ann abc\n",
                                        "ann " ABC "0\n",
                                        "ann " ABC " " ABC "\n",
                                        "a/b " ABC "\n",
                                        "a-name-of-forty-characters-is-one-too-lon " ABC "\n",
                                        "ann sha256:BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A"
                                        "9CB410FF61F20015AD\n"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        write_file(files[i]);
        if (auth_open(path, NULL, &auth, &err) != STATUS_INVALID)
            fail_msg("taken: %s", files[i]);
    }
    assert_int_equal(auth_open("/nowhere/keys", NULL, &auth, &err), STATUS_NOT_FOUND);
    assert_int_equal(auth_open("/tmp", NULL, &auth, &err), STATUS_IO);
    assert_int_equal(auth_open("", "too short", &auth, &err), STATUS_INVALID);
    assert_int_equal(auth_open("", NULL, &auth, &err), STATUS_OK);
    assert_false(auth_is_required(auth));
    auth_close(auth);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_file, remove_file)
    const struct CMUnitTest tests[] = {TEST(test_sha256), TEST(test_check), TEST(test_refusals)};
    return cmocka_run_group_tests_name("auth", tests, NULL, NULL);
}
