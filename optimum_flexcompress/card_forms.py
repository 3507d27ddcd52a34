"""How a saved model is loaded, by what its folder holds: lines of code for its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .tasks import get_task


# Backends whose models open in classes of ours, and what these are called before `ForSequenceClassification` and so on.
_OWN_CLASSES = {
    "openvino": ("OpenVINO", "OVQuantizedModel"),
    "ipex": ("Intel Extension for PyTorch", "IPEXQuantizedModel"),
}
_PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Form:
    """In what form a folder holds a model.

    Attributes:
        runtime: What runs it.
        tags: For the metadata.
        prefix: Of the classes that load it; None for those of Transformers.
    """

    runtime: str = _PYTORCH
    tags: tuple[str, ...] = ()
    prefix: str | None = None

    @property
    def is_pytorch(self) -> bool:
        """Whether Transformers loads it."""
        return self.prefix is None

    def load_lines(self, name: str, model_class: str, task: str | None, import_reason: str | None) -> list[str]:
        """Code that loads the model, and a sentence about it, as Markdown.

        Args:
            name: A folder, or an id on the Hub.
            model_class: The class of Transformers.
            task: What the model is for.
            import_reason: For Transformers: why the plugin has to be imported first; None where that is not needed.
        """
        if self.is_pytorch:
            imports = (
                ["import optimum_flexcompress  # install optimum-flexcompress from its repository"]
                if import_reason
                else []
            )
            imports.append(f"from transformers import {model_class}")
            sentence = import_reason or "It loads in Transformers without any plugin."
        else:
            module, model_class = self._class_for(task)
            imports = [f"from {module} import {model_class}"]
            sentence = f"It runs in {self.runtime}."
        call = f'model = {model_class}.from_pretrained("{name}")'
        return ["```python", *imports, "", call, "```", "", sentence]

    def _class_for(self, task: str | None) -> tuple[str, str]:
        module, _, name = get_task(task or "feature-extraction").ort_class_path.partition(":")
        if self.prefix == "ORTModel":
            own = name.startswith("Flex")
            return "optimum_flexcompress" if own else module, name
        return "optimum_flexcompress", self.prefix + name[name.index("ORTModel") + len("ORTModel") :]


def form_of(folder: Path) -> Form:
    """Looks into a model folder."""
    from .quantization.saved import has_saved, peek_saved

    if has_saved(folder):
        backend = peek_saved(folder).backend
        if backend in _OWN_CLASSES:
            runtime, prefix = _OWN_CLASSES[backend]
            return Form(runtime, ("int8", backend), prefix)
        return Form(tags=("int8", backend))
    graphs = sorted(folder.glob("*.onnx"))
    if not graphs:
        return Form()
    from .evaluation.artifact import is_int8

    int8 = ("int8",) if any(is_int8(graph) for graph in graphs) else ()
    return Form("ONNX Runtime", (*int8, "onnx"), "ORTModel")
