"""How many multiply-accumulates a length configuration costs, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

from ..architectures import LayerView, ModelView
from ..token_dropping import dropping_stack


class LengthMacs:
    """Multiply-accumulates of a model under length configurations.

    What lengths change is counted layer by layer; all else (decoder, head, embeddings) is what the full model costs
    beside its encoder layers.

    Args:
        view: The model.
        max_length: Length of the input at the encoder.
        full: Multiply-accumulates of the whole model at full lengths, see
            [`optimum_flexcompress.evaluation.count_macs`].
    """

    def __init__(self, view: ModelView, max_length: int, full: int):
        self._layers = dropping_stack(view).layers
        self._hidden = view.hidden_size
        self.max_length = max_length
        self.full = full
        self._full_layers = self._stack([max_length] * len(self._layers))

    def __call__(self, counts: Sequence[int]) -> int:
        """Multiply-accumulates of one input of `max_length` tokens, with `counts` tokens kept per layer."""
        return self.full - self._full_layers + self._stack(counts)

    def _stack(self, counts: Sequence[int]) -> int:
        total, before = 0, self.max_length
        for layer, count in zip(self._layers, counts, strict=True):
            total += self._layer(layer, before, count)
            before = count
        return total

    def _layer(self, layer: LayerView, before: int, after: int) -> int:
        total = 0
        attention, ffn = layer.attention, layer.ffn
        if attention is not None:
            queries = attention.q.size
            projections = self._hidden * (2 * queries + attention.k.size + attention.v.size)
            # Scores and the sum of values; where tokens are dropped, the scores once more, for their significance.
            products = 2 + (after < before)
            total += before * projections + products * before * before * queries
        if ffn is not None:
            total += after * self._hidden * ffn.size * (len(ffn.up) + 1)
        return total
