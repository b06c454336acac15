"""Accuracy by task and length, over held-out books:

  python3 engine/train/evaluate.py --url http://127.0.0.1:8080 --data DIR [--out FILE.csv]
  python3 engine/train/evaluate.py --model engine/models/ramba-20m --data DIR [--no-hsa]

The first asks a running daemon through its API: a memory for each haystack, appended once, and every
question asked of it without writing. The second runs the model in PyTorch, where the chunk memories
can be switched off to see what the recurrent state can do alone.

Haystacks are made of DIR/held.npy (see prepare.py), books that were never trained on, and hold the
needles of all tasks that share them, each piece at a uniform depth of its own; noise, crowds of
needles and coded words are haystacks of their own. RULER's tasks count the share of their answers
that the greedy output holds, case folded; all others are right when the output begins with the
answer exactly. `text` is the mean loss over the last 4,096 tokens of a haystack without needles. A
case's seed is --seed plus its number, so that every one can be made again.
With --out: a CSV, the same as JSON, and the plot of accuracy against length (PNG); other lengths that
the JSON holds are kept.
"""
import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import facts
import tasks
import words
from data import Books
from needle import Needle, answer_text, distinct, one, plain_question
from tokenizer import Tokenizer

TAIL = 4096


def locker(rng):
    """The sentence of the daemon's own story, with another name and code each time."""
    first, value = rng.choice(words.FIRST), words.number(rng)
    question = plain_question(f"What is the secret code of {first}'s locker?")
    sentence = f" The secret code of {first}'s locker is {value}."
    return Needle("locker", [sentence], [one(question, f" {value}.")], first)


def numbers_of(key):
    return lambda rng: tasks.niah(rng, "numbers", key(rng))


def unknown_key(rng):
    """Two words that no training key was made of."""
    return "-".join(rng.choice(UNKNOWN) for _ in range(2))


UNKNOWN = """aardvark abacus absent accordion agreeable alligator annoyed anxious avocado awkward
bagpipe bashful bassoon bewildered blushing cactus caterpillar cauliflower chubby clumsy cobra
colossal corduroy crowded cultured dazzling delightful dimple disgusted doubtful elated enchanting
envelope evanescent exuberant flamingo flippant foolish frantic gigantic gopher grotesque grumpy
handsome helpless hilarious hippopotamus homeless immense itchy jackfruit jealous juicy kangaroo
lazuli macaroni mammoth motionless mushroom mysterious nervous nutty obedient obnoxious octopus
outrageous outstanding panicky perfect pineapple poised precious prickly puzzled quaint repulsive
rhinoceros scary selfish shrill sparkling splendid squid stormy teeny tense terrible thoughtful
troubled unsightly upset uptight vexed victorious vivacious wandering wicked zealous zebra
zucchini""".split()

def multikey(rng):
    """The one that is asked for among three of its kind."""
    needles = [tasks.niah(rng, "numbers", words.pair(rng)) for _ in range(4)]
    asked = needles[0]
    pieces = [needle.pieces[0] for needle in needles]
    return Needle("niah_multikey_1", pieces, asked.questions, asked.key, asked.references)


def recent(rng):
    """A fact in the last words, which no whole chunk holds yet."""
    return facts.fact(rng)


# What is asked of each kind of haystack: books, RULER's noise, a crowd of needles, coded words, and
# books without needles.
TASKS = {
    "books": {
        "passkey": tasks.passkey,
        "niah_single_2": numbers_of(words.pair),
        "niah_single_3": lambda rng: tasks.niah(rng, "uuids", words.pair(rng)),
        "niah_words": lambda rng: tasks.niah(rng, "words", words.pair(rng)),
        "niah_unknown": numbers_of(unknown_key),
        "niah_multikey_1": multikey,
        "niah_multivalue": lambda rng: tasks.niah_multivalue(rng, "numbers", 4),
        "niah_multiquery": lambda rng: tasks.niah_multiquery(rng, "numbers", 4),
        "vt": lambda rng: tasks.vt(rng, 4),
        "phone": tasks.phone,
        "phone_book": lambda rng: tasks.phone_book(rng, 20),
        "locker": locker,
        "fact": facts.fact,
        "fact_held_out": lambda rng: facts.fact(rng, held_out=True),
        "family": facts.family,
        "statement": facts.statement,
        "event": facts.event,
        "recent": recent,
    },
    "noise": {"niah_single_1": numbers_of(words.pair)},
    "crowd": {"niah_multikey_2": numbers_of(words.pair)},
    "crowd of uuids": {"niah_multikey_3": lambda rng: tasks.niah(rng, "uuids", tasks.identifier(rng))},
    "coded": {"fwe": None},
    "plain": {"text": None},
}
# Once in a haystack: two passkeys could not be told apart, the last words have room for one fact, and
# one chain is what RULER has.
ALONE = ("passkey", "recent", "vt")
KIND_OF = {name: kind for kind, named in TASKS.items() for name in named}


