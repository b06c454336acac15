"""The loss on text, by how far back its words stand: python3 engine/train/text_loss.py MODEL... --data DIR

Stretches of the books that are not trained on end each in the same 4,096 tokens, which are what counts,
whatever the length of context before them. Each is read with HSA and, with --off, without. Columns:
all of the tokens, and those of rare words (less often than one in 20,000 of the books trained on) by
where the same word stood last: nowhere in the 64K tokens before, fewer than 512 tokens back, fewer
than 4,096, or farther. The last column is the mean weight that text reads its chunks with, of one.
"""
import argparse
import os
import random

import numpy as np
import torch
import torch.nn.functional as F

from model import Ramba, RetrievalLayer
from recurrence import Words
from tokenizer import Tokenizer

TAIL, SPAN = 4096, 65536
KINDS = ("all", "rare, new", "rare, <512", "rare, <4K", "rare, farther")
BACK = (512, 4096)
UNITS = {"K": 1024, "M": 1 << 20}


def kinds_of(words, ids):
    """[len(ids)]: the place in KINDS of each token of a rare word, 0 of every other."""
    kinds = np.zeros(len(ids), np.int64)
    for begin, end, last in zip(*words.rare(ids)):
        far = last < 0 or begin - last >= SPAN
        kinds[begin:end] = 1 if far else 2 + int(np.searchsorted(BACK, begin - last, "right"))
    return kinds


class Stretches:
    """Ends of stretches of the books that are not trained on, and what their last tokens are."""

    def __init__(self, data, count, seed):
        tokenizer = Tokenizer.load(data)
        words = Words(tokenizer, np.load(os.path.join(data, "train.npy")))
        self.ids = np.load(os.path.join(data, "held.npy"))
        rng = random.Random(seed)
        self.ends = [rng.randrange(SPAN + TAIL, len(self.ids)) for _ in range(count)]
        kinds = [kinds_of(words, self.ids[end - SPAN - TAIL : end])[-TAIL:] for end in self.ends]
        self.kinds = np.concatenate(kinds)

    def upto(self, length):
        """Their last `length` tokens, and the one before."""
        return [self.ids[end - length - 1 : end].astype(np.int64) for end in self.ends]

    def means(self, values):
        return [values.mean()] + [values[self.kinds == kind].mean() for kind in range(1, len(KINDS))]

    def heading(self):
        counts = [len(self.kinds)] + [int((self.kinds == kind).sum()) for kind in range(1, len(KINDS))]
        return line("", KINDS, "reading") + "\n" + line("tokens", counts, "")


def line(name, values, last):
    show = lambda value: f"{value:>13.4f}" if isinstance(value, float) else f"{value:>13}"
    return f"{name:>32}" + "".join(map(show, values)) + f"{last:>9}"


class Reading:
    """How much each position reads: the mean of the weights' sums, between reset and mean."""

    def __init__(self, model):
        self.model, self.sums = model, []
        for layer in model.backbone.layers:
            if isinstance(layer, RetrievalLayer):
                layer.pick = self.noting(layer.pick)

    def noting(self, pick):
        def noted(*args):
            picks, weights = pick(*args)
            self.sums.append(weights.float().sum(-1).mean().item())
            return picks, weights

        return noted


@torch.no_grad()
def losses(model, ids, piece):
    """[TAIL]: of each of the last TAIL tokens of `ids`, given what stands before it."""
    session, out, cut = {}, [], len(ids) - TAIL - 1
    for end in [*range(cut % piece or piece, cut, piece), *range(cut, len(ids) - 1, piece), len(ids) - 1]:
        begin = session.get("position", 0)
        if begin == end:
            continue
        x = model.stream(session, ids[begin:end])
        if begin >= cut:
            logits = model.head(x)[0].float()
            out.append(F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none"))
    return torch.cat(out).cpu().numpy()


def table(name, model, stretches, lengths, piece=4096):
    """Prints a line for each of `lengths`, such as 4K,16K."""
    device = next(model.parameters()).device
    reading = Reading(model)
    for length in lengths.split(","):
        reading.sums.clear()
        found = []
        for ids in stretches.upto(int(length[:-1]) * UNITS[length[-1]]):
            found.append(losses(model, torch.from_numpy(ids).to(device), piece))
        means = [float(mean) for mean in stretches.means(np.concatenate(found))]
        read = f"{np.mean(reading.sums):.3f}" if reading.sums else "-"
        print(line(f"{name} {length}", means, read), flush=True)
        print(f"{'each stretch':>32}" + "".join(f" {part.mean():.3f}" for part in found), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True, help="what prepare.py made")
    parser.add_argument("--lengths", default="4K,16K,64K")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--off", action="store_true", help="also with HSA switched off")
    args = parser.parse_args()
    stretches = Stretches(args.data, args.cases, args.seed)
    print(stretches.heading(), flush=True)
    for folder in args.models:
        model = Ramba.load(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        name = os.path.basename(os.path.normpath(folder))
        table(name, model, stretches, args.lengths)
        if args.off:
            model.hsa = False
            table(name + " without HSA", model, stretches, args.lengths)


if __name__ == "__main__":
    main()
