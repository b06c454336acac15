"""Fits what decides which chunks are read, and nothing else, to memories as they are used:

  python3 engine/train/retrieval.py CONFIG --data DIR --from MODEL --out DIR [--haystacks N] [--steps N]

The layers below the retrieval stay, so that what it sees is found once: of haystacks of the books that are
trained on, with CONFIG's facts in them, `carried_share` of which go on from the state behind the last one, the
summary of each chunk and the hidden states that an answer's tokens are chosen by, every question asked as in
use, as the first behind the text. Then the projections to queries and to landmarks alone learn that the chunk
that holds a token has the weight: of all others the eight best can take it, if they are newer, and these come
from the haystack, from the chunk that the question ends in, and from the text of all other haystacks, as in a
context as long as all of them. Text reads what it read before, and less of other text. OUT/export is the model;
prints what one haystack in ten, which is not fitted to, has of the weight.
"""
import argparse
import collections
import copy
import dataclasses
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

import safetensors_io
import train
from data import CHUNK, Books, Builder, Row, choices, text_alone
from model import ChunkingLayer, RetrievalLayer
from tokenizer import Tokenizer

PICKED = 8
BARRED = -1e9  # the score of a chunk that may not be read
PIECE = 1024  # tokens that the lower layers take at a time
QUESTIONS = 32  # that are read beside each other
READERS = 256  # positions of text of a haystack that are to stay as they are
CHOICE = 4.0  # how often a token counts that tells which chunk is read
ASKED = 400  # tokens of answers in a step
RIVALS = (256, 1024, 4096, 16384, 65536)  # chunks of other haystacks in a step, as many as there are at most


@dataclasses.dataclass
class Seen:
    """What retrieval sees of one haystack of C whole chunks. `late`: of the chunks that questions and answers
    complete; those of a token are `late_count` from `late_first` on."""

    chunks: torch.Tensor  # [C,d] summaries
    alone: torch.Tensor  # [C] which are text alone
    asked: torch.Tensor  # [N,d] hidden states that answers' tokens are chosen by
    gold: torch.Tensor  # [N] the chunk that holds each of these
    choices: torch.Tensor  # [N] whether the token tells which chunk it is from
    late: torch.Tensor  # [E,d] summaries
    late_first: torch.Tensor  # [N]
    late_count: torch.Tensor  # [N]
    kinds: list  # [N] of what kind the fact is
    text: torch.Tensor  # [M,d] hidden states of text
    text_before: torch.Tensor  # [M] how many whole chunks are before each


class Lower:
    """A model up to its retrieval layer."""

    def __init__(self, model):
        layers = model.backbone.layers
        count = next(i for i, layer in enumerate(layers) if isinstance(layer, ChunkingLayer))
        self.embeddings, self.layers, self.chunking = model.backbone.embeddings, layers[:count], layers[count]
        self.retrieval = next(layer for layer in layers if isinstance(layer, RetrievalLayer))
        config = model.config
        if config.retrieval_heads > 1 or config.enable_softmax or config.mask_slide_window:
            raise SystemExit("retrieval.py fits one head of stick-breaking retrieval, without a window")

    @torch.no_grad()
    def read(self, ids, states=None):
        """[B,L] -> hidden states [B,L,d] and the layers' states; `states`: of one row, which all go on from."""
        parts = []
        for part in ids.split(PIECE, 1):
            x, after = self.embeddings(part), []
            for i, layer in enumerate(self.layers):
                before = (None, None) if states is None else states[i]
                before = [s if s is None else s.expand(len(ids), *s.shape[1:]) for s in before]
                x, ssm, conv = layer(x, None, *before)
                after.append((ssm, conv))
            states = after
            parts.append(x)
        return torch.cat(parts, 1), states

    @torch.no_grad()
    def summaries(self, x):
        """[count*S,d] -> [count,d]"""
        return self.chunking.summaries(x[None])[1]

    def scores(self, x, summaries):
        """[N,d], [C,d] -> [N,C]"""
        landmarks = self.chunking.lmk_ln(summaries)[None, :, None]
        return self.retrieval.scores(x[None], landmarks)[0, :, 0]


