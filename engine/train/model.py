"""RAMba as a PyTorch module, for training: blocked forms that a GPU likes, gradients, streaming.

Tensor names are those of published checkpoints. ramba.py is the plain reference it is held
against. Runs in float64, float32 and under bf16 autocast, on old and new PyTorch.
"""
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import safetensors_io

DEFAULTS = dict(
    conv_kernel=4,
    expand=2,
    head_dim=64,
    n_groups=1,
    state_size=128,
    layer_norm_epsilon=1e-5,
    use_bias=False,
    use_conv_bias=True,
    chunk_size=64,
    chunk_topk=8,
    num_mamba_per_gca=8,
    num_upper_groups=1,
    encoder_layers=1,
    time_step_limit=[0.0, math.inf],
    tie_word_embeddings=True,
    enable_qk_norm=False,
    enable_lmk_norm=False,
    enable_softmax=False,
    enable_softmax1=False,
    enable_pos_decay=False,
    singlehead_retrieval=False,
    enc_prenorm=False,
    mask_slide_window=False,
    slide_window=0,
    residual_in_fp32=True,
)


BANK = 16384  # landmarks of earlier text kept as what holds nothing for a question: 1M tokens of it
PART = 1024  # positions that the dense attention takes at a time, or an eighth of longer rows


