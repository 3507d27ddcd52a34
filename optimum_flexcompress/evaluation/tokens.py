"""Which words of a text survive to which layer of an encoder that drops tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import position_limit
from ..errors import FlexCompressError
from ..output import write_text_atomically
from ..token_dropping import LengthConfig, kept_positions, lengths_of, using_lengths


# How tokenizers write the white space that belongs to a token, and how it is shown where it is all there is.
SPACE_MARKS = "▁Ġ"
WHITE_SPACE = "␣"
# What tokenizers without a limit say is far above this many tokens.
UNLIMITED = 1e6


@dataclass
class Word:
    """A word, or a special token, and how long each of its pieces survives.

    Attributes:
        pieces: The parts that the tokenizer makes of it, as they stand in the text.
        survives: For each piece the number of layers after which it is still there: 0 to all.
        special: Whether it is a token that the tokenizer added.
        space: Whether white space comes before it.
    """

    pieces: list[str]
    survives: list[int]
    special: bool = False
    space: bool = True

    @property
    def text(self) -> str:
        """The whole word."""
        return "".join(self.pieces)

    def parts(self) -> list[tuple[str, int]]:
        """Pieces and how long they survive."""
        return list(zip(self.pieces, self.survives, strict=True))


@dataclass
class TokenTrace:
    """What [`trace_tokens`] found.

    Attributes:
        words: In the order of the text.
        layers: How many layers the encoder has.
        lengths: The length configuration, as [`LengthConfig.to_dict`] gives it; None where every token is kept.
        traced_in: Name of the model that was run, where it is not the one that is shown.
    """

    words: list[Word]
    layers: int
    lengths: dict[str, Any] | None = None
    traced_in: str | None = None

    @property
    def survives(self) -> list[int]:
        """For each token of the input the number of layers after which it is still there."""
        return [count for word in self.words for count in word.survives]

    @property
    def tokens(self) -> int:
        """How many tokens the input has."""
        return len(self.survives)

    @property
    def kept(self) -> list[list[int]]:
        """For each layer the positions of the tokens that are left after it."""
        survives = self.survives
        return [[place for place, count in enumerate(survives) if count > layer] for layer in range(self.layers)]

    @property
    def counts(self) -> list[int]:
        """How many tokens are left after each layer."""
        return [len(positions) for positions in self.kept]

    def steps(self) -> list[tuple[int, int]]:
        """Runs of layers after which the same tokens are left: first and last layer, from 1; 0 is the input."""
        counts = [self.tokens, *self.counts]
        firsts = [layer for layer, count in enumerate(counts) if layer == 0 or count != counts[layer - 1]]
        return [(first, last - 1) for first, last in zip(firsts, [*firsts[1:], len(counts)], strict=True)]

    def describe(self) -> str:
        """One line: how long the text is, what the layers keep, and where that was seen."""
        config = LengthConfig.parse(self.lengths)
        if config is None:
            kept = "every layer keeps all of them"
        else:
            numbers = ", ".join(f"{value:.3g}" for value in config.values)
            kept = f"{config.unit if config.unit == 'fractions' else 'at most'} kept: {numbers}"
        where = f"; as the PyTorch model {self.traced_in} keeps them" if self.traced_in else ""
        return f"{self.tokens} tokens; {kept}{where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenTrace:
        """What [`TokenTrace.to_dict`] was called on."""
        return cls(**{**data, "words": [Word(**word) for word in data["words"]]})

    def to_html(self, title: str = "Which words survive to which layer") -> str:
        """One self-contained page.

        Raises:
            MissingExtraError: Jinja2 is missing.
        """
        from .page import render_words

        return render_words(self, title)

    def save(self, path: str | os.PathLike, title: str = "Which words survive to which layer") -> Path:
        """Writes the picture.

        Args:
            path: A file whose ending says what it becomes: `.html`, or `.png`, `.svg` or `.pdf`.
            title: Stands above it.

        Returns:
            The path.

        Raises:
            FlexCompressError: The ending is another one.
            MissingExtraError: Jinja2 or matplotlib is missing.
        """
        path = Path(path)
        if path.suffix == ".html":
            write_text_atomically(path, self.to_html(title))
        else:
            from .token_plots import plot_words, save_figure

            save_figure(plot_words(self, title), path)
        return path


def trace_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    text_pair: str | None = None,
    *,
    lengths: Any = None,
    max_length: int | None = None,
) -> TokenTrace:
    """Runs a model over one text and notes which words survive to which layer.

    Args:
        model: A model that can drop tokens.
        tokenizer: Its tokenizer, a fast one.
        text: The text, or its words where they come separately.
        text_pair: A second text, such as the passage that a question is about.
        lengths: The length configuration to run with, as for [`set_lengths`]; by default the model's own.
        max_length: Cuts longer inputs; by default what the tokenizer and the model take.

    Returns:
        The trace; `trace.kept` holds the positions that are left after each layer, `trace.save(path)` draws it.

    Raises:
        FlexCompressError: The model cannot drop tokens, the lengths do not suit it, or the tokenizer does not tell
            which part of the text a token stands for.
    """
    if not tokenizer.is_fast:
        raise FlexCompressError(
            f"{type(tokenizer).__name__} does not tell which part of the text a token stands for: load the fast "
            "tokenizer of the model, as AutoTokenizer does."
        )
    limits = [max_length, tokenizer.model_max_length, position_limit(model.config)]
    limits = [limit for limit in limits if limit is not None and limit <= UNLIMITED]
    split = not isinstance(text, str)
    encoded = tokenizer(
        list(text) if split else text,
        text_pair,
        truncation=bool(limits),
        max_length=min(limits, default=None),
        is_split_into_words=split,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping")[0].tolist()
    if lengths is None:
        kept, used = kept_positions(model, encoded), lengths_of(model)
    else:
        used = LengthConfig.parse(lengths)
        with using_lengths(model, used):
            kept = kept_positions(model, encoded)
    survives = [sum(place in layer for layer in (set(row[0]) for row in kept)) for place in range(len(offsets))]
    encoding = encoded.encodings[0]
    return TokenTrace(
        words=_words(encoding, offsets, survives, text, text_pair),
        layers=len(kept),
        lengths=None if used is None else used.to_dict(),
    )


def step_name(first: int, last: int) -> str:
    """A run of layers in words; see [`TokenTrace.steps`]."""
    if first == 0:
        return "input" if last == 0 else f"up to layer {last}"
    return f"layer {last}" if first == last else f"layers {first}–{last}"


def _words(
    encoding: Any, offsets: list[list[int]], survives: list[int], text: str | Sequence[str], text_pair: str | None
) -> list[Word]:
    words: list[Word] = []
    current = None
    for place, (word, sequence) in enumerate(zip(encoding.word_ids, encoding.sequence_ids, strict=True)):
        if sequence is None:
            words.append(Word([encoding.tokens[place]], [survives[place]], special=True))
            current = None
            continue
        whole = (text, text_pair)[sequence]
        separate = not isinstance(whole, str)
        if separate:
            whole = whole[word]
        start, end = offsets[place]
        piece = whole[start:end]
        # Some tokenizers count the white space before a word to its first piece.
        start += len(piece) - len(piece.lstrip())
        # A token may be nothing but the white space, whatever its offsets say.
        bare = not piece.strip() or not encoding.tokens[place].strip(SPACE_MARKS)
        piece = WHITE_SPACE if bare else piece.strip()
        if current == (sequence, word):
            words[-1].pieces.append(piece)
            words[-1].survives.append(survives[place])
            continue
        space = start == 0 or separate or whole[start - 1].isspace()
        words.append(Word([piece], [survives[place]], space=space))
        current = (sequence, word)
    return words
