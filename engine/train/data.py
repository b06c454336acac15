"""Training batches: haystacks of book text with needles in them and questions behind them."""
import difflib
import functools
import random

import numpy as np

import facts
import tasks
import words
from needle import Needle, answer_text, distinct
from recurrence import CHUNK, Words

TEXT, ANSWER = 1, 2  # what a target counts as; 0: not trained on


def text_alone(marks):
    """[rows * chunks]: which of the whole chunks are text alone, for `marks` [rows, length]."""
    count = marks.shape[1] // CHUNK
    return (marks[:, : count * CHUNK].reshape(-1, CHUNK) == TEXT).all(1)


def choices(ids, gold, blank):
    """[rows, length]: which tokens tell what they are read from, for tokens `ids` and the places that these
    are read from, `gold` (-1: none), both in that shape: those from another chunk than the token before, or,
    where that is `blank` [vocabulary] as before every number, the token behind it."""
    chunk = gold // CHUNK  # -1 of -1
    goes_on = np.pad(chunk[:, 1:] == chunk[:, :-1], ((0, 0), (1, 0)))
    turns, space = (chunk >= 0) & ~goes_on, blank[ids]
    behind = np.pad((turns & space)[:, :-1], ((0, 0), (1, 0)))
    return (turns | behind & goes_on) & ~space


class Books:
    """The token stream of the books, and where text may be cut without changing its tokens."""

    def __init__(self, path, tokenizer):
        self.ids = np.load(path)
        self.end = tokenizer.end
        self.halves = np.full((tokenizer.size, 2), -1, np.int64)
        for token, pair in tokenizer.halves().items():
            self.halves[token] = pair
        space = np.zeros(tokenizer.size, bool)
        self.blank = np.zeros(tokenizer.size, bool)  # which tokens are nothing but white space
        for i, name in tokenizer.names.items():
            space[i], self.blank[i] = name[0] in "ĠĊ", not name.strip("ĠĊ")
        starts = space[self.ids]
        self.cut = starts & ~np.concatenate([[True], starts[:-1]])

    def take(self, rng, length):
        """`length` tokens from a place where a word begins."""
        at = rng.randrange(0, len(self.ids) - length - 64)
        at += int(self.cut[at : at + 64].argmax())
        return self.ids[at : at + length], self.cut[at : at + length]

    def respelled(self, rng, length, share):
        """As `take`, with `share` of the tokens as the two that each was merged from, and the same
        again of those: BPE dropout, so that a book read many times is not the same text each time."""
        ids, cut = self.take(rng, length)
        draw = np.random.default_rng(rng.getrandbits(64))
        for _ in range(2):
            split = (self.halves[ids, 0] >= 0) & (draw.random(len(ids)) < share)
            first = np.arange(len(ids)) + np.cumsum(split) - split
            ids, cut, old = np.repeat(ids, 1 + split), np.repeat(cut, 1 + split), ids
            ids[first[split]], ids[first[split] + 1] = self.halves[old[split]].T
            cut[first[split] + 1] = False
        return ids[:length], cut[:length]


