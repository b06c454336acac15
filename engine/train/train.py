"""Trains RAMba: python3 engine/train/train.py CONFIG --data DIR --out DIR [--seconds N]

CONFIG names the shape, the books held out and the schedule. DIR of --data holds what prepare.py
made of the books. Training stops after --seconds of this call (or --total-seconds or --total-tokens
over all calls, which also set the learning rate's decay) and goes on from OUT/checkpoint.pt at the
next call. OUT/export is the model as the daemon takes it, at most a minute old.
Runs on CUDA where there is one, else on the CPU; on several GPUs of one host as
`torchrun --nproc-per-node N engine/train/train.py ...`, each with a batch of its own.

The curriculum: 0 dense pairs, 1 longer keys and values, 2 needles in short texts, 3 needles in long
texts. A stage ends after as many steps as `stage_steps` says; earlier stages stay in the mix. Rows of
every shape come in the last stage, those of a shape with `from` not before that share of the training.
`carried_share` of the rows go on from the last states of others, so that states are as old in training as in
long memories; a half of rows of 8,192 tokens was too little for what stands behind 24,000.

To go on from a model (--from) without losing what it knows: `anchor_weight` holds what is no answer to
that model's distributions (KL), `decay_to_start` has weights decay towards its own; `choice_weight` is
how often answers' tokens count that tell which chunk is read, in the losses of reading, and
`recall_count` how often text's that could have been read.
"""
import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F

import safetensors_io
from data import ANSWER, TEXT, Books, Builder, choices, text_alone
from model import Aims, BANK, Bank, Config, DEFAULTS, MambaLayer, Ramba
from optimizer import Both
from tokenizer import Tokenizer

LAST_STAGE = 3
# Losses beside the language's.
BESIDE = ("distraction", "straying", "retrieval", "contrast", "apart", "attention")
LOSSES = ("text", "answer", "anchor", *BESIDE)
SAVE_SECONDS = 60


def level_of(stage, length):
    """The stage whose rows are made: long texts need long rows."""
    return min(stage, 2) if length <= 512 else stage


def stage_of(settings, step):
    """The stage of a step's rows."""
    return int((step >= np.cumsum(settings["stage_steps"])).sum())


def plain_rows(settings, rng, stage, batch):
    """How many rows of a batch are text alone: of every eight `plain_rows`, in the mean."""
    if stage == 0:
        return batch // 16
    count, rest = divmod(settings["plain_rows"] * batch, 8)
    return count + (rng.randrange(8) < rest)


def name_of(settings, shape, stage, done):
    """The shape of the rows that come as `shape`: the first one's till it is due."""
    due = stage == LAST_STAGE and done >= settings["shapes"][shape].get("from", 0)
    return shape if due else next(iter(settings["shapes"]))


def worker(settings, data, seed, told, shape, queues):
    """`told`: the trainer's stage, and the share of the training that is behind."""
    tokenizer = Tokenizer.load(data)
    books = Books(os.path.join(data, "train.npy"), tokenizer)
    builder = Builder(tokenizer, books, seed, settings)
    while True:
        now, done = int(told[0]), told[1]
        name = name_of(settings, shape, now, done)
        size = settings["shapes"][name]
        plain = plain_rows(settings, builder.rng, now, size["batch"])
        level = level_of(now, size["length"])
        if now >= settings["distraction_from"] and builder.rng.random() < settings["crowd_share"]:
            crowd, rows = True, builder.crowds(size["batch"], size["length"])
        else:
            crowd, rows = False, builder.batch(level, size["batch"], size["length"], plain)
        queues[shape].put(((now, name), crowd, rows))


def configured(path, changes):
    """The config, with `changes` such as model.encoder_layers=0; without shapes of no share."""
    with open(path) as file:
        settings = json.load(file)
    for change in changes:
        keys, value = change.split("=", 1)
        at, keys = settings, keys.split(".")
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = json.loads(value)
    shapes = settings["shapes"].items()
    settings["shapes"] = {name: shape for name, shape in shapes if shape["share"] > 0}
    return settings


def build(settings):
    torch.manual_seed(settings["seed"])
    config = Config({**DEFAULTS, **settings["model"]})
    model = Ramba(config, settings.get("hsa", True))
    depth = config.num_lower_layers + config.num_upper_layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):  # as Mamba-2: softplus(dt_bias) log-uniform in [1e-3, 0.1]
                dt = torch.exp(torch.rand_like(parameter) * math.log(100) + math.log(1e-3))
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log())
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.02 if "embeddings" in name else parameter.shape[1] ** -0.5)
                if "out_proj" in name or "o_proj" in name or "down_proj" in name:
                    parameter.mul_(1 / math.sqrt(2 * depth))
    return config, model


