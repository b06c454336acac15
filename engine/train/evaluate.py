"""Exact-match accuracy of a model by task and length: python3 engine/train/evaluate.py MODEL
--data DIR [--cases 50] [--lengths 4096,16384] [--tasks ...] [--no-hsa] [--out FILE.csv]

Haystacks are cut from DIR/held.npy, books that were never trained on. One haystack holds one needle
of each task, each at a uniform depth of its own, and is read once; then each question is asked from
that same state. An answer is right when greedy decoding gives it exactly, to its last token, which
is so when each of its tokens is the most likely one after the right ones before it. The case's seed
is --seed plus its number. `text` is the mean loss over the last 4,096 tokens of the haystack.
"""
import argparse
import csv
import json
import math
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

import tasks
from data import Books
from model import Ramba
from tokenizer import Tokenizer

TAIL = 4096


def locker(rng):
    """The sentence of the daemon's own story, with another name and code each time."""
    first, value = rng.choice(tasks.FIRST), tasks.number(rng)
    question = tasks.plain_question(f"What is the secret code of {first}'s locker?")
    return tasks.Needle("locker", f" The secret code of {first}'s locker is {value}.",
                        [(question, f" {value}.")], first)


def other_form(rng):
    while True:
        needle = tasks.fact(rng)
        if "locker" not in needle.text:
            return needle


TASKS = {
    "passkey": tasks.passkey,
    "niah_numbers": lambda rng: tasks.niah(rng, "numbers"),
    "niah_words": lambda rng: tasks.niah(rng, "words"),
    "niah_uuids": lambda rng: tasks.niah(rng, "uuids"),
    "phone": tasks.phone,
    "locker": locker,
    "fact": other_form,
    "fact_held_out": lambda rng: tasks.fact(rng, held_out=True),
}


def haystack(tokenizer, books, rng, needles, length):
    """Token ids [length], and which of them are book text."""
    texts = [tokenizer.encode(needle.text) for needle in needles]
    room = length - sum(map(len, texts))
    if room > len(books.ids) - 128:  # the books again and again, from one place
        at = rng.randrange(len(books.ids))
        repeats = -(-(room + at) // len(books.ids))
        text = np.tile(books.ids, repeats)[at:at + room]
        cut = np.tile(books.cut, repeats)[at:at + room]
    else:
        text, cut = books.take(rng, room)
    places = np.flatnonzero(cut)
    ids, book, before = [], [], 0
    order = list(range(len(texts)))
    rng.shuffle(order)
    for which, place in zip(order, sorted(rng.choice(places) for _ in texts)):
        ids += [text[before:place], np.array(texts[which])]
        book += [np.ones(place - before, bool), np.zeros(len(texts[which]), bool)]
        before = place
    ids.append(text[before:])
    book.append(np.ones(len(text) - before, bool))
    return np.concatenate(ids).astype(np.int64), np.concatenate(book)


def ask(model, session, tokenizer, needle, rng, device):
    question, answer = rng.choice(needle.questions)
    question, answer = tokenizer.encode(question), tokenizer.encode(answer)
    session = {**session, "states": dict(session["states"])}
    ids = torch.tensor(question + answer, device=device)
    logits = model.head(model.stream(session, ids))[0, len(question) - 1:-1]
    return bool((logits.argmax(-1) == ids[len(question):]).all())


def case(model, tokenizer, books, names, length, seed, device, piece):
    rng = random.Random(seed)
    needles = [TASKS[name](rng) for name in names]
    ids, book = haystack(tokenizer, books, rng, needles, length)
    session, ids = {}, torch.from_numpy(ids).to(device)
    head = max(0, length - TAIL)
    for at in range(0, head, piece):
        model.stream(session, ids[at:min(at + piece, head)])
    logits = model.head(model.stream(session, ids[head:]))[0, :-1]
    losses = F.cross_entropy(logits.float(), ids[head + 1:], reduction="none")
    loss = losses[torch.from_numpy(book[head + 1:]).to(device)].mean().item()
    right = [ask(model, session, tokenizer, needle, rng, device) for needle in needles]
    return loss, right


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="what prepare.py made")
    parser.add_argument("--cases", default="50", help="for all lengths, or one number a length")
    parser.add_argument("--lengths", default="4096,16384,65536")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--piece", type=int, default=8192, help="tokens read at a time")
    parser.add_argument("--no-hsa", action="store_true", help="the recurrent state alone")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--out", help="a CSV file; the same as JSON beside it")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Ramba.load(args.model).to(device)
    model.hsa = not args.no_hsa
    tokenizer = Tokenizer.load(args.data)
    books = Books(os.path.join(args.data, "held.npy"), tokenizer)
    lengths = [int(length) for length in args.lengths.split(",")]
    cases = [int(count) for count in args.cases.split(",")]
    cases = cases * len(lengths) if len(cases) == 1 else cases
    names, rows, begin = args.tasks.split(","), [], time.time()
    print(f"seeds {args.seed} to {args.seed + max(cases) - 1}, hsa {model.hsa}, {device}")
    print("length  cases  text   " + " ".join(f"{name:>13}" for name in names) + "  seconds")
    for length, count in zip(lengths, cases):
        results = []
        for number in range(count):
            if time.time() - begin > args.seconds:
                break
            results.append(case(model, tokenizer, books, names, length, args.seed + number, device,
                                args.piece))
        if not results:
            break
        loss = sum(r[0] for r in results) / len(results)
        right = [sum(r[1][i] for r in results) / len(results) for i in range(len(names))]
        rows.append({"length": length, "cases": len(results), "text": round(loss, 4),
                     **{name: round(share, 4) for name, share in zip(names, right)}})
        print(f"{length:<8}{len(results):<6} {loss:.4f} " + " ".join(f"{r:13.3f}" for r in right)
              + f"  {time.time() - begin:.0f}", flush=True)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, ["length", "cases", "text", *names])
            writer.writeheader()
            writer.writerows(rows)
        with open(os.path.splitext(args.out)[0] + ".json", "w") as file:
            json.dump({"seed": args.seed, "hsa": model.hsa, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
