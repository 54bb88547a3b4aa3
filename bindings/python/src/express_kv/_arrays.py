"""Arrays of the caller's library: what goes in, and new ones for what comes out."""

from __future__ import annotations

from typing import Any, Callable, Sequence

_GPU = (2, 13)  # DLPack's numbers of CUDA memory, plain and managed
_libraries: dict[type, str] = {}  # of the types seen
_to_dlpack: Callable[[Any], Any] | None = None


def library(x: Any) -> str:
    """"torch", "numpy", "cupy" or another module's name."""
    name = _libraries.get(type(x))
    if name is None:
        bases = [base.__module__.partition(".")[0] for base in type(x).__mro__]
        name = next((module for module in bases if module in ("torch", "numpy", "cupy")), bases[0])
        _libraries[type(x)] = name
    return name


def given(x: Any, stream: int | None = None) -> Any:
    """x as the core takes it, without a copy.

    stream: of a cache on a GPU, which will read or write x. PyTorch's tensors are in order there, since caches follow its current stream;
    another library is told the stream, by DLPack's protocol, and orders its own work on x before what comes there.
    """
    kind = library(x)
    if kind == "torch":
        global _to_dlpack
        if _to_dlpack is None:
            from torch.utils.dlpack import to_dlpack

            _to_dlpack = to_dlpack
        return _to_dlpack(x.detach() if x.requires_grad else x)
    if stream is not None and kind != "numpy" and hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] in _GPU:
        return x.__dlpack__(stream=stream or 1)  # DLPack's name of the default stream
    return x


def empty(like: Any, shape: Sequence[int], dtype: str | None = None) -> Any:
    """A new array of the library, device and, without `dtype`, element type of `like`."""
    kind = library(like)
    if kind == "torch":
        import torch

        return like.new_empty(tuple(shape), dtype=getattr(torch, dtype) if dtype else like.dtype)
    if kind == "numpy":
        import numpy

        return numpy.empty(tuple(shape), dtype or like.dtype)
    if kind == "cupy":
        import cupy

        with like.device:
            return cupy.empty(tuple(shape), dtype or like.dtype)
    raise TypeError(f"out: cannot make an array like {type(like).__name__}; give one")


def current_stream(x: Any) -> int | None:
    """The stream that x's library works in now, or None where there is none to follow."""
    kind = library(x)
    if kind == "torch" and x.is_cuda:
        return _torch_stream(x.get_device())
    if kind == "cupy":
        import cupy

        return int(cupy.cuda.get_current_stream(x.device.id).ptr)
    return None


def address(x: Any) -> int:
    """Of the first element."""
    if library(x) == "torch":
        return int(x.data_ptr())
    return int(x.data.ptr if library(x) == "cupy" else x.ctypes.data)


def _torch_stream(device: int) -> int:
    import torch

    current = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a tenth of the time of the other
    return int(current(device) if current is not None else torch.cuda.current_stream(device).cuda_stream)