class Answers:
    """Running share of answers right to the last token, by shape."""

    def __init__(self):
        self.right, self.count = 0.0, 0

    def add(self, right, marks):
        flat_right, flat = right.reshape(-1), (marks == ANSWER).reshape(-1)
        wrong = np.concatenate([[0], np.cumsum(flat & ~flat_right)])
        starts = np.flatnonzero(flat & ~np.concatenate([[False], flat[:-1]]))
        ends = np.flatnonzero(flat & ~np.concatenate([flat[1:], [False]])) + 1
        good = (wrong[ends] == wrong[starts]).mean() if len(starts) else 0.0
        self.count += 1
        keep = 0.9 if self.count > 10 else 1 - 1 / self.count
        self.right = keep * self.right + (1 - keep) * good


class Trainer:
    def __init__(self, args):
        self.began = time.time()
        self.settings, self.args = configured(args.config, args.set), args
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
        self.config, self.model = build(self.settings)
        self.model.to(self.device)
        if args.start:
            self.model.load_state_dict(safetensors_io.load_folder(args.start))
        for name in ("decay_to_start", "anchor_weight"):
            if self.settings.get(name) and not args.start:
                raise SystemExit(f"{name} wants --from")
        # What is no answer is held to the start: what a training does not mean to change stays, and text,
        # which is most of it, brings no noise of its own.
        self.teacher = None
        if self.settings.get("anchor_weight"):
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = Both(self.model, self.settings)
        self.tokenizer = Tokenizer.load(args.data)
        self.held = Books(os.path.join(args.data, "held.npy"), self.tokenizer)
        self.step, self.tokens, self.seconds, self.stage, self.kept = 0, 0, 0.0, 0, 0.0
        self.chunk_loss = math.inf  # the running mean of "retrieval"
        self.pool, self.skipped = None, torch.zeros((), device=self.device)
        self.path = os.path.join(args.out, "checkpoint.pt")
        os.makedirs(args.out, exist_ok=True)
        if os.path.exists(self.path):
            self.resume()
        elif args.start:
            self.stage = LAST_STAGE
        self.told = multiprocessing.Array("d", [self.stage, self.done()])
        self.losses = self.answer_losses
        if cuda and not args.no_compile:
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.cache_size_limit = 64  # one entry a shape and layer
            for model in (self.model, self.teacher) if self.teacher else (self.model,):
                for layer in model.backbone.layers:
                    layer.compile(dynamic=False)  # a dynamic second shape compiles for minutes
            self.losses = torch.compile(self.answer_losses, dynamic=False)
            self.warm_up()

    def resume(self):
        saved = torch.load(self.path, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.tokens, self.seconds, self.stage, self.chunk_loss = saved["progress"]
        self.kept = self.seconds
        print(f"resumed at step {self.step}, {self.tokens / 1e6:.1f}M tokens, stage {self.stage}")

    def save(self):
        if self.rank:
            return
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": (self.step, self.tokens, self.seconds, self.stage, self.chunk_loss),
            },
            self.path + ".new",
        )
        os.replace(self.path + ".new", self.path)
        export(self.model, self.settings, self.args)
        if self.args.keep_every and self.seconds - self.kept >= self.args.keep_every:
            self.kept = self.seconds
            folder = os.path.join(self.args.out, "export")
            shutil.copytree(folder, f"{folder}-{self.step}", dirs_exist_ok=True)

    def done(self):
        """The share of the training that is behind."""
        args = self.args
        return max(self.seconds / args.total_seconds, self.tokens / args.total_tokens)

    def rate(self):
        """Warm-up, constant, and a linear way down over the last 40%."""
        done = self.done()
        warm = min(1.0, (self.step + 1) / self.settings["warmup_steps"])
        return self.settings["learning_rate"] * warm * min(1.0, max(0.02, (1 - done) / 0.4))

    def states(self, batch):
        """States for a batch: `carried_share` the final states of other segments, which began so themselves,
        the others zero."""
        if self.pool is None:
            shape = (
                64,
                self.config.inner // self.config.head_dim,
                self.config.head_dim,
                self.config.state_size,
            )
            layers = sum(isinstance(l, MambaLayer) for l in self.model.backbone.layers)
            self.pool = [torch.zeros(shape, device=self.device) for _ in range(layers)]
        self.rows = torch.randperm(64, device=self.device)[:batch]
        carried = torch.rand(batch, 1, 1, 1, device=self.device) < self.settings["carried_share"]
        return [layer[self.rows] * carried for layer in self.pool]

    def put(self, array):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def note(self, chunk_loss):
        """`chunk_loss`: of the last step."""
        if math.isfinite(self.chunk_loss):
            chunk_loss = 0.9 * self.chunk_loss + 0.1 * chunk_loss
        self.chunk_loss = chunk_loss

    def distracts(self):
        """Before the landmarks mean anything, distraction would silence all of them: it counts where the
        loss of the chunk is low, and while it stays so."""
        settings = self.settings
        low = settings.get("distraction_below")
        return self.stage >= settings["distraction_from"] and (low is None or self.chunk_loss < low)

    def aims(self, crowd, ids, marks, gold):
        """All indices are found on the host: a device that is asked for them waits."""
        rows, at = np.nonzero(gold[:, 1:] >= 0)  # the position before it makes a token's choice
        if not self.model.hsa or not len(rows):
            return Aims()
        after = np.pad(marks[:, 1:], ((0, 0), (0, 1)))
        recalled = np.pad(gold[:, 1:] >= 0, ((0, 0), (0, 1))) & (after == TEXT)
        order = np.argsort(recalled[rows, at], kind="stable")  # the first `sole` stand in one chunk alone
        rows, at = rows[order], at[order]
        place = gold[rows, at + 1].astype(np.int64)
        places = tuple(self.put(a) for a in (rows, at, place))
        sole = len(rows) - int(recalled.sum())
        chosen = choices(ids, gold, self.held.blank)[rows, at + 1]
        counts = np.where(chosen, self.settings.get("choice_weight", 1), 1).astype(np.float32)
        counts[sole:] = self.settings.get("recall_count", 1)
        counts = self.put(counts)
        asked, text = np.flatnonzero(after == ANSWER), np.flatnonzero((after == TEXT) & ~recalled)
        if not self.distracts() or not len(asked):
            return Aims(places, counts, sole)
        asked, text = asked[:: max(1, len(asked) // 4096)], text[:: max(1, len(text) // 1024)]
        text = np.concatenate([np.flatnonzero(recalled), text])
        distractors = np.flatnonzero(text_alone(marks))
        return Aims(places, counts, sole, self.put(distractors), self.put(asked), self.put(text), crowd)

    def answer_losses(self, x, target, kind, taught=None):
        """The mean losses of text and of answers, how far the distributions of all that is no answer are
        from those of the hidden states `taught` of the teacher (KL), and which targets are the most
        likely tokens."""
        logits = self.model.head(x)[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = loss.view_as(target)
        mean = lambda loss, which: (loss * which).sum() / which.sum().clamp(min=1)
        anchor = None
        if taught is not None:
            wanted = self.teacher.head(taught)[:, :-1].float().log_softmax(-1)
            apart = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
            anchor = mean(apart, kind != ANSWER)
        return mean(loss, kind == TEXT), mean(loss, kind == ANSWER), anchor, logits.argmax(-1) == target

    def share_gradients(self):
        """The mean of all ranks' gradients."""
        if self.ranks > 1:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            torch.distributed.all_reduce(flat)
            flat /= self.ranks
            for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
                grad.copy_(part.view_as(grad))

    def gradients(self, crowd, arrays):
        ids, marks, resets, gold = arrays
        ids_t, marks_t, resets_t = [self.put(a) for a in (ids, marks, resets)]
        aims = self.aims(crowd, ids, marks, gold)
        kind = self.device.split(":")[0]
        low = torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")
        states, taught = self.states(len(ids)), None
        with low:
            if self.teacher:
                with torch.no_grad():
                    taught, _ = self.teacher.hidden(ids_t, resets_t, states)
            x, after = self.model.hidden(ids_t, resets_t, states, aims=aims)
            text, answer, anchor, right = self.losses(x, ids_t[:, 1:], marks_t[:, 1:], taught)
        s = self.settings
        total = s["text_weight"] * text + s["answer_weight"] * answer
        if anchor is not None:
            total = total + s["anchor_weight"] * anchor
        beside = [getattr(self.model, name) for name in BESIDE]
        for loss, name in zip(beside, BESIDE):
            if loss is not None:
                total = total + s.get(name + "_weight", 0.0) * loss
        total.backward()
        with low:
            self.model.settle(*ids.shape)
        losses = [0.0 if loss is None else loss for loss in (text, answer, anchor, *beside)]
        losses = [torch.as_tensor(loss, device=self.device).detach() for loss in losses]
        return torch.stack(losses), right, after

    def update(self, crowd, arrays):
        """A step: the mean losses, as `log` names them, and which targets were the most likely."""
        losses, right, after = self.gradients(crowd, arrays)
        self.share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # A step without a finite gradient changes nothing; the host does not wait to learn of it.
        finite = torch.isfinite(norm)
        self.skipped += ~finite
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, finite.float())
        self.optimizer.step(self.rate())
        for layer, states in zip(self.pool, after):
            kept = torch.where(finite, states.detach().float().nan_to_num(0.0), layer[self.rows])
            layer[self.rows] = kept
        self.model.zero_grad(set_to_none=True)
        return losses, right

    def warm_up(self):
        """Compiles for every shape, each on another rank first: those that come to it later find it in
        the compiler's cache, if they share one. Halves a batch that does not fit the device."""
        books = Books(os.path.join(self.args.data, "train.npy"), self.tokenizer)
        builder = Builder(self.tokenizer, books, self.settings["seed"], self.settings)
        now = self.stage, self.chunk_loss
        self.stage, self.chunk_loss = LAST_STAGE, 0.0  # whose losses take what all others' do, and more
        shapes = list(self.settings["shapes"].items())
        turn = self.rank % len(shapes)
        for name, size in shapes[turn:] + shapes[:turn]:
            begin = time.time()
            while not self.fits(builder, size):
                size["batch"] //= 2
            took = time.time() - begin
            most = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"rank {self.rank}: {size['batch']} rows of {size['length']} ({name}) are ready after "
                f"{took:.0f} s, {most:.1f} GiB at most",
                flush=True,
            )
        self.stage, self.chunk_loss = now

    def fits(self, builder, size):
        torch.cuda.empty_cache()
        self.fill(True)  # what takes the most memory: a crowd, after many others
        try:
            self.gradients(True, builder.crowds(size["batch"], size["length"]))
            torch.cuda.synchronize()
            return True
        except torch.cuda.OutOfMemoryError:
            if size["batch"] == 1:
                raise
            return False
        finally:
            self.fill(False)
            self.model.zero_grad(set_to_none=True)

    def fill(self, full):
        """The bank as after many batches, or as before the first."""
        self.model.bank = Bank(BANK)
        if full:
            self.model.fill_bank(self.device)

    def agree(self, stop):
        """Rank 0's clock, stage, loss of the chunk and word to stop are everyone's, and its makers'."""
        if self.ranks > 1:
            news = [self.seconds, self.stage, self.chunk_loss, stop]
            news = torch.tensor(news, dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(news, 0)
            self.seconds, stage, self.chunk_loss, stop = news.tolist()
            self.stage = int(stage)
        self.told[:] = self.stage, self.done()
        return bool(stop)

    def start_workers(self):
        """Processes that make batches; returns them and a queue for each shape."""
        settings, args = self.settings, self.args
        shapes = list(settings["shapes"])
        queues = {shape: multiprocessing.Queue(args.workers * 2) for shape in shapes}
        # One worker a shape, each other where the most steps wait for a worker.
        makers = list(shapes)
        while len(makers) < args.workers:
            need = lambda shape: settings["shapes"][shape]["share"] / makers.count(shape)
            makers.append(max(shapes, key=need))
        pool = [
            multiprocessing.Process(
                target=worker,
                daemon=True,
                args=(
                    settings,
                    args.data,
                    settings["seed"] + 10**6 * (i + len(makers) * self.rank) + self.step,
                    self.told,
                    shape,
                    queues,
                ),
            )
            for i, shape in enumerate(makers)
        ]
        for process in pool:
            process.start()
        return pool, queues

    def batch(self, queues):
        """The same shape on every rank."""
        draw = random.Random(self.settings["seed"] * 10**7 + self.step)
        shapes = self.settings["shapes"]
        shape = draw.choices(list(shapes), [size["share"] for size in shapes.values()])[0]
        stage, done = self.told[:]
        name = name_of(self.settings, shape, stage, done)
        while True:
            made_for, crowd, arrays = queues[shape].get()
            if made_for == (stage, name):
                return name, crowd, arrays

    def held_out(self):
        """The loss on books that are not trained on. In the shape of a training step, gradients and
        all, which is compiled already."""
        size = next(iter(self.settings["shapes"].values()))
        rows = [self.held.take(random.Random(i), size["length"])[0] for i in range(size["batch"])]
        ids = self.put(np.stack(rows).astype(np.int64))
        resets, states = torch.zeros_like(ids, dtype=torch.bool), self.states(len(ids))
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
            x, _ = self.model.hidden(ids, resets, [torch.zeros_like(s) for s in states])
            marks = torch.full_like(ids, TEXT, dtype=torch.uint8)[:, 1:]
            return self.losses(x, ids[:, 1:], marks, x.detach() if self.teacher else None)[0].item()

    def log(self, sums, count, answers, rate):
        sums = sums.tolist()
        print(
            f"step {self.step} stage {self.stage} {self.tokens / 1e6:.1f}M tokens {rate / 1e3:.0f}K "
            "tok/s "
            + " ".join(f"{name} {value / count:.3f}" for name, value in zip(LOSSES, sums))
            + f" held out {self.held_out():.3f}"
            + " right "
            + " ".join(f"{shape} {answer.right:.3f}" for shape, answer in answers.items())
            + f" lr {self.rate():.1e} skipped {int(self.skipped)} {self.seconds:.0f}s",
            flush=True,
        )
        if self.skipped > 50:
            raise SystemExit(f"step {self.step}: over 50 steps without a finite gradient")

    def run(self):
        args = self.args
        pool, queues = self.start_workers()
        begin = last = saved = self.began  # what it took to compile counts
        logged = time.time()
        answers = {shape: Answers() for shape in queues}
        logged_tokens, logged_step = self.tokens, self.step
        sums = torch.zeros(len(LOSSES), device=self.device)
        stop = False
        while not stop:
            shape, crowd, arrays = self.batch(queues)
            losses, right = self.update(crowd, arrays)
            sums += losses
            self.step += 1
            self.tokens += arrays[0].size * self.ranks
            if self.step % 10:
                continue
            answers[shape].add(right.cpu().numpy(), arrays[1][:, 1:])
            self.note(losses[LOSSES.index("retrieval")].item())
            now = time.time()
            self.seconds += now - last
            last = now
            stop = now - begin > args.seconds or self.done() >= 1
            stage = self.stage
            self.stage = max(stage, stage_of(self.settings, self.step))
            stop = self.agree(stop)
            if self.stage != stage:
                answers = {shape: Answers() for shape in queues}
                if self.rank == 0:
                    print(f"stage {self.stage} from step {self.step}", flush=True)
            if self.step - logged_step >= args.log_every:
                if self.rank == 0:
                    rate = (self.tokens - logged_tokens) / (now - logged)
                    self.log(sums, self.step - logged_step, answers, rate)
                logged, logged_step, logged_tokens = now, self.step, self.tokens
                sums.zero_()
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = now
        for process in pool:
            process.terminate()
        self.save()

    def profile(self):
        """Where the time of a step goes, for each shape."""
        pool, queues = self.start_workers()
        for _ in range(40):
            self.update(*self.batch(queues)[1:])
            self.step += 1
        batches = [self.batch(queues)[1:] for self.step in range(self.step, self.step + 20)]
        torch.cuda.synchronize()
        begin = time.time()
        for batch in batches:
            self.update(*batch)
        host = time.time() - begin
        torch.cuda.synchronize()
        print(f"{(time.time() - begin) / 20 * 1e3:.1f} ms a step, the host {host / 20 * 1e3:.1f}")
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for batch in batches:
                self.update(*batch)
            torch.cuda.synchronize()
        averages = profile.key_averages()
        print(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=60))
        for process in pool:
            process.terminate()


def export(model, settings, args):
    """OUT/export: the model's folder as the engine loads it, weights in bf16; whole at any time."""
    whole = os.path.join(args.out, "export")
    folder = whole + ".new"
    os.makedirs(folder, exist_ok=True)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(os.path.join(args.data, name), folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(
            {"architectures": ["RambaForCausalLM"], **settings["model"], "torch_dtype": "bfloat16"},
            file,
            indent=1,
        )
    safetensors_io.save_folder(
        {name: t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()},
        folder,
    )
    shutil.rmtree(whole, ignore_errors=True)
    os.rename(folder, whole)


def main(trainer_of=Trainer):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="a model to go on from, in the last stage, where OUT has no checkpoint; where weights decay "
        "to those of the start, what these are",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="of CONFIG: hsa=false ..."
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="stop this call after so long")
    parser.add_argument("--total-seconds", type=float, default=1320, help="training time in all")
    parser.add_argument("--total-tokens", type=float, default=math.inf, help="tokens in all")
    parser.add_argument("--keep-every", type=float, help="keep an OUT/export-STEP so often, in seconds")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    spare = max(2, ((os.cpu_count() or 2) - 3) // ranks)
    parser.add_argument("--workers", type=int, default=min(spare, 16))
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    args = parser.parse_args()
    trainer = trainer_of(args)
    trainer.profile() if args.profile else trainer.run()


if __name__ == "__main__":
    main()
