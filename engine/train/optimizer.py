"""Muon for the matrices between layers, AdamW for the rest.

Muon (Jordan et al., 2024) makes each matrix's momentum orthogonal by Newton-Schulz steps; scaled by
0.2 sqrt(max(rows, columns)) its updates are as large as AdamW's (Liu et al., 2025), so that both
share one learning rate.
"""
import torch

STEPS = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonal(matrices):
    """[n, rows, columns] -> nearly the nearest matrices with singular values of one."""
    wide = matrices.shape[1] <= matrices.shape[2]
    low = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = matrices.to(low) if wide else matrices.to(low).transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in STEPS:
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.transpose(1, 2)).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                grads = []
                for p in same:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    grads.append(p.grad.lerp(state["momentum"], group["momentum"]))
                update = orthogonal(torch.stack(grads))
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(update.unbind(0)), alpha=scale)


class Both:
    """The optimisers of a model, as one. With decay_to_start weights decay towards what they are now,
    instead of towards zero: what the training says nothing about stays as it was."""

    def __init__(self, model, settings):
        matrices, tables, rest = [], [], []
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embeddings" not in name and "lm_head" not in name:
                matrices.append(p)
            else:
                (tables if p.dim() >= 2 else rest).append(p)
        rate, decay = settings["learning_rate"], settings["weight_decay"]
        self.pull, self.trained, self.start = 0.0, [], []
        if settings.get("decay_to_start"):
            self.pull, decay = decay, 0.0
            self.trained = [p for p in model.parameters() if p.requires_grad]
            self.start = [p.detach().clone() for p in self.trained]
        fused = {"fused": True} if rest[0].is_cuda else {}
        groups = [
            {"params": tables, "weight_decay": decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        if not settings["muon"]:
            groups[0]["params"] = tables + matrices
        self.parts = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), **fused)]
        if settings["muon"]:
            self.parts.append(Muon(matrices, rate, decay))

    @torch.no_grad()
    def step(self, rate):
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        if self.trained:
            torch._foreach_mul_(self.trained, 1 - rate * self.pull)
            torch._foreach_add_(self.trained, self.start, alpha=rate * self.pull)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)
