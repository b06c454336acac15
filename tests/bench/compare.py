#!/usr/bin/env python3
"""HSA forward and retrieval of engine/cuda alone, against the authors' Triton kernel and PyTorch.

    tests/bench/compare.py LIBRARY [--triton PATH/TO/hsa_triton.py] [--csv FILE] [--tokens N...]

LIBRARY is libbench_kernels.so of the build (tests/bench/kernels.cu). The Triton kernel is
ops/hsa_triton.py of github.com/RamstorageAI/long-context-modeling; without it its rows are left
out. Needs a GPU, torch and triton.

One layer of the 370M shape over the whole of a prompt: 16 query heads of 64, one kv head, chunks of
64, 8 picks, retrieval width 1024. Picks are visible chunks, newest first, the same for both
kernels: once random ones, of which neighbouring tokens share few, and once as the shipped model
picks on a book, where most stay from token to token (make_text_picks); weights are random, and 0
where fewer chunks are visible. Retrieval is timed for a slice of a prompt of a million tokens, too.
Times are medians (triton.testing.do_bench); each result is checked first: some rows against plain
PyTorch in fp32, and attention of all rows against that of few rows at a time, which has a kernel of
its own and must give the same bits.
The published code has no kernel for retrieval: its formula in PyTorch (a product, a mask, topk,
sort) stands for it. Full attention is torch's scaled_dot_product_attention, causal, on as many
tokens. Ours reads queries and writes outputs in fp32, as between the ops of the engine; the Triton
kernel in bf16.
"""

import argparse
import csv
import ctypes
import importlib.util
import math
import random
import sys

import torch
import triton

HEADS, HEAD_DIM, CHUNK, TOPK = 16, 64, 64, 8
WIDTH = HEADS * HEAD_DIM
BLOCK = 256  # landmarks of a block of the engine's memory
FEW = 256  # rows that are attended without looking at their neighbours
SLICE, LONG = 4096, 1 << 20  # rows of a slice, and the tokens of its prompt


def load_library(path):
    lib = ctypes.CDLL(path)
    u32, u64, ptr = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    lib.bench_kernels_open.restype = ptr
    lib.bench_kernels_open.argtypes = [ptr, u32, u32, u32, u32, u32]
    lib.bench_kernels_attend.argtypes = [ptr, u32, ptr, ptr, ptr, ptr]
    lib.bench_kernels_segment.restype = ptr
    lib.bench_kernels_segment.argtypes = [u64, u32, u64, ptr]
    lib.bench_kernels_room.restype = ctypes.c_size_t
    lib.bench_kernels_room.argtypes = [ptr, u32, u64]
    lib.bench_kernels_retrieve.argtypes = [ptr, ptr, u32, u64, ptr, ptr, ptr, ptr]
    return lib


