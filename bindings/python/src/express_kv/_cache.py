"""The cache of one sequence."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Callable, Iterator, Mapping, Sequence

from . import _core
from ._arrays import address, current_stream, empty, given

ALL_LAYERS = -1
AUTO = -1
PREFILL_BLOCK = 256  # the library's default
PIECE = 4096  # tokens between two words to a progress callback, about
Progress = Callable[[int, int], object]
_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}  # of what is kept; arrays are of the first three
_CHOICES: dict[str, dict[str, int]] = {
    "dtype": _DTYPES,
    "budget_unit": {"entries": 0, "bytes": 1},
    "schedule": {"budget": 0, "rounds": 1},
    "halving": {"kernel": 0, "coin": 1},
    "head_budgets": {"auto": 0, "fixed": 1, "observed": 2},
    "protection_score": {"auto": 0, "energy": 1, "energy_value": 2},
    "rope_layout": {"halves": 0, "interleaved": 1},
}


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of express_config."""
    fields = dict(options)
    device = str(fields.pop("device", "cpu"))
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    fields["device_type"] = 1 if kind == "cpu" else 2
    fields["device_id"] = int(index or 0) if kind == "cuda" else 0
    for name, choices in _CHOICES.items():
        if name in fields:
            value = str(fields[name]).removeprefix("torch.")
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {fields[name]!r}")
            fields[name] = choices[value]
    if "value_dim" not in fields and "key_dim" in fields:
        fields["value_dim"] = fields["key_dim"]
    if "rope_frequencies" in fields:  # any sequence, or a one-dimensional array or tensor on any device
        frequencies = fields["rope_frequencies"]
        fields["rope_frequencies"] = [float(x) for x in (() if frequencies is None else frequencies)]
    for name in ("auto_compress", "validate"):
        if name in fields:
            fields[name] = int(fields[name])
    return fields


