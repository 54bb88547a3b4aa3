"""The Express caches of a batch, one per sequence, and what all layers of a model share about them."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, NamedTuple

import torch

from .._cache import Cache, step_batch
from .._errors import Error, Status
from ._parallel import first_kv_head, of_rank

DERIVED = {"layers", "query_heads", "kv_heads", "key_dim", "value_dim", "scale", "device", "stream"}


class Rows(NamedTuple):
    """Which of the new positions of a sequence are tokens."""

    at: Any  # a slice or, with padding between them, a tensor of indices
    tokens: int  # how many
    solid: int  # positions after the last padding


class Sequences:
    """What the layers of an ExpressCache share: one express_kv.Cache per sequence of the batch, each with all full-attention layers.

    layers: full-attention layers of the model      kv_heads: KV heads of the whole model, over all ranks
    options: fields of express_kv.Cache that do not follow from the model
    """

    def __init__(self, layers: int, kv_heads: int, options: dict[str, Any]) -> None:
        if taken := DERIVED & options.keys():
            raise TypeError(f"{', '.join(sorted(taken))}: not an option, it follows from the model")
        self.layers, self.kv_heads, self.options = layers, kv_heads, options
        self.caches: list[Cache] = []
        self.fields: dict[str, Any] = {}  # of every cache, once there are any
        self.seen = [0] * layers  # positions of each layer, padding included
        self.solid: list[int] = []  # of each sequence: positions since its last padding
        self.pending: tuple[int, int] | None = None  # (layer, positions) that update() took and no attention has come for
        self.failed = False
        self._asked: tuple[str, Any, set[int]] = ("", None, set())
        self._rows: tuple[Any, list[Rows]] | None = None
        self._workspace: Any = None
        self._checked: Any = None  # what _check last found good
        self._ahead: int | None = None  # steps planned for replays of a graph that are yet to come; None: none was replayed
        self._recording = False  # a graph is

    # ---- a forward pass ----

    def announce(self, layer: int, positions: int) -> None:
        """Keys and values of a layer are on their way to its attention."""
        if self.failed or (layer == 0 and len(set(self.seen)) > 1):
            raise RuntimeError("ExpressCache: an earlier forward pass did not finish, so its tokens are in some layers only; call reset()")
        if self.pending is not None:
            raise RuntimeError("ExpressCache: keys and values were given to the cache but attention was not computed by Express; "
                               'load the model with attn_implementation="express" or call model.set_attn_implementation("express"), '
                               "then reset() the cache")
        operation, _, asked = self._asked
        if asked and len(asked) < self.layers:
            raise RuntimeError(f"ExpressCache: {operation} was called on some layers only; call it on the cache, which passes it to all")
        self.pending = (layer, positions)

    def attend(self, layer: int, module: Any, query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
        """Appends the new tokens to a layer and returns their causal attention over all it holds.

        query: (batch, query_heads, n, key_dim)   key: (batch, kv_heads, n, key_dim)   value: (batch, kv_heads, n, value_dim)
        mask: (batch, n) of bool, False where padding is; None: no padding
        returns (batch, n, query_heads, value_dim), zero where padding is
        """
        batch, heads, n = query.shape[:3]
        if not self._recording:
            self.settle()
        if not self.caches:
            self._create(module, query, key, value, scale)
        self._check(query, key, value, scale)
        out = query.new_empty((batch, n, heads, value.shape[3]))
        self.failed = True  # until all is done
        if n == 1 and mask is None:
            step_batch(self.caches, layer, query.select(2, 0), key.select(2, 0), value.select(2, 0), out.select(1, 0))
        else:
            rows = self._rows_of(mask) if mask is not None else [Rows(slice(0, n), n, n)] * batch
            for i, cache in enumerate(self.caches):
                at = rows[i].at
                q, k, v = (x[i].transpose(0, 1)[at] for x in (query, key, value))  # (tokens, heads, dim)
                if rows[i].tokens < n:
                    out[i] = 0
                if isinstance(at, slice):
                    self._one(cache, layer, q, k, v, out[i, at])
                else:
                    out[i, at] = self._one(cache, layer, q, k, v, torch.empty_like(out[i, at]))
        self.seen[layer] += n
        if layer == self.layers - 1:
            runs = [row.solid for row in self._rows_of(mask)] if mask is not None else [n] * batch
            self.solid = [run if run < n else solid + n for run, solid in zip(runs, self.solid)]
            self._workspace = self._rows = None
        self.failed = False
        return out

    def _one(self, cache: Cache, layer: int, q: Any, k: Any, v: Any, out: Any) -> Any:
        n = int(q.shape[0])
        if n == 1:
            cache.append(layer, k, v)
            cache.attend(layer, q, out)
        elif n > 1:
            size = cache.workspace_size(n)
            if size and (self._workspace is None or self._workspace.numel() < size):
                self._workspace = q.new_empty(size, dtype=torch.uint8)  # one for all layers and sequences: they share a stream
            cache.prefill(layer, q, k, v, out, workspace=self._workspace if size else None)
        return out

    def _rows_of(self, mask: Any) -> list[Rows]:
        """The positions of each sequence's tokens. Read from the device once per forward pass."""
        if self._rows is None or self._rows[0] is not mask:
            n, there = int(mask.shape[1]), mask.long()
            last = n - there.flip(1).argmax(1)
            solid = torch.where(mask.all(1), n, (1 - there).flip(1).argmax(1))
            rows: list[Rows] = []
            for i, (first, end, count, run) in enumerate(torch.stack((there.argmax(1), last, there.sum(1), solid), 1).tolist()):
                gaps = count not in (0, end - first)
                rows.append(Rows(mask[i].nonzero().flatten() if gaps else slice(first, first + count), count, run))
            self._rows = (mask, rows)
        return self._rows[1]

    def _create(self, module: Any, query: Any, key: Any, value: Any, scale: float) -> None:
        local = int(key.shape[1])
        first = int(self.options.get("first_kv_head", -1))
        if first < 0:
            first = first_kv_head(module, local, self.kv_heads)
        fields = {"dtype": key.dtype, **of_rank(self.options, self.layers, self.kv_heads, first, local)}
        fields.update(layers=self.layers, query_heads=int(query.shape[1]), kv_heads=local, key_dim=int(key.shape[3]),
                      value_dim=int(value.shape[3]), scale=scale, device=str(key.device), first_kv_head=first)
        self.fields = fields
        caches = self._new(int(query.shape[0]))
        self.caches, self.solid = caches, [0] * len(caches)

    def _new(self, count: int) -> list[Cache]:
        stream = {}
        if self.fields["device"].startswith("cuda"):
            stream["stream"] = int(torch.cuda.current_stream(torch.device(self.fields["device"])).cuda_stream)
        return [Cache(**self.fields, **stream) for _ in range(count)]

    def _check(self, query: Any, key: Any, value: Any, scale: float) -> None:
        sizes = (query.shape, key.shape, value.shape, key.device, scale)
        if sizes == self._checked:
            return
        f = self.fields
        if query.shape[0] != len(self.caches):
            raise ValueError(f"ExpressCache: it holds {len(self.caches)} sequences, the batch has {query.shape[0]}; call reset() for another")
        if str(key.device) != f["device"]:
            raise NotImplementedError(f"ExpressCache: it lives on {f['device']}, a layer on {key.device}: a model whose layers are spread "
                                      "over devices (device_map) is not supported; split its heads (tensor parallelism) instead")
        given = (int(query.shape[1]), int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), scale)
        made = (f["query_heads"], f["kv_heads"], f["key_dim"], f["value_dim"], f["scale"])
        if given != made:
            raise NotImplementedError("ExpressCache: full-attention layers must be alike; (query heads, KV heads, key dim, value dim, "
                                      f"scaling) are {made} in the first one, {given} in this one")
        self._checked = sizes

    # ---- graphs ----

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A forward pass within it is captured in a graph: the caches do not change, nor does anything here."""
        self.settle()
        before = self.seen, self.solid, self.failed
        self.seen, self._recording = list(self.seen), True
        try:
            yield
        finally:
            self.seen, self.solid, self.failed = before
            self.pending = self._rows = self._workspace = None
            self._recording = False

    def replay(self, graph: Any, ahead: int) -> None:
        """One token for every sequence, by the graph; plans for `ahead` of them are made at a time."""
        if not self._ahead:
            self._prepare(ahead)
        graph.replay()
        assert self._ahead is not None
        self._ahead -= 1
        self.seen = [n + 1 for n in self.seen]
        self.solid = [n + 1 for n in self.solid]

    def _prepare(self, steps: int) -> None:
        device = torch.device(self.fields["device"])
        stream = int(torch.cuda.current_stream(device).cuda_stream)  # the replay's
        for cache in self.caches:
            cache.set_stream(stream)
            try:
                cache.step_prepare(steps)
            except Error as error:
                if error.status != Status.RING_FULL:
                    raise
                torch.cuda.current_stream(device).synchronize()
                cache.step_prepare(steps)
        self._ahead = steps

    def settle(self) -> None:
        """After replays: waits for them, and takes the plans of those that will not come back."""
        if self._ahead is None:
            return
        unused, self._ahead = self._ahead, None
        torch.cuda.synchronize(torch.device(self.fields["device"]))
        for cache in self.caches if unused else ():
            cache.step_cancel()

    # ---- all layers at once ----

    def whole(self, operation: str, argument: Any, layer: int) -> None:
        """transformers asks every layer in turn; a sequence's layers are one cache, so it is done when the first is asked."""
        running, with_argument, asked = self._asked
        same = running == operation and (argument is with_argument or (isinstance(argument, int) and argument == with_argument))
        if asked and len(asked) < self.layers and operation != "reset" and (not same or layer in asked):
            raise RuntimeError(f"ExpressCache: {running} was called on some layers only; call it on the cache, which passes it to all")
        if not same or layer in asked or len(asked) == self.layers:
            getattr(self, operation)(argument)
            asked = set()
        self._asked = (operation, argument, asked | {layer})

    def reset(self, _: None = None) -> None:
        """Forgets everything; the next batch may have another size."""
        self.settle()
        for cache in self.caches:
            cache.close()
        self.caches, self.fields, self.solid = [], {}, []
        self.seen = [0] * self.layers
        self.pending, self.failed, self._rows, self._workspace, self._checked = None, False, None, None, None
        self._asked = ("", None, set())

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what crop would raise."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        remove = -tokens_to_remove
        if remove == 0 or not self.caches:
            return
        self.settle()
        if remove > min(self.solid):
            raise ValueError(f"crop: cannot remove {remove} positions, some sequence has padding among them")
        available = min(cache.rollback_available() for cache in self.caches)
        if remove > available:
            raise ValueError(f"crop: cannot remove {remove} tokens, only the last {available} are still as they came; "
                             "create the ExpressCache with a rollback_reserve of the most that will have to be taken back")

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or not self.caches:
            return
        for cache in self.caches:
            cache.rollback(-tokens_to_remove)
        self.seen = [n + tokens_to_remove for n in self.seen]
        self.solid = [n + tokens_to_remove for n in self.solid]

    def take(self, indices: Any) -> None:
        """Sequence i becomes what sequence indices[i] is. Caches are copied only where one sequence goes on as several."""
        if not self.caches:
            return
        self.settle()
        chosen = [int(i) for i in indices]
        if bad := [i for i in chosen if not 0 <= i < len(self.caches)]:
            raise IndexError(f"sequences: expected indices in 0 .. {len(self.caches) - 1}, got {bad[0]}")
        spare = [cache for i, cache in enumerate(self.caches) if i not in set(chosen)]
        copies = len(chosen) - len(set(chosen))
        spare += self._new(max(0, copies - len(spare)))  # before anything changes
        result: list[Cache] = []
        for position, i in enumerate(chosen):
            cache = self.caches[i]
            if i in chosen[:position]:
                copy = spare.pop()
                copy.copy_from(cache)
                cache = copy
            result.append(cache)
        for cache in spare:
            cache.close()
        self.caches, self.solid, self._checked = result, [self.solid[i] for i in chosen], None

    def reorder(self, beam_idx: Any) -> None:
        self.take(beam_idx.tolist())

    def repeat(self, repeats: int) -> None:
        self.take([i for i in range(len(self.caches)) for _ in range(repeats)])

    def select(self, indices: Any) -> None:
        flags = indices.dtype == torch.bool
        self.take((indices.nonzero().flatten() if flags else indices).tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequences:
        self.settle()
        new = Sequences(self.layers, self.kv_heads, self.options)
        memo[id(self)] = new
        new.fields, new.seen, new.solid = dict(self.fields), list(self.seen), list(self.solid)
        new.pending, new.failed = self.pending, self.failed
        new.caches = new._new(len(self.caches)) if self.caches else []
        for cache, old in zip(new.caches, self.caches):
            cache.copy_from(old)
        return new
