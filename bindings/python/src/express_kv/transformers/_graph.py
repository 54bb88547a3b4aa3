"""Decode steps of a model under CUDA graphs: a cache in a budget stays where it is, so one captured step serves every token."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from typing import Any, Iterator

import torch

from ._cache import ExpressCache, ExpressLayer

AHEAD = 16  # steps that are planned at a time
_IGNORED = {"use_cache", "return_dict", "logits_to_keep"}  # of forward's arguments: they make no difference to one token with a cache


@contextlib.contextmanager
def decode_graph(model: Any) -> Iterator[None]:
    """Within it, the model's decode steps with an ExpressCache on a GPU are replayed from a CUDA graph.

        with decode_graph(model):
            model.generate(**inputs, past_key_values=ExpressCache(config=model.config, budget=1024))

    The second decode step of a batch captures the graph, later ones replay it: the host then launches one thing per token, where a forward
    pass is hundreds. Everything else is run as without it: prompts, caches with sliding-window layers, beams while they change places,
    padding, gradients, tensor parallelism, other caches, the CPU. A forward pass that cannot be captured is run as it is, after a warning.
    The first graph of a shape takes about as long as two forward passes; weights must stay where they are.
    """
    graph = _DecodeGraph(model.forward)
    own = "forward" in vars(model)

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return graph(*args, **kwargs)

    setattr(forward, "__signature__", inspect.signature(model.forward))  # generate looks at it
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = graph.forward
        else:
            del model.forward
        graph.drop()


class _DecodeGraph:
    """The graph of one batch, and which it is."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.shapes: Any = None  # of what the step is made for
        self.caches: list[Any] = []  # the express_kv.Cache of its sequences, in order
        self.sequences: Any = None
        self.graph: Any = None
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and "input_ids" not in kwargs:
            kwargs["input_ids"], args = args[0], args[1:]  # the first argument of all models
        cache: Any = kwargs.get("past_key_values")
        if self.failed or args or not _can_be_captured(cache, kwargs):
            return self.forward(*args, **kwargs)
        ids, position = kwargs["input_ids"], kwargs["position_ids"]
        sequences = cache.layers[0].sequences
        shapes = (ids.shape, ids.dtype, ids.device, position.shape, position.dtype)
        if shapes != self.shapes or not _same(self.caches, sequences.caches):
            self.drop()
            self.shapes, self.caches, self.sequences = shapes, list(sequences.caches), sequences
            return self.forward(**kwargs)  # once as it is: what is loaded on first use cannot be captured
        if self.graph is None and not self._capture(cache, ids, position):
            return self.forward(**kwargs)
        self.ids.copy_(ids)
        self.position.copy_(position)
        sequences.replay(self.graph, AHEAD)
        out = dict(self.out.items(), logits=self.out.logits.clone(), past_key_values=cache)
        return type(self.out)(**out)

    def _capture(self, cache: ExpressCache, ids: Any, position: Any) -> bool:
        """Records a step on copies of its inputs. Nothing is computed, and the cache does not change."""
        self.ids, self.position = ids.clone(), position.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with self.sequences.recording(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.out = self.forward(input_ids=self.ids, position_ids=self.position, past_key_values=cache, use_cache=True,
                                        return_dict=True)
        except Exception as error:  # noqa: BLE001: whatever a model does that a graph cannot
            self.failed = True
            warnings.warn(f"decode_graph: this model's step cannot be captured ({type(error).__name__}: {error}); it is run as it is")
            return False
        self.graph = graph
        return True

    def drop(self) -> None:
        if self.sequences is not None:
            self.sequences.settle()
        self.shapes = self.sequences = self.graph = self.out = None
        self.caches = []


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


def _can_be_captured(cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass is one token for each sequence of an ExpressCache, all of whose layers are Express's, on a GPU."""
    ids, position, mask = kwargs.get("input_ids"), kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(cache, ExpressCache) or ids is None or not ids.is_cuda or ids.shape[1] != 1 or torch.is_grad_enabled():
        return False
    if not all(isinstance(layer, ExpressLayer) for layer in cache.layers) or len(cache.layers[0].sequences.caches) != ids.shape[0]:
        return False
    if position is None or position.ndim != 2 or position.shape[1] != 1 or (mask is not None and mask.ndim != 2):
        return False
    known = _IGNORED | {"input_ids", "position_ids", "attention_mask", "past_key_values"}
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in known):
        return False
    if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False or torch.cuda.is_current_stream_capturing():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return False
    return mask is None or bool(mask[:, -1].all())  # read by the host, as without a graph
