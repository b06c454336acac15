"""Hold the training form of the model against goldens: whole sequences, and streamed in pieces.

model.py computes in blocks and densely, for a GPU; ramba.py plainly. What trains must be what is
served, so all of model.py's forms must give the goldens' logits: whole, with the dense attention in
parts, streamed. Exit status 1 when one is off.
"""

import os
import random
import sys

import torch

import safetensors_io
from check_published import LOGITS_LIMIT, ROOT, SHIPPED, worst
import model as form
from model import Ramba


PART = form.PART


def pieces(ids, rng):
    while len(ids):
        count = rng.randint(1, 150)
        yield ids[:count]
        ids = ids[count:]


def check(name, golden_folder, model_folder, rng):
    golden = safetensors_io.load(os.path.join(golden_folder, "golden.safetensors"))
    ids = golden["input_ids"].reshape(-1).long()
    rows = golden["logit_positions"].long()
    model = Ramba.load(model_folder, torch.float64)
    whole = model(ids[None])[0][rows]
    form.PART = 100
    parted = model(ids[None])[0][rows]
    form.PART = PART
    session = {}
    hidden = torch.cat([model.stream(session, piece) for piece in pieces(ids, rng)], 1)
    streamed = model.head(hidden)[0][rows]
    errors = [worst(got, golden["logits"][0]) for got in (whole, parted, streamed)]
    good = all(error < LOGITS_LIMIT for error in errors)
    print(
        f"{'ok  ' if good else 'FAIL'} {name}: whole {errors[0]:.1e} "
        f"in parts {errors[1]:.1e} streamed {errors[2]:.1e}"
    )
    return good


def main():
    torch.set_grad_enabled(False)
    base, good = os.path.join(ROOT, "tests", "golden"), True
    for name in sorted(os.listdir(base)):
        folder = os.path.join(base, name)
        if os.path.exists(os.path.join(folder, "golden.safetensors")):
            shipped = os.path.join(ROOT, "engine", "models", SHIPPED)
            model = shipped if name == "shipped" else folder
            good &= check(name, folder, model, random.Random(1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
