"""What evaluate.py --verbose printed, as the tables of a model card:

  python3 engine/train/report.py LOG... [--before LOG...] [--plot FILE.png]

A mean is over the scores of all cases of a task and a length, in whichever log they are; a case that
was asked twice counts once, with what the last log says. Behind the first table stand how many
haystacks there were of the tasks that have their own, the loss on the same stretches after more and
more text, and how many answers had another score when they were asked again (evaluate.py --again).
With --before, the logs of another model: both means on the cases that both were asked, and how many
scores are higher now and how many lower.
"""
import argparse
import json
import re

from evaluate import KIND_OF, TASKS, plot, size

CASE = re.compile(r"^case [a-z ]+, (\d+[KM]), seed (\d+): (\{[^}]*\})$", re.M)
AGAIN = " again"


def tokens(name):
    return int(name[:-1]) << (20 if name[-1] == "M" else 10)


def read(paths):
    """{(task, length, seed): [score]}"""
    found = {}
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            for length, seed, scores in CASE.findall(file.read()):
                for task, values in json.loads(scores).items():
                    found[task, tokens(length), int(seed)] = values
    return found


def select(found, task, length):
    """{seed: [score]}"""
    return {seed: values for (t, l, seed), values in found.items() if (t, l) == (task, length)}


def scores(found, task, length):
    return [value for values in select(found, task, length).values() for value in values]


def mean(values):
    return sum(values) / len(values)


def shown(task, values):
    """Their mean: nats of text, else percent."""
    if not values:
        return ""
    return f"{mean(values):.3f}" if task == "text" else f"{100 * mean(values):.1f}".removesuffix(".0")


def name_of(task):
    return "loss (nats a token)" if task == "text" else task


def row(name, cells):
    return f"| {name} | " + " | ".join(cells) + " |"


def head(name, lengths):
    return [row(name, map(size, lengths)), "|---" * (len(lengths) + 1) + "|"]


def accuracy(found, lengths):
    """The first table's lines."""
    shared = [
        f"{len(select(found, 'passkey', l))}, {max(len(scores(found, t, l)) for t in TASKS['books'])}"
        for l in lengths
    ]
    lines = head("", lengths) + [row("haystacks of books, facts of a task in all", shared)]
    for task in KIND_OF:
        cells = [shown(task, scores(found, task, l)) for l in lengths]
        if any(cells):
            lines.append(row(name_of(task), cells))
    return lines


def notes(found, lengths):
    """What the first table does not show."""
    for kind in TASKS:
        for task in TASKS[kind] if kind != "books" else ():
            counts = {length: len(select(found, task, length)) for length in lengths}
            if any(counts.values()):
                each = [f"{count} of {size(length)}" for length, count in counts.items() if count]
                yield f"haystacks of {task}: " + ", ".join(each)
    for count in range(2, len(lengths) + 1):
        losses = [select(found, "text", l) for l in lengths[:count]]
        seeds = set.intersection(*map(set, losses))
        if seeds:
            after = [f"{mean([l[s][0] for s in seeds]):.3f} after {size(n)}" for l, n in zip(losses, lengths)]
            yield f"loss on the same {len(seeds)} stretches: " + ", ".join(after)
    for length in lengths:
        twice = [
            first != second
            for (task, l, seed), values in found.items()
            if l == length and (task + AGAIN, l, seed) in found
            for first, second in zip(values, found[task + AGAIN, l, seed])
        ]
        if twice:
            yield f"asked again, {size(length)}: {sum(twice)} of {len(twice)} scores differ"


def pairs(before, now, task, length):
    """[(score before, score now)] of what both were asked."""
    old, new = select(before, task, length), select(now, task, length)
    return [pair for seed in old if seed in new for pair in zip(old[seed], new[seed])]


def moved(pairs_):
    return f"+{sum(b > a for a, b in pairs_)} -{sum(b < a for a, b in pairs_)}"


def comparison(before, now, lengths):
    """The second table's lines."""
    lines = head("before -> now, scores, higher and lower", lengths)
    all_of = {length: [] for length in lengths}
    for task in KIND_OF:
        cells = []
        for length in lengths:
            both = pairs(before, now, task, length)
            old, new = zip(*both) if both else ((), ())
            means = f"{shown(task, old)} -> {shown(task, new)}, {len(both)}"
            if task != "text":  # of which less is better
                all_of[length] += both
                means += f", {moved(both)}"
            cells.append(means if both else "")
        if any(cells):
            lines.append(row(name_of(task), cells))
    return lines + [row("all tasks", [moved(all_of[l]) for l in lengths])]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--before", nargs="+", default=[], metavar="LOG", help="of another model")
    parser.add_argument("--plot", metavar="PNG", help="accuracy against length")
    parser.add_argument("--title", default="ramba-20m: held-out books", help="of the plot")
    args = parser.parse_args()
    now, before = read(args.logs), read(args.before)
    lengths = sorted({length for _, length, _ in now})
    if not lengths:
        parser.error("no cases in these logs; evaluate.py prints them with --verbose")
    print("\n".join([*accuracy(now, lengths), "", *notes(now, lengths)]))
    if before:
        known = sorted({length for _, length, _ in before} & set(lengths))
        print("\n".join(["", *comparison(before, now, known)]))
    if args.plot:
        names = [task for task in KIND_OF if task != "text"]
        rows = [
            {"length": l, **{n: mean(s) if (s := scores(now, n, l)) else None for n in names}}
            for l in lengths
        ]
        plot(rows, names, args.title, args.plot)


if __name__ == "__main__":
    main()
