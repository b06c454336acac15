"""Make tests/golden: small random models, each option of the model covered, and what the float64
reference computes from them.

A golden folder holds config.json, model.safetensors, tokenizer.json (bytes, no merges) and
golden.safetensors with: input_ids [1, L]; positions [n], the rows kept of every layer{i}.hidden
[1, n, d]; logit_positions [m] and logits [1, m, V]; layer{i}.k and .v [1, C*S, Hkv, hd] and
.landmarks [1, C, Hr, r/Hr] of the chunking layer; layer{i}.picks and .weights [1, L, Hr, K] of each
retrieval layer (newest chunk first, unused picks 0 with weight 0); layer{i}.margin [1, L, Hr], by
how much the last pick beat the next candidate (inf: there was none), so that a reader can tell a
tie from an error. Everything is computed in float64 from the stored weights and kept in fp32.
"""

import argparse
import json
import math
import os

import torch

import ramba
import safetensors_io
import tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BASE = {
    "model_type": "ramba",
    "architectures": ["RambaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "vocab_size": 256,
    "expand": 2,
    "head_dim": 32,
    "state_size": 16,
    "n_groups": 1,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-05,
    "residual_in_fp32": True,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "mamba_chunk_size": 64,
    "chunk_size": 64,
    "chunk_topk": 2,
    "num_lower_layers": 1,
    "num_upper_layers": 1,
    "num_upper_groups": 1,
    "num_mamba_per_gca": 1,
    "retrieval_dim": 64,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_kv_heads": 1,
    "torch_dtype": "float32",
}
MODELS = {
    "encoder1-kv1-gqa-bf16": {
        "num_key_value_heads": 2,
        "num_upper_layers": 2,
        "torch_dtype": "bfloat16",
    },
    "noencoder-kv2-groups2-bias": {
        "encoder_layers": 0,
        "chunk_size": 16,
        "chunk_topk": 4,
        "num_kv_heads": 2,
        "num_upper_layers": 2,
        "num_upper_groups": 2,
        "n_groups": 2,
        "use_bias": True,
        "time_step_limit": [0.01, 0.2],
        "tie_word_embeddings": False,
        "mamba_chunk_size": 32,
    },
    "encoder2-qknorm-softmax1-prenorm": {
        "encoder_layers": 2,
        "chunk_size": 32,
        "chunk_topk": 3,
        "num_kv_heads": 2,
        "num_key_value_heads": 1,
        "enc_prenorm": True,
        "enable_qk_norm": True,
        "enable_softmax1": True,
        "torch_dtype": "bfloat16",
    },
    "softmax-singlehead-lmknorm-posdecay": {
        "chunk_size": 16,
        "chunk_topk": 5,
        "num_kv_heads": 2,
        "retrieval_dim": 32,
        "enable_softmax": True,
        "enable_pos_decay": True,
        "singlehead_retrieval": True,
        "enable_lmk_norm": True,
        "torch_dtype": "bfloat16",
    },
    "slidewindow-kv4-lmknorm-softmax": {
        "chunk_size": 16,
        "chunk_topk": 3,
        "num_kv_heads": 4,
        "enable_softmax": True,
        "enable_lmk_norm": True,
        "mask_slide_window": True,
        "slide_window": 96,
        "torch_dtype": "bfloat16",
    },
    "wide-stickbreaking-topk8": {
        "hidden_size": 128,
        "head_dim": 64,
        "state_size": 64,
        "chunk_size": 16,
        "chunk_topk": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_kv_heads": 1,
        "retrieval_dim": 128,
        "num_upper_layers": 2,
        "num_mamba_per_gca": 2,
        "torch_dtype": "bfloat16",
    },
}
LENGTH = 333  # ragged on purpose: it ends inside a chunk of every size used here
SAFE_MARGIN = 1e-4


def random_tensors(c, generator):
    """Weights large enough that every path shows in the logits, small enough not to saturate."""
    out = {}

    def normal(name, shape, scale):
        out[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def matrix(name, rows, columns, scale=1.0, bias=False):
        normal(name + ".weight", (rows, columns), scale / math.sqrt(columns))
        if bias:
            normal(name + ".bias", (rows,), 0.1)

    def norm(name, width):
        normal(name + ".weight", (width,), 0.1)
        out[name + ".weight"] += 1.0

    d, head = c.hidden_size, c.attention_head_dim
    normal("backbone.embeddings.weight", (c.vocab_size, d), 0.5)
    for i, kind in enumerate(c.layers()):
        p = f"backbone.layers.{i}."
        if kind == "mamba":
            norm(p + "norm", d)
            step = torch.exp(
                torch.rand(c.mamba_heads, generator=generator, dtype=torch.float64) * math.log(100)
                + math.log(0.005)
            )
            out[p + "mixer.dt_bias"] = step + torch.log(-torch.expm1(-step))
            spread = torch.rand(c.mamba_heads, generator=generator, dtype=torch.float64)
            out[p + "mixer.A_log"] = torch.log(1 + 7 * spread)
            normal(p + "mixer.D", (c.mamba_heads,), 0.5)
            normal(p + "mixer.conv1d.weight", (c.conv_dim, 1, c.conv_kernel), 0.5)
            normal(p + "mixer.conv1d.bias", (c.conv_dim,), 0.1)
            columns = 2 * c.inner + 2 * c.n_groups * c.state_size + c.mamba_heads
            matrix(p + "mixer.in_proj", columns, d, bias=c.use_bias)
            norm(p + "mixer.norm", c.inner)
            matrix(p + "mixer.out_proj", d, c.inner, bias=c.use_bias)
        elif kind == "chunking":
            if c.encoder_layers:
                normal(p + "cls_emb", (1, 1, d), 0.5)
                if c.enc_prenorm:
                    norm(p + "enc_prenorm", d)
                for j in range(c.encoder_layers):
                    e = f"{p}encoder.layers.{j}."
                    kv = c.num_key_value_heads * head
                    matrix(e + "self_attn.q_proj", d, d, bias=True)
                    matrix(e + "self_attn.k_proj", kv, d, bias=True)
                    matrix(e + "self_attn.v_proj", kv, d, bias=True)
                    matrix(e + "self_attn.o_proj", d, d)
                    norm(e + "self_attn.q_norm", head)
                    norm(e + "self_attn.k_norm", head)
                    matrix(e + "mlp.gate_proj", c.intermediate, d)
                    matrix(e + "mlp.up_proj", c.intermediate, d)
                    matrix(e + "mlp.down_proj", d, c.intermediate)
                    norm(e + "input_layernorm", d)
                    norm(e + "post_attention_layernorm", d)
                norm(p + "encoder.norm", d)
            else:
                norm(p + "norm", d)
            matrix(p + "proj_k", c.num_kv_heads * head, d, 2.0)
            matrix(p + "proj_v", c.num_kv_heads * head, d)
            if c.enable_qk_norm:
                norm(p + "k_rmsnorm", head)
            # A mean of many rows is short, so without an encoder the landmark needs more gain.
            matrix(p + "lmk_ln", c.retrieval_dim, d, 1.5 if c.encoder_layers else 5.0)
        elif kind == "retrieval":
            norm(p + "pre_norm", d)
            matrix(p + "ln", c.retrieval_dim, d, 1.5)
            if c.enable_lmk_norm:
                norm(p + "lmk_q_norm", c.retrieval_head_dim)
                norm(p + "lmk_k_norm", c.retrieval_head_dim)
            if c.enable_pos_decay:
                normal(p + "pos_decay", (1,), 0.3)
        else:
            norm(p + "pre_norm", d)
            matrix(p + "q_proj", d, d, 2.0)
            if c.enable_qk_norm:
                norm(p + "q_norm", head)
            matrix(p + "o_proj", d, d, 2.0)
    norm("backbone.norm_f", d)
    if not c.tie_word_embeddings:
        matrix("lm_head", c.vocab_size, d)
    dtype = torch.bfloat16 if c.torch_dtype == "bfloat16" else torch.float32
    return {name: t.to(dtype) for name, t in out.items()}


def golden_of(model, ids, positions, logit_positions):
    """The tensors of golden.safetensors for one sequence of ids [L]."""
    out = model.forward(ids)
    golden = {
        "input_ids": ids[None],
        "positions": torch.tensor(positions),
        "logit_positions": torch.tensor(logit_positions),
        "logits": out["logits"][logit_positions][None],
    }
    margin = float("inf")
    for name in sorted(out, key=lambda n: (int(n[5:].split(".")[0]) if n != "logits" else -1, n)):
        value = out[name]
        if name.endswith(".hidden"):
            value = value[positions]
        elif name.endswith((".k", ".v")):
            value = value.flatten(0, 1)
        elif name.endswith(".margin"):
            value = torch.where(torch.isnan(value), torch.full_like(value, float("inf")), value)
            margin = min(margin, float(value.min()))
        elif name == "logits":
            continue
        golden[name] = value[None]
    for name, value in golden.items():
        golden[name] = value.to(torch.float32) if value.is_floating_point() else value.long()
    return golden, margin


def make(name, options, folder):
    values = dict(BASE)
    values.update(options)
    c = ramba.Config(values)
    seed = 1000 + sorted(MODELS).index(name)
    while True:  # until no choice of a chunk is near a tie
        generator = torch.Generator().manual_seed(seed)
        tensors = random_tensors(c, generator)
        ids = torch.randint(0, c.vocab_size, (LENGTH,), generator=generator)
        s = c.chunk_size
        positions = [0, 1, s - 1, s, s + 1, 2 * s - 1, 2 * s, 200, 256, LENGTH - 1]
        positions = sorted(set(positions))
        logit_positions = sorted(set(positions + [100, 150, 222, 300]))
        golden, margin = golden_of(ramba.Reference(c, tensors), ids, positions, logit_positions)
        if margin > SAFE_MARGIN:
            break
        seed += 100
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.write("\n")
    safetensors_io.save(tensors, os.path.join(folder, "model.safetensors"))
    safetensors_io.save(golden, os.path.join(folder, "golden.safetensors"), {"seed": str(seed)})
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(tokenizer.byte_tokenizer(), file, ensure_ascii=False)
    spread = golden["logits"].std()
    print(f"{name}: seed {seed}, smallest margin {margin:.1e}, logits' deviation {spread:.2f}")


def make_shipped(model_folder, folder, text):
    """Goldens of a trained model; its weights stay where they are."""
    model = ramba.Reference.load(model_folder)
    ids = torch.tensor(tokenizer.Tokenizer.load(model_folder).encode(text)[:1000])
    length = len(ids)
    positions = [0, 1, 63, 64, 127, 128, 200, 640, length - 1]
    golden, margin = golden_of(model, ids, positions, positions + [150, 250, 500, 800])
    os.makedirs(folder, exist_ok=True)
    safetensors_io.save(golden, os.path.join(folder, "golden.safetensors"))
    print(f"{folder}: {length} tokens, smallest margin {margin:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=os.path.join(ROOT, "tests", "golden"))
    parser.add_argument("--shipped", help="only the goldens of this model folder, in OUT/shipped")
    parser.add_argument("--text", help="the text file whose beginning --shipped reads")
    args = parser.parse_args()
    if args.shipped:
        with open(args.text, encoding="utf-8") as file:
            make_shipped(args.shipped, os.path.join(args.out, "shipped"), file.read(20000)[4000:])
        return
    for name, options in MODELS.items():
        make(name, options, os.path.join(args.out, name))


if __name__ == "__main__":
    main()
