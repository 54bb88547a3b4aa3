"""Arrays of the caller's library: what goes in, and new ones for what comes out."""

from __future__ import annotations

from typing import Any, Sequence


def is_torch(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "data_ptr")


def given(x: Any) -> Any:
    """x as the core takes it: without gradients, and on a GPU without a word to the default stream."""
    if not is_torch(x):
        return x
    x = x.detach() if x.requires_grad else x
    return x.__dlpack__(stream=-1) if x.is_cuda else x


def empty(like: Any, shape: Sequence[int], dtype: str | None = None) -> Any:
    """A new array of the library, device and, without `dtype`, element type of `like`."""
    if is_torch(like):
        import torch

        return like.new_empty(tuple(shape), dtype=getattr(torch, dtype) if dtype else like.dtype)
    if type(like).__module__.partition(".")[0] == "numpy":
        import numpy

        return numpy.empty(tuple(shape), dtype or like.dtype)
    raise TypeError(f"out: cannot make an array like {type(like).__name__}; give one")


def current_stream(x: Any) -> int | None:
    """PyTorch's stream for x, or None where there is none to follow."""
    if not is_torch(x) or not x.is_cuda:
        return None
    import torch

    return int(torch.cuda.current_stream(x.device).cuda_stream)
