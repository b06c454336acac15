"""Trains what decides which chunks are read, and nothing else:

  python3 engine/train/retrieval.py CONFIG --data DIR --from MODEL --out DIR [--seconds N]

As train.py, whose options it takes, but no layer above the retrieval runs, and the language has no loss.
Each answer's token has a chunk that it stands in; its rivals are the other chunks of its row, the whole
batch where that is a crowd of needles, and the last landmarks of text, as many as a context of a million
tokens has. The losses are of what the layer does with scores: it takes the best eight and breaks the
stick from the newest on, so that of all rivals only the seven best ones cost weight. Text, and answers
that stand in no whole chunk, read what they read before, and the chunks' keys and values stay.
"""
import numpy as np
import torch
import torch.nn.functional as F

import safetensors_io
import train
from data import ANSWER, CHUNK, TEXT, text_alone
from model import ChunkingLayer, RetrievalLayer

BARRED = -1e4  # the score of a chunk that may not be read
QUERIES, READERS = 2048, 1024  # positions of answers, and of what is to stay as it is, in a step


def memory_layers(model):
    """The number of the chunking layer, it, and the first retrieval layer."""
    layers = model.backbone.layers
    lower = next(i for i, layer in enumerate(layers) if isinstance(layer, ChunkingLayer))
    return lower, layers[lower], next(l for l in layers if isinstance(l, RetrievalLayer))


def away(now, before):
    """The mean square of what changed, as a share of what it was."""
    return (now.float() - before.float()).pow(2).mean() / before.float().pow(2).mean()


