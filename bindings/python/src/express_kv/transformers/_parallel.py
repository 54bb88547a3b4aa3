"""Tensor parallelism: which of the model's KV heads a rank holds, and which of the options are theirs."""

from __future__ import annotations

from typing import Any


def first_kv_head(module: Any, local: int, total: int) -> int:
    """The global index of the first of this rank's `local` KV heads, from the mesh that the module's weights are sharded over."""
    if local >= total:
        return 0
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:
        DTensor = ()
    mesh = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        raise ValueError(f"first_kv_head: this process has {local} of {total} KV heads and its weights do not say which; "
                         "give ExpressCache the global index of its first KV head")
    rank = mesh.get_local_rank("tp") if mesh.mesh_dim_names and "tp" in mesh.mesh_dim_names else mesh.get_local_rank()
    return int(rank) * local


def of_rank(options: dict[str, Any], layers: int, kv_heads: int, first: int, local: int) -> dict[str, Any]:
    """Options given for all KV heads of the model, cut to `local` heads from `first` on."""
    if local >= kv_heads:
        return options
    cut = {"head_budgets": "fixed", **options}  # a rank would share out its own heads' total
    if (settings := options.get("head_settings")) is not None and len(settings) == layers * kv_heads != layers:
        cut["head_settings"] = [settings[i * kv_heads + first + h] for i in range(layers) for h in range(local)]
    if (share := options.get("head_share")) is not None and len(share) != layers:
        raise NotImplementedError("head_share: a rank does not see the other ranks' heads; give head_settings, or one share per layer")
    return cut
