"""Trains RAMba: python3 engine/train/train.py CONFIG --data DIR --out DIR [--seconds N]

CONFIG names the shape, the books held out and the schedule. DIR of --data holds what prepare.py
made of the books. Training stops after --seconds of this call (or --total-seconds over all calls,
which also sets the learning rate's decay) and goes on from OUT/checkpoint.pt at the next call.
Runs on CUDA where there is one, else on the CPU.

The curriculum: 0 dense pairs, 1 longer keys and values, 2 needles in short texts, 3 needles in long
texts. A stage ends when its answers are `advance_at` right; earlier stages stay in the mix.
"""
import argparse
import json
import math
import multiprocessing
import os
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F

import safetensors_io
from data import ANSWER, TEXT, Books, Builder
from model import Config, DEFAULTS, MambaLayer, Ramba
from tokenizer import Tokenizer

LAST_STAGE = 3
SAVE_SECONDS = 60


def worker(settings, data, seed, stage, queue):
    tokenizer = Tokenizer.load(data)
    builder = Builder(
        tokenizer,
        Books(os.path.join(data, "train.npy"), tokenizer),
        seed,
        settings["mix"],
        settings["talk_share"],
    )
    while True:
        now = stage.value
        shape = (
            "long"
            if now == LAST_STAGE and builder.rng.random() < settings["long_share"]
            else "short"
        )
        size = settings[shape]
        plain = settings["plain_rows"] * size["batch"] // 8
        if now == 0:
            plain = size["batch"] // 16
        level = now if shape == "long" else min(now, 2)
        queue.put((shape, now, plain, builder.batch(level, size["batch"], size["length"], plain)))


def build(settings):
    torch.manual_seed(settings["seed"])
    config = Config({**DEFAULTS, **settings["model"]})
    model = Ramba(config)
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
    """Running share of answers right to the last token, by stage."""

    def __init__(self):
        self.right, self.count = 0.0, 0

    def add(self, right, marks):
        flat_right, flat = right.reshape(-1), (marks == ANSWER).reshape(-1)
        wrong = np.concatenate([[0], np.cumsum(flat & ~flat_right)])
        starts = np.flatnonzero(flat & ~np.concatenate([[False], flat[:-1]]))
        ends = np.flatnonzero(flat & ~np.concatenate([flat[1:], [False]])) + 1
        good = (wrong[ends] == wrong[starts]).mean() if len(starts) else 0.0
        self.count += 1
        keep = 0.95 if self.count > 20 else 1 - 1 / self.count
        self.right = keep * self.right + (1 - keep) * good