class Row:
    """A row in the making. `ask` notes where each answer token is to be read from."""

    def __init__(self, length):
        self.length, self.ids, self.marks, self.gold, self.resets = length, [], [], [], []

    def add(self, ids, mark):
        """Returns the place of the first token."""
        at = len(self.ids)
        self.ids += ids
        self.marks += [mark] * len(ids)
        self.gold += [-1] * len(ids)
        return at

    def ask(self, question, answer, pieces):
        """`answer`: (tokens, piece) parts; `pieces`: the tokens and place of each piece, or None."""
        self.add(question, 0)
        for tokens, which in answer:
            at = self.add(tokens, ANSWER)
            if which is None or pieces[which] is None:
                continue
            needle, place = pieces[which]
            for i, source in enumerate(sources(needle, tokens), at):
                if source >= 0 and ((place + source) // CHUNK + 1) * CHUNK < i:
                    self.gold[i] = place + source

    def arrays(self):
        length = self.length
        resets = np.zeros(length, bool)
        resets[[at for at in self.resets if at < length]] = True
        return (
            np.array(self.ids[:length], np.int64),
            np.array(self.marks[:length], np.uint8),
            resets,
            np.array(self.gold[:length], np.int32),
        )


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


class Builder:
    def __init__(self, tokenizer, books, seed, settings):
        """`settings`: mix (how often which kind of fact), the shares near, talk and counting of rows
        with questions, the share lead of questions that come out of text, the share cut of answers
        that the end of a chunk is put into where they are told, and where they are said, the share of
        rows whose book text is respelled, and whether the words that come again in a row of text are
        marked as what it could have read."""
        self.tokenizer, self.books, self.rng = tokenizer, books, random.Random(seed)
        self.settings, self.respelling = settings, 0.0

    @functools.cached_property
    def words(self):
        return Words(self.tokenizer, self.books.ids)

    def text(self, length):
        """Book text in the spelling of this row."""
        if not self.respelling:
            return self.books.take(self.rng, length)
        return self.books.respelled(self.rng, length, self.respelling)

    def plain(self, length):
        """A row of book text; sometimes with a state reset somewhere in it."""
        row = Row(length)
        ids = self.text(length)[0]
        row.add(ids.tolist(), TEXT)
        if self.settings.get("recall"):
            row.gold = self.words.recalled(ids).tolist()
        if self.rng.random() < 0.5:
            row.resets.append(self.rng.randrange(length))
        return row.arrays()

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
        if rng.random() < 0.04:
            return self.crowd(length, self.crowd_kind(), set())
        count = rng.randint(4, 9) if length <= 512 else rng.randint(6, max(28, length // 200))
        mix = self.settings["mix"]
        if rng.random() < self.settings["alike_share"]:  # all of one kind
            mix = {rng.choices(list(mix), list(mix.values()))[0]: 1}
        needles = distinct([tasks.mixed(rng, mix) for _ in range(count)])
        return needles + self.passages(max(0, count // 4 - 1))

    def crowd_kind(self):
        """What makes `count` needles of a crowd: one of `crowd_mix`, RULER's with which values and keys.
        An event is none: its questions do not name all that its key does, so that many have two answers."""
        rng, mix = self.rng, self.settings.get("crowd_mix", {"niah": 1})
        name = rng.choices(list(mix), list(mix.values()))[0]
        if name != "niah":
            return lambda count: [tasks.KINDS[name](rng) for _ in range(count)]
        kinds = [("numbers", words.pair), ("numbers", words.unheard), ("words", words.pair)]
        kinds += [("uuids", words.pair), ("uuids", tasks.identifier), ("letters", words.pair)]
        values, key = rng.choices(kinds, [4, 1.5, 1, 1, 2.5, 1])[0]

        def niahs(count):
            keys = words.alike(rng, count) if key is words.pair and rng.random() < 0.4 else key
            return [tasks.niah(rng, values, keys(rng)) for _ in range(count)]

        return niahs

    def crowd(self, length, kind, taken):
        """Enough needles of one kind to fill a row, of keys that are not `taken`, and are then."""
        sizes = [len(self.tokenizer.encode("".join(needle.pieces))) for needle in kind(4)]
        needles = distinct(kind(4 * length // sum(sizes)))
        needles = [needle for needle in needles if needle.key not in taken]
        taken.update(needle.key for needle in needles)
        return needles

    def passages(self, count):
        """Book text to be quoted from: what memory of any text means, without a form."""
        needles = []
        for _ in range(count):
            text = self.tokenizer.decode(self.books.take(self.rng, 48)[0]).split()[:-1]
            if len(text) < 20:
                continue
            head = self.rng.randint(5, 9)
            opening, rest = " ".join(text[:head]), " ".join(text[head : head + 8])
            question = self.rng.choice(
                [f'\n"{opening}', f"\n{opening}", f'\nQuestion: What follows "{opening}"?\nAnswer:']
            )
            about = [(question, [(" " + rest, 0)])]
            needles.append(Needle("passage", ["\n" + " ".join(text)], about, opening))
        return needles

    def question(self, needle):
        """Tokens of a question, and of the parts of its answer with the piece they stand in."""
        question, answer = self.rng.choice(needle.questions)
        parts = [(self.tokenizer.encode(text), which) for text, which in answer]
        if needle.kind not in ("pair", "passage"):
            if not answer_text(answer).endswith("<|im_end|>"):
                parts.append(([self.tokenizer.end], None))
        return self.tokenizer.encode(question), parts

    def haystack(self, length):
        """Book text, or the noise of RULER's first needle task."""
        if self.rng.random() > 0.06:
            return self.text(length)
        noise = self.tokenizer.encode(" " + tasks.NOISE.strip())
        text = np.array(noise * (length // len(noise) + 1), np.uint16)[:length]
        return text, np.arange(length) % len(noise) == 0

    def questions(self, needles, room, lead_share):
        """Questions of as many needles as fit, in random order: [which, lead, question, parts], and how
        long they are. `lead` is how much text stands before it: in use most questions are the first
        behind a long text, so that the state does not expect them, and the chunk that they end in,
        which holds the key, too, is mostly text."""
        out, used = [], 0
        order = list(range(len(needles)))
        self.rng.shuffle(order)
        for which in order:
            question, parts = self.question(needles[which])
            lead = int(4 * 128 ** self.rng.random()) if self.rng.random() < lead_share else 0
            size = lead + len(question) + sum(len(tokens) for tokens, _ in parts)
            if used + size <= room:
                used += size
                out.append([which, lead, question, parts])
        return out, used

    def shorten_leads(self, questions, length):
        """Of the `questions` that end a row of `length` puts the end of a chunk into the answers of some:
        the chunk of the question, which holds the key, becomes whole in the middle of these. Takes what
        it needs from the text behind them, and returns how much that is."""
        end, less = length, 0
        for this, behind in reversed(list(zip(questions, questions[1:] + [None]))):
            size = sum(len(tokens) for tokens, _ in this[3])
            if behind and self.rng.random() < self.settings.get("cut_share", 0):
                moves = [move for move in range(min(CHUNK, behind[1] + 1)) if 0 < (end + move) % CHUNK < size]
                move = self.rng.choice(moves or [0])
                behind[1] -= move
                end, less = end + move, less + move
            end -= this[1] + len(this[2]) + size
        return less

    def cut_spans(self, texts, questions):
        """Of some pieces that are asked for, by (needle, piece): from where in them to where the answer
        stands, for the end of a chunk to fall between."""
        tokens, spans = {(needle, piece): text for needle, piece, text in texts}, {}
        for which, _, _, parts in questions:
            for answer, piece in parts:
                text = tokens.get((which, piece))
                if text and self.rng.random() < self.settings.get("cut_share", 0):
                    told = [place for place in sources(text, answer) if place >= 0]
                    if told and max(told) > min(told):
                        spans[which, piece] = min(told), max(told)
        return spans

    def dense(self, row, stage, texts, room):
        """Nothing but pairs; in the first stage each several times. Returns their last places."""
        ids, where = [], {}
        while len(ids) < room:
            order = list(range(len(texts)))
            self.rng.shuffle(order)
            for which in order:
                if len(ids) + len(texts[which]) <= room // CHUNK * CHUNK:
                    where[which] = len(ids)
                ids += texts[which]
            if stage == 1:
                break
        fill = max(0, room - len(ids))
        if fill:
            row.add(self.text(fill)[0].tolist(), 0)
        row.add(ids[:room], 0)
        return {which: at + fill for which, at in where.items()}

    def scatter(self, row, texts, room, spans):
        """`texts`: (needle, piece, tokens), hidden in a haystack, a needle's pieces in their order, with
        the end of a chunk in the `spans` of some. Returns the places by (needle, piece), or None."""
        rng = self.rng
        if rng.random() < 0.3:
            kind = tasks.niah_kind(rng)
            intro = tasks.niah_intro(kind, rng.random() < 0.5)
            row.add(self.tokenizer.encode(tasks.VT_INTRO if rng.random() < 0.2 else intro), 0)
        text, cut = self.haystack(room - len(row.ids) - sum(len(t) for _, _, t in texts))
        if not cut.any():
            return None
        places = sorted(rng.choices(np.flatnonzero(cut).tolist(), k=len(texts)))
        order = list(texts)
        rng.shuffle(order)
        waiting = {}  # the pieces of a needle come in their own order
        for needle, piece, tokens in texts:
            waiting.setdefault(needle, []).append((piece, tokens))
        where, before = {}, 0
        for place, (needle, _, _) in zip(places, order):
            piece, tokens = waiting[needle].pop(0)
            place = max(place, before)
            if (needle, piece) in spans:
                first, last = spans[needle, piece]
                near = place + np.flatnonzero(cut[place : place + CHUNK])
                inside = -(len(row.ids) + near - before + first) % CHUNK  # a chunk's end behind `first`
                near = near[(0 < inside) & (inside <= last - first)].tolist()
                place = rng.choice(near or [place])
            row.add(text[before:place].tolist(), TEXT)
            where[needle, piece] = row.add(tokens, 0)
            before = place
        row.add(text[before:].tolist(), TEXT)
        return where

    def asked(self, stage, length, crowd=None):
        """A row of one haystack and its questions; `crowd`: the needles that it is made of."""
        rng, row = self.rng, Row(length)
        needles, texts, used = [], [], 0
        share = rng.choice([0.5, 0.68, 0.82]) if crowd else 0.55  # leave room for a haystack
        for needle in crowd or self.needles(stage, length):
            pieces = [self.tokenizer.encode(piece) for piece in needle.pieces]
            used += sum(map(len, pieces))
            if stage > 1 and used > length * share:
                break
            texts += [(len(needles), i, piece) for i, piece in enumerate(pieces)]
            needles.append(needle)
        asking = 0.96 - share if crowd else 0.25 if stage <= 1 else 0.35
        leads = self.settings.get("lead_share", 0) if stage > 1 else 0
        questions, size = self.questions(needles, int(length * asking), leads)
        if not questions:  # a short row of long facts
            return self.plain(length)
        if stage > 1:
            size -= self.shorten_leads(questions, length)
        room = length - size
        if stage <= 1:
            found = self.dense(row, stage, [tokens for _, _, tokens in texts], room)
            where = {(which, 0): at for which, at in found.items()}
        else:
            where = self.scatter(row, texts, room, self.cut_spans(texts, questions))
            if where is None:
                return self.plain(length)
        style, reads = rng.random(), self.settings.get("hsa", True)
        if reads and (style < 0.5 or stage == 0):  # the answer can only come through the chunk memories
            row.resets.append(len(row.ids))
        tokens = {(which, i): text for which, i, text in texts}
        for which, lead, question, parts in questions:
            if reads and (style < 0.25 or (lead and rng.random() < 0.7)):  # as if none had been asked
                row.resets.append(len(row.ids))
            row.add(self.text(lead)[0].tolist() if lead else [], TEXT)
            count = len(needles[which].pieces)
            pieces = [
                (tokens[which, i], where[which, i]) if (which, i) in where else None
                for i in range(count)
            ]
            row.ask(question, parts, pieces)
        return row.arrays()

    def near(self, stage, length):
        """A row of pairs told and asked for at any distance, from the next on: what is not in a
        whole chunk yet can only be in the recurrent state."""
        rng, row, taken, told = self.rng, Row(length), set(), []
        letters, digits = (1, 2) if stage == 0 else (rng.choice([1, 2, 2]), rng.choice([2, 3, 5, 7]))
        while len(row.ids) < length:
            if len(told) < 45 and (not told or rng.random() < 0.4):
                needle = tasks.pair(rng, taken, letters, digits)
                tokens = self.tokenizer.encode(needle.pieces[0])
                told.append((needle, tokens, row.add(tokens, 0)))
            else:
                back = min(len(told), int(rng.expovariate(0.15)) + 1)
                needle, tokens, place = told[-back]
                question, parts = self.question(needle)
                row.ask(question, parts, [(tokens, place)])
        return row.arrays()

    def talk(self, length):
        """A row of facts told and asked for at any distance, from the next line on."""
        rng, row, told, keys = self.rng, Row(length), [], set()
        while len(row.ids) < length:
            draw = rng.random()
            if draw < 0.2:
                row.add(self.text(rng.choice([8, 20, 40, 90, 200]))[0].tolist(), TEXT)
            elif draw < 0.55 or not told:
                needle = tasks.mixed(rng, self.settings["mix"])
                if len(needle.pieces) > 1 or needle.kind == "phone_book" or needle.key in keys:
                    continue
                keys.add(needle.key)
                if rng.random() < 0.4:  # told in a chat, and acknowledged
                    row.add(self.tokenizer.encode("\n<|im_start|>user\n"), 0)
                    tokens = self.tokenizer.encode(needle.pieces[0].strip())
                    told.append((needle, tokens, row.add(tokens, 0)))
                    row.add(self.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"), 0)
                    row.add(self.tokenizer.encode(facts.ACKNOWLEDGED + "<|im_end|>"), TEXT)
                else:
                    tokens = self.tokenizer.encode(needle.pieces[0])
                    told.append((needle, tokens, row.add(tokens, 0)))
            else:
                # The latest most often: that is where the chunk is not whole yet.
                which = len(told) - 1 if rng.random() < 0.5 else rng.randrange(len(told))
                needle, tokens, place = told[which]
                question, parts = self.question(needle)
                row.ask(question, parts, [(tokens, place)])
        return row.arrays()

    def counting(self, length):
        """A row of RULER's frequent words."""
        row, count = Row(length), length // 6
        while True:
            text, question, most = tasks.fwe(self.rng, count, self.rng.random() < 0.5)
            ids = [self.tokenizer.encode(part) for part in (text, question)]
            answer = self.tokenizer.encode("".join(" " + word for word in most)) + [
                self.tokenizer.end
            ]
            if len(ids[0]) + len(ids[1]) + len(answer) <= length:
                break
            count = count * 9 // 10
        room = length - len(ids[0]) - len(ids[1]) - len(answer)
        if room:
            row.add(self.text(room)[0].tolist(), TEXT)
            row.resets.append(room)
        row.add(ids[0], 0)
        row.ask(ids[1], [(answer, None)], [])
        return row.arrays()

    def crowds(self, count, length):
        """A batch of rows whose needles are all of one kind and of different keys: each row's are every
        other's rivals."""
        kind, taken, rows = self.crowd_kind(), set(), []
        while len(rows) < count:
            rows.append(self.row(self.asked, 2, length, self.crowd(length, kind, taken)))
        return [np.stack(part) for part in zip(*rows)]

    def batch(self, stage, count, length, plain_rows):
        rows = [self.row(self.plain, length) for _ in range(plain_rows)]
        rows += [self.row(self.questioned, stage, length) for _ in range(count - plain_rows)]
        return [np.stack(part) for part in zip(*rows)]

    def row(self, make, *args):
        settings, rng = self.settings, self.rng
        self.respelling = rng.uniform(0, 0.3) if rng.random() < settings["respelled_rows"] else 0.0
        return make(*args)

    def questioned(self, stage, length):
        settings, rng = self.settings, self.rng
        level, draw = stage, rng.random()
        if rng.random() < 0.15 and length <= 512:
            level = rng.randint(0, stage)
        if level <= 1:
            near = draw < settings["near_share"]
            return self.near(level, length) if near else self.asked(level, length)
        if draw < settings["talk_share"]:
            return self.talk(length)
        if draw < settings["talk_share"] + settings["counting_share"]:
            return self.counting(length)
        return self.asked(level, length)