def spread(books, rng, length):
    """`length` tokens of book text. Their end is drawn, so that a case ends in the same words at
    every length; the books go round."""
    end = rng.randrange(len(books.ids))
    at = np.arange(end - length, end) % len(books.ids)
    return books.ids[at], books.cut[at]


def noise(tokenizer, length):
    """RULER's first haystack: one line repeated."""
    line = tokenizer.encode(" " + tasks.NOISE.strip())
    ids = np.array(line * (length // len(line) + 1), np.uint16)[:length]
    return ids, np.arange(length) % len(line) == 0


def crowd(tokenizer, rng, task, length):
    """A haystack of needles: its text, and one of them."""
    needles, used = [], 0
    while used < length:
        needles.append(task(rng))
        used += len(tokenizer.encode(needles[-1].pieces[0]))
    needles = distinct(needles)
    return "".join(needle.pieces[0] for needle in needles), rng.choice(needles)


def haystack(tokenizer, text, cut, rng, needles):
    """`text` with the needles' pieces in it, each needle's in their order."""
    cuts = np.flatnonzero(cut)
    near = cuts[cuts > len(text) - 40]
    order = [n for n, needle in enumerate(needles) for _ in needle.pieces]
    rng.shuffle(order)
    places = [
        int(rng.choice(near if needles[n].kind == "recent" and len(near) else cuts)) for n in order
    ]
    waiting = [list(needle.pieces) for needle in needles]
    ids, before = [], 0
    for place, n in sorted(zip(places, order), key=lambda pair: pair[0]):
        ids += [text[before:place], np.array(tokenizer.encode(waiting[n].pop(0)))]
        before = place
    return np.concatenate([*ids, text[before:]]).astype(np.int64)


class Daemon:
    """A model behind the API."""

    def __init__(self, url, key):
        self.url, self.key = url.rstrip("/"), key
        self.name = self.call("GET", "/v1/models")["data"][0]["id"]

    def call(self, method, path, body=None, kind="application/json"):
        headers = {"content-type": kind}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=24 * 3600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            sys.exit(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}")
        except urllib.error.URLError as error:
            sys.exit(f"{self.url}: {error.reason}; is the daemon running there?")

    def read(self, text):
        memory = self.call("POST", "/v1/memories", b"{}")["id"]
        self.call("POST", f"/v1/memories/{memory}/append", text.encode(), "text/plain")
        return memory

    def complete(self, memory, prompt, **more):
        body = {"memory": memory, "memory_write": False, "prompt": prompt, "temperature": 0, **more}
        return self.call("POST", "/v1/completions", json.dumps(body).encode())["choices"][0]

    def ask(self, memory, question, limit, *_):
        return self.complete(memory, question, max_tokens=limit)["text"]

    def loss(self, memory, text):
        got = self.complete(memory, text, max_tokens=1, echo=True, logprobs=0)
        logprobs = got["logprobs"]["token_logprobs"][1:-1]
        return -sum(logprobs) / len(logprobs)

    def forget(self, memory):
        self.call("DELETE", f"/v1/memories/{memory}")

    def wait(self):
        """Until it is ready."""
        while True:
            try:
                with urllib.request.urlopen(self.url + "/health/ready", timeout=60):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.01)


class Local:
    """A model in PyTorch, on CUDA where there is one."""

    def __init__(self, folder, hsa, piece):
        import torch

        from model import Ramba

        torch.set_grad_enabled(False)
        self.torch, self.piece = torch, piece
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Ramba.load(folder).to(self.device)
        self.model.hsa = hsa
        self.tokenizer = Tokenizer.load(folder)
        self.name = os.path.basename(os.path.normpath(folder)) + ("" if hsa else " without HSA")

    def stream(self, session, text):
        ids = self.torch.tensor(self.tokenizer.encode(text), device=self.device)
        for at in range(0, len(ids), self.piece):
            x = self.model.stream(session, ids[at : at + self.piece])
        return x, ids

    def read(self, text):
        session = {}
        self.stream(session, text)
        return session

    def ask(self, session, question, limit, answer, exact):
        """Greedy. As long as it is `answer`, all of its tokens are found at once; what comes behind
        them does not count, nor, where it must be `exact`, what comes behind the first wrong one."""
        fork = lambda: {**session, "states": dict(session["states"])}
        asked, guess = self.tokenizer.encode(question), self.tokenizer.encode(answer)[:limit]
        x = self.model.stream(fork(), self.torch.tensor(asked + guess, device=self.device))
        said = self.model.head(x[:, len(asked) - 1 :])[0].argmax(-1).tolist()
        right = next((i for i, pair in enumerate(zip(said, guess)) if pair[0] != pair[1]), len(guess))
        out, token = guess[:right], said[right]
        if exact or right == len(guess):
            return self.tokenizer.decode(out + [token])
        ask = fork()
        self.model.stream(ask, self.torch.tensor(asked + out, device=self.device))
        while len(out) < limit and token != self.tokenizer.end:
            out.append(token)
            x = self.model.stream(ask, self.torch.tensor([token], device=self.device))
            token = int(self.model.head(x[:, -1:])[0, 0].argmax())
        return self.tokenizer.decode(out)

    def loss(self, session, text):
        ids = self.torch.tensor(self.tokenizer.encode(text), device=self.device)
        logits = self.model.head(self.model.stream(session, ids))[0, :-1]
        return self.torch.nn.functional.cross_entropy(logits.float(), ids[1:]).item()

    def forget(self, session):
        pass


def score(needle, question, answer, output):
    if needle.references is not None:
        found = [reference.lower() in output.lower() for reference in needle.references]
        return sum(found) / len(found)
    return float(output.startswith(answer.replace("<|im_end|>", "")))


class Judge:
    """Makes haystacks, has them read, asks and scores. `each`: needles of each task in a haystack."""

    def __init__(self, target, tokenizer, books, each=1, verbose=False):
        self.target, self.tokenizer, self.books = target, tokenizer, books
        self.each, self.verbose = each, verbose
        self.read_tokens, self.reads, self.asks = 0, [], []  # seconds

    def questions(self, named, rng):
        """[(task, needle, question, answer, limit)] of [(task, needle)]."""
        out = []
        for name, needle in named:
            question, parts = rng.choice(needle.questions)
            answer = answer_text(parts)
            slack = 64 if needle.references and len(needle.references) > 1 else 8
            out.append((name, needle, question, answer, len(self.tokenizer.encode(answer)) + slack))
        return out

    def hidden(self, kind, names, length, rng):
        """A haystack with every task's needles, the same whatever is asked: text and questions."""
        tokenizer, named = self.tokenizer, []
        for name in TASKS[kind]:
            count = 1 if name in ALONE else self.each
            made = distinct([TASKS[kind][name](rng) for _ in range(count)])
            for needle in made:
                needle.kind = name if name == "recent" else needle.kind
            named += [(name, needle) for needle in made]
        needles = [needle for _, needle in named]
        intro = tokenizer.encode(tasks.niah_intro("numbers", kind == "noise" and self.each == 1))
        room = length - len(intro)
        room -= sum(len(tokenizer.encode(p)) for needle in needles for p in needle.pieces)
        text, cut = noise(tokenizer, room) if kind == "noise" else spread(self.books, rng, room)
        ids = haystack(tokenizer, text, cut, rng, needles)
        asked = [(name, needle) for name, needle in named if name in names]
        return tokenizer.decode(np.concatenate([intro, ids])), self.questions(asked, rng)

    def make(self, kind, names, length, seed):
        """A haystack's text and its questions; of plain text, its end instead of questions."""
        rng = random.Random(seed)
        if kind == "plain":
            ids, _ = spread(self.books, rng, length)
            return self.tokenizer.decode(ids[:-TAIL]) or "\n", self.tokenizer.decode(ids[-TAIL:])
        if kind == "coded":
            text, question, most = tasks.fwe(rng, length // 6)
            needle = Needle("fwe", [], [(question, [(" " + " ".join(most), 0)])], "fwe", most)
            return text, self.questions([("fwe", needle)], rng)
        if kind.startswith("crowd"):
            text, needle = crowd(self.tokenizer, rng, TASKS[kind][names[0]], length)
            intro = tasks.niah_intro(needle.kind[5:])
            return intro + text.strip(), self.questions([(names[0], needle)], rng)
        return self.hidden(kind, names, length, rng)

    def answers(self, memory, questions):
        """{task: [score]}"""
        scores = {}
        for name, needle, question, answer, limit in questions:
            begin = time.time()
            output = self.target.ask(memory, question, limit, answer, needle.references is None)
            self.asks.append(time.time() - begin)
            got = score(needle, question, answer, output)
            scores.setdefault(name, []).append(got)
            if self.verbose and got < 1:
                print(f"{name} {got:.2f}: {question!r}\n  want {answer!r}\n  got  {output!r}")
        return scores

    def case(self, kind, names, length, seed, again=None):
        """{task: [score]}, and with `again` the same of the memory once more after that command."""
        text, questions = self.make(kind, names, length, seed)
        begin = time.time()
        memory = self.target.read(text)
        self.read_tokens += length
        self.reads.append(time.time() - begin)
        if kind == "plain":
            scores = {"text": [self.target.loss(memory, questions)]}
        else:
            scores = self.answers(memory, questions)
        if again and kind != "plain":
            scores.update(self.once_more(memory, questions, again))
        self.target.forget(memory)
        if self.verbose:
            # In one piece: others print beside it.
            print(f"case {kind}, {size(length)}, seed {seed}: {json.dumps(scores)}\n", end="", flush=True)
        return scores

    def once_more(self, memory, questions, command):
        begin = time.time()
        subprocess.run(command, shell=True, check=True)
        self.target.wait()
        ready = time.time()
        self.target.ask(memory, questions[0][2], 1)
        print(f"  after {command!r}: ready in {ready - begin:.2f} s, first token {time.time() - ready:.3f} s later")
        return {name + " again": got for name, got in self.answers(memory, questions).items()}

    def speed(self):
        """Since the last call: a line about time."""
        line = f"{self.read_tokens / max(1e-9, sum(self.reads)) / 1e3:.0f}K tokens/s read by each reader"
        if self.asks:
            asks = sorted(self.asks)
            line += f", {len(asks)} questions, median {1e3 * asks[len(asks) // 2]:.0f} ms"
        self.read_tokens, self.reads, self.asks = 0, [], []
        return line


def size(length):
    return f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}K"


def plot(rows, names, title, path):
    try:
        import matplotlib
    except ImportError:
        print("no plot without matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6))
    styles = ["-", "--", ":"]
    for i, name in enumerate(name for name in names if name != "text"):
        known = [row for row in rows if row.get(name) is not None]
        axes.plot(
            [row["length"] for row in known],
            [100 * row[name] for row in known],
            marker="o",
            markersize=4,
            linestyle=styles[i // 10 % 3],
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["length"] for row in rows], [size(row["length"]) for row in rows])
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("right answers, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower left", ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def write(base, name, seed, rows):
    """The rows, and those of other lengths that are there already."""
    if os.path.exists(base + ".json"):
        with open(base + ".json") as file:
            lengths = [row["length"] for row in rows]
            old = [row for row in json.load(file)["rows"] if row["length"] not in lengths]
        rows = sorted(old + rows, key=lambda row: row["length"])
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(base + ".csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    with open(base + ".json", "w") as file:
        json.dump({"model": name, "seed": seed, "rows": rows}, file, indent=1)
    beside = ("length", "cases", "each")
    names = [name for name in names if name not in beside and not name.endswith(" again")]
    plot(rows, names, f"{name}: held-out books", base + ".png")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running daemon")
    parser.add_argument("--key", default=os.environ.get("RAMBA_API_KEY"), help="its API key")
    parser.add_argument("--model", help="a model's folder, to be run in PyTorch")
    parser.add_argument("--no-hsa", action="store_true", help="the recurrent state alone")
    parser.add_argument("--data", required=True, help="what prepare.py made")
    parser.add_argument("--cases", default="20", help="for all lengths, or one number a length")
    parser.add_argument("--lengths", default="4K,16K,64K", help="4096, 4K, 1M ...")
    parser.add_argument("--tasks", default=",".join(KIND_OF), help="default: all")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--piece", type=int, default=8192, help="PyTorch: tokens read at a time")
    parser.add_argument("--each", type=int, default=1, help="needles of each task in a haystack")
    parser.add_argument("--parallel", type=int, default=1, help="a daemon: haystacks at once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case begins later")
    parser.add_argument("--again", metavar="COMMAND", help="ask again after it: to restart the daemon")
    parser.add_argument("--verbose", action="store_true", help="print cases, and what is not right")
    parser.add_argument("--out", help="a CSV file; a JSON and a PNG beside it")
    args = parser.parse_args()
    if args.model and (args.parallel > 1 or args.again):
        parser.error("--parallel and --again are for a daemon")
    if bool(args.url) == bool(args.model):
        parser.error("name a daemon with --url or a folder with --model")
    args.tasks = args.tasks.split(",")
    unknown = [name for name in args.tasks if name not in KIND_OF]
    if unknown:
        parser.error(f"no task {unknown[0]}; there are {', '.join(KIND_OF)}")
    units = {"K": 1 << 10, "M": 1 << 20}
    args.lengths = [
        int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
        for text in args.lengths.split(",")
    ]
    args.cases = [int(count) for count in args.cases.split(",")]
    if len(args.cases) == 1:
        args.cases *= len(args.lengths)
    if len(args.cases) != len(args.lengths):
        parser.error("--cases wants one number, or as many as --lengths")
    return args


def measure(judge, args, length, count, pool, late):
    """{task: mean} of `count` haystacks of each kind, or as many as begin before it is `late`; and
    how many haystacks there were of the kind that had the most."""
    jobs = [
        (kind, names, length, args.seed + number, args.again)
        for number in range(count)
        for kind in TASKS
        if (names := [name for name in TASKS[kind] if name in args.tasks])
    ]
    scores, cases = {}, Counter()
    judged = pool.map(lambda job: {} if late() else judge.case(*job), jobs)
    for done, (job, got) in enumerate(zip(jobs, judged), 1):
        cases[job[0]] += bool(got)
        for name, values in got.items():
            scores.setdefault(name, []).extend(values)
        if sys.stderr.isatty():
            print(f"\r{size(length)}: {done} of {len(jobs)}", end="\r", file=sys.stderr)
    order = [name + more for more in ("", " again") for name in args.tasks if name + more in scores]
    means = {name: round(sum(scores[name]) / len(scores[name]), 4) for name in order}
    return means, max(cases.values())


def main():
    args = parse()
    target = (
        Daemon(args.url, args.key) if args.url else Local(args.model, not args.no_hsa, args.piece)
    )
    tokenizer = Tokenizer.load(args.data)
    books = Books(os.path.join(args.data, "held.npy"), tokenizer)
    judge = Judge(target, tokenizer, books, args.each, args.verbose)
    rows, begin = [], time.time()
    print(f"{target.name}, seeds from {args.seed}")
    with ThreadPoolExecutor(args.parallel) as pool:
        for length, count in zip(args.lengths, args.cases):
            late = lambda: time.time() - begin > args.seconds
            means, count = measure(judge, args, length, count, pool, late)
            if not means:
                break
            rows.append({"length": length, "cases": count, "each": args.each, **means})
            print(f"{size(length)}, {count} cases, {time.time() - begin:.0f} s; {judge.speed()}")
            for name, mean in means.items():
                shown = f"{mean:.4f}" if name == "text" else f"{100 * mean:5.1f} %"
                print(f"  {name:<16} {shown}", flush=True)
            if args.out:
                write(os.path.splitext(args.out)[0], target.name, args.seed, rows)


if __name__ == "__main__":
    main()
