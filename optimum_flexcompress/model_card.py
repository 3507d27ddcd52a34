"""The model card of a compressed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .config_sizes import LENGTHS_KEY
from .errors import UnsupportedArchitectureError
from .structure import ModelStructure, count_parameters
from .token_dropping import lengths_of


TAG = "optimum-flexcompress"


def write_model_card(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    *,
    methods: Sequence[str] = (),
    base_model: str | None = None,
    metrics: Mapping[str, float] | None = None,
    licence: str | None = None,
    lines: Sequence[str] = (),
    name: str | None = None,
) -> Path | None:
    """Writes `README.md` into a checkpoint folder, unless somebody else wrote one.

    Args:
        folder: The folder of the checkpoint.
        model: The model in it.
        methods: Names of the methods that made it.
        base_model: Hub id of the model it was made from; a local path is not passed on.
        metrics: What was measured, by name.
        licence: Identifier of the licence to pass on.
        lines: Sections of one's own, as Markdown.
        name: What the model is called; the name of the folder when `None`.

    Returns:
        The path of the card, or `None` where there is a card that this function did not write.
    """
    path = Path(folder) / "README.md"
    if path.exists() and TAG not in (ModelCard.load(path, ignore_metadata_errors=True).data.tags or []):
        return None
    name = path.parent.name if name is None else name
    needs_plugin = "structure" in (getattr(model.config, "quantization_config", None) or {})
    drops = hasattr(model.config, LENGTHS_KEY)
    if base_model is not None and Path(base_model).exists():
        base_model = None
    data = ModelCardData(
        library_name="transformers",
        tags=[TAG, *methods],
        base_model=base_model,
        license=licence,
        model_name=name,
    )
    auto_class = type(model).__name__
    text = [
        f"# {name}",
        "",
        f"A compressed `{auto_class}`" + (f" made from `{base_model}`" if base_model else "") + ".",
        "Made with optimum-flexcompress" + (f" ({', '.join(methods)})." if methods else "."),
        "",
        "## Load it",
        "",
        "```python",
        *(
            ["import optimum_flexcompress  # pip install optimum-flexcompress; teaches from_pretrained the sizes"]
            * (needs_plugin or drops)
        ),
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("{name}")',
        "```",
        "",
        "Layers differ in size here, so loading asks for the import above; without it, loading stops with an error."
        if needs_plugin
        else "It loads in Transformers without any plugin" + (", at full lengths." if drops else "."),
        "",
        *_length_lines(model, drops),
        *([*lines, ""] if lines else []),
        "## Size",
        "",
        *_sizes(model),
    ]
    if metrics:
        text += ["", "## Measured", "", "| metric | value |", "|---|---|"]
        text += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n", ignore_metadata_errors=True).save(path)
    return path


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


def _length_lines(model: PreTrainedModel, drops: bool) -> list[str]:
    if not drops:
        return []
    lengths = lengths_of(model)
    kept = "all tokens" if lengths is None else f"these {lengths.unit} of tokens: {list(lengths.values)}"
    return [
        "## Lengths",
        "",
        f"Its encoder can drop tokens from layer to layer. As it is, the layers keep {kept}. Another configuration is "
        "set with `from_pretrained(..., length_config=[...])`, one count or fraction per layer.",
        "",
    ]