def told(builder, length):
    """A haystack [length]: its tokens, which of its chunks are text alone, and rows that each go on from it
    with a question and its answer; or None."""
    needles, texts, used = [], [], 0
    for needle in builder.needles(train.LAST_STAGE, length):
        pieces = [builder.tokenizer.encode(piece) for piece in needle.pieces]
        used += sum(map(len, pieces))
        if used > length * 0.5:
            break
        texts += [(len(needles), i, piece) for i, piece in enumerate(pieces)]
        needles.append(needle)
    row = Row(length)
    where = builder.scatter(row, texts, length, {})
    if where is None:
        return None
    tokens, rows = {(which, i): text for which, i, text in texts}, []
    for which, needle in enumerate(needles):
        pieces = [(tokens[which, i], where[which, i]) for i in range(len(needle.pieces))]
        asked = Row(2 * length)
        asked.add(row.ids, 0)
        asked.ask(*builder.question(needle), pieces)
        rows.append((needle.kind, asked))
    return np.array(row.ids), text_alone(np.array(row.marks)[None]), rows


def see(lower, builder, length, device, before=None):
    """`Seen` of a new haystack that goes on from the layers' states `before`, and their states behind it."""
    made = builder.row(told, builder, length)
    if made is None:
        return see(lower, builder, length, device, before)
    ids, alone, rows = made
    count, rng = len(ids) // CHUNK, builder.rng
    x, states = lower.read(torch.from_numpy(ids.astype(np.int64))[None].to(device), before)
    x = x[0]
    rest = x[count * CHUNK :]
    found, late, lates = collections.defaultdict(list), [], 0
    for begin in range(0, len(rows), QUESTIONS):
        part = rows[begin : begin + QUESTIONS]
        behind = [row.ids[len(ids) :] for _, row in part]
        padded = torch.zeros(len(part), max(map(len, behind)), dtype=torch.int64)
        for i, tokens in enumerate(behind):
            padded[i, : len(tokens)] = torch.tensor(tokens)
        y, _ = lower.read(padded.to(device), states)
        for i, (kind, row) in enumerate(part):
            chosen = choices(np.array(row.ids)[None], np.array(row.gold)[None], builder.books.blank)[0]
            for at in range(len(ids), len(row.ids)):
                chunk = row.gold[at] // CHUNK if row.gold[at] >= 0 else None
                if chunk is not None and chunk < count:
                    found["asked"].append(y[i, at - 1 - len(ids)])
                    found["gold"].append(chunk)
                    found["choices"].append(bool(chosen[at]))
                    found["late_first"].append(lates)
                    found["late_count"].append((at - 1) // CHUNK - count)
                    found["kinds"].append(kind)
            whole = torch.cat([rest, y[i, : len(behind[i])]])
            whole = whole[: len(whole) // CHUNK * CHUNK]
            if len(whole):
                late.append(lower.summaries(whole))
                lates += len(late[-1])
    readers = np.flatnonzero(np.repeat(alone, CHUNK))
    readers = readers[readers >= PICKED * CHUNK]
    readers = np.array(rng.sample(readers.tolist(), min(READERS, len(readers))))
    if "gold" not in found or not len(readers):
        return see(lower, builder, length, device, before)
    put = lambda values: torch.tensor(values, device=device)
    seen = Seen(
        lower.summaries(x[: count * CHUNK]), put(alone), torch.stack(found["asked"]), put(found["gold"]),
        put(found["choices"]), torch.cat(late) if late else x[:0], put(found["late_first"]),
        put(found["late_count"]), found["kinds"], x[put(readers)], put(readers // CHUNK),
    )
    return seen, states


def wanted(lower, seen, which, rivals, slots):
    """For the tokens `which` [n]: -log of the weight of the chunk that holds them, -log of its share in a
    softmax, and how many chunks are scored higher. `rivals` [D,d] are chunks of other text, behind the first
    `slots` [D] of the haystack's."""
    x, gold = seen.asked[which], seen.gold[which]
    own, other = lower.scores(x, seen.chunks), lower.scores(x, rivals)
    late, number = lower.scores(x, seen.late), torch.arange(len(seen.late), device=x.device)
    first = seen.late_first[which, None]
    late = late.masked_fill((number < first) | (number >= first + seen.late_count[which, None]), BARRED)
    score = own.gather(1, gold[:, None])
    every = torch.cat([own, other, late], 1)
    place = torch.arange(own.shape[1], device=x.device)
    newer = torch.cat([place, slots - 1, own.shape[1] + number]) > gold[:, None]
    # Seven others are picked with it, and the newer ones of these take their part first.
    rest = every.scatter(1, gold[:, None], BARRED).topk(min(PICKED - 1, every.shape[1]), 1)
    spent = (F.softplus(rest.values) * newer.gather(1, rest.indices)).sum(1)
    score = score[:, 0]
    return spent + F.softplus(-score), every.logsumexp(1) - score, (every > score[:, None]).sum(1)


def stick(scores, picked):
    """log of the weights of `picked` chunks, and of what they leave."""
    scores = scores.masked_fill(~picked, BARRED)
    spent = F.softplus(scores).flip(-1).cumsum(-1).flip(-1)
    return (scores - spent).masked_fill(~picked, 0.0), -spent[:, 0]


def best(scores, seen):
    return torch.zeros_like(seen).scatter(1, scores.topk(min(PICKED, scores.shape[1]), 1).indices, True) & seen


def taken(scores):
    """-log of what the best chunks, as many as are picked, leave."""
    return F.softplus(scores.topk(min(PICKED, scores.shape[1]), 1).values).sum(1)


def strayed(lower, before, seen, which, rivals):
    """For the text `which` [n]: how far what it reads is from what it read (KL), and what it would read of
    other text's chunks `rivals` [D,d]; `before`: the layers as they were."""
    x = seen.text[which]
    visible = torch.arange(len(seen.chunks), device=x.device) < seen.text_before[which, None]
    now = lower.scores(x, seen.chunks).masked_fill(~visible, BARRED)
    with torch.no_grad():
        then = before.scores(x, seen.chunks).masked_fill(~visible, BARRED)
        read = best(then, visible)
        was, left = stick(then, read)
    picked = read | best(now, visible)
    is_, leaves = stick(now, picked)
    apart = (was.exp() * (was - is_) * read).sum(1) + left.exp() * (left - leaves)
    return apart.mean(), taken(lower.scores(x, rivals)).mean()


class Fit:
    def __init__(self, lower, before, haystacks, seed, straying):
        self.lower, self.before, self.rng = lower, before, random.Random(seed)
        self.straying = straying
        self.device = haystacks[0].chunks.device
        keep = max(1, len(haystacks) // 10)
        self.kept, self.haystacks = haystacks[:keep], haystacks[keep:]
        self.text = torch.cat([seen.chunks[seen.alone] for seen in haystacks])
        self.owner = torch.cat(
            [torch.full((int(seen.alone.sum()),), i, device=self.device) for i, seen in enumerate(haystacks)]
        ) - keep  # the number of those that are fitted to
        self.made = torch.Generator(self.device).manual_seed(seed)

    def rivals(self, which, seen, count):
        """At most `count` chunks of other haystacks' text, and where among `seen`'s own they stand."""
        others = torch.nonzero(self.owner != which)[:, 0]
        order = torch.randperm(len(others), generator=self.made, device=self.device)[:count]
        slots = torch.randint(
            len(seen.chunks) + 1, (len(order),), generator=self.made, device=self.device
        )
        return self.text[others[order]], slots

    def loss(self):
        which = self.rng.randrange(len(self.haystacks))
        seen = self.haystacks[which]
        rivals, slots = self.rivals(which, seen, self.rng.choice(RIVALS))
        draw = lambda count, most: torch.randperm(count, generator=self.made, device=self.device)[:most]
        asked = draw(len(seen.gold), ASKED)
        lost, share, _ = wanted(self.lower, seen, asked, rivals, slots)
        readers = draw(len(seen.text), READERS // 2)
        apart, far = strayed(self.lower, self.before, seen, readers, rivals)
        counts = 1.0 + (CHOICE - 1.0) * seen.choices[asked]
        return ((lost + 0.1 * share) * counts).sum() / counts.sum() + apart + self.straying * far

    @torch.no_grad()
    def report(self, name):
        """What is left of the weight in the haystacks that are kept, among all the text."""
        sums, read = collections.defaultdict(lambda: np.zeros(4)), np.zeros(2)
        for which, seen in enumerate(self.kept):
            rivals, slots = self.rivals(which - len(self.kept), seen, len(self.text))
            every = torch.arange(len(seen.gold), device=self.device)
            lost, _, above = wanted(self.lower, seen, every, rivals, slots)
            told = zip(seen.kinds, lost.tolist(), above.tolist(), seen.choices.tolist())
            for kind, cost, over, choice in told:
                for key in (kind, "all", "choices") if choice else (kind, "all"):
                    sums[key] += 1, cost, cost > -np.log(0.3), over >= PICKED
            every = torch.arange(len(seen.text), device=self.device)
            read += [float(part) for part in strayed(self.lower, self.before, seen, every, rivals)]
        count, cost, low, missed = sums.pop("all")
        telling, _, low_telling, _ = sums.pop("choices", np.zeros(4))
        read /= len(self.kept)
        print(
            f"{name}: -log of the weight {cost / count:.3f}, below 0.3 {low / count:.3f}, of what tells the "
            f"chunk {low_telling / max(1, telling):.3f}, not picked {missed / count:.4f}; text, KL {read[0]:.4f}, "
            f"of other text {read[1]:.3f}\n    below 0.3: "
            + " ".join(f"{kind} {part[2] / part[0]:.3f}" for kind, part in sorted(sums.items())),
            flush=True,
        )
        return cost / count

    def run(self, steps, rate):
        parts = [self.lower.retrieval.ln.weight, self.lower.chunking.lmk_ln.weight]
        optimizer = torch.optim.Adam(parts, rate, betas=(0.9, 0.99))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 20, max(0.02, 2 * (1 - step / steps)))
            loss = self.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % max(1, steps // 5) == 0:
                self.report(f"step {step + 1}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--data", required=True)
    parser.add_argument("--from", dest="start", required=True, metavar="MODEL")
    parser.add_argument("--out", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="of CONFIG")
    parser.add_argument("--haystacks", type=int, default=250)
    parser.add_argument("--length", type=int, default=32768, help="tokens of the longest of them")
    parser.add_argument("--shortest", type=int, default=1024, help="and of the shortest")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument(
        "--straying", type=float, default=0.1, help="how much it counts what text would read of other text"
    )
    args = parser.parse_args()
    settings = train.configured(args.config, args.set)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = train.build(settings)[1].to(device)
    model.load_state_dict(safetensors_io.load_folder(args.start))  # of another shape than CONFIG's: an error
    lower, before = Lower(model), Lower(copy.deepcopy(model))
    tokenizer = Tokenizer.load(args.data)
    books = Books(os.path.join(args.data, "train.npy"), tokenizer)
    builder = Builder(tokenizer, books, settings["seed"], settings)
    haystacks, states, begin = [], None, time.time()
    for number in range(args.haystacks):
        if builder.rng.random() >= settings["carried_share"]:
            states = None
        length = int(args.shortest * (args.length / args.shortest) ** builder.rng.random())
        seen, states = see(lower, builder, length, device, states)
        haystacks.append(seen)
        if (number + 1) % 10 == 0:
            print(f"{number + 1} of {args.haystacks} haystacks, {time.time() - begin:.0f} s", flush=True)
    fit = Fit(lower, before, haystacks, settings["seed"], args.straying)
    print(f"{sum(len(seen.gold) for seen in haystacks)} tokens of answers, {len(fit.text)} chunks of text")
    fit.report("before")
    fit.run(args.steps, args.rate)
    train.export(model, settings, args)
    print(f"{args.out}/export is written, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
