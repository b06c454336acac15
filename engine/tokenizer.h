/* tokenizer.h - byte-level BPE read from a Hugging Face tokenizer.json.
 * Thread: a tokenizer is immutable after open and may be used from any thread at once; a decoder
 * belongs to one thread at a time.
 * Owns its vocabulary, merges and compiled pattern. Any bytes in: invalid UTF-8 is encoded byte by
 * byte and decodes to the same bytes. */
#ifndef ENGINE_TOKENIZER_H
#define ENGINE_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

struct tokenizer;

/* Tokens of one call; grown by tokenizer_encode. Free with tokenizer_tokens_close. */
struct tokenizer_tokens {
    int32_t *ids;
    size_t count, capacity;
};

/* Reads `path` (tokenizer.json). `*out` is set only on STATUS_OK. Refuses by name whatever it does
 * not implement (another model type, normaliser, pre-tokeniser). STATUS_NOT_FOUND, STATUS_INVALID,
 * STATUS_UNSUPPORTED, STATUS_IO. */
STATUS_CHECKED enum status tokenizer_open(const char *path, struct tokenizer **out,
                                          struct error *err);
/* The same from memory; `json` is borrowed. */
STATUS_CHECKED enum status tokenizer_open_memory(const char *json, size_t size,
                                                 struct tokenizer **out, struct error *err);
void tokenizer_close(struct tokenizer *tokenizer);

/* Largest id + 1. */
int32_t tokenizer_vocab_size(const struct tokenizer *tokenizer);
/* Id of a token by its text as written in the file's added tokens ("<|endoftext|>"), or -1. */
int32_t tokenizer_added_id(const struct tokenizer *tokenizer, const char *text);
/* The bytes of one token (not NUL-terminated, may be half a character); borrowed, lives as long as
 * the tokenizer. An id that is not in the vocabulary has size 0. */
const char *tokenizer_bytes(const struct tokenizer *tokenizer, int32_t id, size_t *size);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);

/* Appends the tokens of `text` to `tokens`. Added tokens in the text are recognised only when
 * `parse_special`; a user's document must never be able to forge one. Work is linear in `size`
 * but for one pre-token's own BPE (n log n). */
STATUS_CHECKED enum status tokenizer_encode(const struct tokenizer *tokenizer, const char *text,
                                            size_t size, bool parse_special,
                                            struct tokenizer_tokens *tokens);
void tokenizer_tokens_close(struct tokenizer_tokens *tokens);

/* Where a stream of text may be cut so that encoding the two parts gives the tokens of the whole:
 * the largest such offset in (0, size], or, if the pattern allows none, the last UTF-8 character
 * border, or size. More text is to follow: the end of `text` itself is not taken as a border. */
size_t tokenizer_cut(const struct tokenizer *tokenizer, const char *text, size_t size);

/* Streaming decoder: gives text that never ends inside a UTF-8 character. */
struct tokenizer_decoder {
    char pending[8]; /* bytes of a character not complete yet */
    uint8_t pending_size;
};

void tokenizer_decoder_init(struct tokenizer_decoder *decoder);
/* Feeds one token; appends what is complete now to `out` (struct buf of proto/base/buf.h).
 * Bytes that can never become a character are replaced by U+FFFD, as Hugging Face does. Special
 * tokens give no text unless `keep_special`. */
struct buf;
void tokenizer_decode(const struct tokenizer *tokenizer, struct tokenizer_decoder *decoder,
                      int32_t id, bool keep_special, struct buf *out);
/* At the end of a stream: an incomplete character becomes U+FFFD. */
void tokenizer_decode_end(struct tokenizer_decoder *decoder, struct buf *out);

#endif
