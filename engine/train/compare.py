"""Forms of the model trained beside each other on the same rows:
python3 engine/train/compare.py CONFIG --data DIR --out DIR --seconds N FORM...

FORM is a name and what it changes of CONFIG, in one word: 'mamba hsa=false model.num_lower_layers=5'.
On several GPUs, those of CUDA_VISIBLE_DEVICES, the forms go round them. All take the same rows in the
same order and keep pace, so that at any moment, and at the end, they have seen the same tokens. Their
clock, and so the way down of the learning rate, starts when all are compiled and ends with --seconds.
CONFIG says how long the rows of each stage last: `stage_steps`. OUT/NAME holds log.txt and export;
then text_loss.py's table of each form comes out.
"""
import argparse
import math
import multiprocessing
import os
import pickle
import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

import text_loss
from data import TEXT, Books, Builder
from model import Ramba
from tokenizer import Tokenizer
from train import LAST_STAGE, Trainer, configured, level_of, plain_rows, stage_of

AHEAD = 10  # steps that a form may be before the slowest
STORED = 400  # steps that rows are made before the slowest


def rows_of(settings, builder, step):
    """The rows of a step, whoever makes them: (stage, shape, crowd, arrays)."""
    builder.rng = rng = random.Random(settings["seed"] * 10**7 + step)
    stage, shapes = stage_of(settings, step), settings["shapes"]
    shares = [size["share"] for size in shapes.values()]
    name = rng.choices(list(shapes), shares)[0] if stage == LAST_STAGE else next(iter(shapes))
    size = shapes[name]
    if stage >= settings["distraction_from"] and rng.random() < settings["crowd_share"]:
        return stage, name, True, builder.crowds(size["batch"], size["length"])
    plain = plain_rows(settings, rng, stage, size["batch"])
    level = level_of(stage, size["length"])
    return stage, name, False, builder.batch(level, size["batch"], size["length"], plain)


class Pace:
    """Where each form is: a file each in OUT/pace, its next step. Gone: a form that failed."""

    def __init__(self, out):
        self.folder = os.path.join(out, "pace")
        os.makedirs(self.folder, exist_ok=True)

    def tell(self, name, step):
        path = os.path.join(self.folder, name)
        with open(path + ".new", "w") as file:
            file.write(str(step))
        os.replace(path + ".new", path)

    def slowest(self):
        steps = []
        for name in os.listdir(self.folder):
            if not name.endswith(".new"):
                try:
                    with open(os.path.join(self.folder, name)) as file:
                        steps.append(int(file.read()))
                except FileNotFoundError:
                    pass  # it has failed in between
        return min(steps, default=0)

    def end_at(self, step):
        """The step at which all end: `step`, or what another has said."""
        path = os.path.join(self.folder, "end.new")
        try:
            with open(path, "x") as file:
                file.write(str(step))
            return step
        except FileExistsError:
            time.sleep(0.1)  # it may be in the writing
            with open(path) as file:
                return int(file.read())

    def forget(self, name):
        if os.path.exists(os.path.join(self.folder, name)):
            os.remove(os.path.join(self.folder, name))


def make_rows(settings, data, out, first, makers):
    """Writes OUT/rows/STEP.npz for every `makers`th step from `first` on, for ever; removes what all
    have taken."""
    os.nice(5)
    tokenizer = Tokenizer.load(data)
    builder = Builder(tokenizer, Books(os.path.join(data, "train.npy"), tokenizer), 0, settings)
    pace, step, old = Pace(out), first, first
    path = lambda step: os.path.join(out, "rows", f"{step}.npz")
    while True:
        slowest = pace.slowest()
        while old < slowest:
            os.remove(path(old))
            old += makers
        if step > max(0, slowest) + STORED:
            time.sleep(0.05)
            continue
        stage, name, crowd, (ids, marks, resets, gold) = rows_of(settings, builder, step)
        with open(path(step) + ".new", "wb") as file:
            np.savez(
                file, stage=stage, name=name, crowd=crowd, ids=ids.astype(np.uint16), marks=marks,
                resets=resets, gold=gold,
            )
        os.replace(path(step) + ".new", path(step))
        step += makers


