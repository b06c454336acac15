/* limits.h - every bound in the system, each with its reason.
 * Thread: any (constants). Owns nothing.
 * A bound an operator may move is a default here and a flag in server/config.h. */
#ifndef PROTO_LIMITS_H
#define PROTO_LIMITS_H

#include <stddef.h>
#include <stdint.h>

#define LIMITS_MIB ((size_t)1 << 20)

/* Identifiers: "mem_" and 24 hexadecimal digits, 96 random bits, so they cannot be guessed. */
#define LIMITS_ID_BYTES 40

/* HTTP. */
#define LIMITS_HEADER_BYTES ((size_t)32 << 10)   /* all header fields of one request */
#define LIMITS_URL_BYTES ((size_t)8 << 10)       /* ids and a few query fields */
#define LIMITS_JSON_BODY_BYTES (16 * LIMITS_MIB) /* a JSON body is held whole; text is streamed */
#define LIMITS_OUTPUT_BYTES (1 * LIMITS_MIB)     /* unsent bytes of a reader too slow to keep */
#define LIMITS_ANSWER_BYTES (64 * LIMITS_MIB)    /* an answer that is not streamed is held whole */
#define LIMITS_CONNECTIONS 1024                  /* each costs a few KiB */
#define LIMITS_HEADER_TIMEOUT_S 10               /* a slow header holds a connection */
#define LIMITS_IDLE_TIMEOUT_S 75                 /* above the 60 s of common load balancers */
#define LIMITS_BODY_TIMEOUT_S 30                 /* without one byte of the body arriving */

/* Keys. */
#define LIMITS_KEYS 4096          /* all are looked at for each request, in constant time */
#define LIMITS_WEIGHT 1000        /* of a key's share of the engine */
#define LIMITS_KEY_BYTES_LEAST 16 /* of one that a person chose */

/* Requests. */
#define LIMITS_QUEUE_REQUESTS 256               /* waiting for the engine, then 429 */
#define LIMITS_QUEUE_TOKENS ((uint64_t)4 << 20) /* of prompts that wait, 4 bytes each */
#define LIMITS_RUNNING 32                       /* sequences decoded together */
#define LIMITS_STALL_CPU_MS 250 /* between two tokens, because of what is read in beside them */
#define LIMITS_STALL_GPU_MS 50
#define LIMITS_PRIORITY_S 3600.0     /* that a request may ask to be put off, or ahead */
#define LIMITS_TIMEOUT_S 86400.0     /* that a request may give us */
#define LIMITS_CHOICES 128           /* n and best_of, as the API page says */
#define LIMITS_PROMPTS 128           /* prompts of one completion request */
#define LIMITS_MESSAGES 65536        /* of one chat request; the body's size bounds what they say */
#define LIMITS_CONVERSATION_ITEMS 20 /* added at once, as the API page says */
#define LIMITS_CHAT_TOKENS 4096      /* of an answer for which the request names no bound */
#define LIMITS_STOP_STRINGS 4        /* as the API page says */
#define LIMITS_STOP_BYTES 256 /* a stop string is held back from the stream while it may match */
#define LIMITS_LOGPROBS 20    /* as the API's top_logprobs */
#define LIMITS_ECHO_LOGPROBS                                             \
    ((size_t)1 << 20) /* values echoed with a prompt, tens of bytes each \
                       */
#define LIMITS_LOGIT_BIAS 1024
#define LIMITS_METADATA_PAIRS 16 /* as the API page says, with the two below */
#define LIMITS_METADATA_KEY 64
#define LIMITS_METADATA_VALUE 512

/* Appends: text is tokenised and prefilled block by block, each so many bytes for a token of the
 * engine's slices, which makes it several slices. A commit, at a block's end, writes a snapshot of
 * the same size whatever is new: it comes when the new chunks are so many times as large, or when a
 * crash would cost so much time. */
#define LIMITS_APPEND_BLOCK_RATIO 64u
#define LIMITS_APPEND_BLOCKS_WAITING 4 /* then the socket is no longer read */
#define LIMITS_APPEND_SNAPSHOT_SHARE 4u
#define LIMITS_APPEND_COMMIT_MS ((uint64_t)5000)

/* Storage. */
#define LIMITS_WRITER_QUEUE_BYTES (256 * LIMITS_MIB) /* then STATUS_BUSY: back-pressure */
#define LIMITS_WRITER_QUEUE_ITEMS 65536
#define LIMITS_MAP_BYTES ((size_t)1 << 40) /* address space; the file grows as it is filled */
#define LIMITS_LINGER_MS 250               /* a chunk waits so long for others, or for its commit */
#define LIMITS_LINEAGE 4096                /* forks of forks along one memory */
#define LIMITS_KEEP_SNAPSHOTS 4            /* of a memory's last turns; MiBs each */
#define LIMITS_PREFIX_SNAPSHOTS 16         /* of a conversation without a memory; it can be edited
                                              so far back */
#define LIMITS_PREFIX_TOKENS 64            /* fewer are read again sooner than they are found */
#define LIMITS_PREFIX_BORROWED 262144u     /* marks in others' memories: the 16M tokens last said */
#define LIMITS_RECEIPT_NAME_BYTES 32       /* a SHA-256 */
#define LIMITS_RECEIPT_S 86400             /* an Idempotency-Key is known so long */
#define LIMITS_RECEIPT_KEY_BYTES 255       /* of an Idempotency-Key */
#define LIMITS_RECEIPT_TOKENS 65536        /* of an answer that is kept whole for it */
#define LIMITS_BOOKMARK_BYTES 64           /* a name a person gives */
#define LIMITS_EXPORT_TURNS 65536          /* newest ones that an exported memory takes along */
#define LIMITS_EXPIRES_S 3153600000.0      /* a hundred years, of an expires_after */
#define LIMITS_EXPIRY_SWEEP_MS 5000        /* between two looks for memories that are over */

/* Engine. */
/* Prefill rows of one step. A CPU's activations stay in its cache; a GPU's kernels are long against
 * their launches. */
#define LIMITS_SLICE_TOKENS 256
#define LIMITS_SLICE_TOKENS_GPU 8192
/* A slice that is cut at multiples of this gives the same numbers as a whole one, unless it leaves
 * a rest so short that its rows are computed one by one. */
#define LIMITS_CUT_TOKENS 64
#define LIMITS_CUT_REST 8
#define LIMITS_TOPK 64
#define LIMITS_CHUNK_TOKENS 256

#endif
