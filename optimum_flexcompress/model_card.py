"""The card of a compressed model: what it is, how to load it, and what was measured."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedModel

from .card_forms import Form, form_of
from .config_sizes import LENGTHS_KEY, TAG
from .configuration import METHOD_CONFIGS
from .errors import UnsupportedArchitectureError
from .hub import is_hub_id
from .structure import ModelStructure, count_parameters
from .tasks import CLASS_ENDINGS, get_task, infer_task
from .token_dropping import lengths_of


if TYPE_CHECKING:
    from .evaluation.report import Report


CARD_NAME = "README.md"
# What a compressed model has from the one it was made from.
_PASSED_ON = ("license", "license_name", "license_link", "language")
# Sections that can be written again from the folder and a report.
_SECTIONS = ("Load it", "Lengths", "How it was made", "Measured", "Size")
# Seconds.
_TIMEOUT = 10


@dataclass(frozen=True)
class Measured:
    """Where a model's figures are.

    Attributes:
        report: The benchmark.
        name: The model's name in it.
        dataset: Id on the Hub of the data set it was measured on; None for files.
    """

    report: Report
    name: str
    dataset: str | None = None


@dataclass(frozen=True)
class Base:
    """What a model was made from, as far as its card tells.

    Attributes:
        id: On the Hub; None where it, and what it was made from, is not there.
        passed_on: Metadata that hold for what is made from it too: licence and language.
        methods: What compressed it before.
    """

    id: str | None = None
    passed_on: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()


def find_base(source: str | os.PathLike | None) -> Base:
    """Reads the card of the model that another one is made from.

    Args:
        source: A folder, an id on the Hub, or None where nothing is known. Where the Hub cannot be reached, its licence
            stays unknown.
    """
    if not source:
        return Base()
    if is_hub_id(source):
        return _base_on_hub(str(source))
    path = Path(source).expanduser() / CARD_NAME
    if not path.is_file():
        return Base()
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    # A folder is not on the Hub, but what it was made from may be; a merger of several has no one base.
    return _base_of(data, data.base_model if isinstance(data.base_model, str) else None)


@functools.lru_cache
def _base_on_hub(model_id: str) -> Base:
    try:
        # One request; a download of the card would be tried again for half a minute where there is no network.
        data = HfApi().model_info(model_id, timeout=_TIMEOUT).card_data
    except HFValidationError:
        return Base()
    except (requests.RequestException, OfflineModeIsEnabled):
        return Base(model_id)
    return _base_of(data, model_id) if data is not None else Base(model_id)


def _base_of(data: ModelCardData, model_id: str | None) -> Base:
    values = data.to_dict()
    tags = values.get("tags") or []
    return Base(
        id=model_id,
        passed_on={name: values[name] for name in _PASSED_ON if values.get(name)},
        methods=tuple(tag for tag in tags if tag in METHOD_CONFIGS) if TAG in tags else (),
    )


def write_model_card(
    folder: str | os.PathLike,
    model: PreTrainedModel | None = None,
    *,
    methods: Sequence[str] = (),
    base_model: str | os.PathLike | None = None,
    metrics: Mapping[str, float] | None = None,
    licence: str | None = None,
    lines: Sequence[str] = (),
    name: str | None = None,
    measured: Measured | None = None,
    metadata: Mapping[str, Any] | None = None,
    task: str | None = None,
) -> Path | None:
    """Writes `README.md` into a model folder, unless somebody else wrote one.

    Args:
        folder: The folder of the model.
        model: The model in it; by default one is made from its configuration, without the weights.
        methods: Names of the methods that made it, beside those of the model it was made from.
        base_model: What it was made from: an id on the Hub, or a folder, whose own card is read. The licence is taken
            from there.
        metrics: What was measured, by name, where there is no benchmark.
        licence: Identifier of the licence to pass on, where it is not the base's.
        lines: Sections of one's own, as Markdown.
        name: What the model is called and loaded by: its id on the Hub, or the name of the folder (the default).
        measured: Where a benchmark measured the model.
        metadata: Further metadata of the Hub; for what this function knows better it makes no difference.
        task: What the model is for; by default, what its class says.

    Returns:
        The path of the card, or `None` where there is a card that this function did not write.

    Raises:
        FlexCompressError: The folder is no model.
    """
    path = Path(folder) / CARD_NAME
    if not is_own_card(path):
        return None
    name = path.parent.name if name is None else name
    base, form = find_base(base_model), form_of(path.parent)
    model = _without_weights(path.parent, task) if model is None else model
    methods = list(dict.fromkeys([*base.methods, *methods]))
    task = get_task(task).name if task else _task_of(model)
    extra = dict(metadata or {})
    known = {
        "library_name": "transformers" if form.is_pytorch else "optimum",
        "tags": list(dict.fromkeys([TAG, *methods, *form.tags, *extra.pop("tags", ())])),
        "base_model": base.id,
        "base_model_relation": "quantized" if base.id and "int8" in form.tags else None,
        "pipeline_tag": task,
        "model_name": name,
        "license": licence,
    }
    figures: list[str] = []
    if measured is not None:
        from .card_figures import eval_results, figure_lines

        known["eval_results"] = eval_results(measured.report, measured.name, measured.dataset)
        known["metrics"] = list(measured.report[measured.name].metrics)
        known["datasets"] = [measured.dataset] if measured.dataset else None
        figures = figure_lines(measured.report, measured.name)
    elif metrics:
        figures = ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in metrics.items())]
    known = {key: value for key, value in known.items() if value is not None}
    data = ModelCardData(**{**base.passed_on, **extra, **known})
    origin = f", made from [`{base.id}`](https://huggingface.co/{base.id})" if base.id else ""
    runtime = "" if form.is_pytorch else f" for {form.runtime}"
    text = [
        f"# {name}",
        "",
        f"A compressed `{type(model).__name__}`{runtime}{origin}.",
        "Made with optimum-flexcompress" + (f" ({', '.join(methods)})." if methods else "."),
        "",
        "## Load it",
        "",
        *form.load_lines(name, type(model).__name__, task, _import_reason(model)),
        "",
        *_length_lines(model, form),
        *([*lines, ""] if lines else []),
        *(["## Measured", "", *figures, ""] if figures else []),
        "## Size",
        "",
        *_sizes(model),
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n", ignore_metadata_errors=True).save(path)
    return path


def is_own_card(path: str | os.PathLike) -> bool:
    """Whether a card may be written: there is none, or one of ours."""
    path = Path(path)
    return not path.exists() or TAG in (ModelCard.load(path, ignore_metadata_errors=True).data.tags or [])


def own_sections(folder: str | os.PathLike) -> list[str]:
    """The sections of a card of ours that say what only its writer knew, such as a method's own, as Markdown."""
    path = Path(folder) / CARD_NAME
    if not path.is_file() or not is_own_card(path):
        return []
    sections = ModelCard.load(path, ignore_metadata_errors=True).text.split("\n## ")[1:]
    own = [f"## {text.strip()}" for text in sections if text.partition("\n")[0] not in _SECTIONS]
    return [line for section in own for line in (*section.splitlines(), "")]