class Config(dict):
    """config.json with the defaults filled in; keys read as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as missing:
            raise AttributeError(name) from missing

    @staticmethod
    def load(path):
        with open(path) as file:
            return Config({**DEFAULTS, **json.load(file)})

    @property
    def inner(self):
        return self.expand * self.hidden_size

    @property
    def attention_head(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def retrieval_heads(self):
        return 1 if self.singlehead_retrieval else self.num_kv_heads


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


def ssd(x, dt, a, b, c, resets, state, block):
    """The Mamba-2 recurrence in its chunked form.

    x [B,L,H,P], dt [B,L,H], a [H] (negative), b and c [B,L,G,N]; resets [B,L] bool or None: the
    state is zeroed before that position; state [B,H,P,N] or None: the state before position 0.
    L is a multiple of `block`. Returns y [B,L,H,P] and the state after the last position.
    """
    batch, length, heads, width = x.shape
    groups, size = b.shape[2:]
    blocks = length // block
    low = x.dtype
    wide = torch.float64 if low == torch.float64 else torch.float32
    log_decay = (dt.to(wide) * a.to(wide)).view(batch, blocks, block, heads)
    inside = log_decay.cumsum(2)  # log decay from the block's start through position i
    total = inside[:, :, -1]
    if resets is None:
        segment = torch.zeros(batch, blocks, block, dtype=torch.int64, device=x.device)
    else:
        segment = resets.view(batch, blocks, block).long().cumsum(2)
    last = segment[:, :, -1]

    xdt = (x * dt.unsqueeze(-1).to(low)).view(batch, blocks, block, heads, width)
    b = b.view(batch, blocks, block, groups, size)
    c = c.view(batch, blocks, block, groups, size)
    share = heads // groups

    order = torch.ones(block, block, dtype=torch.bool, device=x.device).tril()
    same = (segment.unsqueeze(3) == segment.unsqueeze(2)) & order  # [B,nb,i,j]
    gap = inside.permute(0, 1, 3, 2)  # [B,nb,H,i]
    gap = gap.unsqueeze(-1) - gap.unsqueeze(-2)
    decay = gap.masked_fill(~same.unsqueeze(2), -math.inf).exp().to(low)
    scores = torch.einsum("bzign,bzjgn->bzgij", c, b).repeat_interleave(share, 2)
    y = torch.einsum("bzhij,bzjhp->bzihp", scores * decay, xdt)

    # What each block adds to the state at its end, then the states between blocks.
    to_end = (total.unsqueeze(2) - inside).exp() * (segment == last.unsqueeze(2)).unsqueeze(-1)
    bh = b.repeat_interleave(share, 3)
    added = torch.einsum("bzjhn,bzjhp->bzhpn", bh, xdt * to_end.unsqueeze(-1).to(low))
    run = torch.cat([torch.zeros_like(total[:, :1]), total.cumsum(1)], 1)  # before block z
    seen = torch.cat([torch.zeros_like(last[:, :1]), (last > 0).long().cumsum(1)], 1)
    # State before block z: from the start (source 0) or from the end of block s - 1 (source s).
    start = torch.zeros_like(added[:, :1]) if state is None else state.unsqueeze(1).to(low)
    sources = torch.cat([start, added], 1)  # [B,nb+1,H,P,N]
    hop = run.permute(0, 2, 1)
    hop = hop.unsqueeze(-1) - hop.unsqueeze(-2)  # [B,H,z,s]
    alive = (seen.unsqueeze(2) == seen.unsqueeze(1)) & torch.ones(
        blocks + 1, blocks + 1, dtype=torch.bool, device=x.device
    ).tril()
    hop = hop.masked_fill(~alive.unsqueeze(1), -math.inf).exp().to(low)
    states = torch.einsum("bhzs,bshpn->bzhpn", hop, sources)
    from_start = inside.exp() * (segment == 0).unsqueeze(-1)
    ch = c.repeat_interleave(share, 3)
    old = torch.einsum("bzihn,bzhpn->bzihp", ch, states[:, :-1])
    y = y + old * from_start.unsqueeze(-1).to(low)
    return y.reshape(batch, length, heads, width), states[:, -1]


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, inner = config.hidden_size, config.inner
        groups, size = config.n_groups, config.state_size
        self.config, self.heads = config, inner // config.head_dim
        mixed = inner + 2 * groups * size
        self.in_proj = nn.Linear(d, inner + mixed + self.heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            mixed, mixed, config.conv_kernel, groups=mixed, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.arange(1, self.heads + 1).float().log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(inner, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, d, bias=config.use_bias)

    def forward(self, x, resets=None, ssm=None, conv=None):
        """`ssm` [B,H,P,N] and `conv` [B,columns,conv_kernel-1] are the state before the first
        token, None for zeros. Returns the output and both after the last."""
        config = self.config
        inner, groups, size = config.inner, config.n_groups, config.state_size
        batch, length, _ = x.shape
        z, mixed, dt = self.in_proj(x).split([inner, inner + 2 * groups * size, self.heads], dim=-1)
        tail = config.conv_kernel - 1
        if conv is None:
            padded = F.pad(mixed, (0, 0, tail, 0))
        else:
            padded = torch.cat([conv.transpose(1, 2).to(mixed.dtype), mixed], 1)
        conv = padded[:, padded.shape[1] - tail :].transpose(1, 2)
        # As shifts, which fuse with what stands around them: library convolutions by column are slow.
        weight = self.conv1d.weight[:, 0]
        taps = [padded[:, k : k + length] * weight[:, k] for k in range(tail + 1)]
        filtered = sum(taps[1:], taps[0])
        if self.conv1d.bias is not None:
            filtered = filtered + self.conv1d.bias
        mixed = F.silu(filtered).to(mixed.dtype)
        xs, b, c = mixed.split([inner, groups * size, groups * size], dim=-1)
        xs = xs.reshape(batch, length, self.heads, -1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        low, high = config.time_step_limit
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(low, high)
        block = 64
        pad = -length % block
        b, c = b.view(batch, length, groups, size), c.view(batch, length, groups, size)
        args = [xs, dt, b, c]
        if pad:  # dt = 0 leaves the state as it is
            args = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in args]
            resets = None if resets is None else F.pad(resets, (0, pad))
        y, ssm = ssd(
            args[0], args[1], -self.A_log.to(wide).exp(), args[2], args[3], resets, ssm, block
        )
        y = y[:, :length] + xs * self.D.unsqueeze(-1).to(xs.dtype)
        y = self.norm(y.reshape(batch, length, inner) * F.silu(z))
        return self.out_proj(y), ssm, conv


class MambaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mixer(config)

    def forward(self, x, resets=None, ssm=None, conv=None):
        y, ssm, conv = self.mixer(self.norm(x), resets, ssm, conv)
        return x + y.to(x.dtype), ssm, conv


def rope(x, positions):
    """Half-rotation layout, theta 10,000; x [..., positions, hd]."""
    half = x.shape[-1] // 2
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rate = 10000.0 ** (-torch.arange(half, dtype=wide, device=x.device) / half)
    angle = positions.to(wide).unsqueeze(-1) * rate
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x.to(wide) * cos + turned.to(wide) * sin).to(x.dtype)


class EncoderAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, hd = config.hidden_size, config.attention_head
        self.hd = hd
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, self.heads * hd)
        self.k_proj = nn.Linear(d, self.kv_heads * hd)
        self.v_proj = nn.Linear(d, self.kv_heads * hd)
        self.o_proj = nn.Linear(self.heads * hd, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm(hd, 1e-6), RMSNorm(hd, 1e-6)

    def forward(self, x):
        count, length, _ = x.shape
        shape = (count, length, -1, self.hd)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        positions = torch.arange(length, device=x.device)
        q, k = rope(q, positions), rope(k, positions)
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.hd**-0.5
        out = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1).to(v.dtype), v)
        return self.o_proj(out.transpose(1, 2).reshape(count, length, -1))


class EncoderMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        size = int(8 * d / 3 / 64) * 64
        self.gate_proj = nn.Linear(d, size, bias=False)
        self.up_proj = nn.Linear(d, size, bias=False)
        self.down_proj = nn.Linear(size, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = EncoderAttention(config), EncoderMlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, 1e-6)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, 1e-6)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x)).to(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.hidden_size, 1e-6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ChunkingLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, hd = config.hidden_size, config.attention_head
        self.config = config
        if config.encoder_layers > 0:
            self.cls_emb = nn.Parameter(torch.randn(1, 1, d) * 0.02)
            self.encoder = Encoder(config)
            if config.enc_prenorm:
                self.enc_prenorm = RMSNorm(d, 1e-6)
        else:
            self.norm = RMSNorm(d, 1e-6)
        self.proj_k = nn.Linear(d, config.num_kv_heads * hd, bias=False)
        self.proj_v = nn.Linear(d, config.num_kv_heads * hd, bias=False)
        self.lmk_ln = nn.Linear(d, config.retrieval_dim, bias=False)
        if config.enable_qk_norm:
            self.k_rmsnorm = RMSNorm(hd, 1e-6)

    def summaries(self, x):
        """x [B,L,d] -> what keys and values are made of [B*C,S,d], and landmarks [B*C,d], of whole chunks."""
        config = self.config
        batch, length, d = x.shape
        count = length // config.chunk_size
        chunks = x[:, : count * config.chunk_size].reshape(batch * count, config.chunk_size, d)
        if config.encoder_layers == 0:
            tokens = self.norm(chunks)
            return tokens, tokens.mean(1)
        cls = self.cls_emb.to(chunks.dtype).expand(len(chunks), -1, -1)
        chunks = torch.cat([chunks, cls], 1)
        if config.enc_prenorm:
            chunks = self.enc_prenorm(chunks)
        chunks = self.encoder(chunks)
        return chunks[:, :-1], chunks[:, -1]

    def forward(self, x):
        """x [B,L,d] -> K, V [B,C,S,Hkv,hd] and landmarks [B,C,Hr,r/Hr] of the whole chunks."""
        config = self.config
        batch, count = len(x), x.shape[1] // config.chunk_size
        tokens, summary = self.summaries(x)
        shape = (batch, count, config.chunk_size, config.num_kv_heads, config.attention_head)
        keys, values = self.proj_k(tokens).view(shape), self.proj_v(tokens).view(shape)
        if config.enable_qk_norm:
            keys = self.k_rmsnorm(keys)
        landmarks = self.lmk_ln(summary).view(batch, count, config.retrieval_heads, -1)
        return keys, values, landmarks


def weighed(loss, counts):
    """The mean of `loss` [N,heads], of which each row counts `counts` [N] times; 0 of nothing."""
    return (loss.mean(1) * counts).sum() / counts.sum().clamp(min=1e-6)


class RetrievalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.retrieval_dim // config.retrieval_heads
        self.pre_norm = RMSNorm(config.hidden_size, 1e-6)
        self.ln = nn.Linear(config.hidden_size, config.retrieval_dim, bias=False)
        if config.enable_softmax and config.enable_pos_decay:
            self.pos_decay = nn.Parameter(torch.zeros(1))
        if config.enable_lmk_norm:
            self.lmk_q_norm, self.lmk_k_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)

    def scores(self, x, landmarks):
        """[B,L,Hr,C] in fp32 or wider."""
        config = self.config
        q = self.ln(self.pre_norm(x)).view(*x.shape[:2], config.retrieval_heads, -1)
        if config.enable_lmk_norm:
            q, landmarks = self.lmk_q_norm(q), self.lmk_k_norm(landmarks)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.einsum("blhr,bchr->blhc", q, landmarks).to(wide) * q.shape[-1] ** -0.5

    def visible(self, positions, count):
        """[L,C]: which chunks a token may read."""
        config = self.config
        window = config.chunk_size - config.slide_window if config.mask_slide_window else 0
        ends = (torch.arange(count, device=positions.device) + 1) * self.config.chunk_size
        return positions.unsqueeze(1) + window >= ends

    def weigh(self, scores, picked):
        """Dense weights [B,L,Hr,C] of the picked chunks: newest first is from the right."""
        config = self.config
        if config.enable_softmax:
            if config.enable_pos_decay:
                rank = picked.long().flip(-1).cumsum(-1).flip(-1) - 1
                scores = scores + self.pos_decay * rank
            weights = scores.masked_fill(~picked, -math.inf).softmax(-1)
            return weights.nan_to_num(0.0)
        # Only picked chunks may enter: exp() of another's score can overflow, and inf * 0 is NaN
        # in the gradient even where the value is masked afterwards.
        scores = scores.masked_fill(~picked, -math.inf)
        spent = F.softplus(scores).flip(-1).cumsum(-1).flip(-1)
        return (scores - spent).exp()

    def forward(self, x, landmarks, positions):
        """Dense weights [B,L,Hr,C], zero where a chunk is not picked."""
        count = landmarks.shape[1]
        scores = self.scores(x, landmarks)
        visible = self.visible(positions, count).unsqueeze(1)
        masked = scores.masked_fill(~visible, -math.inf)
        picks = masked.topk(min(self.config.chunk_topk, count), -1).indices
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picks, True) & visible
        return self.weigh(scores, picked)

    def missed(self, x, landmarks, positions, gold, counts, sole, others=None, own=None, earlier=None):
        """Three means over the `gold` positions (batch, at, place), which teach the landmarks before any
        answer is right: of -log of the weight of the place's chunk, were every chunk picked; over
        the first `sole`, for which no other chunk would do, of -log of its share in a softmax over the
        scores of every visible chunk and `others` [C,Hr,r/Hr] (InfoNCE), chunks that hold nothing for
        these rows, but where `own` [batch,C]; and over the rest the same with `earlier` [C,Hr,r/Hr]
        alone, or None. A position counts `counts` [positions] times."""
        batch, at, place = gold
        q = self.ln(self.pre_norm(x[batch, at])).view(len(batch), self.config.retrieval_heads, -1)
        if self.config.enable_lmk_norm:
            q, landmarks = self.lmk_q_norm(q), self.lmk_k_norm(landmarks)
            others = None if others is None else self.lmk_k_norm(others)
            earlier = None if earlier is None else self.lmk_k_norm(earlier)
        scale = q.shape[-1] ** -0.5
        scores = torch.einsum("nhr,nchr->nhc", q, landmarks[batch].to(q.dtype)).float() * scale
        chunk = place.view(-1, 1, 1) // self.config.chunk_size
        number = torch.arange(scores.shape[-1], device=x.device)
        rivals = self.visible(positions[at], len(number)).unsqueeze(1)
        wanted = scores.gather(-1, chunk.expand(-1, scores.shape[1], 1)).squeeze(-1)
        among = scores.masked_fill(~rivals, -math.inf).logsumexp(-1)
        if self.config.enable_softmax:
            spent = among
        else:
            spent = (F.softplus(scores) * (rivals & (number >= chunk))).sum(-1)
        among = among[:sole]
        if others is not None:
            scores = torch.einsum("nhr,chr->nhc", q[:sole], others.to(q.dtype)).float() * scale
            if own is not None:
                scores = scores.masked_fill(own[batch[:sole]].unsqueeze(1), -math.inf)
            among = torch.logaddexp(among, scores.logsumexp(-1))
        contrast = weighed(among - wanted[:sole], counts[:sole])
        apart = None
        if earlier is not None and len(earlier):
            scores = torch.einsum("nhr,chr->nhc", q[sole:], earlier.to(q.dtype)).float() * scale
            rest = wanted[sole:]
            apart = weighed(torch.logaddexp(rest, scores.logsumexp(-1)) - rest, counts[sole:])
        return weighed(spent - wanted, counts), contrast, apart

    def distracted(self, x, landmarks, own=None):
        """What chunks [C,Hr,r/Hr] that hold nothing for positions x [N,d] cost these: the mean of -log of
        what the best of them, as many as are picked, leave of the stick; `own` [N,C]: those that hold
        something."""
        scores = self.scores(x.unsqueeze(0), landmarks.unsqueeze(0))[0]
        if own is not None:
            scores = scores.masked_fill(own[:, None], -math.inf)
        best = scores.topk(min(self.config.chunk_topk, len(landmarks)), -1).values
        return F.softplus(best).sum(-1).mean()

    def pick(self, x, landmarks, positions):
        """The sparse form: picks and weights [B,L,Hr,K], newest first, for any number of chunks."""
        scores = self.scores(x, landmarks)
        visible = self.visible(positions, landmarks.shape[1]).unsqueeze(1)
        scores = scores.masked_fill(~visible, -math.inf)
        best = scores.topk(min(self.config.chunk_topk, landmarks.shape[1]), -1)
        order = best.indices.masked_fill(best.values == -math.inf, -1).argsort(-1, descending=True)
        picks, scores = best.indices.gather(-1, order), best.values.gather(-1, order)
        if self.config.enable_softmax:
            if self.config.enable_pos_decay:
                scores = scores + self.pos_decay * torch.arange(scores.shape[-1], device=x.device)
            return picks, scores.softmax(-1).nan_to_num(0.0)
        return picks, (scores - F.softplus(scores).cumsum(-1)).exp().nan_to_num(0.0)


class HsaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, hd = config.hidden_size, config.attention_head
        self.config = config
        self.pre_norm = RMSNorm(d, 1e-6)
        self.q_proj = nn.Linear(d, config.num_attention_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, d, bias=False)
        if config.enable_qk_norm:
            self.q_norm = RMSNorm(hd, 1e-6)

    def forward(self, x, keys, values, weights):
        """Dense form: attends to every chunk and multiplies by its weight, zero for most. Long rows
        go in parts, each over the chunks that its last position may read."""
        config = self.config
        batch, length, _ = x.shape
        kv, hd = config.num_kv_heads, config.attention_head
        share = config.num_attention_heads // kv
        q = self.q_proj(self.pre_norm(x)).view(batch, length, kv, share, hd)
        if config.enable_qk_norm:
            q = self.q_norm(q)
        weights = weights.expand(-1, -1, kv, -1).permute(0, 2, 1, 3)  # [B,kv,L,C]
        ahead = config.chunk_size - config.slide_window if config.mask_slide_window else 0
        parts, step = [], max(PART, length // 8) if length > PART else length
        for begin in range(0, length, step):
            end = min(length, begin + step)
            count = min(keys.shape[1], (end - 1 + ahead) // config.chunk_size)
            part = self.attend(q[:, begin:end], keys[:, :count])
            part = (part * weights[:, :, None, begin:end, :count, None]).to(q.dtype)
            parts.append(torch.einsum("bkglcs,bcskd->blkgd", part, values[:, :count].to(q.dtype)))
        out = torch.cat(parts, 1)
        return x + self.o_proj(out.reshape(batch, length, -1)).to(x.dtype)

    def attend(self, q, keys):
        """Each query's attention within each chunk: [B,kv,share,L,C,S]."""
        logits = torch.einsum("blkgd,bcskd->bkglcs", q, keys.to(q.dtype)) * q.shape[-1] ** -0.5
        if self.config.enable_softmax1:
            extra = torch.zeros_like(logits[..., :1])
            return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        return logits.softmax(-1)

    def missed(self, x, keys, gold, counts):
        """Mean over the `gold` positions (batch, at, place), each of which counts `counts` times, of -log
        of the attention that half of the heads pay to that place within its chunk."""
        config = self.config
        batch, at, place = gold
        q = self.q_proj(self.pre_norm(x[batch, at]))
        q = q.view(len(batch), config.num_kv_heads, -1, config.attention_head)
        q = q[:, :, : max(1, q.shape[2] // 2)]
        if config.enable_qk_norm:
            q = self.q_norm(q)
        k = keys[batch, place // config.chunk_size].to(q.dtype)
        logits = torch.einsum("nkgd,nskd->nkgs", q, k).float() * q.shape[-1] ** -0.5
        want = (place % config.chunk_size).view(-1, 1, 1, 1).expand(-1, *logits.shape[1:3], 1)
        return weighed(-logits.log_softmax(-1).gather(-1, want).flatten(1), counts)

    def gathered(self, x, keys, values, picks, weights):
        """The sparse form of `forward`, for picks and weights [1,L,Hr,K]."""
        config = self.config
        length, kv, hd = x.shape[1], config.num_kv_heads, config.attention_head
        q = self.q_proj(self.pre_norm(x)).view(length, kv, -1, hd)
        if config.enable_qk_norm:
            q = self.q_norm(q)
        picks, weights = picks[0].expand(-1, kv, -1), weights[0].expand(-1, kv, -1)
        head = torch.arange(kv, device=x.device).view(1, kv, 1)
        k, v = keys[0].transpose(1, 2)[picks, head], values[0].transpose(1, 2)[picks, head]
        logits = torch.einsum("lkgd,lkcsd->lkgcs", q, k.to(q.dtype)) * hd**-0.5
        if config.enable_softmax1:
            logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1)
        attention = logits.softmax(-1)[..., : config.chunk_size] * weights[:, :, None, :, None]
        out = torch.einsum("lkgcs,lkcsd->lkgd", attention.to(v.dtype), v)
        return x + self.o_proj(out.reshape(1, length, -1).to(x.dtype)).to(x.dtype)


class Aims:
    """What a training batch should read, for the losses beside the language's.

    gold: (row, position, place) of positions and the place that each should read from, or None:
        `retrieval` is the mean of -log of its chunk's weight, were every chunk picked, `contrast`
        that of its share among its row's chunks and those that hold nothing for it, `attention`
        that of the place's share of the attention to that chunk, in half of the heads of the first
        HSA layer.
    counts: [positions], how many times each of them counts in these.
    sole: of how many of them, the first, no other chunk holds the same: `contrast` is of these, and of
        the others `apart`, which sets the place's chunk against those of earlier batches alone.
    distractors: the flat numbers of chunks that are text alone. `distraction` is what the flat positions
        `asked` would read of these or those of earlier batches, `straying` what the flat positions
        `text` would of those of earlier batches: they keep landmarks apart in longer contexts than are
        trained on.
    crowd: every row is a haystack of needles of one kind, no key in two of them: what holds nothing for
        it are then also the other rows.
    """

    def __init__(self, gold=None, counts=None, sole=0, distractors=None, asked=None, text=None, crowd=False):
        self.gold, self.counts, self.sole = gold, counts, sole
        self.distractors, self.asked, self.text, self.crowd = distractors, asked, text, crowd


class Bank:
    """The landmarks of earlier chunks [N,Hr,r/Hr], the newest first, at most `most`, and what these were
    made of [N,S,d]; both None at first. Were the landmarks of a step the only ones with a gradient, it
    would count all that raising a wanted one brings, and a fraction of what it costs to raise every
    other with it. So the earlier ones have theirs too, and `settle` carries it to the layer that makes
    landmarks; no further, since the layers below that have changed."""

    def __init__(self, most):
        self.most, self.landmarks, self.chunks, self.fresh = most, None, None, None

    def keep(self, landmarks, chunks):
        """From the next `settle` on these are in the bank too."""
        wide = torch.promote_types(landmarks.dtype, torch.float32)
        self.fresh = landmarks.detach().to(wide), chunks.detach()

    def behind(self, fresh):
        """`fresh` landmarks, and the bank's behind them."""
        return fresh if self.landmarks is None else torch.cat([fresh, self.landmarks.to(fresh.dtype)])

    def settle(self, layer, rows, count):
        """After the losses' backward and before the optimiser's step. `layer` is the one that makes
        landmarks: it makes as many anew as `rows` of `count` chunks are, in that shape."""
        if self.landmarks is not None and len(self.landmarks) and self.landmarks.grad is not None:
            self.carry(layer, self.landmarks.grad.flatten(1), rows, count)
        if self.fresh is not None:
            if self.landmarks is not None:
                old = self.landmarks.detach(), self.chunks
                self.fresh = [torch.cat(pair)[: self.most] for pair in zip(self.fresh, old)]
            self.landmarks, self.chunks = (part[: self.most] for part in self.fresh)
            self.landmarks.requires_grad_()
            self.fresh = None

    def carry(self, layer, grads, rows, count):
        """Where there are more landmarks than are made, they are drawn by the size of their gradients,
        so that the mean over the draws is what all would give."""
        drawn = torch.arange(rows * count, device=grads.device)
        stands = (drawn < len(grads)).to(grads.dtype)
        drawn = drawn % len(grads)
        if len(drawn) < len(grads):
            size = grads.norm(dim=1).nan_to_num(0.0, 0.0, 0.0) + 1e-30
            drawn = torch.multinomial(size, len(drawn), replacement=True)
            stands = size.sum() / (len(drawn) * size[drawn])
        made = layer(self.chunks[drawn].unflatten(0, (rows, count)).flatten(1, 2))[2]
        made.backward((grads[drawn] * stands[:, None]).view_as(made).to(made.dtype))
        self.landmarks.detach()[drawn] = made.detach().flatten(0, 1).to(self.landmarks.dtype)


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [MambaLayer(config) for _ in range(config.num_lower_layers)]
        layers.append(ChunkingLayer(config))
        for _ in range(config.num_upper_groups):
            layers.append(RetrievalLayer(config))
            per_group = config.num_upper_layers // config.num_upper_groups
            for _ in range(per_group // config.num_mamba_per_gca):
                layers.append(HsaLayer(config))
                layers += [MambaLayer(config) for _ in range(config.num_mamba_per_gca)]
        self.layers = nn.ModuleList(layers)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class Ramba(nn.Module):
    def __init__(self, config, hsa=True):
        super().__init__()
        self.config, self.hsa = config, hsa
        self.bank = Bank(BANK)
        self.backbone = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def head(self, x):
        x = self.backbone.norm_f(x)
        if self.config.tie_word_embeddings:
            return F.linear(x, self.backbone.embeddings.weight)
        return self.lm_head(x)

    def hidden(self, ids, resets=None, states=None, trace=None, aims=None):
        """[B,L] -> the last layer's hidden states [B,L,d], and the Mamba states after it.

        `states`: a list of [B,H,P,N], one for each Mamba layer, or None. `trace`: a dict to be
        filled with layer{i}.hidden, .k, .v, .landmarks, .weights. With `aims` self.distraction,
        self.straying, self.retrieval, self.contrast, self.apart and self.attention are the losses of that
        name.
        """
        x = self.backbone.embeddings(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        keys = values = landmarks = weights = made_of = None
        after, mamba = [], 0
        self.distraction = self.straying = self.retrieval = self.contrast = None
        self.apart = self.attention = None
        for i, layer in enumerate(self.backbone.layers):
            if isinstance(layer, MambaLayer):
                x, ssm, _ = layer(x, resets, None if states is None else states[mamba])
                after.append(ssm)
                mamba += 1
            elif isinstance(layer, ChunkingLayer):
                made_of = x
                if self.hsa:
                    keys, values, landmarks = layer(x)
                if trace is not None:
                    trace.update(
                        {
                            f"layer{i}.k": keys,
                            f"layer{i}.v": values,
                            f"layer{i}.landmarks": landmarks,
                        }
                    )
            elif isinstance(layer, RetrievalLayer):
                if self.hsa and landmarks.shape[1]:
                    weights = layer(x, landmarks, positions)
                    if trace is not None:
                        trace[f"layer{i}.weights"] = weights
                    if aims is not None:
                        self.aim(aims, layer, x, landmarks, positions, made_of)
            elif self.hsa and landmarks.shape[1]:
                if aims is not None and aims.gold is not None and self.attention is None:
                    self.attention = layer.missed(x, keys, aims.gold, aims.counts)
                x = layer(x, keys, values, weights)
            if trace is not None:
                trace[f"layer{i}.hidden"] = x
        return x, after

    def aim(self, aims, layer, x, landmarks, positions, made_of):
        """`made_of` [B,L,d]: what the landmarks were made of."""
        others = own = earlier = None
        if aims.asked is not None:
            earlier = None if self.bank.landmarks is None else self.bank.landmarks.to(x.dtype)
            flat, chunks = x.flatten(0, 1), landmarks.flatten(0, 1)
            distractors = chunks[aims.distractors]
            self.bank.keep(distractors, self.whole_chunks(made_of)[aims.distractors])
            others = self.bank.behind(distractors)
            if aims.crowd:
                others = torch.cat([chunks, others])
                row = torch.arange(len(x), device=x.device)
                own = row[:, None] == row.repeat_interleave(landmarks.shape[1])
                own = F.pad(own, (0, len(others) - len(chunks)))
            mine = None if own is None else own[aims.asked // x.shape[1]]
            self.distraction = layer.distracted(flat[aims.asked], others, mine)
            if earlier is not None and len(aims.text):
                self.straying = layer.distracted(flat[aims.text], earlier)
        if aims.gold is not None:
            self.retrieval, self.contrast, self.apart = layer.missed(
                x, landmarks, positions, aims.gold, aims.counts, aims.sole, others, own, earlier
            )

    def whole_chunks(self, x):
        """[B,L,d] -> [B*C,S,d]."""
        size = self.config.chunk_size
        return x.unfold(1, size, size).transpose(2, 3).flatten(0, 1)

    def settle(self, rows, length):
        """After the backward of a step of that shape, and before the optimiser's."""
        layer = next(l for l in self.backbone.layers if isinstance(l, ChunkingLayer))
        self.bank.settle(layer, rows, length // self.config.chunk_size)

    def fill_bank(self, device):
        """As after many batches, with landmarks of nothing."""
        config, bank = self.config, self.bank
        heads, width = config.retrieval_heads, config.retrieval_dim // config.retrieval_heads
        bank.landmarks = torch.zeros(bank.most, heads, width, device=device, requires_grad=True)
        bank.chunks = torch.zeros(bank.most, config.chunk_size, config.hidden_size, device=device)

    def forward(self, ids, trace=None):
        return self.head(self.hidden(ids, trace=trace)[0])

    @torch.no_grad()
    def stream(self, session, ids):
        """Carries `session` (a dict, {} at first) forward by ids [L]; returns the hidden states
        [1,L,d]. The past is kept as states and chunk memories, so the length is free."""
        config = self.config
        x = self.backbone.embeddings(ids.unsqueeze(0))
        start = session.get("position", 0)
        positions = torch.arange(start, start + len(ids), device=ids.device)
        states, mamba, picks, weights = session.setdefault("states", {}), 0, None, None
        for layer in self.backbone.layers:
            if isinstance(layer, MambaLayer):
                ssm, conv = states.get(mamba, (None, None))
                x, ssm, conv = layer(x, None, ssm, conv)
                states[mamba] = (ssm, conv)
                mamba += 1
            elif isinstance(layer, ChunkingLayer):
                rest = x if "rest" not in session else torch.cat([session["rest"], x], 1)
                whole = rest.shape[1] // config.chunk_size * config.chunk_size
                session["rest"] = rest[:, whole:]
                if whole:
                    made = [t.to(x.dtype) for t in layer(rest[:, :whole])]
                    old = session.get("memory")
                    session["memory"] = (
                        made if old is None else [torch.cat(pair, 1) for pair in zip(old, made)]
                    )
            elif isinstance(layer, RetrievalLayer):
                if self.hsa and "memory" in session:
                    picks, weights = layer.pick(x, session["memory"][2], positions)
            elif self.hsa and "memory" in session:
                x = layer.gathered(x, session["memory"][0], session["memory"][1], picks, weights)
        session["position"] = start + len(ids)
        return x

    @staticmethod
    def load(folder, dtype=torch.float32):
        config = Config.load(os.path.join(folder, "config.json"))
        tensors = safetensors_io.load_folder(folder)
        config["tie_word_embeddings"] = (
            "lm_head.weight" not in tensors or config.tie_word_embeddings
        )
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        model = Ramba(config).to(dtype)
        model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()})
        return model.eval()
