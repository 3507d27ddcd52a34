"""Names for the models of a benchmark, and whether they can be compared at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import FlexCompressError, nearest
from ..hub import fetch_model, is_hub_id
from ..tasks.labels import names_of_model
from .artifact import Artifact


def name_models(
    folders: Mapping[str, str | os.PathLike] | Sequence[str | os.PathLike], baseline: str | os.PathLike | None
) -> tuple[dict[str, Path], str]:
    """Names for models, and which of them is the baseline.

    Args:
        folders: `{name: folder}` or folders; ids on the Hub, which are fetched, do for folders.
        baseline: A name, a folder, or None for the first.

    Returns:
        `{name: path}`, the baseline first, and its name.

    Raises:
        FlexCompressError: There is no model, or no such baseline.
    """
    if isinstance(folders, Mapping):
        paths = {str(name): fetch_model(path) for name, path in folders.items()}
    else:
        paths = _unique_names(folders)
    if baseline is None:
        if not paths:
            raise FlexCompressError("There is no model to measure.")
        baseline = next(iter(paths))
    elif str(baseline) not in paths:
        # A single word is more likely a misspelt name than an id.
        path = fetch_model(baseline) if "/" in str(baseline) else Path(baseline).expanduser()
        known = next((name for name, other in paths.items() if other.absolute() == path.absolute()), None)
        if known is not None:
            baseline = known
        elif path.exists():
            if not isinstance(folders, Mapping):
                paths = _unique_names([baseline, *folders])
                baseline = next(iter(paths))
            else:
                baseline = path.name if path.name not in paths else str(path)
                paths[baseline] = path
        else:
            raise FlexCompressError(f"There is no baseline {str(baseline)!r}.{nearest(str(baseline), paths)}")
    baseline = str(baseline)
    return {baseline: paths[baseline], **paths}, baseline


def _unique_names(models: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Ids, and the shortest ends of the paths that tell them apart: `a/student`, `b/student`, but just `teacher`."""
    ids = [str(model) for model in models if is_hub_id(model)]
    absolute = list(dict.fromkeys(Path(m).expanduser().absolute() for m in models if not is_hub_id(m)))
    names = {}
    for model in models:
        if str(model) in ids:
            names[str(model)] = fetch_model(model)
            continue
        path = Path(model).expanduser().absolute()
        for depth in range(1, len(path.parts) + 1):
            name = "/".join(path.parts[-depth:])
            if sum("/".join(other.parts[-depth:]) == name for other in absolute) == 1:
                break
        names[name] = path
    return names


def check_same_inputs(artifacts: Mapping[str, Artifact], baseline: str) -> None:
    """Models are only comparable where the same ids mean the same words and classes.

    Raises:
        FlexCompressError: They differ.
    """
    first = artifacts[baseline]
    names = names_of_model(first.config)
    for name, artifact in artifacts.items():
        if getattr(artifact.config, "vocab_size", None) != getattr(first.config, "vocab_size", None):
            raise FlexCompressError(
                f"{name} has a vocabulary of {artifact.config.vocab_size} words and {baseline} one of "
                f"{first.config.vocab_size}: measure models with different tokenizers in separate benchmarks."
            )
        own = names_of_model(artifact.config)
        if names is not None and own is not None and own != names:
            raise FlexCompressError(
                f"{name} has other classes than {baseline}, or has them in another order ({', '.join(own[:4])}... and "
                f"{', '.join(names[:4])}...): measure them in separate benchmarks."
            )
