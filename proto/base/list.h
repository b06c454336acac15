/* list.h - an intrusive doubly linked list with a sentinel.
 * Thread: whoever owns the list. Owns nothing: nodes live inside their structs.
 * A node is in at most one list; list_remove makes it linkable again. */
#ifndef PROTO_BASE_LIST_H
#define PROTO_BASE_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct list {
    struct list *prev, *next;
};

#define LIST_ENTRY(node, type, member) ((type *)(void *)((char *)(node)-offsetof(type, member)))
/* Iterates; the body must not remove `node`, except with LIST_EACH_SAFE. */
#define LIST_EACH(node, head)                                                                      \
    for (struct list *node = (head)->next; node != (head); node = node->next)
#define LIST_EACH_SAFE(node, head)                                                                 \
    for (struct list *node = (head)->next, *node##_next = node->next; node != (head);              \
         node = node##_next, node##_next = node->next)

static inline void list_init(struct list *list)
{
    list->prev = list->next = list;
}

static inline bool list_empty(const struct list *list)
{
    return list->next == list;
}

static inline void list_push_back(struct list *list, struct list *node)
{
    node->prev = list->prev;
    node->next = list;
    list->prev->next = node;
    list->prev = node;
}

static inline void list_push_front(struct list *list, struct list *node)
{
    list_push_back(list->next, node);
}

static inline void list_remove(struct list *node)
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    list_init(node);
}

/* All of `from` goes behind what is in `list`, in its order and in constant time. */
static inline void list_append_all(struct list *list, struct list *from)
{
    if (list_empty(from))
        return;
    from->next->prev = list->prev;
    from->prev->next = list;
    list->prev->next = from->next;
    list->prev = from->prev;
    list_init(from);
}

/* All of `from` moves to `to`, which need not be initialised. */
static inline void list_take_all(struct list *from, struct list *to)
{
    list_init(to);
    list_append_all(to, from);
}

#endif
