"""Exact-match accuracy by task and length, over held-out books:

  python3 engine/train/evaluate.py --url http://127.0.0.1:8080 --data DIR [--out FILE.csv]
  python3 engine/train/evaluate.py --model engine/models/ramba-6m --data DIR [--no-hsa]

The first asks a running daemon through its API: one memory a case, its haystack appended, each
question asked without writing. The second runs the model in PyTorch, where the chunk memories can
be switched off to see what the recurrent state can do alone.

Haystacks are cut from DIR/held.npy (see prepare.py), books that were never trained on. A haystack
holds one needle of each task, each at a uniform depth of its own, and is read once. An answer is
right when greedy decoding begins with it exactly. A case's seed is --seed plus its number, so that
every row can be made again. `text` is the mean loss over the last 4,096 tokens (PyTorch only).
With --out: a CSV, the same as JSON, and the plot of accuracy against length (PNG).
"""
import argparse
import csv
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request

import numpy as np

import tasks
from data import Books
from tokenizer import Tokenizer

TAIL = 4096


def locker(rng):
    """The sentence of the daemon's own story, with another name and code each time."""
    first, value = rng.choice(tasks.FIRST), tasks.number(rng)
    question = tasks.plain_question(f"What is the secret code of {first}'s locker?")
    return tasks.Needle(
        "locker",
        f" The secret code of {first}'s locker is {value}.",
        [(question, f" {value}.")],
        first,
    )


def other_form(rng):
    while True:
        needle = tasks.fact(rng)
        if "locker" not in needle.text:
            return needle


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

TASKS = {
    "passkey": tasks.passkey,
    "niah_numbers": numbers_of(tasks.ruler_key),
    "niah_words": lambda rng: tasks.niah(rng, "words"),
    "niah_uuids": lambda rng: tasks.niah(rng, "uuids"),
    "niah_unknown": numbers_of(unknown_key),
    "phone": tasks.phone,
    "locker": locker,
    "fact": other_form,
    "fact_held_out": lambda rng: tasks.fact(rng, held_out=True),
    "statement": tasks.statement,
}


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


def haystack(tokenizer, books, rng, needles, length, of_noise):
    """Token ids [length], and which of them are book text."""
    pieces = [tokenizer.encode(needle.text) for needle in needles]
    room = max(0, length - sum(map(len, pieces)))
    text, cut = noise(tokenizer, room) if of_noise else spread(books, rng, room)
    places = np.flatnonzero(cut) if cut.any() else [0]
    ids, book, before = [], [], 0
    rng.shuffle(pieces)
    for piece, place in zip(pieces, sorted(rng.choice(places) for _ in pieces)):
        ids += [text[before:place], np.array(piece)]
        book += [np.ones(place - before, bool), np.zeros(len(piece), bool)]
        before = place
    ids.append(text[before:])
    book.append(np.ones(len(text) - before, bool))
    return np.concatenate(ids).astype(np.int64), np.concatenate(book)


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

    def read(self, tokenizer, ids, book):
        memory = self.call("POST", "/v1/memories", b"{}")["id"]
        self.call(
            "POST", f"/v1/memories/{memory}/append", tokenizer.decode(ids).encode(), "text/plain"
        )
        return memory, None

    def ask(self, memory, tokenizer, question, answer):
        body = {
            "memory": memory,
            "memory_write": False,
            "prompt": question,
            "temperature": 0,
            "max_tokens": len(tokenizer.encode(answer)) + 4,
        }
        text = self.call("POST", "/v1/completions", json.dumps(body).encode())["choices"][0]["text"]
        return text.startswith(answer.replace("<|im_end|>", ""))

    def forget(self, memory):
        self.call("DELETE", f"/v1/memories/{memory}")


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
        self.name = os.path.basename(os.path.normpath(folder)) + ("" if hsa else " without HSA")

    def read(self, tokenizer, ids, book):
        session, head = {}, max(0, len(ids) - TAIL)
        ids = self.torch.from_numpy(ids).to(self.device)
        for at in range(0, head, self.piece):
            self.model.stream(session, ids[at : min(at + self.piece, head)])
        logits = self.model.head(self.model.stream(session, ids[head:]))[0, :-1]
        losses = self.torch.nn.functional.cross_entropy(
            logits.float(), ids[head + 1 :], reduction="none"
        )
        return (
            session,
            losses[self.torch.from_numpy(book[head + 1 :]).to(self.device)].mean().item(),
        )

    def ask(self, session, tokenizer, question, answer):
        """Greedy decoding gives the answer when each of its tokens is the most likely one after
        the right ones before it."""
        question, answer = tokenizer.encode(question), tokenizer.encode(answer)
        session = {**session, "states": dict(session["states"])}
        ids = self.torch.tensor(question + answer, device=self.device)
        logits = self.model.head(self.model.stream(session, ids))[0, len(question) - 1 : -1]
        return bool((logits.argmax(-1) == ids[len(question) :]).all())

    def forget(self, session):
        pass


