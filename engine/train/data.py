"""Training batches: haystacks of book text with needles in them and questions behind them."""
import random

import numpy as np

import tasks
from bpe import Tokenizer

TEXT, ANSWER = 1, 2  # what a target counts as; 0: not trained on


class Encoder:
    """Text to ids with special tokens recognised, and pieces cached."""

    def __init__(self, path):
        self.tokenizer = Tokenizer(path)
        self.eos = self.tokenizer.specials["<|endoftext|>"]

    def __call__(self, text):
        out = []
        while text:
            cuts = [(text.find(s), s) for s in self.tokenizer.specials if s in text]
            if not cuts:
                return out + self.tokenizer.encode(text)
            at, special = min(cuts)
            out += self.tokenizer.encode(text[:at]) + [self.tokenizer.specials[special]]
            text = text[at + len(special):]
        return out


class Books:
    """The token stream of the books, and where text may be cut in two without changing its tokens."""

    def __init__(self, path, encoder):
        self.ids = np.load(path)
        names = encoder.tokenizer.names
        space = np.zeros(len(names), bool)
        for i, name in names.items():
            space[i] = name[0] in "ĠĊ"
        starts = space[self.ids]
        self.cut = starts & ~np.concatenate([[True], starts[:-1]])

    def take(self, rng, length):
        """`length` tokens from a place where a word begins."""
        at = rng.randrange(0, len(self.ids) - length - 64)
        at += int(self.cut[at:at + 64].argmax())
        return self.ids[at:at + length], self.cut[at:at + length]


class Builder:
    def __init__(self, encoder, books, seed):
        self.encoder, self.books, self.rng = encoder, books, random.Random(seed)

    def plain(self, length):
        """A row of book text; sometimes with a state reset somewhere in it."""
        ids, _ = self.books.take(self.rng, length)
        resets = np.zeros(length, bool)
        if self.rng.random() < 0.5:
            resets[self.rng.randrange(length)] = True
        return ids.astype(np.int64), np.full(length, TEXT, np.uint8), resets

    def needles(self, stage, length):
        rng, taken = self.rng, set()
        if stage == 0:  # dense pairs, one-letter keys, two digits
            return [tasks.pair(rng, taken, 1, 2) for _ in range(40)]
        if stage == 1:
            digits = rng.choice([2, 3, 5, 7])
            count = (length - length // 4) // (digits + 3)
            return [tasks.pair(rng, taken, rng.choice([1, 2, 2]), digits)
                    for _ in range(min(count, 60))]
        count = rng.randint(4, 9) if length <= 512 else rng.randint(6, 28)
        return tasks.distinct([tasks.mixed(rng) for _ in range(count)])

    def questions(self, needles, room):
        """Tokens and marks of as many questions as fit, in random order."""
        ids, marks, starts = [], [], []
        order = needles[:]
        self.rng.shuffle(order)
        for needle in order:
            question, answer = self.rng.choice(needle.questions)
            q, a = self.encoder(question), self.encoder(answer)
            if needle.kind != "pair" and not answer.endswith("<|im_end|>"):
                a = a + [self.encoder.eos]
            if len(ids) + len(q) + len(a) > room:
                continue
            starts.append(len(ids))
            ids += q + a
            marks += [0] * len(q) + [ANSWER] * len(a)
        return ids, marks, starts

    def asked(self, stage, length):
        """A row of one haystack and its questions."""
        rng = self.rng
        needles = self.needles(stage, length)
        texts = [self.encoder(n.text) for n in needles]
        asked, asked_marks, starts = self.questions(needles, length // 4)
        room = length - len(asked)
        ids, marks = [], []
        if stage <= 1:  # nothing but pairs; in the first stage each several times
            while len(ids) < room:
                order = texts[:]
                rng.shuffle(order)
                ids += [t for text in order for t in text]
                if stage == 1:
                    break
            ids = ids[:room]
            fill = room - len(ids)
            ids = self.books.take(rng, fill)[0].tolist() + ids if fill else ids
            marks = [0] * room
        else:
            if rng.random() < 0.3:
                kind = rng.choice(["numbers", "words", "uuids"])
                ids = self.encoder(tasks.niah_intro(kind, rng.random() < 0.5))
                marks = [0] * len(ids)
            text, cut = self.books.take(rng, room - len(ids) - sum(map(len, texts)))
            places = sorted(rng.choices(np.flatnonzero(cut).tolist(), k=len(texts)))
            rng.shuffle(texts)
            before = 0
            for place, needle in zip(places, texts):
                ids += text[before:place].tolist() + needle
                marks += [TEXT] * (place - before) + [0] * len(needle)
                before = place
            ids += text[before:].tolist()
            marks += [TEXT] * (len(text) - before)
        resets = np.zeros(length, bool)
        begin, style = len(ids), rng.random()
        if style < 0.6 or stage == 0:  # the answer can only come through the chunk memories
            resets[begin] = True
        if style < 0.3:
            resets[[begin + s for s in starts]] = True
        ids, marks = ids + asked, marks + asked_marks
        return np.array(ids, np.int64), np.array(marks, np.uint8), resets

    def batch(self, stage, count, length, plain_rows):
        rows = [self.plain(length) for _ in range(plain_rows)]
        while len(rows) < count:
            earlier = self.rng.random() < 0.15 and length <= 512
            rows.append(self.asked(self.rng.randint(0, stage) if earlier else stage, length))
        return [np.stack(part) for part in zip(*rows)]
