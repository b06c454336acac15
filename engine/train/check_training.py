"""Hold the training form of the model against goldens: whole sequences, and streamed in pieces.

model.py computes in blocks and densely, for a GPU; ramba.py plainly. What trains must be what is
served, so all of model.py's forms must give the goldens' logits: whole, with the dense attention in
parts, streamed. What teaches the landmarks is held against its definition, one position and one chunk
after the other. Exit status 1 when one is off.
"""

import math

import os
import random
import sys

import torch

import safetensors_io
from check_published import LOGITS_LIMIT, ROOT, SHIPPED, worst
import model as form
from model import Ramba, RetrievalLayer
from ramba import Reference


PART = form.PART


def pieces(ids, rng):
    while len(ids):
        count = rng.randint(1, 150)
        yield ids[:count]
        ids = ids[count:]


def check(name, golden_folder, model_folder, rng):
    golden = safetensors_io.load(os.path.join(golden_folder, "golden.safetensors"))
    ids = golden["input_ids"].reshape(-1).long()
    rows = golden["logit_positions"].long()
    model = Ramba.load(model_folder, torch.float64)
    whole = model(ids[None])[0][rows]
    form.PART = 100
    parted = model(ids[None])[0][rows]
    form.PART = PART
    session = {}
    hidden = torch.cat([model.stream(session, piece) for piece in pieces(ids, rng)], 1)
    streamed = model.head(hidden)[0][rows]
    errors = [worst(got, golden["logits"][0]) for got in (whole, parted, streamed)]
    good = all(error < LOGITS_LIMIT for error in errors)
    print(
        f"{'ok  ' if good else 'FAIL'} {name}: whole {errors[0]:.1e} "
        f"in parts {errors[1]:.1e} streamed {errors[2]:.1e}"
    )
    return good


def visible(config, at):
    """The chunks that a position may read."""
    if config.mask_slide_window:
        at += config.chunk_size - max(config.slide_window, config.sliding_window)
    return range(max(0, at // config.chunk_size))


def plain_missed(config, weigh, hidden, landmarks, gold, others, own):
    """RetrievalLayer.missed by its definition; `weigh` gives one query's scores of some landmarks."""
    retrieval, contrast = [], []
    for row, at, place in gold:
        chunk = place // config.chunk_size
        seen = visible(config, at)
        mine = weigh(hidden[row, at], landmarks[row])  # [heads, chunks]
        rest = weigh(hidden[row, at], others)
        for head in range(len(mine)):
            score = lambda c: math.exp(mine[head, c])
            rivals = sum(math.exp(rest[head, o]) for o in range(len(others)) if not own[row][o])
            contrast.append(-math.log(score(chunk) / (sum(map(score, seen)) + rivals)))
            if config.enable_softmax:
                retrieval.append(-math.log(score(chunk) / sum(map(score, seen))))
            else:
                newer = [c for c in seen if c > chunk]
                left = math.prod(1 / (1 + score(c)) for c in newer)
                retrieval.append(-math.log(left * score(chunk) / (1 + score(chunk))))
    return sum(retrieval) / len(retrieval), sum(contrast) / len(contrast)


def check_missed(name, folder, rng):
    reference, model = Reference.load(folder), Ramba.load(folder, torch.float64)
    config = reference.config
    number, layer = next(
        (i, l) for i, l in enumerate(model.backbone.layers) if isinstance(l, RetrievalLayer)
    )
    count, size = 7, config.chunk_size
    made = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, count * size, config.hidden_size, generator=made, dtype=torch.float64)
    shape = (config.retrieval_heads, config.retrieval_head_dim)
    landmarks = torch.randn(3, count, *shape, generator=made, dtype=torch.float64)
    others = torch.randn(11, *shape, generator=made, dtype=torch.float64)
    own = torch.rand(3, 11, generator=made) < 0.3
    gold = []
    while len(gold) < 20:
        at = rng.randrange(count * size)
        if visible(config, at):
            gold.append((rng.randrange(3), at, rng.randrange(len(visible(config, at)) * size)))

    def weigh(x, marks):
        q = reference.linear(number, "ln", reference.norm(number, "pre_norm", x)).reshape(shape)
        if config.enable_lmk_norm:
            q = reference.norm(number, "lmk_q_norm", q)
            marks = reference.norm(number, "lmk_k_norm", marks)
        return torch.einsum("he,che->hc", q, marks) * shape[1] ** -0.5

    want = plain_missed(config, weigh, hidden, landmarks, gold, others, own)
    positions, places = torch.arange(count * size), tuple(map(torch.tensor, zip(*gold)))
    got = layer.missed(hidden, landmarks, positions, places, others, own)
    error = max(abs(float(a) - b) for a, b in zip(got, want))
    good = error < 1e-6  # scores are taken to fp32
    print(f"{'ok  ' if good else 'FAIL'} {name}: what teaches the landmarks {error:.1e}")
    return good


def main():
    torch.set_grad_enabled(False)
    base, good = os.path.join(ROOT, "tests", "golden"), True
    for name in sorted(os.listdir(base)):
        folder = os.path.join(base, name)
        if os.path.exists(os.path.join(folder, "golden.safetensors")):
            shipped = os.path.join(ROOT, "engine", "models", SHIPPED)
            model = shipped if name == "shipped" else folder
            good &= check(name, folder, model, random.Random(1))
            good &= check_missed(name, model, random.Random(2))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
