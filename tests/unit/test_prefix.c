/* The index of prefixes against a plain list of everything that was ever said: what it finds, what
 * goes when there is too much, and that keys never meet. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/prefix.h"

#define CHUNK 8
#define LONGEST 64
#define SAID 400
#define SEED 20261124u

struct said { /* one entry, as a plain list knows it */
    struct prefix_entry *entry;
    char tenant[8];
    int32_t tokens[LONGEST];
    size_t begin, count;
    bool snapshots[LONGEST + 1];
};

static struct said said[SAID];
static size_t said_count;
static uint64_t random_state = SEED;

static uint32_t draw(uint32_t below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % below;
}

/* Two tokens, so that beginnings are shared often. */
static size_t draw_tokens(int32_t *tokens)
{
    const size_t count = 1 + draw(LONGEST);
    for (size_t i = 0; i < count; i++)
        tokens[i] = draw(12) == 0;
    return count;
}

static size_t shared(const int32_t *a, size_t a_count, const int32_t *b, size_t b_count)
{
    size_t n = 0;
    while (n < a_count && n < b_count && a[n] == b[n])
        n++;
    return n;
}

static void expect(const char *tenant, const int32_t *tokens, size_t count, uint64_t *position,
                   uint64_t *border)
{
    *position = *border = 0;
    for (size_t k = 0; k < said_count; k++) {
        const struct said *s = &said[k];
        if (!s->entry || s->entry->doomed || strcmp(s->tenant, tenant) != 0)
            continue;
        const size_t n = shared(s->tokens, s->count, tokens, count);
        for (size_t at = s->begin + 1; at <= n; at++) {
            if (s->snapshots[at] && at > *position)
                *position = at;
            if ((s->snapshots[at] || at % CHUNK == 0) && at > *border)
                *border = at;
        }
    }
}

static void look_up(struct prefix *prefix, const char *tenant, const int32_t *tokens, size_t count,
                    struct prefix_hit *hit)
{
    uint64_t position, border;
    prefix_find(prefix, tenant, tokens, count, hit);
    expect(tenant, tokens, count, &position, &border);
    assert_int_equal(hit->position, position);
    assert_int_equal(hit->border, border);
    assert_true((hit->entry != NULL) == (position > 0));
    if (!hit->entry)
        return;
    assert_string_equal(hit->entry->tenant, tenant);
    uint64_t hash = prefix_seed(prefix, tenant);
    for (uint64_t i = 0; i < hit->position; i++)
        hash = prefix_chain(hash, tokens[i]);
    assert_true(hash == hit->hash && prefix_has(prefix, tenant, hash, hit->position));
}

/* What was said goes into the index from where it was found, in pieces. */
static void keep(struct prefix *prefix, const char *tenant, const int32_t *tokens, size_t count,
                 const struct prefix_hit *hit)
{
    struct said *s = &said[said_count];
    char id[16];
    snprintf(id, sizeof id, "prefix_%zu", said_count++);
    *s = (struct said){.begin = hit->position, .count = count};
    snprintf(s->tenant, sizeof s->tenant, "%s", tenant);
    memcpy(s->tokens, tokens, count * sizeof *tokens);
    s->entry = prefix_add(prefix, id, tenant, hit->entry, hit->position,
                          hit->entry ? hit->hash : prefix_seed(prefix, tenant));
    assert_non_null(s->entry);
    for (size_t at = hit->position; at < count;) {
        const size_t n = 1 + draw((uint32_t)(count - at));
        prefix_advance(prefix, s->entry, tokens + at, n, true);
        at += n;
        s->snapshots[at] = true;
        assert_int_equal(s->entry->position, at);
    }
    prefix_set_bytes(prefix, s->entry, 10);
}

static void forget_some(struct prefix *prefix, struct said *s)
{
    uint64_t positions[LONGEST];
    size_t kept = 0;
    for (size_t at = 0; at <= s->count; at++) {
        s->snapshots[at] = s->snapshots[at] && draw(2);
        if (s->snapshots[at])
            positions[kept++] = at;
    }
    prefix_keep(prefix, s->entry, positions, kept);
}

static void test_model(void **state)
{
    (void)state;
    static const char *const tenants[] = {"", "ann", "bob"};
    struct prefix *prefix;
    assert_int_equal(prefix_create(CHUNK, 1 << 20, &prefix), STATUS_OK);
    print_message("seed %u\n", SEED);
    for (int i = 0; i < 4000; i++) {
        int32_t tokens[LONGEST];
        const size_t count = draw_tokens(tokens);
        const char *tenant = tenants[draw(3)];
        struct prefix_hit hit;
        look_up(prefix, tenant, tokens, count, &hit);
        if (said_count < SAID && draw(4) == 0 && hit.position < count)
            keep(prefix, tenant, tokens, count, &hit);
        if (!said_count || draw(20))
            continue;
        struct said *s = &said[draw((uint32_t)said_count)];
        if (s->entry && draw(3) == 0) {
            prefix_doom(prefix, s->entry);
        } else if (s->entry && draw(2)) {
            forget_some(prefix, s);
        } else if (s->entry) {
            prefix_remove(prefix, s->entry);
            s->entry = NULL;
        }
    }
    assert_int_equal(said_count, SAID);
    prefix_destroy(prefix);
}

static struct prefix_entry *add(struct prefix *prefix, const char *id, struct prefix_entry *parent)
{
    struct prefix_entry *entry = prefix_add(prefix, id, "", parent, 0, prefix_seed(prefix, ""));
    assert_non_null(entry);
    prefix_set_bytes(prefix, entry, 100);
    return entry;
}

