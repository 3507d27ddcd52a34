"""Training-time compression of transformers for the Hugging Face Optimum ecosystem.

Importing this package teaches `from_pretrained` to load compressed checkpoints. Everything else is imported when it
is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import loader, logs  # noqa: F401  they register the loader, and set the verbosity
from .version import __version__


_EXPORTS = {
    "configuration": ["FlexCompressConfig", "DistillationConfig", "MiniLMConfig", "VIBPruningConfig"],
    "modular_config": ["ModularConfig"],
    "methods.modular": ["Assembly", "ModularModel"],
    "length_config": ["LengthAdaptiveConfig"],
    "token_dropping": ["LengthConfig", "lengths_of", "set_lengths", "using_lengths"],
    "trainer": ["FlexCompressTrainer", "FlexCompressSeq2SeqTrainer"],
    "structure": ["ModelStructure"],
    "kept": ["Kept", "KeptLayer"],
    "surgery": ["keep_layers", "resize", "select"],
    "quantization": ["FlexORTQuantizer"],
    "quantization.ipex": ["IPEXQuantizer"],
    "quantization.ipex_config": ["IPEXQuantizationConfig"],
    "modeling_ipex": [
        "IPEXQuantizedModelForFeatureExtraction",
        "IPEXQuantizedModelForImageClassification",
        "IPEXQuantizedModelForMaskedLM",
        "IPEXQuantizedModelForQuestionAnswering",
        "IPEXQuantizedModelForSequenceClassification",
        "IPEXQuantizedModelForTokenClassification",
    ],
    "modeling_ort": ["FlexORTModelForCausalLM", "FlexORTModelForSeq2SeqLM"],
    "modeling_openvino": [
        "OVQuantizedModel",
        "OVQuantizedModelForFeatureExtraction",
        "OVQuantizedModelForImageClassification",
        "OVQuantizedModelForMaskedLM",
        "OVQuantizedModelForQuestionAnswering",
        "OVQuantizedModelForSequenceClassification",
        "OVQuantizedModelForTokenClassification",
    ],
    "errors": ["FlexCompressError"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Assembly",
    "DistillationConfig",
    "FlexCompressConfig",
    "FlexCompressError",
    "FlexCompressSeq2SeqTrainer",
    "FlexCompressTrainer",
    "FlexORTModelForCausalLM",
    "FlexORTModelForSeq2SeqLM",
    "FlexORTQuantizer",
    "IPEXQuantizationConfig",
    "IPEXQuantizedModelForFeatureExtraction",
    "IPEXQuantizedModelForImageClassification",
    "IPEXQuantizedModelForMaskedLM",
    "IPEXQuantizedModelForQuestionAnswering",
    "IPEXQuantizedModelForSequenceClassification",
    "IPEXQuantizedModelForTokenClassification",
    "IPEXQuantizer",
    "Kept",
    "KeptLayer",
    "LengthAdaptiveConfig",
    "LengthConfig",
    "MiniLMConfig",
    "ModelStructure",
    "ModularConfig",
    "ModularModel",
    "OVQuantizedModel",
    "OVQuantizedModelForFeatureExtraction",
    "OVQuantizedModelForImageClassification",
    "OVQuantizedModelForMaskedLM",
    "OVQuantizedModelForQuestionAnswering",
    "OVQuantizedModelForSequenceClassification",
    "OVQuantizedModelForTokenClassification",
    "VIBPruningConfig",
    "__version__",
    "keep_layers",
    "lengths_of",
    "resize",
    "select",
    "set_lengths",
    "using_lengths",
]

if TYPE_CHECKING:
    from .configuration import DistillationConfig, FlexCompressConfig, MiniLMConfig, VIBPruningConfig
    from .errors import FlexCompressError
    from .kept import Kept, KeptLayer
    from .length_config import LengthAdaptiveConfig
    from .methods.modular import Assembly, ModularModel
    from .modeling_ipex import (
        IPEXQuantizedModelForFeatureExtraction,
        IPEXQuantizedModelForImageClassification,
        IPEXQuantizedModelForMaskedLM,
        IPEXQuantizedModelForQuestionAnswering,
        IPEXQuantizedModelForSequenceClassification,
        IPEXQuantizedModelForTokenClassification,
    )
    from .modeling_openvino import (
        OVQuantizedModel,
        OVQuantizedModelForFeatureExtraction,
        OVQuantizedModelForImageClassification,
        OVQuantizedModelForMaskedLM,
        OVQuantizedModelForQuestionAnswering,
        OVQuantizedModelForSequenceClassification,
        OVQuantizedModelForTokenClassification,
    )
    from .modeling_ort import FlexORTModelForCausalLM, FlexORTModelForSeq2SeqLM
    from .modular_config import ModularConfig
    from .quantization import FlexORTQuantizer
    from .quantization.ipex import IPEXQuantizer
    from .quantization.ipex_config import IPEXQuantizationConfig
    from .structure import ModelStructure
    from .surgery import keep_layers, resize, select
    from .token_dropping import LengthConfig, lengths_of, set_lengths, using_lengths
    from .trainer import FlexCompressSeq2SeqTrainer, FlexCompressTrainer


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