class Scored:
    """Scores of queries [n] of the rows `row` at `at` over the chunks of their batch and the bank: one
    retrieval head. `apart`: which chunks [rows * C] are rivals in other rows than their own."""

    def __init__(self, q, landmarks, bank, row, at, apart):
        rows, count, width = landmarks.shape
        with torch.autocast(q.device.type, enabled=False):
            chunks = torch.cat([landmarks.flatten(0, 1).float(), bank])
            scores, banked = (q.float() * width**-0.5 @ chunks.T).tensor_split([rows * count], 1)
        number = torch.arange(rows * count, device=q.device)
        ends = (number % count + 1) * CHUNK
        self.own = (number // count == row[:, None]) & (at[:, None] >= ends)
        other = (number // count != row[:, None]) & apart
        scores = scores.masked_fill(~(self.own | other), BARRED)
        self.scores = torch.cat([scores, banked], 1)

    def losses(self, gold):
        """-log of the weight of the `gold` chunks (flat numbers) beside the seven best rivals, -log of
        their share among all, and which are among the best eight. Of other rows and the bank, half
        count as newer."""
        wanted = self.scores.gather(1, gold[:, None])
        best = self.scores.scatter(1, gold[:, None], BARRED).topk(8, 1)
        rivals, where = best.values[:, :7], best.indices[:, :7]
        owned = F.pad(self.own, (0, self.scores.shape[1] - self.own.shape[1])).gather(1, where)
        newer = torch.where(owned, where > gold[:, None], where % 2 == 0)
        spent = (F.softplus(rivals) * newer).sum(1) + F.softplus(-wanted[:, 0])
        share = self.scores.logsumexp(1) - wanted[:, 0]
        count = max(1, len(gold))
        return spent.sum() / count, share.sum() / count, best.values[:, 7] < wanted[:, 0]

    def strayed(self, before):
        """How far the weights of these scores are from those `before`: of the own chunks in both
        directions, of what holds nothing for them upwards alone."""
        change = self.scores.sigmoid() - before.scores.sigmoid()
        own = F.pad(self.own, (0, change.shape[1] - self.own.shape[1]))
        more = change.masked_fill(own, 0.0).clamp(min=0).topk(8, 1).values.sum(1)
        return ((change * own).pow(2).sum(1) + more).mean()


class Retrieval(train.Trainer):
    def __init__(self, args):
        if not args.start:
            raise SystemExit("wants --from")
        self.teacher = self.taught = None
        super().__init__(args)

    def teach(self):
        """The layers as they were: what text reads, keys and values are held against theirs."""
        model = train.build(self.settings)[1].to(self.device)
        model.load_state_dict(safetensors_io.load_folder(self.args.start))
        self.teacher = memory_layers(model)[1:]
        if self.device != "cpu" and not self.args.no_compile:
            self.teacher[0].compile(dynamic=False)

    def fill(self, full):
        """And what the teacher's landmarks of the same chunks are."""
        super().fill(full)
        count = self.model.bank.most if full else 0
        self.taught = torch.zeros(count, self.config.retrieval_dim, device=self.device)

    @torch.no_grad()
    def lower(self, ids, resets, states):
        """The lower decoder's output, and its layers' states."""
        x, after = self.model.backbone.embeddings(ids), []
        for layer, state in zip(self.model.backbone.layers[: self.config.num_lower_layers], states):
            x, ssm, _ = layer(x, resets, state)
            after.append(ssm)
        return x, after

    def positions(self, marks, gold):
        """On the host: (row, position) of the answers' tokens that stand in a chunk, and of others."""
        draw = np.random.default_rng(self.step)
        found = np.argwhere(gold[:, 1:] >= 0)
        after = marks[:, 1:]
        others = np.argwhere(((after == TEXT) | (after == ANSWER)) & (gold[:, 1:] < 0))
        pick = lambda all_, most: all_[draw.permutation(len(all_))[:most]]
        return pick(found, QUERIES), pick(others, READERS)

    def gradients(self, crowd, arrays):
        if self.teacher is None:
            self.teach()
        if self.taught is None:
            self.fill(False)
        ids, marks, resets, gold = arrays
        settings, count = self.settings, ids.shape[1] // self.config.chunk_size
        asked, others = self.positions(marks, gold)
        wanted = gold[asked[:, 0], asked[:, 1] + 1] // self.config.chunk_size + asked[:, 0] * count
        alone = text_alone(marks)
        put = lambda array: self.put(array.astype(np.int64))
        ids_t, resets_t, alone_t = put(ids), self.put(resets), self.put(alone)
        text = put(np.flatnonzero(alone))
        row, at, wanted = put(asked[:, 0]), put(asked[:, 1]), put(wanted)
        row2, at2 = put(others[:, 0]), put(others[:, 1])
        apart = torch.ones_like(alone_t) if crowd else alone_t
        kind = self.device.split(":")[0]
        low = torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")
        with low:
            x, after = self.lower(ids_t, resets_t, self.states(len(ids)))
            _, chunking, retrieval = memory_layers(self.model)
            keys, values, marks_now = [t.flatten(2) if t.dim() == 4 else t for t in chunking(x)]
            with torch.no_grad():
                keys0, values0, marks_before = self.teacher[0](x)
                marks_before = marks_before.flatten(2)
                q0 = self.query(self.teacher[1], x[row2, at2])
            q, q2 = self.query(retrieval, x[row, at]), self.query(retrieval, x[row2, at2])
            bank = self.model.bank
            banked = self.taught if bank.landmarks is None else bank.landmarks.flatten(1)
            asking = Scored(q, marks_now, banked, row, at, apart)
            reading = Scored(q2, marks_now, banked, row2, at2, alone_t)
            before = Scored(q0, marks_before, self.taught, row2, at2, alone_t)
            weight, share, found = asking.losses(wanted)
            strayed = reading.strayed(before)
            kept = away(keys, keys0) + away(values, values0)
        total = (
            settings["retrieval_weight"] * weight
            + settings["contrast_weight"] * share
            + settings["distraction_weight"] * strayed
            + settings["keep_weight"] * kept
        )
        total.backward()
        bank.keep(marks_now.flatten(0, 1)[text][:, None], self.model.whole_chunks(x)[text])
        with low:
            self.model.settle(*ids.shape)
        taught = marks_before.flatten(0, 1)[text].to(self.taught.dtype)
        self.taught = torch.cat([taught, self.taught])[: bank.most]
        right = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool, device=self.device)
        right[row, at] = found
        zero = torch.zeros((), device=self.device)
        losses = [zero, zero, zero, zero, strayed, weight, share, zero, kept]  # as train.LOSSES names them
        return torch.stack([loss.detach().float() for loss in losses]), right, after

    @staticmethod
    def query(layer, x):
        return layer.ln(layer.pre_norm(x))

    def held_out(self):
        return 0.0


if __name__ == "__main__":
    train.main(Retrieval)