def load_module(path):
    spec = importlib.util.spec_from_file_location("hsa_triton", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def must(status):
    if status:
        sys.exit(f"a kernel failed with status {status}")


def median(work):
    return triton.testing.do_bench(work, warmup=20, rep=80, return_mode="median")


def make_picks(tokens):
    """[tokens, TOPK] chunks, newest first, and weights."""
    seen = torch.arange(tokens, device="cuda") // CHUNK
    chunks = tokens // CHUNK
    keys = torch.rand(tokens, chunks, device="cuda")
    keys.masked_fill_(torch.arange(chunks, device="cuda") >= seen[:, None], -1)
    best, picks = keys.topk(TOPK, dim=1)
    picks = picks.masked_fill(best < 0, -1).sort(dim=1, descending=True).values
    weights = torch.rand(tokens, TOPK, device="cuda") * (picks >= 0) / TOPK
    return picks, weights


def make_text_picks(tokens):
    """The same as on text. On a book of 191,000 tokens the shipped model keeps 6.5 to 7.2 picks of 8
    from a token to the next; 16 tokens in a row read 12 to 16 chunks, 1,024 read 22 to 36. Here
    picks are drawn anew with probability 0.16 from a pool of 16 chunks, of which one in 64 tokens
    makes way for another."""
    draw = random.Random(tokens)
    pool, held, picks = [], [], torch.full((tokens, TOPK), -1)
    for t in range(tokens):
        seen = t // CHUNK
        if len(pool) < min(16, seen):
            pool.append(seen - 1)
        elif seen > 16 and draw.random() < 1 / 64:
            fresh = draw.randrange(seen)
            if fresh not in pool:
                gone = draw.randrange(16)
                held = [c for c in held if c != pool[gone]]
                pool[gone] = fresh
        held = [c for c in held if draw.random() > 0.16]
        others = [c for c in pool if c not in held]
        held += draw.sample(others, min(TOPK - len(held), len(others)))
        if held:
            picks[t, :len(held)] = torch.tensor(sorted(held, reverse=True))
    picks = picks.cuda()
    return picks, torch.rand(tokens, TOPK, device="cuda") * (picks >= 0) / TOPK


def hsa_rows(rows, q, keys, values, picks, weights):
    """Plain fp32 attention of some rows."""
    k, v = keys[picks[rows].clamp(min=0)].float(), values[picks[rows].clamp(min=0)].float()
    scores = torch.einsum("rhd,rjtd->rjht", q[rows].float(), k) / math.sqrt(HEAD_DIM)
    out = torch.einsum("rjht,rjtd->rjhd", scores.softmax(dim=-1), v)
    return (out * weights[rows][:, :, None, None]).sum(dim=1)


def error(got, want):
    off = ((got.float() - want).norm() / want.norm()).item()
    if not off < 0.02:
        sys.exit(f"wrong by {off:.1e} of the norm")
    return off


class Attention:
    def __init__(self, lib, context, tokens, make=make_picks):
        self.lib, self.context, self.tokens = lib, context, tokens
        chunks = tokens // CHUNK
        self.pages = torch.randn(chunks, 2, CHUNK, HEAD_DIM, device="cuda").bfloat16()
        self.q = torch.randn(tokens, HEADS, HEAD_DIM, device="cuda").bfloat16()
        self.wide = self.q.float()
        self.picks, self.weights = make(tokens)
        bytes_of_page = 2 * CHUNK * HEAD_DIM * 2
        at = self.pages.data_ptr() + self.picks * bytes_of_page
        self.addresses = at.masked_fill(self.picks < 0, 0)
        self.out = torch.full_like(self.wide, float("nan"))
        rows = torch.randint(CHUNK, tokens, (64,), device="cuda")
        rows[0], rows[1] = tokens - 1, CHUNK
        self.rows = rows
        self.want = hsa_rows(rows, self.q, self.pages[:, 0], self.pages[:, 1], self.picks,
                             self.weights)

    def attend(self, first, count, out):
        must(self.lib.bench_kernels_attend(
            self.context, count, self.wide[first].data_ptr(), self.weights[first].data_ptr(),
            self.addresses[first].data_ptr(), out[first].data_ptr()))

    def ours(self):
        self.attend(0, self.tokens, self.out)

    def check_ours(self):
        self.ours()
        if torch.isnan(self.out).any():
            sys.exit("an output was not written")
        alone = torch.full_like(self.out, float("nan"))
        for first in range(0, self.tokens, FEW):
            self.attend(first, min(FEW, self.tokens - first), alone)
        if not torch.equal(alone, self.out):
            sys.exit("rows in groups and few rows at a time have different bits")
        return error(self.out[self.rows], self.want)

    def prepare_triton(self, module):
        n = self.tokens
        self.kernel = module._attn_fwd
        self.k = self.pages[:, 0].reshape(1, n, 1, HEAD_DIM).contiguous()
        self.v = self.pages[:, 1].reshape(1, n, 1, HEAD_DIM).contiguous()
        self.indices = self.picks.clamp(min=0).reshape(1, n, 1, TOPK).contiguous()
        self.shares = self.weights.reshape(1, n, 1, TOPK).contiguous()
        self.narrow = self.q.reshape(1, n, HEADS, HEAD_DIM)
        self.m = torch.empty(1, TOPK, n, HEADS, device="cuda")
        self.triton_out = torch.full_like(self.narrow, float("nan"))

    def triton(self):
        """As the published forward calls it, without its checks and allocations."""
        q, k, v, o, w, i, m = (self.narrow, self.k, self.v, self.triton_out, self.shares,
                               self.indices, self.m)
        self.kernel[(self.tokens, 1, 1)](
            q, k, v, w, i, 1 / math.sqrt(HEAD_DIM), 0.0, m, o, *q.stride(), *k.stride(),
            *v.stride(), *o.stride(), *w.stride(), *i.stride(), *m.stride(), self.tokens,
            self.tokens, HEADS, TOPK, HEAD_DIM, 1, CHUNK, 1)

    def check_triton(self):
        self.triton()
        return error(self.triton_out[0][self.rows], self.want)

    def full(self):
        q = self.q.transpose(0, 1)[None]
        if not hasattr(self, "full_k"):
            self.full_k = torch.randn(1, 1, self.tokens, HEAD_DIM, device="cuda").bfloat16()
            self.full_v = torch.randn_like(self.full_k)
            self.full_q = q.contiguous()
        torch.nn.functional.scaled_dot_product_attention(
            self.full_q, self.full_k, self.full_v, is_causal=True, enable_gqa=True)


class Retrieval:
    """The last `count` of `tokens`."""

    def __init__(self, lib, context, tokens, count):
        self.lib, self.context, self.count, self.first = lib, context, count, tokens - count
        self.chunks = tokens // CHUNK
        blocks = (self.chunks + BLOCK - 1) // BLOCK
        self.marks = torch.zeros(blocks * BLOCK, WIDTH, device="cuda").bfloat16()
        self.marks[:self.chunks] = torch.randn(self.chunks, WIDTH, device="cuda").bfloat16()
        self.table = (self.marks.data_ptr() +
                      torch.arange(blocks, device="cuda") * BLOCK * WIDTH * 2)
        self.q = (torch.randn(count, WIDTH, device="cuda") / math.sqrt(WIDTH)).bfloat16()
        self.seen = (tokens - 1) // CHUNK
        self.segment = self.segment_of(0, count)
        room = max(lib.bench_kernels_room(context, n, self.seen) for n in (count, FEW))
        self.candidates = torch.empty(room, device="cuda", dtype=torch.int64)
        self.picked = torch.full((count, TOPK), -1, device="cuda", dtype=torch.int64)
        self.weights = torch.full((count, TOPK), float("nan"), device="cuda")

    def segment_of(self, first, count):
        return self.lib.bench_kernels_segment(self.first + first, count, self.chunks,
                                              self.table.data_ptr())

    def retrieve(self, segment, count, q, picked, weights):
        must(self.lib.bench_kernels_retrieve(
            self.context, segment, count, self.seen, q.data_ptr(), self.candidates.data_ptr(),
            picked.data_ptr(), weights.data_ptr()))

    def ours(self):
        self.retrieve(self.segment, self.count, self.q, self.picked, self.weights)

    def check_part(self, first, count):
        """Rows that are a segment of their own, scanned in more parts, get the same."""
        rows = slice(first, first + count)
        picked, weights = torch.empty_like(self.picked[rows]), torch.empty_like(self.weights[rows])
        self.retrieve(self.segment_of(first, count), count, self.q[rows], picked, weights)
        if not (torch.equal(picked, self.picked[rows]) and
                torch.equal(weights, self.weights[rows])):
            sys.exit("some rows alone have other picks or weights")

    def check_ours(self):
        """The worst that a pick's score lies below the K-th best one."""
        self.ours()
        if torch.isnan(self.weights).any():
            sys.exit("a weight was not written")
        self.check_part(self.count // 2, FEW)
        rows = torch.randint(max(TOPK * CHUNK - self.first, 0), self.count, (64,), device="cuda")
        scores = self.q[rows].float() @ self.marks[:self.chunks].float().T
        visible = (self.first + rows) // CHUNK
        hidden = torch.arange(self.chunks, device="cuda") >= visible[:, None]
        scores.masked_fill_(hidden, float("-inf"))
        least = scores.topk(TOPK, dim=1).values[:, -1:]
        gap = (least - scores.gather(1, self.picked[rows])).max().item()
        if not gap < 1e-3:
            sys.exit(f"a pick's score lies {gap:.1e} below the best ones")
        return max(gap, 0.0)

    def torch(self):
        """The published formula: the scores of all pairs, masked, topk, sort, stick-breaking."""
        scores = (self.q @ self.marks[:self.chunks].T).float()
        visible = (self.first + torch.arange(self.count, device="cuda")) // CHUNK
        hidden = torch.arange(self.chunks, device="cuda") >= visible[:, None]
        scores.masked_fill_(hidden, float("-inf"))
        _, picks = scores.topk(TOPK, dim=1)
        picks = picks.sort(dim=1, descending=True).values
        best = scores.gather(1, picks)
        spent = torch.nn.functional.softplus(best).cumsum(dim=1)
        return picks, (best - spent).exp()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--triton", help="the published hsa_triton.py")
    parser.add_argument("--csv")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    options = parser.parse_args()
    torch.manual_seed(1)
    lib = load_library(options.library)
    context = lib.bench_kernels_open(torch.cuda.current_stream().cuda_stream, HEADS, 1, HEAD_DIM,
                                     CHUNK, TOPK)
    module = load_module(options.triton) if options.triton else None
    rows = []

    def note(tokens, what, whose, ms, work, off):
        ours = next((r[3] for r in rows if r[0] == tokens and r[1] == what), ms)
        rows.append((tokens, what, whose, ms, ms / ours, work / ms * 1e-9, off))
        print(f"{tokens:7} {what:21} {whose:24} {ms:9.4f} ms {ms / ours:7.2f}x "
              f"{work / ms * 1e-9:7.1f} TFLOP/s  {off}", flush=True)

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for tokens in options.tokens:
        work = 4 * tokens * TOPK * CHUNK * WIDTH
        for make, what in (make_picks, "attention"), (make_text_picks, "attention, text"):
            attention = Attention(lib, context, tokens, make)
            off = attention.check_ours()
            note(tokens, what, "ours", median(attention.ours), work, f"off {off:.1e}")
            if module:
                attention.prepare_triton(module)
                off = attention.check_triton()
                note(tokens, what, "published Triton", median(attention.triton), work,
                     f"off {off:.1e}")
        note(tokens, "attention", "torch, full and causal", median(attention.full),
             2 * tokens * tokens * WIDTH, "")
        del attention
    for tokens, count in [(n, n) for n in options.tokens] + [(LONG, SLICE)]:
        torch.cuda.empty_cache()
        retrieval = Retrieval(lib, context, tokens, count)
        what = "retrieval" if count == tokens else f"retrieval, {count:,} rows"
        work = count * (2 * tokens - count) // CHUNK * WIDTH
        gap = retrieval.check_ours()
        note(tokens, what, "ours", median(retrieval.ours), work, f"gap {gap:.1e}")
        note(tokens, what, "published formula, torch", median(retrieval.torch), work, "")
        del retrieval
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["tokens", "what", "whose", "ms", "times_ours", "tflops", "error"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
