"""Holds report.py against tables made by hand. Exit status 1 when one is off."""
import json
import os
import subprocess
import sys
import tempfile

NOW = {  # case: {task: [score]}; one log, then another in which a case was asked anew
    ("books", "4K", 7): {"passkey": [1.0], "fact": [0.0, 0.0], "niah_multivalue": [0.25, 0.5]},
    ("plain", "4K", 3): {"text": [3.5]},
    ("books", "1M", 7): {"passkey": [1.0], "fact": [1.0, 0.0], "fact again": [1.0, 1.0]},
}
ANEW = {("books", "4K", 7): {"passkey": [1.0], "fact": [1.0, 0.0], "niah_multivalue": [0.25, 1.0]},
        ("plain", "1M", 3): {"text": [3.25]}}
BEFORE = {("books", "4K", 7): {"passkey": [0.0], "fact": [1.0, 1.0]}, ("books", "4K", 8): {"fact": [0.0]},
          ("plain", "4K", 3): {"text": [3.75]}}
WANTED = """|  | 4K | 1M |
|---|---|---|
| haystacks of books, facts of a task in all | 1, 2 | 1, 2 |
| passkey | 100 | 100 |
| niah_multivalue | 62.5 |  |
| fact | 50 | 50 |
| loss (nats a token) | 3.500 | 3.250 |

haystacks of text: 1 of 4K, 1 of 1M
loss on the same 1 stretches: 3.500 after 4K, 3.250 after 1M
asked again, 1M: 1 of 2 scores differ

| before -> now, scores, higher and lower | 4K |
|---|---|
| passkey | 0 -> 100, 1, +1 -0 |
| fact | 100 -> 50, 2, +0 -1 |
| loss (nats a token) | 3.750 -> 3.500, 1 |
| all tasks | +1 -1 |
"""


def log(folder, name, cases):
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        file.write("export, seeds from 3\nfact 0.00: '\\nQuestion: What?'\n  want ' a.'\n  got  ' b.'\n")
        for (kind, length, seed), scores in cases.items():
            file.write(f"case {kind}, {length}, seed {seed}: {json.dumps(scores)}\n")
    return path


def main():
    report = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.py")
    with tempfile.TemporaryDirectory() as folder:
        now = [log(folder, "now", NOW), log(folder, "anew", ANEW)]
        before = log(folder, "before", BEFORE)
        run = lambda *args: subprocess.run([sys.executable, report, *args], capture_output=True, text=True)
        got, none = run(*now, "--before", before), run(log(folder, "none", {}))
    good = got.stdout == WANTED and got.returncode == 0
    good &= none.returncode == 2 and "no cases" in none.stderr
    print(f"{'ok  ' if good else 'FAIL'} the tables of a model card")
    if not good:
        print(got.stdout + got.stderr + none.stderr)
    sys.exit(not good)


if __name__ == "__main__":
    main()