class Follower(Trainer):
    """Takes its rows from the makers, keeps pace with the others, and has their clock."""

    def __init__(self, name, args):
        self.name, self.pace, self.start_at, self.end = name, Pace(args.together), None, None
        super().__init__(args)
        self.pace.tell(name, 0)
        while self.pace.slowest() < 0:
            time.sleep(0.05)
        self.start_at = time.time()

    def start_workers(self):
        return [], {name: None for name in self.settings["shapes"]}

    def batch(self, queues):
        if self.step:
            self.pace.tell(self.name, self.step)
        while self.step > self.pace.slowest() + AHEAD:
            time.sleep(0.001)
        path = os.path.join(self.args.together, "rows", f"{self.step}.npz")
        while not os.path.exists(path):
            time.sleep(0.001)
        made = np.load(path)
        self.stage, marks, gold = int(made["stage"]), made["marks"], made["gold"]
        if not self.settings["recall"]:
            gold = np.where(marks == TEXT, -1, gold)
        arrays = [made["ids"].astype(np.int64), marks, made["resets"], gold]
        return str(made["name"]), bool(made["crowd"]), arrays

    def done(self):
        """By the common clock; the first that finds it run out says at which step all end."""
        if self.start_at is None:
            return 0.0
        share = (time.time() - self.start_at) / max(1.0, self.args.until - self.start_at)
        if share >= 1 and self.end is None:
            self.end = self.pace.end_at((self.step // AHEAD + 2) * AHEAD)
        return 1.0 if self.end is not None and self.step >= self.end else min(share, 0.999)


def follow(name, changes, gpu, args):
    """A form's process: trains it, then its table."""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    folder = os.path.join(args.out, name)
    os.makedirs(folder, exist_ok=True)
    log = os.open(os.path.join(folder, "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    trainer = Follower(
        name,
        SimpleNamespace(
            config=args.config, set=args.set + changes, data=args.data, out=folder, together=args.out,
            start=None, seconds=1e9, total_seconds=1e9, total_tokens=math.inf, keep_every=None, workers=1,
            log_every=args.log_every, no_compile=args.no_compile, until=args.until,
        ),
    )
    trainer.run()
    print(f"trained on {trainer.tokens} tokens in {trainer.step} steps", flush=True)
    model = Ramba(trainer.config, trainer.model.hsa).to(trainer.device)
    model.load_state_dict(trainer.model.state_dict())
    del trainer
    with open(os.path.join(args.out, "stretches"), "rb") as file:
        stretches = pickle.load(file)
    text_loss.table(name, model.eval(), stretches, args.lengths)
    if model.hsa:
        model.hsa = False
        text_loss.table(name + " without HSA", model, stretches, args.lengths.split(",")[0])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("forms", nargs="+", metavar="FORM")
    parser.add_argument("--data", required=True, help="what prepare.py made")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--seconds", type=float, required=True, help="till the training's end")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="of CONFIG, for all")
    parser.add_argument("--makers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 4)))
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--lengths", default="4K,16K,64K", help="of the tables")
    parser.add_argument("--cases", type=int, default=12, help="of the tables")
    parser.add_argument("--seed", type=int, default=1, help="of the tables")
    args = parser.parse_args()
    args.until = time.time() + args.seconds
    os.makedirs(args.out)
    os.mkdir(os.path.join(args.out, "rows"))
    pace = Pace(args.out)
    forms = {words[0]: words[1:] for words in (form.split() for form in args.forms)}
    for name in forms:
        pace.tell(name, -1)
    start = multiprocessing.get_context("spawn").Process
    settings = configured(args.config, args.set)
    makers = [
        start(target=make_rows, args=(settings, args.data, args.out, i, args.makers), daemon=True)
        for i in range(args.makers)
    ]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    running = {
        name: start(target=follow, args=(name, sets, gpus[i % len(gpus)], args))
        for i, (name, sets) in enumerate(forms.items())
    }
    for process in [*makers, *running.values()]:
        process.start()
    with open(os.path.join(args.out, "stretches"), "wb") as file:
        pickle.dump(text_loss.Stretches(args.data, args.cases, args.seed), file)
    failed = False
    while running:
        time.sleep(0.2)
        if any(maker.exitcode is not None for maker in makers):
            for process in running.values():
                process.terminate()  # it would wait for ever
        for name, process in list(running.items()):
            if process.exitcode is not None:
                pace.forget(name)
                failed |= process.exitcode != 0
                del running[name]
    for process in makers:
        process.terminate()
    for name in forms:
        print(f"== {name}: {' '.join(forms[name])}")
        with open(os.path.join(args.out, name, "log.txt")) as file:
            print("".join(file.readlines()[-4 - 2 * len(args.lengths.split(",")) :]), end="")
    sys.exit(failed)


if __name__ == "__main__":
    main()
