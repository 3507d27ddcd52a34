"""Int8 models that run in OpenVINO, behind the interface of Transformers models."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from .errors import FlexCompressError, MissingExtraError, nearest
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
from .quantization.saved import RECORD_NAME, Saved, installed_versions


_OPTIONS = ("threads", "precision", "device", "expected_sha256")


class OVQuantizedModel(RuntimeModel):
    """An int8 model that `quantize --backend openvino` wrote.

    `from_pretrained` of this class finds the class for the task by itself. Beside the arguments of all such classes it
    takes:

    - `threads`: how many to use; by default OpenVINO's choice.
    - `precision`: `f32` or `bf16`, for what is not int8; by default OpenVINO's choice, which is bf16 where the processor
      has instructions for it.
    - `device`: one of OpenVINO's devices, such as `CPU`, the default.

    Example:
    ```python
    >>> from optimum_flexcompress import OVQuantizedModelForSequenceClassification
    >>> model = OVQuantizedModelForSequenceClassification.from_pretrained("student-int8", threads=4)
    >>> pipeline("text-classification", model=model, tokenizer=tokenizer)("What a film!")
    ```
    """

    backend = "openvino"

    @classmethod
    def _open(
        cls,
        saved: Saved,
        config: PretrainedConfig,
        threads: int | None = None,
        precision: str | None = None,
        device: str = "CPU",
        **unknown: Any,
    ) -> _Compiled:
        for name in unknown:
            raise FlexCompressError(f"OpenVINO models have no option {name!r}.{nearest(name, _OPTIONS)}")
        try:
            import openvino
        except ModuleNotFoundError as error:
            if error.name != "openvino":
                raise
            raise MissingExtraError("openvino", "openvino") from None
        _check_version(saved)
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        file = only_file(saved, ".xml")
        try:
            return _Compiled(openvino.Core().compile_model(file, device, settings))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise FlexCompressError(
                f"OpenVINO cannot open {file} with the settings {settings} on the device {device} ({reason}): check "
                "them, or quantize the original model again."
            ) from error

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        arrays = {
            name: (tensor.float() if tensor.is_floating_point() else tensor.long()).numpy()
            for name, tensor in inputs.items()
        }
        outputs = self.model.request().infer(arrays, share_inputs=True)
        return tuple(torch.from_numpy(outputs[name]) for name in self.output_names)


class _Compiled:
    """A compiled model, with a request for each thread that calls it: one request serves one call at a time."""

    def __init__(self, compiled: Any):
        self.compiled = compiled
        self._own = threading.local()

    def request(self) -> Any:
        """The calling thread's request."""
        if not hasattr(self._own, "request"):
            self._own.request = self.compiled.create_infer_request()
        return self._own.request


def _check_version(saved: Saved) -> None:
    """OpenVINO reads what older versions wrote, not what newer ones did."""
    made, here = saved.versions.get("openvino", "0.0"), installed_versions("openvino")["openvino"]
    if _major_and_minor(made) is None:
        raise FlexCompressError(
            f"{saved.folder / RECORD_NAME} says that OpenVINO {made} made the model, which is no version: quantize the "
            "original model again."
        )
    if _major_and_minor(made) > (_major_and_minor(here) or (0, 0)):
        raise FlexCompressError(
            f"{saved.folder} was made with OpenVINO {made}, and {here} is installed: install `openvino>={made}`, or "
            "quantize the original model again."
        )


def _major_and_minor(version: Any) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", str(version))
    return None if found is None else (int(found[1]), int(found[2]))


class OVQuantizedModelForFeatureExtraction(ForFeatureExtraction, OVQuantizedModel):
    """Hidden states, in OpenVINO."""


class OVQuantizedModelForSequenceClassification(ForSequenceClassification, OVQuantizedModel):
    """Classes of sentences, in OpenVINO."""


class OVQuantizedModelForTokenClassification(ForTokenClassification, OVQuantizedModel):
    """Classes of tokens, in OpenVINO."""


class OVQuantizedModelForQuestionAnswering(ForQuestionAnswering, OVQuantizedModel):
    """Answers within a text, in OpenVINO."""


class OVQuantizedModelForMaskedLM(ForMaskedLM, OVQuantizedModel):
    """Words for masks, in OpenVINO."""


class OVQuantizedModelForImageClassification(ForImageClassification, OVQuantizedModel):
    """Classes of images, in OpenVINO."""
