"""Training batches: haystacks of book text with needles in them and questions behind them."""
import difflib
import random

import numpy as np

import tasks

TEXT, ANSWER = 1, 2  # what a target counts as; 0: not trained on
CHUNK = 64


class Books:
    """The token stream of the books, and where text may be cut without changing its tokens."""

    def __init__(self, path, tokenizer):
        self.ids = np.load(path)
        self.end = tokenizer.end
        space = np.zeros(tokenizer.size, bool)
        for i, name in tokenizer.names.items():
            space[i] = name[0] in "ĠĊ"
        starts = space[self.ids]
        self.cut = starts & ~np.concatenate([[True], starts[:-1]])

    def take(self, rng, length):
        """`length` tokens from a place where a word begins."""
        at = rng.randrange(0, len(self.ids) - length - 64)
        at += int(self.cut[at : at + 64].argmax())
        return self.ids[at : at + length], self.cut[at : at + length]


class Builder:
    def __init__(self, tokenizer, books, seed, mix, talk_share):
        """`mix`: how often which kind of fact; `talk_share`: of the rows with questions."""
        self.mix, self.talk_share = mix, talk_share
        self.tokenizer, self.books, self.rng = tokenizer, books, random.Random(seed)

    def plain(self, length):
        """A row of book text; sometimes with a state reset somewhere in it."""
        ids, _ = self.books.take(self.rng, length)
        resets = np.zeros(length, bool)
        if self.rng.random() < 0.5:
            resets[self.rng.randrange(length)] = True
        gold = np.full(length, -1, np.int32)
        return ids.astype(np.int64), np.full(length, TEXT, np.uint8), resets, gold

    def needles(self, stage, length):
        rng, taken = self.rng, set()
        if stage == 0:  # dense pairs, one-letter keys, two digits
            return [tasks.pair(rng, taken, 1, 2) for _ in range(40)]
        if stage == 1:
            digits = rng.choice([2, 3, 5, 7])
            count = (length - length // 4) // (digits + 3)
            return [
                tasks.pair(rng, taken, rng.choice([1, 2, 2]), digits) for _ in range(min(count, 60))
            ]
        if rng.random() < 0.08:  # a haystack made of needles
            kind = rng.choice(["numbers", "words", "uuids"])
            count = length // (2 * len(self.tokenizer.encode(tasks.niah(rng, kind).text)))
            return tasks.distinct([tasks.niah(rng, kind) for _ in range(count)])
        count = rng.randint(4, 9) if length <= 512 else rng.randint(6, 28)
        needles = tasks.distinct([tasks.mixed(rng, self.mix) for _ in range(count)])
        return needles + self.passages(max(0, count // 4 - 1))

    def passages(self, count):
        """Book text to be quoted from: what memory of any text means, without a form."""
        needles = []
        for _ in range(count):
            words = self.tokenizer.decode(self.books.take(self.rng, 48)[0]).split()[:-1]
            if len(words) < 20:
                continue
            head = self.rng.randint(5, 9)
            opening, rest = " ".join(words[:head]), " ".join(words[head : head + 8])
            question = self.rng.choice(
                [f'\n"{opening}', f"\n{opening}", f'\nQuestion: What follows "{opening}"?\nAnswer:']
            )
            needles.append(
                tasks.Needle("passage", "\n" + " ".join(words), [(question, " " + rest)], opening)
            )
        return needles

    def questions(self, needles, room):
        """Tokens and marks of as many questions as fit, in random order, and of each question
        (where it starts, where its answer starts, the answer's tokens, the needle's number)."""
        ids, marks, asked = [], [], []
        order = list(range(len(needles)))
        self.rng.shuffle(order)
        for which in order:
            needle = needles[which]
            question, answer = self.rng.choice(needle.questions)
            q, a = self.tokenizer.encode(question), self.tokenizer.encode(answer)
            if needle.kind not in ("pair", "passage") and not answer.endswith("<|im_end|>"):
                a = a + [self.tokenizer.end]
            if len(ids) + len(q) + len(a) > room:
                continue
            asked.append((len(ids), len(ids) + len(q), a, which))
            ids += q + a
            marks += [0] * len(q) + [ANSWER] * len(a)
        return ids, marks, asked

    @staticmethod
    def sources(needle, answer):
        """For each answer token its place in the needle's tokens; where the answer is worded
        differently, the place of the next token that does occur; -1 behind the last."""
        places = [-1] * len(answer)
        match = difflib.SequenceMatcher(None, needle, answer, False)
        for a, b, size in match.get_matching_blocks():
            places[b : b + size] = range(a, a + size)
        known = -1
        for i in reversed(range(len(answer))):
            places[i] = known = places[i] if places[i] >= 0 else known
        return places

    def haystack(self, length):
        """Book text, or the noise of RULER's first needle task."""
        if self.rng.random() > 0.06:
            return self.books.take(self.rng, length)
        noise = self.tokenizer.encode(" " + tasks.NOISE.strip())
        text = np.array(noise * (length // len(noise) + 1), np.uint16)[:length]
        return text, np.arange(length) % len(noise) == 0

    def asked(self, stage, length):
        """A row of one haystack and its questions."""
        rng = self.rng
        needles, texts = self.needles(stage, length), []
        for needle in needles:
            texts.append(self.tokenizer.encode(needle.text))
            if stage > 1 and sum(map(len, texts)) > length * 0.55:  # leave room for a haystack
                texts.pop()
                break
        needles = needles[: len(texts)]
        asked, asked_marks, starts = self.questions(needles, length // 4)
        if not asked:  # a short row of long facts
            return self.plain(length)
        where = {}  # needle -> the place of its last occurrence in a chunk that can be read
        room = length - len(asked)
        ids, marks = [], []
        if stage <= 1:  # nothing but pairs; in the first stage each several times
            while len(ids) < room:
                order = list(range(len(texts)))
                rng.shuffle(order)
                for which in order:
                    if len(ids) + len(texts[which]) <= room // CHUNK * CHUNK:
                        where[which] = len(ids)
                    ids += texts[which]
                if stage == 1:
                    break
            ids = ids[:room]
            fill = room - len(ids)
            if fill:
                ids = self.books.take(rng, fill)[0].tolist() + ids
                where = {which: at + fill for which, at in where.items()}
            marks = [0] * room
        else:
            if rng.random() < 0.3:
                kind = rng.choice(["numbers", "words", "uuids"])
                ids = self.tokenizer.encode(tasks.niah_intro(kind, rng.random() < 0.5))
                marks = [0] * len(ids)
            text, cut = self.haystack(room - len(ids) - sum(map(len, texts)))
            if not cut.any():
                return self.plain(length)
            places = sorted(rng.choices(np.flatnonzero(cut).tolist(), k=len(texts)))
            order = list(range(len(texts)))
            rng.shuffle(order)
            before = 0
            for place, which in zip(places, order):
                needle = texts[which]
                where[which] = len(ids) + place - before
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
            resets[[begin + s[0] for s in starts]] = True
        gold = np.full(length, -1, np.int32)
        for _, at, answer, which in starts:
            if which not in where:
                continue
            self.point(gold, begin + at, answer, texts[which], where[which])
        ids, marks = ids + asked, marks + asked_marks
        return np.array(ids, np.int64), np.array(marks, np.uint8), resets, gold

    def talk(self, length):
        """A row of facts told and asked for at any distance, from the next line on: what is not
        in a whole chunk yet can only be in the recurrent state."""
        rng, ids, marks, told, asked = self.rng, [], [], [], []
        while len(ids) < length:
            draw = rng.random()
            if draw < 0.25:
                text = self.books.take(rng, rng.choice([8, 20, 40, 90, 200]))[0].tolist()
                ids += text
                marks += [TEXT] * len(text)
            elif draw < 0.6 or not told:
                needle = tasks.mixed(rng, self.mix)
                if any(needle.key == other.key for other, _, _ in told):
                    continue
                told.append((needle, self.tokenizer.encode(needle.text), len(ids)))
                if rng.random() < 0.4:  # told in a chat, and acknowledged
                    head = self.tokenizer.encode("\n<|im_start|>user\n")
                    words = self.tokenizer.encode(needle.text.strip())
                    reply = self.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
                    said = self.tokenizer.encode(tasks.ACKNOWLEDGED + "<|im_end|>")
                    told[-1] = (needle, words, len(ids) + len(head))
                    ids += head + words + reply + said
                    marks += [0] * (len(head) + len(words) + len(reply)) + [TEXT] * len(said)
                else:
                    ids += told[-1][1]
                    marks += [0] * len(told[-1][1])
            else:
                # The latest most often: that is where the chunk is not whole yet.
                which = len(told) - 1 if rng.random() < 0.5 else rng.randrange(len(told))
                question, answer = rng.choice(told[which][0].questions)
                q, a = self.tokenizer.encode(question), self.tokenizer.encode(answer)
                if not answer.endswith("<|im_end|>"):
                    a = a + [self.tokenizer.end]
                asked.append((len(ids) + len(q), a, which))
                ids += q + a
                marks += [0] * len(q) + [ANSWER] * len(a)
        gold = np.full(len(ids), -1, np.int32)
        for at, answer, which in asked:
            self.point(gold, at, answer, told[which][1], told[which][2])
        resets = np.zeros(length, bool)
        return (
            np.array(ids[:length], np.int64),
            np.array(marks[:length], np.uint8),
            resets,
            gold[:length],
        )

    def point(self, gold, at, answer, needle, place):
        """Marks where the tokens of an answer at `at` are to be read: in the needle at `place`."""
        for i, source in enumerate(self.sources(needle, answer), at):
            if source >= 0 and ((place + source) // CHUNK + 1) * CHUNK < i:
                gold[i] = place + source

    def batch(self, stage, count, length, plain_rows):
        rows = [self.plain(length) for _ in range(plain_rows)]
        while len(rows) < count:
            if stage >= 2 and self.rng.random() < self.talk_share:
                rows.append(self.talk(length))
                continue
            earlier = self.rng.random() < 0.15 and length <= 512
            rows.append(self.asked(self.rng.randint(0, stage) if earlier else stage, length))
        return [np.stack(part) for part in zip(*rows)]
