"""The model, written out from its description: plain PyTorch, any float type, no speed.

This is the reference. It follows the recurrences one token at a time where the trainer and the
engine use blocked forms, so that the three can disagree. `Reference(config, tensors)` takes the
checkpoint's own tensor names (`backbone.layers.{i}...`).
"""

import json
import os

import torch
import torch.nn.functional as F

import safetensors_io

MEMORY_EPSILON = 1e-6  # RMSNorm epsilon of everything but the Mamba-2 blocks and norm_f

DEFAULTS = {
    "expand": 2,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, float("inf")],
    "tie_word_embeddings": True,
    "chunk_size": 64,
    "chunk_topk": 8,
    "num_upper_groups": 1,
    "num_mamba_per_gca": 1,
    "encoder_layers": 1,
    "num_kv_heads": 1,
    "rope_theta": 10000.0,
    "enc_prenorm": False,
    "enable_qk_norm": False,
    "enable_lmk_norm": False,
    "enable_softmax": False,
    "enable_softmax1": False,
    "enable_pos_decay": False,
    "singlehead_retrieval": False,
    "mask_slide_window": False,
    "slide_window": 0,
    "sliding_window": 0,
}


class Config:
    """config.json with the defaults of the keys it leaves out."""

    def __init__(self, values):
        merged = dict(DEFAULTS)
        merged.update(values)
        merged.setdefault("num_key_value_heads", merged["num_attention_heads"])
        merged.setdefault("retrieval_dim", merged["hidden_size"])
        if merged["time_step_limit"] is None:
            merged["time_step_limit"] = [0.0, float("inf")]
        self.values = values
        self.__dict__.update(merged)
        self.inner = self.expand * self.hidden_size
        self.mamba_heads = self.inner // self.head_dim
        self.conv_dim = self.inner + 2 * self.n_groups * self.state_size
        self.attention_head_dim = self.hidden_size // self.num_attention_heads
        self.retrieval_heads = 1 if self.singlehead_retrieval else self.num_kv_heads
        self.retrieval_head_dim = self.retrieval_dim // self.retrieval_heads
        self.intermediate = int(8 * self.hidden_size / 3) // 64 * 64

    @staticmethod
    def load(folder):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return Config(json.load(file))

    def layers(self):
        """The kind of every entry of backbone.layers, in order."""
        out = ["mamba"] * self.num_lower_layers + ["chunking"]
        per_group = self.num_upper_layers // self.num_upper_groups
        for _ in range(self.num_upper_groups):
            out.append("retrieval")
            for _ in range(per_group // self.num_mamba_per_gca):
                out += ["hsa"] + ["mamba"] * self.num_mamba_per_gca
        return out


def rms_norm(x, weight, epsilon):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Reference:
    """forward(ids) -> every intermediate that a golden holds. ids: [L] integers, one sequence."""

    def __init__(self, config, tensors, dtype=torch.float64):
        self.config = config
        self.dtype = dtype
        self.tensors = {name: t.to(dtype) for name, t in tensors.items()}

    @staticmethod
    def load(folder, dtype=torch.float64):
        return Reference(Config.load(folder), safetensors_io.load_folder(folder), dtype)

    def get(self, layer, name):
        return self.tensors.get(f"backbone.layers.{layer}.{name}")

    def linear(self, layer, name, x):
        return F.linear(x, self.get(layer, name + ".weight"), self.get(layer, name + ".bias"))

    def norm(self, layer, name, x, epsilon=MEMORY_EPSILON):
        return rms_norm(x, self.get(layer, name + ".weight"), epsilon)

    def mamba(self, layer, x):
        """x [L, d] -> [L, d]: the recurrence, one token after the other."""
        c = self.config
        length = x.shape[0]
        projected = self.linear(
            layer, "mixer.in_proj", self.norm(layer, "norm", x, c.layer_norm_epsilon)
        )
        gate, xbc, dt = torch.split(projected, [c.inner, c.conv_dim, c.mamba_heads], -1)
        weight = self.get(layer, "mixer.conv1d.weight")[:, 0]  # [conv_dim, width]
        padded = torch.cat([xbc.new_zeros(c.conv_kernel - 1, c.conv_dim), xbc])
        conv = sum(padded[i : i + length] * weight[:, i] for i in range(c.conv_kernel))
        bias = self.get(layer, "mixer.conv1d.bias")
        conv = F.silu(conv if bias is None else conv + bias)
        state_width = c.n_groups * c.state_size
        u, b, cc = torch.split(conv, [c.inner, state_width, state_width], -1)
        u = u.reshape(length, c.mamba_heads, c.head_dim)
        repeat = c.mamba_heads // c.n_groups
        b = b.reshape(length, c.n_groups, c.state_size).repeat_interleave(repeat, 1)
        cc = cc.reshape(length, c.n_groups, c.state_size).repeat_interleave(repeat, 1)
        dt = F.softplus(dt + self.get(layer, "mixer.dt_bias"))
        dt = dt.clamp(float(c.time_step_limit[0]), float(c.time_step_limit[1]))
        a = -torch.exp(self.get(layer, "mixer.A_log"))
        skip = self.get(layer, "mixer.D")
        h = x.new_zeros(c.mamba_heads, c.head_dim, c.state_size)
        rows = []
        for t in range(length):
            decay = torch.exp(dt[t] * a)[:, None, None]
            h = decay * h + (dt[t][:, None] * u[t])[:, :, None] * b[t][:, None, :]
            rows.append((h * cc[t][:, None, :]).sum(-1) + skip[:, None] * u[t])
        y = torch.stack(rows).reshape(length, c.inner) * F.silu(gate)
        y = self.norm(layer, "mixer.norm", y, c.layer_norm_epsilon)
        return x + self.linear(layer, "mixer.out_proj", y)

    def encoder(self, layer, chunks):
        """chunks [C, S, d] -> token outputs [C, S, d] and cls output [C, d]."""
        c = self.config
        count, size, width = chunks.shape
        head = c.attention_head_dim
        cls = self.get(layer, "cls_emb").expand(count, 1, width)
        x = torch.cat([chunks, cls], 1)
        if c.enc_prenorm:
            x = self.norm(layer, "enc_prenorm", x)
        steps = torch.arange(size + 1, dtype=self.dtype)
        frequency = c.rope_theta ** (-torch.arange(0, head, 2, dtype=self.dtype) / head)
        angle = torch.cat([torch.outer(steps, frequency)] * 2, -1)[:, None]  # [S+1, 1, hd]
        for j in range(c.encoder_layers):
            name = f"encoder.layers.{j}"
            y = self.norm(layer, name + ".input_layernorm", x)
            q, k, v = (
                self.linear(layer, f"{name}.self_attn.{part}_proj", y).reshape(
                    count, size + 1, -1, head
                )
                for part in "qkv"
            )
            q = self.norm(layer, name + ".self_attn.q_norm", q)
            k = self.norm(layer, name + ".self_attn.k_norm", k)
            q = q * angle.cos() + rotate_half(q) * angle.sin()
            k = k * angle.cos() + rotate_half(k) * angle.sin()
            repeat = c.num_attention_heads // c.num_key_value_heads
            k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
            scores = torch.einsum("cqhe,ckhe->chqk", q, k) * head**-0.5
            out = torch.einsum("chqk,ckhe->cqhe", scores.softmax(-1), v)
            x = x + self.linear(layer, name + ".self_attn.o_proj", out.flatten(2))
            y = self.norm(layer, name + ".post_attention_layernorm", x)
            y = F.silu(self.linear(layer, name + ".mlp.gate_proj", y)) * self.linear(
                layer, name + ".mlp.up_proj", y
            )
            x = x + self.linear(layer, name + ".mlp.down_proj", y)
        x = self.norm(layer, "encoder.norm", x)
        return x[:, :size], x[:, size]

    def chunking(self, layer, x):
        """x [L, d] -> K and V [C, S, Hkv, hd], landmarks [C, Hr, r / Hr]."""
        c = self.config
        count = x.shape[0] // c.chunk_size
        chunks = x[: count * c.chunk_size].reshape(count, c.chunk_size, -1)
        if c.encoder_layers > 0:
            e, g = self.encoder(layer, chunks)
        else:
            e = self.norm(layer, "norm", chunks)
            g = e.mean(1)
        shape = (count, c.chunk_size, c.num_kv_heads, c.attention_head_dim)
        k = self.linear(layer, "proj_k", e).reshape(shape)
        v = self.linear(layer, "proj_v", e).reshape(shape)
        if c.enable_qk_norm:
            k = self.norm(layer, "k_rmsnorm", k)
        landmarks = self.linear(layer, "lmk_ln", g)
        return k, v, landmarks.reshape(count, c.retrieval_heads, c.retrieval_head_dim)

    def retrieval(self, layer, x, landmarks):
        """x [L, d] -> picks [L, Hr, K] newest first (unused: 0), weights, margin of the choice."""
        c = self.config
        length, count = x.shape[0], landmarks.shape[0]
        q = self.linear(layer, "ln", self.norm(layer, "pre_norm", x))
        q = q.reshape(length, c.retrieval_heads, c.retrieval_head_dim)
        m = landmarks
        if c.enable_lmk_norm:
            q, m = self.norm(layer, "lmk_q_norm", q), self.norm(layer, "lmk_k_norm", m)
        scores = torch.einsum("the,che->thc", q, m) * c.retrieval_head_dim**-0.5
        position = torch.arange(length)
        if c.mask_slide_window:
            position = position - max(c.slide_window, c.sliding_window) + c.chunk_size
        visible = position[:, None] >= (torch.arange(count) + 1)[None] * c.chunk_size  # [L, C]
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        pad = max(0, c.chunk_topk + 1 - count)
        scores = F.pad(scores, (0, pad), value=float("-inf"))
        # A stable sort puts the lower chunk first among equal scores.
        best, index = torch.sort(scores, dim=-1, descending=True, stable=True)
        margin = best[..., c.chunk_topk - 1] - best[..., c.chunk_topk]
        best, index = best[..., : c.chunk_topk], index[..., : c.chunk_topk]
        unused = torch.isinf(best)
        index = index.masked_fill(unused, -1)
        index, order = torch.sort(index, -1, descending=True)
        best = torch.gather(best, -1, order)
        unused = index < 0
        if c.enable_softmax:
            if c.enable_pos_decay:
                best = best + self.get(layer, "pos_decay") * torch.arange(c.chunk_topk)
            top = best.masked_fill(unused, float("-inf")).max(-1, keepdim=True).values
            top = top.masked_fill(torch.isinf(top), 0.0)
            weights = torch.exp(best - top).masked_fill(unused, 0.0)
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        else:
            s = best.masked_fill(unused, 0.0)
            drop = F.softplus(s).masked_fill(unused, 0.0)
            weights = torch.exp(s - torch.cumsum(drop, -1)).masked_fill(unused, 0.0)
        return index.clamp_min(0), weights, margin

    def hsa(self, layer, x, k, v, picks, weights):
        """x [L, d] -> [L, d], one token after the other."""
        c = self.config
        length = x.shape[0]
        q = self.linear(layer, "q_proj", self.norm(layer, "pre_norm", x))
        q = q.reshape(length, c.num_attention_heads, c.attention_head_dim)
        if c.enable_qk_norm:
            q = self.norm(layer, "q_norm", q)
        per_kv = c.num_attention_heads // c.num_kv_heads
        rows = []
        for t in range(length):
            heads = []
            for g in range(c.num_kv_heads):
                r = 0 if c.singlehead_retrieval else g
                keys = k[picks[t, r], :, g] if k.shape[0] else None  # [K, S, hd]
                if keys is None:
                    heads.append(x.new_zeros(per_kv, c.attention_head_dim))
                    continue
                queries = q[t, g * per_kv : (g + 1) * per_kv]
                s = torch.einsum("he,kse->hks", queries, keys) * c.attention_head_dim**-0.5
                if c.enable_softmax1:
                    s = F.pad(s, (1, 0)).softmax(-1)[..., 1:]
                else:
                    s = s.softmax(-1)
                values = v[picks[t, r], :, g]
                heads.append(torch.einsum("k,hks,kse->he", weights[t, r], s, values))
            rows.append(torch.cat(heads).reshape(-1))
        return x + self.linear(layer, "o_proj", torch.stack(rows))

    def forward(self, ids):
        c = self.config
        out = {}
        x = self.tensors["backbone.embeddings.weight"][ids]
        k = v = landmarks = picks = weights = None
        for i, kind in enumerate(c.layers()):
            if kind == "mamba":
                x = self.mamba(i, x)
            elif kind == "chunking":
                k, v, landmarks = self.chunking(i, x)
                out[f"layer{i}.k"], out[f"layer{i}.v"] = k, v
                out[f"layer{i}.landmarks"] = landmarks
            elif kind == "retrieval":
                picks, weights, margin = self.retrieval(i, x, landmarks)
                out[f"layer{i}.picks"], out[f"layer{i}.weights"] = picks, weights
                out[f"layer{i}.margin"] = margin
            else:
                x = self.hsa(i, x, k, v, picks, weights)
            out[f"layer{i}.hidden"] = x
        x = rms_norm(x, self.tensors["backbone.norm_f.weight"], c.layer_norm_epsilon)
        head = self.tensors.get("lm_head.weight")
        if head is None:
            head = self.tensors["backbone.embeddings.weight"]
        out["logits"] = x @ head.t()
        return out
