"""Rewrites exported graphs into what ONNX Runtime's CPU kernels run fastest, without changing what they compute."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto
from transformers import AutoConfig, PretrainedConfig

from ..errors import FlexCompressError
from .attention import Attention, find_attentions, fuse, measure
from .dropping import dropping_length, drops_tokens, lengths_in
from .first_token import keep_first_token
from .graph import Graph, has_subgraphs, load_model, save_model
from .kept_tokens import (
    Significance,
    choose_early,
    find_significances,
    fuse_with_significance,
    matching,
    read_padding_directly,
    spare_unread_choices,
)
from .probe import Feeds, Reference, can_probe, made_up_feeds


logger = logging.getLogger(__name__)

TOLERANCE = 1e-4


@dataclass
class FusionReport:
    """What [`fuse_graph`] did.

    Attributes:
        attentions: Names of the attentions that were fused.
        left: For each attention that was not, by name, the reason.
        first_token_only: Whether the last layer computes the first token only.
        choices: In how many layers tokens are dropped before the output projection of the attention.
    """

    attentions: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    first_token_only: bool = False
    choices: int = 0


@dataclass(frozen=True)
class Form:
    """How a runtime wants attention to be written.

    Attributes:
        attention: Writes an attention anew.
        dropping: Writes an attention and the sums of its maps, by which tokens are chosen, anew.
        finish: Comes last, when nothing is cut any more.
    """

    attention: Callable[[Graph, Attention], None]
    dropping: Callable[[Graph, Attention, Significance], None]
    finish: Callable[[Graph], None]


def _sum_residuals(graph: Graph) -> None:
    """Writes `x + y` before a norm as `Sum`.

    ONNX Runtime would fuse an `Add` with the norm into an operator whose CPU kernel takes several times as long as the
    two operators do by themselves; it does not look for `Sum`, which is the same operation.
    """
    for norm in graph.nodes:
        if norm.op_type == "LayerNormalization":
            add = graph.producer(norm.input[0], "Add")
            if add is not None and all(graph.constant(name) is None for name in add.input):
                add.op_type = "Sum"


ONNX_RUNTIME = Form(fuse, fuse_with_significance, _sum_residuals)


def fuse_graph(
    model: ModelProto, config: PretrainedConfig | None = None, form: Form = ONNX_RUNTIME
) -> tuple[ModelProto, FusionReport]:
    """Fuses attention, cuts the last layer to the token that is read, and prepares residual sums.

    Every rewritten graph is run beside the original one; an attention whose fusion changes the outputs by more than
    1e-4 is left alone, and the report says so.

    Args:
        model: An exported model in single precision. Graphs with sub-graphs (merged decoders) are returned as they
            are.
        config: The model's configuration, from which the size of images is taken.
        form: How attention is written; by default, in the operators of ONNX Runtime.

    Returns:
        A new model, and what was done.
    """
    report = FusionReport()
    if has_subgraphs(model):
        report.left["all"] = "the file holds sub-graphs"
        return model, report
    if not can_probe(model):
        report.left["all"] = "the model is too big to be checked in memory"
        return model, report
    if drops_tokens(model) and lengths_in(config) is None:
        report.left["all"] = "it drops tokens, and its configuration does not say how many"
        return model, report
    feeds = probing_feeds(model, config)
    reference = Reference(model, feeds)
    if drops_tokens(model):
        model = _simplified_choices(model, reference)
    attentions, report.left = find_attentions(Graph(model))
    for one in find_significances(Graph(model)):
        # These softmaxes belong to the attentions whose maps they repeat.
        report.left.pop(one.softmax, None)
    names = [item.name for item in attentions]
    fused = _with_attentions(model, names, reference, report, form)
    if fused is None:
        good = [name for name in names if _with_attentions(model, [name], reference, report, form) is not None]
        fused = _with_attentions(model, good, reference, report, form) or model
    for name, reason in report.left.items():
        logger.info("Attention %s is not fused: %s.", name, reason)
    graph = Graph(_copy(fused))
    first_token = keep_first_token(graph, feeds[0])
    report.choices = choose_early(graph, feeds[0])
    form.finish(graph)
    candidate = graph.write()
    if reference.difference(candidate) <= TOLERANCE:
        report.first_token_only = first_token
        return candidate, report
    logger.warning("The last layer is not cut to its first token: that would change the outputs.")
    graph, report.choices = Graph(fused), 0
    form.finish(graph)
    return graph.write(), report


def _with_attentions(
    model: ModelProto, names: list[str], reference: Reference, report: FusionReport, form: Form
) -> ModelProto | None:
    """The model with the named attentions fused, or None if that changes what it computes."""
    if not names:
        return model
    graph = Graph(_copy(model))
    attentions = [item for item in find_attentions(graph)[0] if item.name in names]
    report.left.update(measure(graph, attentions, reference.feeds))
    significances = find_significances(graph)
    for item in attentions:
        significance = matching(significances, item)
        if significance is None:
            form.attention(graph, item)
        else:
            form.dropping(graph, item, significance)
    fused = graph.write()
    difference = reference.difference(fused)
    if difference > TOLERANCE:
        if len(names) == 1:
            report.left[names[0]] = f"fusing it changes the outputs by {difference:.1e}"
            logger.warning("Attention %s is not fused: that changes the outputs by %.1e.", names[0], difference)
        return None
    report.attentions = [item.name for item in attentions]
    return fused


def _simplified_choices(model: ModelProto, reference: Reference) -> ModelProto:
    """The model with no more than what it takes to choose among tokens."""
    for simplify in (read_padding_directly, spare_unread_choices):
        graph = Graph(_copy(model))
        if simplify(graph, reference.feeds):
            simpler = graph.write()
            if reference.difference(simpler) <= TOLERANCE:
                model = simpler
    return model


def probing_feeds(model: ModelProto, config: PretrainedConfig | None) -> list[Feeds]:
    """Inputs of two sizes, with padding, for measuring and comparing."""
    image_size = getattr(config, "image_size", None) or 224
    vocabulary = min(getattr(config, "vocab_size", None) or 8, 1000)
    end = getattr(config, "eos_token_id", None)
    end = end if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) else None
    options = {"image_size": image_size, "vocabulary": vocabulary, "end_token": end}
    lengths = lengths_in(config) if drops_tokens(model) else None
    # What is measured where nothing is dropped does not hold where something is.
    second = {"scale": 2} if lengths is None else {"length": dropping_length(config, lengths)}
    return [made_up_feeds(model, 0, **options), made_up_feeds(model, 1, **second, **options)]


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def fuse_folder(folder: str | Path) -> dict[str, FusionReport]:
    """Fuses every ONNX file of a folder in place.

    Args:
        folder: What [`export_onnx`] wrote.

    Returns:
        One report for each file, by name.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.onnx"))
    if not files:
        raise FlexCompressError(f"{folder} holds no ONNX files: export the model first.")
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    reports = {}
    for file in files:
        model, reports[file.name] = fuse_graph(load_model(file), config)
        save_model(model, file)
    return reports
