"""Which words of a text are rare, and where the same word stood before."""
import numpy as np

CHUNK = 64
RARE = 1 / 20000  # of the tokens of the books that are trained on
FACTOR, LONGEST = np.uint64(0x9E3779B97F4A7C15), 64


class Words:
    """Words of token ids: runs of letters, the same where their tokens are, but for a leading space."""

    def __init__(self, tokenizer, ids):
        """`ids`: of the books that are trained on."""
        size = tokenizer.size
        self.bare, self.begins, self.letters = np.arange(size), np.ones(size, bool), np.zeros(size, bool)
        for i, name in tokenizer.names.items():
            bare = name.lstrip("Ġ")
            self.bare[i] = tokenizer.vocab.get(bare, i)
            self.letters[i] = bare.isascii() and bare.isalpha()
            self.begins[i] = bare != name or not self.letters[i]
        with np.errstate(over="ignore"):
            self.powers = np.cumprod(np.full(LONGEST, FACTOR))
        known, counts = np.unique(self.of(ids)[2], return_counts=True)
        self.often = known[counts >= RARE * len(ids)]

    def of(self, ids):
        """Of each word where it begins, where it ends, and a number that stands for it."""
        start = self.begins[ids]
        start[1:] |= ~self.letters[ids[:-1]]
        start[0] = True
        begins = np.flatnonzero(start)
        place = np.arange(len(ids)) - begins[np.cumsum(start) - 1]
        with np.errstate(over="ignore"):
            parts = (self.bare[ids].astype(np.uint64) + np.uint64(1)) * self.powers[
                np.minimum(place, LONGEST - 1)
            ]
            numbers = np.add.reduceat(parts, begins)
        ends = np.append(begins[1:], len(ids))
        words = self.letters[ids[begins]]
        return begins[words], ends[words], numbers[words]

    def rare(self, ids):
        """Of each rare word: where it begins, where it ends, and where it began the last time, or -1."""
        begins, ends, numbers = self.of(ids)
        seldom = ~np.isin(numbers, self.often)
        begins, ends, numbers = begins[seldom], ends[seldom], numbers[seldom]
        order = np.argsort(numbers, kind="stable")
        last = np.full(len(begins), -1)
        same = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
        last[order[same + 1]] = begins[order[same]]
        return begins, ends, last

    def recalled(self, ids):
        """[len(ids)]: for each token that the same rare word's last place in a whole chunk tells, that
        place, else -1: those behind a word's first, and the first behind the same token."""
        places = np.full(len(ids), -1, np.int32)
        for begin, end, last in zip(*self.rare(ids)):
            if last < 0:
                continue
            for at, place in zip(range(begin, end), range(last, last + end - begin)):
                told = at > begin or (last > 0 and ids[at - 1] == ids[place - 1])
                if told and ids[at] == ids[place] and (place // CHUNK + 1) * CHUNK < at:
                    places[at] = place
        return places
