"""Int8 models in Intel Extension for PyTorch, as Transformers models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from .architectures import position_limit
from .errors import FlexCompressError, first_line
from .quantization.ipex_lane import PACKAGE, load_ipex
from .quantization.runtime_model import (
    ForFeatureExtraction,
    ForImageClassification,
    ForMaskedLM,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
    RuntimeModel,
    only_file,
)
from .quantization.saved import Saved


# Bytes of attention maps that are computed at a time: what a processor's cache holds.
_MAP_BYTES = 16 << 20


class IPEXQuantizedModel(RuntimeModel):
    """An int8 model that [`IPEXQuantizer`] saved, in an environment with IPEX.

    A TorchScript archive is code: opening one from somebody else runs what they put in. The record beside it finds
    damage by itself, but who can change the archive can change the record too. Where a model comes from elsewhere, take
    it from a place that you trust and pin it: `from_pretrained(folder, expected_sha256=...)`, with what `sha256sum
    flexcompress_backend.json` said there.

    IPEX compiles for every new shape, which takes about ten times as long as running a sentence. `length_bucket=16` pads
    inputs to multiples of 16 tokens, so that there are few shapes; the results stay the same (in dynamic mode, up to
    rounding), and later runs take a few percent longer.

    Example:
    ```python
    >>> model = IPEXQuantizedModelForSequenceClassification.from_pretrained("int8", length_bucket=16)
    >>> pipeline("text-classification", model=model, tokenizer=tokenizer)("not bad")
    ```
    """

    backend = "ipex"
    same_versions = ("torch", PACKAGE)

    length_bucket: int = 1

    @classmethod
    def from_pretrained(cls, *args: Any, length_bucket: int = 1, **kwargs: Any) -> IPEXQuantizedModel:
        """Opens a folder; see the class and [`RuntimeModel`].

        Args:
            *args: The folder, and what [`RuntimeModel`] takes.
            length_bucket: Inputs are padded to a multiple of so many tokens.
            **kwargs: Likewise, such as `expected_sha256`.

        Raises:
            FlexCompressError: IPEX cannot be used here, or the folder cannot be opened.
        """
        load_ipex()
        if isinstance(length_bucket, bool) or not isinstance(length_bucket, int) or length_bucket < 1:
            raise FlexCompressError(f"length_bucket is {length_bucket!r}: give a number of tokens, such as 32.")
        model = super().from_pretrained(*args, **kwargs)
        model.length_bucket = length_bucket
        return model

    @classmethod
    def _open(cls, saved: Saved, config: PretrainedConfig, **options: Any) -> torch.jit.ScriptModule:
        for name in options:
            raise FlexCompressError(f"IPEX models have no option {name!r}: there are length_bucket, expected_sha256.")
        path = only_file(saved, ".pt")
        try:
            return torch.jit.load(str(path)).eval()
        except RuntimeError as error:
            raise FlexCompressError(
                f"{path} cannot be opened ({first_line(error)}): quantize the original model again."
            ) from error

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rows, length = next(iter(inputs.values())).shape[:2]
        padding = 0
        if "input_ids" in inputs:
            limit = position_limit(self.config) or length + self.length_bucket
            padding = min(-length % self.length_bucket, max(limit - length, 0))
        if padding:
            inputs = {name: F.pad(tensor, (0, padding), value=self._pad(name)) for name, tensor in inputs.items()}
        sizes = self._parts(rows, length + padding)
        parts = [self.model(*part) for part in zip(*(tensor.split(sizes) for tensor in inputs.values()), strict=True)]
        outputs = (torch.cat(part) if len(sizes) > 1 else part[0] for part in zip(*parts, strict=True))
        if padding and self.task in _BY_TOKEN:
            outputs = (output[:, :length] for output in outputs)
        return tuple(outputs)

    def _pad(self, name: str) -> int:
        return (self.config.pad_token_id or 0) if name == "input_ids" else 0

    def _parts(self, rows: int, length: int) -> list[int]:
        """How many rows run at a time.

        Where tokens are chosen by attention maps, these are written and read again; in parts of the batch they stay in
        the cache. The sizes are powers of two, so that there are few shapes to compile.
        """
        heads = self.saved.facts.get("map_heads", 0)
        if not heads:
            return [rows]
        at_most = max(_MAP_BYTES // (heads * length * length * 4), 1)
        sizes = []
        while rows:
            sizes.append(1 << (min(at_most, rows).bit_length() - 1))
            rows -= sizes[-1]
        return sizes


_BY_TOKEN = ("feature-extraction", "fill-mask", "question-answering", "token-classification")


class IPEXQuantizedModelForFeatureExtraction(ForFeatureExtraction, IPEXQuantizedModel):
    """Hidden states, as `AutoModel` gives them."""


class IPEXQuantizedModelForSequenceClassification(ForSequenceClassification, IPEXQuantizedModel):
    """A sentence classifier."""


class IPEXQuantizedModelForTokenClassification(ForTokenClassification, IPEXQuantizedModel):
    """A token classifier."""


class IPEXQuantizedModelForQuestionAnswering(ForQuestionAnswering, IPEXQuantizedModel):
    """Where the answer starts and ends."""


class IPEXQuantizedModelForMaskedLM(ForMaskedLM, IPEXQuantizedModel):
    """Words for masks."""


class IPEXQuantizedModelForImageClassification(ForImageClassification, IPEXQuantizedModel):
    """An image classifier."""