class Cache:
    """A cache of one sequence: all layers, inside a budget that never grows.

    Keyword arguments are the fields of the C ABI's express_config; those not given have its defaults:
      layers (1), query_heads, kv_heads, key_dim, value_dim (= key_dim), scale (1 / sqrt(key_dim)),
      budget (1024): entries per KV head, or with budget_unit="bytes" bytes of the whole cache,
      dtype of what is kept ("float32", "float16", "bfloat16", "int8": 8-bit codes and a scale for each key and value),
      device ("cpu", "cuda", "cuda:1"),
      sinks, window, protected_entries, rollback_reserve, head_share (a number per layer or per layer and KV head),
      head_settings (tuples of budget, sinks, window, protected_entries), head_budgets ("auto", "fixed", "observed"),
      rope_frequencies: by how many radians the model turns each pair of a key's elements from one token to the next (its rotary_emb's
      inv_freq), in all layers alike; rope_layout ("halves", "interleaved"); protection_score ("auto", "energy", "energy_value"),
      schedule ("budget", "rounds"), halving ("kernel", "coin"),
      weight_exponent, gamma, tau, delta, level_fraction, level_floor, max_levels, seed, first_layer, first_kv_head,
      prefill_block, auto_compress, validate, threads.

    Threads may share a cache: calls that change it wait for the others. Errors are express_kv.Error; a call that fails changes
    nothing. `with Cache(...) as cache` frees the memory at the end, as close() does. Caches can be pickled.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        fields = _fields(options)
        self._query_heads = int(fields.get("query_heads", 1))
        self._kv_heads = int(fields.get("kv_heads", 1))
        self._key_dim = int(fields.get("key_dim", 64))
        self._value_dim = int(fields.get("value_dim", 64))
        self._layers = int(fields.get("layers", 1))
        self._cuda = fields["device_type"] == 2
        self._stream = int(fields.get("stream", 0))
        self._core = _core.Cache(fields)

    # ---- life ----

    def close(self) -> None:
        """Frees the memory. Later calls fail."""
        self._core.close()

    @property
    def closed(self) -> bool:
        return self._core.closed

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> tuple[dict[str, Any], bytes]:
        return {name: value for name, value in self._options.items() if name != "stream"}, self.save()

    def __setstate__(self, state: tuple[dict[str, Any], bytes]) -> None:
        options, data = state
        self.__init__(**options)  # type: ignore[misc]
        self.load(data)

    def reset(self) -> None:
        """Forgets all tokens, keeps the memory."""
        self._core.reset()

    # ---- tokens ----

    def append(self, layer: int, k: Any, v: Any, *, progress: Progress | None = None) -> None:
        """Ingests n tokens into a layer: k (n, kv_heads, key_dim), v (n, kv_heads, value_dim), of float32, float16 or bfloat16.

        progress(done, n), if given, is called as the work goes on, every few thousand tokens (on a GPU: as it is enqueued). What it
        raises ends the call; the tokens done until then stay.
        """
        if progress is not None:
            for begin, end in self._pieces(layer, int(k.shape[0]), progress):
                self.append(layer, k[begin:end], v[begin:end])
            return
        stream = self._follow(k)
        self._core.append(layer, given(k, stream), given(v, stream))

    def append_all(self, k: Any, v: Any, *, progress: Progress | None = None) -> None:
        """The same for all layers: k (layers, n, kv_heads, key_dim), v (layers, n, kv_heads, value_dim)."""
        if progress is not None:
            for begin, end in self._pieces(0, int(k.shape[1]), progress):
                self.append_all(k[:, begin:end], v[:, begin:end])
            return
        stream = self._follow(k)
        self._core.append_all(given(k, stream), given(v, stream))

    def attend(self, layer: int, q: Any, out: Any = None, *, lse: Any = None) -> Any:
        """Attention of q (n, query_heads, key_dim) over all that the layer holds, without a mask among the n.

        Returns out (n, query_heads, value_dim), new or the one given. lse, if given, is (n, query_heads) of float32 and receives the log
        of the weighted sum of exponentials, by which results over parts of a sequence can be merged.
        """
        out = self._out(q, out)
        stream = self._follow(q)
        self._core.attend(layer, given(q, stream), given(out, stream), None if lse is None else given(lse, stream))
        return out

    def prefill(self, layer: int, q: Any, k: Any, v: Any, out: Any = None, *, lse: Any = None, workspace: Any = None,
                progress: Progress | None = None) -> Any:
        """Causal attention of n new tokens over the layer and themselves, and their append; shapes as in attend and append.

        On a GPU `workspace` is scratch of at least workspace_size(n) bytes (uint8), new if it is not given. progress as in append; the
        results do not depend on it (with budgets that observe attention, chunks of a prompt do make a difference).
        """
        out = self._out(q, out)
        if workspace is None:
            size = self.workspace_size(int(q.shape[0]))
            workspace = empty(q, (size,), "uint8") if size > 0 else None
        if progress is not None:
            for begin, end in self._pieces(layer, int(q.shape[0]), progress):
                self.prefill(layer, q[begin:end], k[begin:end], v[begin:end], out[begin:end], workspace=workspace,
                             lse=None if lse is None else lse[begin:end])
            return out
        stream = self._follow(q)
        self._core.prefill(layer, given(q, stream), given(k, stream), given(v, stream), given(out, stream),
                           None if lse is None else given(lse, stream), None if workspace is None else given(workspace, stream))
        return out

    def workspace_size(self, n: int) -> int:
        """Bytes of scratch that prefill of n tokens needs: 0 on the CPU."""
        return self._core.workspace_size(n)

    def compress(self, tokens: int, layer: int = ALL_LAYERS) -> int:
        """Halves ahead of need, until the layer takes `tokens` more without a halving; returns how many it now takes."""
        return self._core.compress(layer, tokens)

    def rollback(self, tokens: int) -> None:
        """Drops the last tokens of every layer, at most rollback_available()."""
        self._core.rollback(tokens)

    def rollback_available(self) -> int:
        return self._core.rollback_available()

    # ---- what it holds ----

    def entries(self, layer: int, kv_head: int) -> int:
        """Entries that a KV head holds now."""
        return self._core.entries(layer, kv_head)

    def export(self, layer: int, kv_head: int, like: Any) -> tuple[Any, Any, Any, Any]:
        """What a KV head holds: k (count, key_dim) and v (count, value_dim) of the type of the array `like`, log weights (count) of
        float32, and positions in the stream (count) of int64, in no particular order."""
        count = self.entries(layer, kv_head)
        k, v = empty(like, (count, self._key_dim)), empty(like, (count, self._value_dim))
        log_weight, position = empty(like, (count,), "float32"), empty(like, (count,), "int64")
        stream = self._follow(k)
        self._core.export(layer, kv_head, given(k, stream), given(v, stream), given(log_weight, stream), given(position, stream))
        return k, v, log_weight, position

    def stats(self, layer: int = ALL_LAYERS) -> dict[str, Any]:
        """Counts of one layer or of all: tokens, entries, their peak and budget, weights, halvings, bytes, seconds of compression; and
        head_budgets, "fixed" or "observed"."""
        stats = self._core.stats(layer)
        names = {number: name for name, number in _CHOICES["head_budgets"].items()}
        return {**stats, "head_budgets": names[stats["head_budgets"]]}

    @property
    def nbytes(self) -> int:
        """Bytes allocated, from creation to close()."""
        return self._core.bytes()

    # ---- saving and forking ----

    def save(self) -> bytes:
        """All it holds, as bytes that any cache of the same model, budgets, method and seed can load, on any device."""
        data: bytes = self._core.save()
        return data

    def load(self, data: bytes) -> None:
        """Takes the place of all it holds. Damaged data and other configurations are refused. From another kind of device: say in both
        what head_budgets are, "auto" is not the same everywhere."""
        self._core.load(data)

    def copy_from(self, other: Cache) -> None:
        """Holds what `other` holds, of the same configuration and device: to fork a sequence, to reorder beams."""
        self._core.copy(other._core)

    # ---- CUDA ----

    def set_stream(self, stream: int) -> None:
        """The stream of later calls, by its address (0: the default one), ordered by the caller after earlier work of this cache.

        With PyTorch's and CuPy's arrays their current stream is taken without being asked for.
        """
        self._core.set_stream(stream)
        self._stream = stream

    def step_prepare(self, n: int) -> None:
        """Plans the coming n tokens of all layers for replays of a captured graph, in the cache's stream.

        Capture within torch.cuda.graph(...): for every layer in order append(_batch) of one token and attend(_batch), on tensors that stay.
        That leaves the cache in the stream of the capture, so set_stream(torch.cuda.current_stream().cuda_stream) comes next; then
        prepare n, replay n times, and again. docs/cuda.md has the rest; express_kv.transformers.decode_graph does it for a model.
        """
        self._core.step_prepare(n)

    def step_cancel(self) -> None:
        """Takes prepared steps back that were not replayed. Synchronise the stream before."""
        self._core.step_cancel()

    def _follow(self, x: Any) -> int | None:
        """The stream that the call is going to work in, that of x's library if it has one; None on the CPU."""
        if not self._cuda:
            return None
        stream = current_stream(x)
        if stream is not None and stream != self._stream:
            self.set_stream(stream)
        return self._stream

    def _pieces(self, layer: int, n: int, progress: Progress) -> Iterator[tuple[int, int]]:
        """n tokens in pieces that end at absolute multiples of prefill_block, told to `progress` as each is done."""
        block = int(self._options.get("prefill_block", 0)) or PREFILL_BLOCK
        piece = block * -(-PIECE // block)  # no short prompt of its own (express_prefill): that would make a difference
        begin, offset = 0, int(self.stats(layer)["tokens"]) % block
        while True:
            end = min(n, begin + piece - (offset if begin == 0 else 0))
            yield begin, end
            progress(end, n)
            begin = end
            if begin >= n:
                return

    def _out(self, q: Any, out: Any) -> Any:
        return empty(q, (q.shape[0], self._query_heads, self._value_dim)) if out is None else out


def _follow_all(caches: Sequence[Cache], x: Any) -> int | None:
    if not caches or not caches[0]._cuda:
        return None
    stream = current_stream(x)
    if stream is None:
        return caches[0]._stream
    for cache in caches:
        if cache._stream != stream:
            cache.set_stream(stream)
    return stream


def append_batch(caches: Sequence[Cache], layer: int, k: Any, v: Any) -> None:
    """append of one token in each of the caches (distinct, alike but for budgets and seeds): k (count, kv_heads, key_dim)."""
    stream = _follow_all(caches, k)
    _core.append_batch([cache._core for cache in caches], layer, given(k, stream), given(v, stream))


def attend_batch(caches: Sequence[Cache], layer: int, q: Any, out: Any = None, *, lse: Any = None) -> Any:
    """attend of one query token in each of the caches: q (count, query_heads, key_dim) to out (count, query_heads, value_dim)."""
    if not caches:
        raise ValueError("caches: expected at least one")
    out = caches[0]._out(q, out)
    stream = _follow_all(caches, q)
    _core.attend_batch([cache._core for cache in caches], layer, given(q, stream), given(out, stream),
                       None if lse is None else given(lse, stream))
    return out


def step_batch(caches: Sequence[Cache], layer: int, q: Any, k: Any, v: Any, out: Any) -> None:
    """append_batch and attend_batch, with what they share done once."""
    stream = _follow_all(caches, k)
    cores = [cache._core for cache in caches]
    _core.append_batch(cores, layer, given(k, stream), given(v, stream))
    _core.attend_batch(cores, layer, given(q, stream), given(out, stream), None)


def size(**options: Any) -> tuple[int, int]:
    """What Cache(**options) would take, without taking it: bytes in all, and mean entries per KV head."""
    return _core.size(_fields(options))


def compress_kv(k: Any, v: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Compresses keys and values of n tokens, k (n, kv_heads, key_dim), v (n, kv_heads, value_dim), to `budget` entries per KV head.

    Returns k (kv_heads, count, key_dim), v (kv_heads, count, value_dim), log weights (kv_heads, count) and positions (kv_heads, count).
    `options` as in Cache; head counts and dims are taken from k and v.
    """
    heads, key_dim, value_dim = int(k.shape[1]), int(k.shape[2]), int(v.shape[2])
    fields = _fields({"query_heads": heads, "kv_heads": heads, "key_dim": key_dim, "value_dim": value_dim, **options})
    stream = None
    if fields["device_type"] == 2:
        current = current_stream(k)
        stream = fields.setdefault("stream", 0 if current is None else current)
    budget = int(fields.get("budget", 1024))
    out_k, out_v = empty(k, (heads, budget, key_dim)), empty(v, (heads, budget, value_dim))
    log_weight, position = empty(k, (heads, budget), "float32"), empty(k, (heads, budget), "int64")
    scratch = empty(k, (_core.compress_kv_workspace(fields) + 256,), "uint8")
    start = -address(scratch) % 256
    arrays = (k, v, out_k, out_v, log_weight, position, scratch[start:])
    count = _core.compress_kv(fields, *(given(x, stream) for x in arrays))
    return out_k[:, :count], out_v[:, :count], log_weight[:, :count], position[:, :count]
