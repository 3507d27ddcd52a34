"""Turns examples into the inputs of each ONNX file, so that static int8 can be calibrated on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from tqdm.auto import tqdm

from ..errors import FlexCompressError
from ..export.onnx import DECODER, DECODER_WITH_PAST
from ..export.probe import Feeds, open_session


ENCODER = "encoder_model.onnx"
# Steps of one example that are kept: early and late ones differ in how much they attend to the past.
KEPT_STEPS = 4


def calibration_feeds(
    files: Sequence[Path],
    examples: Iterable[Mapping[str, Any]],
    limit: int,
    new_tokens: int,
    progress: bool = False,
) -> dict[str, list[Feeds]]:
    """Inputs for every file of a model.

    Encoders and classifiers get the examples. Decoders get what they meet while the model generates from the
    examples: the first step, and a few of the later ones with their cache.

    Args:
        files: The files of the model in single precision.
        examples: One mapping of column to values for each example, unpadded.
        limit: How many examples are used at most.
        new_tokens: Tokens to generate for each example.
        progress: Whether a progress bar is shown.

    Returns:
        For each file name a list of inputs.

    Raises:
        FlexCompressError: There are no examples, or they lack a column that the model needs.
    """
    rows = [example_row(example) for example in islice(iter(examples), limit)]
    if not rows:
        raise FlexCompressError("There are no calibration examples: give a data set with at least one row.")
    by_name = {file.name: file for file in files}
    if ENCODER in by_name:
        return _encoder_decoder_feeds(by_name, rows, new_tokens, progress)
    feeds: dict[str, list[Feeds]] = {}
    for file in files:
        session = open_session(file)
        if any(value.name.startswith("past_key_values") for value in session.get_inputs()):
            feeds[file.name] = _decoder_feeds(file, session, rows, new_tokens, progress)
        else:
            feeds[file.name] = [complete_feeds(session, row) for row in rows]
    return feeds


def example_row(example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One example with a batch axis."""
    row = {}
    for name, value in example.items():
        if value is not None and not isinstance(value, str | bytes):
            array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            if array.dtype.kind in "iufb":
                row[name] = array[None]
    return row


def complete_feeds(session: InferenceSession, row: Mapping[str, np.ndarray]) -> Feeds:
    """The inputs of a session, from an example that may lack those which follow from its length.

    Raises:
        FlexCompressError: The example lacks what the model reads.
    """
    feeds: Feeds = {}
    for value in session.get_inputs():
        name = value.name
        if name in row:
            array = row[name]
        elif "input_ids" in row and name in ("attention_mask", "token_type_ids", "position_ids"):
            shape = row["input_ids"].shape
            array = {
                "attention_mask": np.ones(shape, np.int64),
                "token_type_ids": np.zeros(shape, np.int64),
                "position_ids": np.broadcast_to(np.arange(shape[1]), shape),
            }[name]
        else:
            raise FlexCompressError(
                f"The calibration examples have no column {name}, which the model reads; they have "
                f"{', '.join(sorted(row))}. Prepare them as for evaluating the model."
            )
        feeds[name] = np.ascontiguousarray(array, np.float32 if "float" in value.type else np.int64)
    return feeds


def _encoder_decoder_feeds(
    files: Mapping[str, Path], rows: list[dict[str, np.ndarray]], new_tokens: int, progress: bool
) -> dict[str, list[Feeds]]:
    from ..modeling_ort import FlexORTModelForSeq2SeqLM

    with_cache = DECODER_WITH_PAST in files
    if with_cache and new_tokens < 2:
        raise FlexCompressError(
            f"new_tokens is {new_tokens}: generate 2 or more for calibration, since the decoder with a cache makes the second."
        )
    model = FlexORTModelForSeq2SeqLM.from_pretrained(
        files[ENCODER].parent, use_merged=False, use_cache=with_cache, use_io_binding=False
    )
    parts = {ENCODER: model.encoder, DECODER: model.decoder}
    if with_cache:
        parts[DECODER_WITH_PAST] = model.decoder_with_past
    recorders = {name: _Recorder(part, keep=1 if name == ENCODER else KEPT_STEPS) for name, part in parts.items()}
    _generate(model, rows, new_tokens, progress, recorders.values())
    return {name: recorder.feeds for name, recorder in recorders.items()}


def _decoder_feeds(
    file: Path, session: InferenceSession, rows: list[dict[str, np.ndarray]], new_tokens: int, progress: bool
) -> list[Feeds]:
    from ..modeling_ort import FlexORTModelForCausalLM

    del session
    model = FlexORTModelForCausalLM.from_pretrained(file.parent, file_name=file.name, use_io_binding=False)
    recorder = _Recorder(model, keep=KEPT_STEPS)
    _generate(model, rows, new_tokens, progress, [recorder])
    return recorder.feeds


class _Recorder:
    """Notes down what a session of an `ORTModel` is run on.

    Args:
        part: The holder of the session.
        keep: How many runs of one example are kept: the first, and others spread over the rest.
    """

    def __init__(self, part: Any, keep: int):
        self.feeds: list[Feeds] = []
        self.keep, self._runs = keep, []
        self._session, part.session = part.session, self
        self._model_path = self._session._model_path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, outputs: list[str] | None, feeds: Feeds) -> list[np.ndarray]:
        self._runs.append({name: np.array(value) for name, value in feeds.items()})
        return self._session.run(outputs, feeds)

    def end_example(self) -> None:
        chosen = np.unique(np.linspace(0, len(self._runs) - 1, min(self.keep, len(self._runs))).round().astype(int))
        self.feeds += [self._runs[index] for index in chosen]
        self._runs = []


def _generate(
    model: Any, rows: list[dict[str, np.ndarray]], new_tokens: int, progress: bool, recorders: Iterable[_Recorder]
) -> None:
    recorders = list(recorders)
    for inputs in _prompts(rows, progress):
        length = inputs["input_ids"].shape[1]
        # A prompt as long as the model's positions leaves no room to generate.
        room = getattr(model.config, "max_position_embeddings", None)
        tokens = new_tokens
        if room is not None and not model.config.is_encoder_decoder:
            tokens = min(new_tokens, room - length)
        if tokens < 1:
            continue
        # What comes after the first token runs on the cache, also where a model would end at once.
        least = min(2, tokens) if model.config.is_encoder_decoder else None
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=least, do_sample=False, num_beams=1)
        for recorder in recorders:
            recorder.end_example()


def _prompts(rows: list[dict[str, np.ndarray]], progress: bool) -> Iterator[dict[str, torch.Tensor]]:
    for row in tqdm(rows, desc="Generating for calibration", disable=not progress, leave=False):
        if "input_ids" not in row:
            raise FlexCompressError(
                f"The calibration examples have no column input_ids; they have {', '.join(sorted(row))}. Tokenise them."
            )
        ids = torch.as_tensor(row["input_ids"]).long()
        mask = torch.as_tensor(row["attention_mask"]).long() if "attention_mask" in row else torch.ones_like(ids)
        yield {"input_ids": ids, "attention_mask": mask}
