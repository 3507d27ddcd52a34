"""Int8 models: for ONNX Runtime."""

from .configuration import FlexORTQuantizationConfig
from .folder import QuantizedFolder, quantize_folder
from .ort import FlexORTQuantizer


__all__ = ["FlexORTQuantizationConfig", "FlexORTQuantizer", "QuantizedFolder", "quantize_folder"]
