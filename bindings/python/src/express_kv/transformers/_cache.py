"""The cache that `generate` is given."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers import cache_utils

from .._cache import Cache
from ._rotary import rope_frequencies
from ._sequences import Sequences

MARK = "_express_layer"  # the attribute of the keys that update() hands to the attention function


class ExpressLayer(cache_utils.CacheLayerMixin):
    """A full-attention layer: the layer `index` of the express_kv.Cache of each sequence.

    update() stores nothing yet: it returns the new keys and values, and the attention function "express", which also has the queries,
    appends them and attends. Between the two get_seq_length() counts them already. reset, crop, reorder_cache, batch_repeat_interleave and
    batch_select_indices act on whole sequences; call them on the ExpressCache, which passes them to every layer.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # what has left the window is not brought back by crop

    def __init__(self, sequences: Sequences, index: int) -> None:
        super().__init__()
        self.sequences, self.index = sequences, index

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """New keys (batch, kv_heads, n, key_dim) and values (batch, kv_heads, n, value_dim), after RoPE; returns the same, not the past."""
        self.sequences.announce(self.index, int(key_states.shape[2]))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states.detach()  # a tensor object of our own, on the same memory
        setattr(keys, MARK, self)
        return keys, value_states

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        pending = self.sequences.pending
        return self.sequences.seen[self.index] + (pending[1] if pending and pending[0] == self.index else 0)

    def get_stored_length(self) -> int:
        """Entries held, the most of any sequence and KV head: never more than the budget."""
        self.sequences.settle()
        heads = range(self.sequences.fields.get("kv_heads", 0))
        return max((cache.entries(self.index, h) for cache in self.sequences.caches for h in heads), default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that update() returns: the new ones, after all that was seen."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.sequences.whole("reset", None, self.index)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove tokens back; ValueError beyond the window and rollback_reserve."""
        self.sequences.whole("crop", int(tokens_to_remove), self.index)  # generate may give a tensor

    def reorder_cache(self, beam_idx: Any) -> None:
        self.sequences.whole("reorder", beam_idx, self.index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sequences.whole("repeat", repeats, self.index)

    def batch_select_indices(self, indices: Any) -> None:
        self.sequences.whole("select", indices, self.index)

    def offload(self) -> None:
        raise NotImplementedError("ExpressCache: offloading is not supported; its memory is bounded")

    prefetch = offload


class ExpressCache(cache_utils.Cache):
    """A cache for `generate` whose full-attention layers stay inside a budget; sliding-window layers are transformers' own.

    config: the model's       budget: entries per KV head, or with budget_unit="bytes" bytes per sequence (and rank)
    options: of express_kv.Cache (sinks, window, rollback_reserve, head_settings, seed, prefill_block, threads, ...); layers, heads, dims,
    scale, dtype and device follow from the model, and of models whose keys are known to turn alike in all layers rope_frequencies do, unless
    they or rope_layout are given. Settings by head are given for all KV heads of the model, on every rank.

    The model must run with attn_implementation="express". Memory is allocated in the first forward pass, per sequence of the batch, and does
    not grow. If a forward pass fails, reset() before the next.
    """

    def __init__(self, config: Any, budget: int = 1024, **options: Any) -> None:
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_kv_shared_layers", 0):
            raise NotImplementedError("config: layers that share the keys and values of another layer are not supported")
        layers = list(DynamicCache(config=config).layers)
        full = [i for i, layer in enumerate(layers) if type(layer) is cache_utils.DynamicLayer]
        for i, layer in enumerate(layers):
            if isinstance(layer, cache_utils.DynamicLayer) and i not in full and not layer.is_sliding:
                raise NotImplementedError(f"config: layer {i} would have a {type(layer).__name__}, which Express cannot take the place of")
        if not options.keys() & {"rope_frequencies", "rope_layout"} and (frequencies := rope_frequencies(config)):
            options["rope_frequencies"] = frequencies
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self._sequences = Sequences(len(full), int(kv_heads), {"budget": budget, **options})
        for index, i in enumerate(full):
            layers[i] = ExpressLayer(self._sequences, index)
        super().__init__(layers=layers)

    @property
    def sequences(self) -> list[Cache]:
        """The express_kv.Cache of each sequence; empty before the first forward pass. Its layers are the full-attention ones."""
        self._sequences.settle()
        return list(self._sequences.caches)

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences' Express caches; sliding-window layers are not counted."""
        return sum(cache.nbytes for cache in self._sequences.caches)

    def get_stored_length(self, layer_idx: int = 0) -> int:
        """Entries that a layer holds, beside get_seq_length(), the positions it has seen."""
        return int(self.layers[layer_idx].get_stored_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove tokens of every sequence back; ValueError, and nothing changed, if they are not all exact."""
        self._sequences.check_crop(int(tokens_to_remove))
        super().crop(int(tokens_to_remove))