def rename_card(folder: str | os.PathLike, name: str) -> None:
    """Gives the model in a folder another name in its card, if the card is ours: its id on the Hub."""
    path = Path(folder) / CARD_NAME
    if not path.is_file() or not is_own_card(path):
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    old = card.data.model_name
    card.data.model_name = name
    card.text = card.text.replace(f"# {old}\n", f"# {name}\n", 1)
    card.text = card.text.replace(f'from_pretrained("{old}")', f'from_pretrained("{name}")')
    card.save(path)


def _without_weights(folder: Path, task: str | None) -> PreTrainedModel:
    """A model of the sizes that the configuration in a folder describes, on the meta device."""
    from .evaluation.cost import skeleton

    return skeleton(folder, get_task(task or infer_task(folder)), device="meta")


def _task_of(model: PreTrainedModel) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in CLASS_ENDINGS.items() if name.endswith(ending)), None)


def _import_reason(model: PreTrainedModel) -> str | None:
    """Why the plugin has to be imported before the model is loaded; None where it need not be."""
    entry = getattr(model.config, "quantization_config", None) or {}
    if isinstance(entry, dict) and "structure" in entry:
        return "Layers differ in size here, so loading asks for the import above; without it, loading stops with an error."
    if hasattr(model.config, LENGTHS_KEY):
        return "The import above makes it drop tokens; without any plugin, it loads in Transformers at full lengths."
    return None


def _sizes(model: PreTrainedModel) -> list[str]:
    try:
        counts = count_parameters(model)
    except UnsupportedArchitectureError:
        # Distillation of logits needs no table of the family, and gives a model all the same.
        return [f"{model.num_parameters():,} parameters."]
    return [
        f"{counts['total']:,} parameters: {counts['prunable']:,} in layers, {counts['embeddings']:,} in embeddings, "
        f"{counts['other']:,} elsewhere.",
        "",
        "```",
        ModelStructure.of(model).summary(),
        "```",
    ]


def _length_lines(model: PreTrainedModel, form: Form) -> list[str]:
    if not hasattr(model.config, LENGTHS_KEY):
        return []
    lengths = lengths_of(model)
    kept = "all tokens" if lengths is None else f"these {lengths.unit} of tokens: {list(lengths.values)}"
    choice = (
        "Another configuration is set with `from_pretrained(..., length_config=[...])`, one count or fraction per layer."
        if form.is_pytorch
        else "That is part of the graph: for another configuration, export the PyTorch model again."
    )
    return [
        "## Lengths",
        "",
        f"Its encoder can drop tokens from layer to layer. As it is, the layers keep {kept}. {choice}",
        "",
    ]