def case(target, tokenizer, books, names, length, seed, of_noise):
    rng = random.Random(seed)
    needles = [TASKS[name](rng) for name in names]
    ids, book = haystack(tokenizer, books, rng, needles, length, of_noise)
    held, loss = target.read(tokenizer, ids, book)
    right = [target.ask(held, tokenizer, *rng.choice(needle.questions)) for needle in needles]
    target.forget(held)
    return loss, right


def plot(rows, names, title, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name in names:
        axes.plot(
            [row["length"] for row in rows],
            [100 * row[name] for row in rows],
            marker="o",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["length"] for row in rows], [f"{row['length'] // 1024}K" for row in rows])
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("right answers, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running daemon")
    parser.add_argument("--key", default=os.environ.get("RAMBA_API_KEY"), help="its API key")
    parser.add_argument("--model", help="a model's folder, to be run in PyTorch")
    parser.add_argument("--no-hsa", action="store_true", help="the recurrent state alone")
    parser.add_argument("--data", required=True, help="what prepare.py made")
    parser.add_argument("--cases", default="50", help="for all lengths, or one number a length")
    parser.add_argument("--lengths", default="4096,16384,65536")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--noise", action="store_true", help="one line repeated, no books")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--piece", type=int, default=8192, help="PyTorch: tokens read at a time")
    parser.add_argument("--out", help="a CSV file; a JSON and a PNG beside it")
    args = parser.parse_args()
    if bool(args.url) == bool(args.model):
        parser.error("name a daemon with --url or a folder with --model")
    names = args.tasks.split(",")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        parser.error(f"no task {unknown[0]}; there are {', '.join(TASKS)}")
    target = (
        Daemon(args.url, args.key) if args.url else Local(args.model, not args.no_hsa, args.piece)
    )
    tokenizer = Tokenizer.load(args.data)
    books = Books(os.path.join(args.data, "held.npy"), tokenizer)
    lengths = [int(length) for length in args.lengths.split(",")]
    cases = [int(count) for count in args.cases.split(",")]
    cases = cases * len(lengths) if len(cases) == 1 else cases
    rows, begin = [], time.time()
    print(f"{target.name}, seeds from {args.seed}")
    print("length  cases  text   " + " ".join(f"{name:>13}" for name in names) + "  seconds")
    for length, count in zip(lengths, cases):
        results = []
        for number in range(count):
            results.append(
                case(target, tokenizer, books, names, length, args.seed + number, args.noise)
            )
            if sys.stderr.isatty():
                print(f"\r{length}: {number + 1} of {count}", end="\r", file=sys.stderr)
        losses = [loss for loss, _ in results if loss is not None]
        loss = round(sum(losses) / len(losses), 4) if losses else None
        right = [sum(r[i] for _, r in results) / count for i in range(len(names))]
        rows.append(
            {
                "length": length,
                "cases": count,
                "text": loss,
                **{name: round(share, 4) for name, share in zip(names, right)},
            }
        )
        print(
            f"{length:<8}{count:<6} {'-' if loss is None else loss:<6} "
            + " ".join(f"{r:13.3f}" for r in right)
            + f"  {time.time() - begin:.0f}",
            flush=True,
        )
        if args.out:
            base = os.path.splitext(args.out)[0]
            with open(base + ".csv", "w", newline="") as file:
                writer = csv.DictWriter(file, ["length", "cases", "text", *names])
                writer.writeheader()
                writer.writerows(rows)
            with open(base + ".json", "w") as file:
                json.dump({"model": target.name, "seed": args.seed, "rows": rows}, file, indent=1)
            plot(rows, names, f"{target.name}: held-out books", base + ".png")


if __name__ == "__main__":
    main()
