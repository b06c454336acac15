"""A model between others: python3 engine/train/blend.py OUT MODEL=SHARE MODEL=SHARE ...

Each MODEL is a folder of the same shape; tensors that it lacks are the first one's. OUT is a folder as
the daemon takes it, with weights in bf16: the sum of each MODEL's times its SHARE.
"""
import os
import shutil
import sys

import torch

import safetensors_io


def blend(models, shares):
    """The weighted sum of `models`, dicts of tensors."""
    return {
        name: sum(
            share * tensors.get(name, tensor).float() for tensors, share in zip(models, shares)
        ).to(torch.bfloat16)
        for name, tensor in models[0].items()
    }


def main():
    if len(sys.argv) < 3 or not all("=" in part for part in sys.argv[2:]):
        sys.exit(__doc__)
    out, *parts = sys.argv[1:]
    folders, shares = zip(*(part.rsplit("=", 1) for part in parts))
    shares = [float(share) for share in shares]
    if abs(sum(shares) - 1) > 1e-6:
        sys.exit("the shares must add up to 1")
    os.makedirs(out, exist_ok=True)
    models = [safetensors_io.load_folder(folder) for folder in folders]
    safetensors_io.save_folder(blend(models, shares), out)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(folders[0], name), out)


if __name__ == "__main__":
    main()
