"""What a forward pass knows about the tokens it has left."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .rows import Limit, choose, take


@dataclass
class LayerRecord:
    """One layer in one forward pass. Gradient checkpointing runs the layer again from it.

    Attributes:
        hidden: What entered the layer, `[batch, length, hidden size]`.
        positions: Where its tokens stood in the input, `[batch, length]`; `None` before any was dropped.
        valid: Booleans `[batch, length]`, or `None` where there is no padding.
        decided: Whether the layer has chosen what stays.
        kept: Indices of the tokens that stay, or `None` where all do.
        after: Positions of the tokens that stay.
        after_valid: Which of these are valid.
        query: What the query projection returned, until the layer has decided.
        key: The same of the key projection.
        gathered: The last tensor that was gathered, and what came of it.
    """

    hidden: torch.Tensor
    positions: torch.Tensor | None
    valid: torch.Tensor | None
    decided: bool = False
    kept: torch.Tensor | None = None
    after: torch.Tensor | None = None
    after_valid: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    gathered: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class _Piece:
    """Tokens that a layer dropped: rows of what entered it, and where they stood in the input."""

    layer: int
    hidden: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass
class PassState:
    """One forward pass through a stack.

    A token has one place: among the pieces, with the state it had when it entered the layer that dropped it, or in
    the tensor that goes on. Where a shorter sample leaves a gap in that tensor, the gap has position `total`.

    Attributes:
        total: Length of the input.
        tokens: Valid tokens of each sample at the input, `[batch]`.
        keep_pieces: Whether dropped tokens will be put back.
        records: By layer.
        positions: Where the tokens that are left stood in the input; `None` before any was dropped.
        valid: Which of them are valid, or `None` where all are.
    """

    total: int
    tokens: torch.Tensor
    keep_pieces: bool
    valid: torch.Tensor | None
    positions: torch.Tensor | None = None
    records: dict[int, LayerRecord] = field(default_factory=dict)
    pieces: list[_Piece] = field(default_factory=list)

    def drop(self, layer: int, scores: torch.Tensor, limit: Limit) -> None:
        """Chooses what stays after the attention of a layer.

        Args:
            layer: The layer; its record must be there.
            scores: Significance, `[batch, length]`.
            limit: How many stay.
        """
        record = self.records[layer]
        kept, dropped = choose(scores, limit)
        after, dropped_positions = (
            index if self.positions is None else self.positions.gather(1, index) for index in (kept, dropped)
        )
        valid = self.valid if self.valid is None else self.valid.gather(1, kept)
        if limit.each is not None:
            # Beyond what a sample keeps, the tensor is a gap; before it, nothing was dropped.
            rank = torch.arange(scores.shape[1], device=scores.device)
            stays = rank < limit.each[:, None]
            after = after.masked_fill(~stays[:, : limit.width], self.total)
            dropped_positions = dropped_positions.masked_fill(stays[:, limit.smallest :], self.total)
            if valid is not None:
                valid = valid & stays[:, : limit.width]
        if self.keep_pieces:
            self.pieces.append(_Piece(layer, record.hidden, dropped, dropped_positions))
        record.kept, record.after, record.after_valid = kept, after, valid
        self.positions, self.valid = after, valid

    def restore(self, hidden: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Puts every token back to its place.

        Args:
            hidden: Tokens that are left, `[batch, length, hidden size]`.
            layer: After which layer they are left; the last by default.

        Returns:
            `[batch, total, hidden size]`: of each token the last hidden state it had.
        """
        pieces = [piece for piece in self.pieces if layer is None or piece.layer <= layer]
        if not pieces:
            return hidden
        positions = self.records[pieces[-1].layer].after
        parts = [take(piece.hidden, piece.rows) for piece in pieces] + [hidden]
        source = torch.argsort(torch.cat([piece.positions for piece in pieces] + [positions], dim=1), dim=1)
        return take(torch.cat(parts, dim=1), source[:, : self.total])