class Trainer:
    def __init__(self, args):
        with open(args.config) as file:
            self.settings = json.load(file)
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.model = build(self.settings)
        self.model.to(self.device)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        options = {"fused": True} if self.device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": self.settings["weight_decay"]},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=self.settings["learning_rate"],
            betas=(0.9, 0.95),
            **options,
        )
        self.step, self.tokens, self.seconds, self.stage = 0, 0, 0.0, 0
        self.pool, self.skipped = None, 0
        self.path = os.path.join(args.out, "checkpoint.pt")
        os.makedirs(args.out, exist_ok=True)
        if os.path.exists(self.path):
            self.resume()
        elif args.start:
            tensors = safetensors_io.load(os.path.join(args.start, "model.safetensors"))
            self.model.load_state_dict(tensors)
            with open(os.path.join(args.start, "progress.json")) as file:
                self.step, self.tokens, _, self.stage = json.load(file)
        self.began = self.step
        if self.device == "cuda" and not args.no_compile:
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.cache_size_limit = 64  # one entry a shape and layer
            for layer in self.model.backbone.layers:
                layer.compile(dynamic=False)  # a dynamic second shape compiles for minutes

    def resume(self):
        saved = torch.load(self.path, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.tokens, self.seconds, self.stage = saved["progress"]
        print(f"resumed at step {self.step}, {self.tokens / 1e6:.1f}M tokens, stage {self.stage}")

    def save(self):
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": (self.step, self.tokens, self.seconds, self.stage),
            },
            self.path + ".new",
        )
        os.replace(self.path + ".new", self.path)
        export(self.model, self.settings, self.args)
        with open(os.path.join(self.args.out, "export", "progress.json"), "w") as file:
            json.dump([self.step, self.tokens, self.seconds, self.stage], file)

    def rate(self):
        """Warm-up, constant, and a linear way down over the last 40% of the total time."""
        done = self.seconds / self.args.total_seconds
        begin = self.began if self.args.start else 0
        warm = min(1.0, (self.step + 1 - begin) / self.settings["warmup_steps"])
        return self.settings["learning_rate"] * warm * min(1.0, max(0.02, (1 - done) / 0.4))

    def states(self, batch):
        """States for a batch: half zero, half the final states of other segments."""
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
        keep = (torch.rand(batch, 1, 1, 1, device=self.device) < 0.5).float()
        return [layer[self.rows] * keep for layer in self.pool]

    def update(self, plain, arrays):
        ids = arrays[0]
        batch = [torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays]
        ids_t, marks_t, resets_t, gold_t = batch
        target, kind = ids_t[:, 1:], marks_t[:, 1:]
        asked = F.pad((kind == ANSWER).float(), (0, 1))
        gold = F.pad(gold_t[:, 1:], (0, 1), value=-1)
        if self.stage < self.settings["distraction_from"]:
            plain = 0  # before the landmarks mean anything, it would only silence all of them
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            x, after = self.model.hidden(
                ids_t, resets_t, self.states(len(ids)), distractors=plain, asked=asked, gold=gold
            )
            logits = self.model.head(x)[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(
            target
        )
        text = (loss * (kind == TEXT)).sum() / (kind == TEXT).sum().clamp(min=1)
        answer = (loss * (kind == ANSWER)).sum() / (kind == ANSWER).sum().clamp(min=1)
        s = self.settings
        total = s["text_weight"] * text + s["answer_weight"] * answer
        total = total + s["retrieval_weight"] * self.model.retrieval
        total = total + s["attention_weight"] * self.model.attention
        if plain:
            total = total + s["distraction_weight"] * self.model.distraction
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        if torch.isfinite(norm):
            self.optimizer.step()
            for layer, states in zip(self.pool, after):
                layer[self.rows] = states.detach().float()
        else:  # the states of such a step would poison the steps that start from them
            self.skipped += 1
            if self.skipped > 50:
                raise SystemExit(f"step {self.step}: 50 steps without a finite gradient")
        self.optimizer.zero_grad(set_to_none=True)
        right = logits.argmax(-1) == target
        distraction = torch.as_tensor(self.model.distraction).detach()
        retrieval = torch.as_tensor(self.model.retrieval).detach()
        attention = torch.as_tensor(self.model.attention).detach()
        return (text.detach(), answer.detach(), distraction, retrieval, attention), right

    def run(self):
        args, settings = self.args, self.settings
        stage = multiprocessing.Value("i", self.stage)
        queue = multiprocessing.Queue(args.workers * 3)
        pool = [
            multiprocessing.Process(
                target=worker,
                daemon=True,
                args=(settings, args.data, settings["seed"] + 1000 * i + self.step, stage, queue),
            )
            for i in range(args.workers)
        ]
        for process in pool:
            process.start()
        begin = last = saved = time.time()
        answers, last_tokens, last_log = (
            {"short": Answers(), "long": Answers()},
            self.tokens,
            self.step,
        )
        sums = np.zeros(5)
        stage_began = self.step
        while time.time() - begin < args.seconds and self.seconds < args.total_seconds:
            shape, made_for, plain, arrays = queue.get()
            if made_for != self.stage:
                continue
            losses, right = self.update(plain, arrays)
            self.step += 1
            self.tokens += arrays[0].size
            now = time.time()
            self.seconds += now - last
            last = now
            if self.step % 10 == 0:
                answers[shape].add(right.cpu().numpy(), arrays[1][:, 1:])
                sums += [float(loss) for loss in losses]
            if self.step - last_log >= args.log_every:
                spent = now - begin
                print(
                    f"step {self.step} stage {self.stage} {self.tokens / 1e6:.1f}M tokens "
                    f"{(self.tokens - last_tokens) / spent / 1e3:.0f}K tok/s text "
                    f"{sums[0] / (args.log_every / 10):.3f} answer {sums[1] / (args.log_every / 10):.3f} "
                    f"distraction {sums[2] / (args.log_every / 10):.3f} "
                    f"retrieval {sums[3] / (args.log_every / 10):.3f} "
                    f"attention {sums[4] / (args.log_every / 10):.3f} right short "
                    f"{answers['short'].right:.3f} long {answers['long'].right:.3f} "
                    f"lr {self.rate():.1e} skipped {self.skipped} {self.seconds:.0f}s",
                    flush=True,
                )
                sums[:] = 0
                last_log = self.step
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = now
            long_enough = self.step - stage_began > 150
            late = self.seconds / args.total_seconds > settings["advance_by"][self.stage]
            good = long_enough and answers["short"].right > settings["advance_at"][self.stage]
            if good or late:
                self.stage += 1
                stage.value = self.stage
                stage_began = self.step
                answers = {"short": Answers(), "long": Answers()}
                print(f"stage {self.stage} from step {self.step}", flush=True)
        for process in pool:
            process.terminate()
        self.save()


def export(model, settings, args):
    """OUT/export: the model's folder as the engine loads it, weights in bf16."""
    folder = os.path.join(args.out, "export")
    os.makedirs(folder, exist_ok=True)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(os.path.join(args.data, name), folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(
            {"architectures": ["RambaForCausalLM"], **settings["model"], "torch_dtype": "bfloat16"},
            file,
            indent=1,
        )
    safetensors_io.save(
        {name: t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()},
        os.path.join(folder, "model.safetensors"),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--start",
        help="an export to go on from, with a schedule of its own, where " "OUT has no checkpoint",
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="stop this call after so long")
    parser.add_argument("--total-seconds", type=float, default=1320, help="training time in all")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--no-compile", action="store_true")
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
