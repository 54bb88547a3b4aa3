"""Attention-level measurements on recorded activations: run.py --activations FILE. The file's format is described in README.md."""
import json
import time

import numpy as np
import torch

import registry
from model import CHUNK
from policy import ModelSpec


class Recording:
    """q, k, v of some layers of one sequence, as tensors (1, heads, n, d) of float32; keys and values rounded to bfloat16."""

    def __init__(self, path, device="cpu"):
        self.file, self.device = np.load(path), device
        self.layers = [int(layer) for layer in self.file["layers"]]
        q, k = self._shape("q"), self._shape("k")
        self.tokens, self.name = q[0], str(self.file["text"]) if "text" in self.file else path
        scale = float(self.file["scale"]) if "scale" in self.file else q[2] ** -0.5
        theta = float(self.file["rope_theta"]) if "rope_theta" in self.file else 500000.0
        layers = int(self.file["model_layers"]) if "model_layers" in self.file else max(self.layers) + 1
        self.spec = ModelSpec(layers, q[1], k[1], q[2], scale, theta)
        for layer in self.layers:
            shapes = [self.file[f"{name}{layer}"].shape for name in "qkv"]
            if shapes != [q, k, k]:
                raise ValueError(f"{path}: layer {layer}: expected q {q}, k and v {k}, got {shapes}")

    def _shape(self, name):
        shape = self.file[f"{name}{self.layers[0]}"].shape  # (n, heads, d)
        if len(shape) != 3:
            raise ValueError(f"{name}{self.layers[0]}: expected (tokens, heads, dim), got {shape}")
        return shape

    def tensor(self, name, layer):
        x = self.file[f"{name}{layer}"]
        if x.dtype == np.uint16:  # the bits of bfloat16
            x = (x.astype(np.uint32) << 16).view(np.float32)
        x = torch.tensor(x.astype(np.float32), device=self.device).transpose(0, 1)[None].contiguous()
        return x if name == "q" else x.bfloat16().float()


def attend(policy, layer, q, k, v):
    """Outputs of a whole layer, chunk by chunk as a model would."""
    return torch.cat([policy.extend(layer, *(x[:, :, begin:begin + CHUNK] for x in (q, k, v))) for begin in range(0, q.shape[2], CHUNK)], 2)


def errors(out, exact, begin):
    """Relative error ||out - exact|| / ||exact|| per query head, over the tokens from begin on."""
    out, exact = out[0, :, begin:], exact[0, :, begin:]
    squares = lambda x: x.square().sum((1, 2), dtype=torch.float64)
    return (squares(out - exact) / squares(exact).clamp(min=1e-300)).sqrt().tolist()


def measure_setting(recording, device, setting, layers, inputs, exact):
    name, budget, seed = setting
    if not layers:
        return []
    policy, rows = registry.make(name, recording.spec, 1, budget, seed, device), []
    for layer in layers:
        out = attend(policy, layer, *inputs[layer])
        rows.append({"case": recording.name, "policy": name, "budget": budget, "seed": seed, "layer": layer, "length": recording.tokens,
                     "output_error": errors(out, exact[layer], 0), "output_error_second_half": errors(out, exact[layer], recording.tokens // 2)})
    return rows


@torch.inference_mode()
def run(options):
    """Rows, one per policy, budget, seed and layer, appended to options.out like those of texts; skips what is there."""
    import run as command
    recording = Recording(options.activations, options.device)
    rows = command.read(options.out)
    done = {tuple(row[name] for name in ("case", "policy", "budget", "seed", "layer")) for row in rows if "layer" in row}
    settings = [s for s in command.choose_settings(options) if not s[0].endswith(", prompt") and s[0] != "exact"]
    bar = command.Bar(len(settings))
    inputs = {layer: [recording.tensor(name, layer) for name in "qkv"] for layer in recording.layers}
    exact = {layer: attend(registry.make("exact", recording.spec, 1, 0, 0, options.device), layer, *x) for layer, x in inputs.items()}
    failures = []
    with open(options.out, "a") as file:
        for name, budget, seed in settings:
            todo = [layer for layer in recording.layers if (recording.name, name, budget, seed, layer) not in done]
            started, note = time.monotonic(), "was there"
            try:
                new = measure_setting(recording, options.device, (name, budget, seed), todo, inputs, exact)
            except Exception as error:  # a budget too small for the policy, no library: the other settings still run
                failures.append(f"{name}, {budget} entries: {type(error).__name__}: {error}")
                new, note = [], f"failed: {error}"
            for row in new:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                note = f"{sum(sum(r['output_error']) / len(r['output_error']) for r in new) / len(new):.4f}"
            file.flush()
            bar.step(f"{name}, {budget} entries, seed {seed}: {note} ({time.monotonic() - started:.1f} s)")
    return rows, failures
