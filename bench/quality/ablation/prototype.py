"""The prototype as policies of bench/quality (a plugin module: POLICIES). Needs this folder and bench/quality on the module path."""
import torch

import proto_policies
from policy import BLOCK, Policy
from proto_model import rotate  # noqa: F401  (the prototype's rotary convention is the harness's)


class Shim:
    """What the prototype asks of a model."""

    def __init__(self, spec, device):
        self.layers, self.q_heads, self.kv_heads, self.dim, self.device = spec.layers, spec.q_heads, spec.kv_heads, spec.dim, device
        self.frequency = 1.0 / spec.rope_theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float64) / spec.dim)

    def angles(self, begin, end):
        angle = torch.outer(torch.arange(begin, end, dtype=torch.float64), self.frequency)
        return angle.cos().float().to(self.device), angle.sin().float().to(self.device)


class Prototype(Policy):
    """Budgets may change after a chunk of tokens has gone through all layers."""

    def __init__(self, spec, sequences, budget, seed=0, device="cpu", kind="Express", **options):
        super().__init__(spec, sequences, budget, seed, device)
        if kind == "Express":
            options["seed"] = seed
        self.inner = getattr(proto_policies, kind)(Shim(spec, device), sequences, 0, budget, **options)
        self.most = 0

    def extend(self, layer, q, k, v):
        out = super().extend(layer, q, k, v)
        if layer == self.spec.layers - 1:
            self.inner.tick(self.seen[layer])
            self.most = max(self.most, int(self.inner.entries().max()))
        return out

    def extend_block(self, layer, q, k, v):
        return self.inner.extend(layer, q, k, v)

    def bytes(self):
        bits = self.inner.bits
        entry = self.spec.entry_bytes if not bits else 2 * (self.spec.dim * bits // 8 + 4 * self.spec.dim // self.inner.group)
        return self.spec.layers * self.spec.kv_heads * self.budget * entry

    def entries(self):
        return [l.alive[:, :, :l.len].sum(2).amax(0).tolist() for l in self.inner.layers]


FROZEN = dict(budgets="online", distance=0.5, power=3.0, update="frozen", cap=2.0)
DIVISION = dict(window=0.8, protect=0.2, coreset=False)
POLICIES = {
    "prototype, observed mass": (Prototype, dict(FROZEN, heads="max", **DIVISION), True),
    "prototype, observed output": (Prototype, dict(FROZEN, signal="outabs", **DIVISION), True),
    "prototype, observed mass, 60/28/12": (Prototype, dict(FROZEN, heads="max"), True),
    "window, observed mass": (Prototype, dict(FROZEN, heads="max", kind="Window"), False),
}