/* The least recently used go first, never one in use, nor one that others stand on. */
static void test_victims(void **state)
{
    (void)state;
    struct prefix *prefix;
    assert_int_equal(prefix_create(CHUNK, 400, &prefix), STATUS_OK);
    struct prefix_entry *a = add(prefix, "a", NULL), *b = add(prefix, "b", a),
                        *c = add(prefix, "c", NULL), *d = add(prefix, "d", NULL);
    assert_null(prefix_victim(prefix));
    struct prefix_entry *e = add(prefix, "e", NULL);
    assert_int_equal(prefix_bytes(prefix), 500);
    assert_int_equal(prefix_entries(prefix), 5);
    assert_ptr_equal(prefix_victim(prefix), b);
    b->users = 1;
    assert_ptr_equal(prefix_victim(prefix), c);
    c->pending = 1;
    assert_ptr_equal(prefix_victim(prefix), d);
    b->users = c->pending = 0;
    prefix_touch(prefix, b);
    assert_ptr_equal(prefix_victim(prefix), c);
    prefix_remove(prefix, c);
    assert_null(prefix_victim(prefix));
    prefix_doom(prefix, e);
    assert_ptr_equal(prefix_victim(prefix), e);
    prefix_remove(prefix, e);
    /* A full disk: half of it, and then as much as before. */
    prefix_shrink(prefix);
    assert_ptr_equal(prefix_victim(prefix), d);
    prefix_remove(prefix, d);
    assert_ptr_equal(prefix_victim(prefix), b);
    prefix_remove(prefix, b);
    assert_null(prefix_victim(prefix));
    add(prefix, "f", NULL);
    assert_null(prefix_victim(prefix));
    /* What is left of a lineage when its beginning is damaged. */
    struct prefix_entry *g = add(prefix, "g", a);
    prefix_remove(prefix, a);
    assert_null(g->parent);
    prefix_destroy(prefix);
}

/* One that others stand on stays, and gives up its older places sooner than they go. */
static void test_parents(void **state)
{
    (void)state;
    struct prefix *prefix;
    const int32_t token = 7;
    assert_int_equal(prefix_create(CHUNK, 250, &prefix), STATUS_OK);
    struct prefix_entry *parent = add(prefix, "parent", NULL);
    for (int i = 0; i < 3; i++)
        prefix_advance(prefix, parent, &token, 1, true);
    struct prefix_entry *child = add(prefix, "child", parent);
    prefix_advance(prefix, child, &token, 1, true);
    prefix_advance(prefix, child, &token, 1, true);
    prefix_touch(prefix, child);
    assert_null(prefix_victim(prefix)); /* there is room */
    prefix_set_bytes(prefix, parent, 300);
    for (uint64_t oldest = 1; oldest < 3; oldest++) {
        const uint64_t rest[] = {oldest + 1, 3};
        assert_ptr_equal(prefix_victim(prefix), parent);
        assert_int_equal(prefix_spare(prefix, parent), oldest);
        prefix_keep(prefix, parent, rest, 2);
    }
    assert_int_equal(prefix_spare(prefix, parent), 0); /* its last one it keeps */
    assert_ptr_equal(prefix_victim(prefix), child);
    assert_int_equal(prefix_spare(prefix, child), 1);
    prefix_destroy(prefix);
}

/* An entry that says one token so often, in a memory of somebody's own. */
static struct prefix_entry *borrow(struct prefix *prefix, const char *id, int32_t token,
                                   size_t count)
{
    struct prefix_entry *entry = prefix_borrow(prefix, id, "", 0, prefix_seed(prefix, ""));
    assert_non_null(entry);
    for (size_t i = 0; i < count; i++)
        prefix_advance(prefix, entry, &token, 1, i + 1 == count);
    return entry;
}

/* Memories of others: found, never written on; they go for their own number alone, the oldest
 * first.
 */
static void test_borrowed(void **state)
{
    (void)state;
    struct prefix *prefix;
    struct prefix_hit hit;
    const int32_t tokens[CHUNK + 1] = {7, 7, 7, 7, 7, 7, 7, 7, 7};
    assert_int_equal(prefix_create(CHUNK, 100, &prefix), STATUS_OK);
    struct prefix_entry *a = borrow(prefix, "a", 7, CHUNK);
    prefix_find(prefix, "", tokens, CHUNK + 1, &hit);
    assert_ptr_equal(hit.entry, a);
    assert_int_equal(hit.position, CHUNK);
    assert_false(prefix_is_free_end(a, CHUNK));
    /* One of ours at the same place can be written on. */
    struct prefix_entry *b = add(prefix, "b", NULL);
    for (size_t i = 0; i < CHUNK; i++)
        prefix_advance(prefix, b, tokens, 1, i + 1 == CHUNK);
    prefix_find(prefix, "", tokens, CHUNK + 1, &hit);
    assert_ptr_equal(hit.entry, b);
    assert_true(prefix_is_free_end(b, CHUNK));
    /* Too many bytes are none of theirs, too many marks are. */
    struct prefix_entry *c = add(prefix, "c", NULL);
    assert_ptr_equal(prefix_victim(prefix), b);
    prefix_remove(prefix, b);
    assert_null(prefix_victim(prefix));
    struct prefix_entry *d = borrow(prefix, "d", 8, (size_t)CHUNK * LIMITS_PREFIX_BORROWED);
    assert_ptr_equal(prefix_victim(prefix), a);
    prefix_touch(prefix, a);
    assert_ptr_equal(prefix_victim(prefix), d);
    prefix_remove(prefix, d);
    assert_null(prefix_victim(prefix));
    assert_false(c->doomed || a->doomed);
    prefix_destroy(prefix);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_model), cmocka_unit_test(test_victims),
                                       cmocka_unit_test(test_parents),
                                       cmocka_unit_test(test_borrowed)};
    return cmocka_run_group_tests_name("prefix", tests, NULL, NULL);
}
