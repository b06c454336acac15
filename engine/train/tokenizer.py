"""Byte-level BPE in the Hugging Face tokenizer.json form: training, encoding, decoding.

Plain Python on purpose: the trainer must run where no tokenizer package does. The pre-tokenizer is
GPT-2's pattern. No merge holds a digit, so that a number is always one token a digit: a model this
small copies digits far better than it spells numbers cut at random places.
"""

import collections
import heapq
import json
import os
import re
import unicodedata

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_characters():
    """GPT-2's map of the 256 bytes to printable characters, in byte order."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    extra = iter(range(256, 512))
    return [chr(b) if b in set(printable) else chr(next(extra)) for b in range(256)]


BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {c: b for b, c in enumerate(BYTE_TO_CHAR)}


def number_class():
    """The characters of Unicode category N as the inside of a character class."""
    codes = [c for c in range(0x110000) if unicodedata.category(chr(c)).startswith("N")]
    out, start = [], codes[0]
    for code, following in zip(codes, codes[1:] + [0]):
        if following != code + 1:
            out.append(re.escape(chr(start)) + ("-" + re.escape(chr(code)) if code > start else ""))
            start = following
    return "".join(out)


def pattern():
    """GPT-2's pre-tokenizer pattern in the words of Python's re."""
    n = number_class()
    letter = rf"[^\W_{n}]"
    other = rf"(?:[^\w{SPACE}]|_)"
    return re.compile(
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?[{n}]+| ?{other}+"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    )


def describe(vocab, merges, added):
    """The tokenizer.json of a vocabulary: characters of BYTE_TO_CHAR -> id."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, index in added
        ],
        "normalizer": None,
        "pre_tokenizer": dict(level),
        "post_processor": None,
        "decoder": dict(level),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def byte_tokenizer():
    """A tokenizer of single bytes: id = byte."""
    return describe({c: b for b, c in enumerate(BYTE_TO_CHAR)}, [], [])


def train(texts, vocab_size):
    """The tokenizer.json of `vocab_size` tokens learned from an iterable of texts.

    Incremental: pair counts over the distinct words, a lazy heap of the most frequent pair, and
    for each pair the words it occurs in, so that a merge touches only those.
    """
    split = pattern()
    counts = collections.Counter()
    for text in texts:
        counts.update(split.findall(text))
    words, frequency = [], []
    for word, count in sorted(counts.items()):
        if any(ch.isdigit() for ch in word):
            continue
        words.append([BYTE_TO_CHAR[b] for b in word.encode()])
        frequency.append(count)
    pairs = collections.Counter()
    where = collections.defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += frequency[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    vocab = {text: i for i, text in enumerate(SPECIAL)}
    for ch in sorted(BYTE_TO_CHAR):
        vocab[ch] = len(vocab)
    while len(vocab) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        joined = pair[0] + pair[1]
        merges.append([pair[0], pair[1]])
        vocab[joined] = len(vocab)
        touched = set()
        for index in where.pop(pair):
            word, times = words[index], frequency[index]
            for old in zip(word, word[1:]):
                pairs[old] -= times
                touched.add(old)
            merged, i = [], 0
            while i < len(word):
                if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
                    merged.append(joined)
                    i += 2
                else:
                    merged.append(word[i])
                    i += 1
            words[index] = merged
            for new in zip(merged, merged[1:]):
                pairs[new] += times
                where[new].add(index)
                touched.add(new)
        for changed in touched:
            if pairs[changed] > 0:
                heapq.heappush(heap, (-pairs[changed], changed))
            else:
                pairs.pop(changed, None)
    return describe(vocab, merges, [(text, i) for i, text in enumerate(SPECIAL)])


class Tokenizer:
    def __init__(self, values):
        model = values["model"]
        self.vocab = model["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        self.ranks = {tuple(m): i for i, m in enumerate(merges)}
        self.added = {t["content"]: t["id"] for t in values["added_tokens"]}
        self.names = {i: t for t, i in self.vocab.items()}
        self.split = pattern()
        self.cache = {}
        special = set(self.added.values())  # decoded to nothing
        self.bytes = {
            index: bytes(CHAR_TO_BYTE[c] for c in name)
            for index, name in self.names.items()
            if index not in special
        }
        names = sorted(self.added, key=len, reverse=True)
        self.added_split = (
            re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        )

    @staticmethod
    def load(folder):
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            return Tokenizer(json.load(file))

    @property
    def end(self):
        return self.added[SPECIAL[0]]

    @property
    def size(self):
        return max(max(self.vocab.values()), max(self.added.values(), default=0)) + 1

    def halves(self):
        """{token: the two tokens that it was merged from}"""
        vocab = self.vocab
        return {vocab[a + b]: (vocab[a], vocab[b]) for a, b in reversed(self.ranks)}

    def word(self, text):
        ids = self.cache.get(text)
        if ids is not None:
            return ids
        parts = [BYTE_TO_CHAR[b] for b in text.encode()]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda p: self.ranks.get(p, 1 << 30))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        ids = [self.vocab[p] for p in parts]
        if len(self.cache) < 1 << 20:  # numbers are endless; words are not
            self.cache[text] = ids
        return ids

    def encode(self, text):
        pieces = self.added_split.split(text) if self.added_split else [text]
        out = []
        for piece in pieces:
            if piece in self.added:
                out.append(self.added[piece])
            elif piece:
                for word in self.split.findall(piece):
                    out.extend(self.word(word))
        return out

    def decode(self, ids):
        """Text of ids; special tokens are left out, broken UTF-8 is replaced."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return b"".join([self.bytes.get(index, b"") for index in ids]).decode(errors="replace")


def tokenizer_config():
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write(values, folder):
    """tokenizer.json and tokenizer_config.json, as Hugging Face's tools and the daemon read them."""
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(values, file, ensure_ascii=False)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(tokenizer_config(), file, indent=1)
