"""Byte-level BPE trainer and encoder, plain Python, no dependencies."""
import collections, heapq, json, re, sys

def byte_alphabet():
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    chars, extra = keep[:], 0
    table = {}
    for b in range(256):
        if b in keep: table[b] = chr(b)
        else:
            table[b] = chr(256 + extra); extra += 1
    return table
B2C = byte_alphabet(); C2B = {c: b for b, c in B2C.items()}
# GPT-2's pattern in terms of `re` (no \p classes): letters = [^\W\d_], numbers = \d
PATTERN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

def train(texts, vocab_size, specials):
    words = collections.Counter()
    for text in texts: words.update(PATTERN.findall(text))
    seqs, counts = [], []
    for w, n in words.items():
        s = [B2C[b] for b in w.encode()]
        if len(s) > 1 and not any(c.isdigit() for c in w): seqs.append(s); counts.append(n)
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, s in enumerate(seqs):
        for p in zip(s, s[1:]): pairs[p] += counts[i]; where[p].add(i)
    heap = [(-n, p) for p, n in pairs.items()]; heapq.heapify(heap)
    vocab = sorted(C2B); merges = []
    while len(vocab) + len(specials) < vocab_size and heap:
        n, p = heapq.heappop(heap)
        if pairs.get(p, 0) != -n or n == 0: continue
        merges.append(p); new = p[0] + p[1]; vocab.append(new)
        changed = set()
        for i in list(where.pop(p)):
            s, c = seqs[i], counts[i]
            for q in zip(s, s[1:]): pairs[q] -= c; changed.add(q)
            out, j = [], 0
            while j < len(s):
                if j + 1 < len(s) and s[j] == p[0] and s[j+1] == p[1]: out.append(new); j += 2
                else: out.append(s[j]); j += 1
            seqs[i] = out
            for q in zip(out, out[1:]): pairs[q] += c; where[q].add(i); changed.add(q)
        pairs.pop(p, None); changed.discard(p)
        for q in changed:
            if pairs[q] > 0: heapq.heappush(heap, (-pairs[q], q))
    return vocab, merges

def tokenizer_json(vocab, merges, specials):
    ids = {t: i for i, t in enumerate(vocab)}
    added = []
    for s in specials:
        added.append({"id": len(ids) + len(added), "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True})
    for a in added: ids[a["content"]] = a["id"]
    bl = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": bl, "post_processor": None, "decoder": bl,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": ids, "merges": [f"{a} {b}" for a, b in merges]}}

class Tokenizer:
    def __init__(self, path):
        d = json.load(open(path)); m = d["model"]
        self.vocab = m["vocab"]; self.rank = {}
        for i, p in enumerate(m["merges"]):
            a, b = p.split(" ") if isinstance(p, str) else p
            self.rank[(a, b)] = i
        self.specials = {a["content"]: a["id"] for a in d["added_tokens"]}
        self.names = {i: t for t, i in self.vocab.items()}; self.cache = {}
    def word(self, w):
        got = self.cache.get(w)
        if got is not None: return got
        s = [B2C[b] for b in w.encode()]
        while len(s) > 1:
            best = min(zip(s, s[1:]), key=lambda p: self.rank.get(p, 1 << 30))
            if best not in self.rank: break
            out, j = [], 0
            while j < len(s):
                if j + 1 < len(s) and (s[j], s[j+1]) == best: out.append(s[j] + s[j+1]); j += 2
                else: out.append(s[j]); j += 1
            s = out
        got = [self.vocab[t] for t in s]
        if len(self.cache) < 500000: self.cache[w] = got
        return got
    def encode(self, text):
        out = []
        for w in PATTERN.findall(text): out += self.word(w)
        return out
    def decode(self, ids):
        b = bytearray()
        for i in ids:
            t = self.names[int(i)]
            if t in self.specials: b += t.encode()
            else: b += bytes(C2B[c] for c in t)
        return b.decode("utf-8", "replace")
