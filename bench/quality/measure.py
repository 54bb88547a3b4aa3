"""Runs one policy over texts of equal length, side by side, and makes a row of numbers for each."""
import math
import time

import torch

from model import CHUNK, encode
from rivals.exact import Exact

POSITIONS = 16  # parts of a text for figures by position


class Score:
    """What the logits of texts side by side say, chunk by chunk."""

    def __init__(self, cases, device, reference=None, keep=False):
        """reference: log probabilities (S, n, vocab) of exact attention, to compare with; keep: keep those seen, as such a reference"""
        self.ids = torch.tensor([encode(case.text) for case in cases], device=device)  # (S, n)
        S, n = self.ids.shape
        self.target = torch.cat((self.ids[:, 1:], self.ids[:, :1]), 1)  # the last one predicts nothing and is left out
        self.bits, self.divergence = (torch.zeros(S, n, device=device) for _ in range(2))
        self.first = torch.zeros(S, n, dtype=torch.bool, device=device)  # whether the true byte is the first choice
        self.reference, self.keep, self.kept = reference, keep, []

    def see(self, begin, logits):
        place = slice(begin, begin + logits.shape[1])
        log_p = torch.log_softmax(logits, -1)
        target = self.target[:, place]
        self.bits[:, place] = -log_p.gather(2, target[..., None])[..., 0] / math.log(2)
        self.first[:, place] = logits.argmax(-1) == target
        if self.keep:
            self.kept.append(log_p.half())
        if self.reference is not None:
            exact = self.reference[:, place].float()
            self.divergence[:, place] = (exact.exp() * (exact - log_p)).sum(-1)

    def rows(self, cases, begin=0):
        """Numbers of each text, from byte `begin` on."""
        bits, divergence, first = (x[:, :-1].cpu() for x in (self.bits, self.divergence, self.first))
        n = bits.shape[1]
        edges = [n * i // POSITIONS for i in range(POSITIONS + 1)]
        for i, case in enumerate(cases):
            row = {"bits": bits[i, begin:].mean().item(), "bits_second_half": bits[i, max(begin, n // 2):].mean().item(),
                   "bits_by_position": [round(bits[i, a:b].mean().item(), 5) for a, b in zip(edges, edges[1:])]}
            if self.reference is not None:
                row["kl"] = divergence[i, begin:].mean().item()
                row["kl_second_half"] = divergence[i, max(begin, n // 2):].mean().item()
            # Of each question: how deep its fact lies, and whether all bytes of the answer are the first choice.
            row["answers"] = [[round(a["fact_offset"] / n, 4), int(first[i, a["offset"]:a["offset"] + a["length"]].all())] for a in case.answers]
            yield row


class OutputError:
    """Squared error of a policy's outputs against exact attention of the same queries, keys and values: per layer and query head."""

    def __init__(self, spec, sequences, device):
        self.exact = Exact(spec, sequences, 0, 0, device)
        self.error, self.norm = (torch.zeros(sequences, spec.layers, spec.q_heads, dtype=torch.float64, device=device) for _ in range(2))

    def __call__(self, layer, q, k, v, out):
        exact = self.exact.extend(layer, q, k, v)
        self.error[:, layer] += (out - exact).square().sum((2, 3), dtype=torch.float64)
        self.norm[:, layer] += exact.square().sum((2, 3), dtype=torch.float64)

    def relative(self):
        """(S, layers, q_heads): ||out - exact|| / ||exact|| over all tokens; 0 / 0 = 0."""
        return (self.error / self.norm.clamp(min=1e-300)).sqrt().cpu()


def synchronise(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def run(model, policy, cases, device, reference=None, keep=False, errors=False, begin=0):
    """Rows of a policy, and the log probabilities if they are to be kept."""
    score = Score(cases, device, reference, keep)
    error = OutputError(model.spec, len(cases), device) if errors else None
    peak = {"bytes": 0, "entries": 0}

    def see(start, logits):
        score.see(start, logits)
        entries = [n for row in policy.entries() for n in row]
        peak.update(bytes=max(peak["bytes"], policy.bytes()), entries=max(peak["entries"], sum(entries) / len(entries)))

    synchronise(device)
    start = time.perf_counter()
    model.run(score.ids, policy, see, error)
    synchronise(device)
    seconds = time.perf_counter() - start
    rows = list(score.rows(cases, begin))
    for i, row in enumerate(rows):
        row.update(bytes_peak=peak["bytes"], entries_peak=peak["entries"])
        if error:
            row["output_error"] = [[round(x, 5) for x in head] for head in error.relative()[i].tolist()]
        else:
            row["us_per_token"] = 1e6 * seconds / score.ids.numel()
    return rows, torch.cat(score.kept, 1) if keep else None
