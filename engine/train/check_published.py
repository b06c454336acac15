"""Compare the reference with goldens: those that the published code computed, and our own.

Reads $RAMBAD_SHARED/published/goldens (default ../shared beside the checkout) and, with --own, the
project's own tests/golden and the shipped model's. Exit status 1 when a number is off, 77 when
there is nothing to read.
"""

import argparse
import os
import sys

import torch

import ramba
import safetensors_io

SHIPPED = "ramba-20m"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PUBLISHED_POSITIONS = [0, 1, 63, 64, 65, 127, 128, 500, 640, 1023]
LOGITS_LIMIT = 1e-4  # of the largest logit, as the project's issue asks; 2e-6 is what it reaches
TIE = 1e-5  # a choice between two scores closer than this is a tie


def worst(got, want):
    want = want.to(torch.float64)
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.to(torch.float64) - want).abs().max() / want.abs().max().clamp_min(1e-30))


def check(folder):
    golden = safetensors_io.load(os.path.join(folder, "golden.safetensors"))
    shipped = os.path.basename(folder) == "shipped"  # its weights are not kept twice
    model = ramba.Reference.load(
        os.path.join(ROOT, "engine", "models", SHIPPED) if shipped else folder
    )
    out = model.forward(golden["input_ids"].reshape(-1).long())
    positions = golden.get("positions", torch.tensor(PUBLISHED_POSITIONS)).long()
    logit_positions = golden.get("logit_positions")
    logits = out["logits"] if logit_positions is None else out["logits"][logit_positions.long()]
    errors = {"logits": worst(logits, golden["logits"][0])}
    wrong_picks = 0
    for name, want in golden.items():
        want = want[0] if want.dim() > 1 else want
        kind = name.split(".")[-1]
        if kind == "hidden":
            error = worst(out[name][positions], want)
        elif kind in ("k", "v"):
            error = worst(out[name].reshape(want.shape), want)
        elif kind == "landmarks":
            error = worst(out[name].reshape(want.shape), want)
        elif kind == "picks":
            # The published files repeat a single retrieval head for every kv head.
            weights = golden[name.replace("picks", "weights")][0]
            got_picks = out[name].expand(want.shape)
            got_weights = out[name.replace("picks", "weights")].expand(weights.shape)
            tie = (out[name.replace("picks", "margin")] < TIE).expand(want.shape[:2])
            differs = (got_picks != want).any(-1) & ~tie
            wrong_picks += int(differs.sum())
            same = ~tie
            errors["weights"] = max(
                errors.get("weights", 0.0), float((got_weights - weights)[same].abs().max())
            )
            continue
        else:
            continue
        errors[kind] = max(errors.get(kind, 0.0), error)
    good = wrong_picks == 0 and all(e < LOGITS_LIMIT for e in errors.values())
    text = " ".join(f"{k} {e:.1e}" for k, e in errors.items())
    name = os.path.basename(folder)
    print(f"{'ok  ' if good else 'FAIL'} {name}: {text} picks off {wrong_picks}")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--own", action="store_true", help="check tests/golden as well")
    args = parser.parse_args()
    shared = os.environ.get("RAMBAD_SHARED", os.path.join(os.path.dirname(ROOT), "shared"))
    folders = []
    bases = [os.path.join(shared, "published", "goldens")]
    if args.own:
        bases.append(os.path.join(ROOT, "tests", "golden"))
    for base in bases:
        if os.path.isdir(base):
            folders += [os.path.join(base, n) for n in sorted(os.listdir(base))]
    folders = [f for f in folders if os.path.exists(os.path.join(f, "golden.safetensors"))]
    if not folders:
        print("skipped: no goldens found; set RAMBAD_SHARED")
        return 77
    return 0 if all([check(f) for f in folders]) else 1


if __name__ == "__main__":
    sys.exit(main())
