"""The settings of int8 quantization for ONNX Runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from onnxruntime.quantization import QuantFormat, QuantizationMode, QuantType
from optimum.onnxruntime.configuration import QuantizationConfig

from ..errors import FlexCompressError, nearest
from .targets import AUTO, Target, find_target


CALIBRATION_METHODS = ("minmax", "percentile", "mse")


@dataclass
class FlexORTQuantizationConfig:
    """How [`FlexORTQuantizer`] makes a model int8.

    Attributes:
        mode: `dynamic` takes the range of every activation at run time; `static` from calibration, which is a little
            faster and needs examples.
        target: The processor: `avx2`, `avx512`, `avx512_vnni`, `arm64`, `tensorrt`, or `auto` for this machine's.
        per_channel: One weight scale for each output feature; off, one for each matrix.
        embeddings: Whether embedding tables become int8 as well, with one scale for each row.
        fuse: Whether attention is fused first and work that nothing reads is cut, see
            [`optimum_flexcompress.export.fusion`].
        reduce_range: 7-bit weights; by default, what the target needs.
        calibration_method: Of static mode: `mse` takes the range that rounds best, `percentile` cuts outliers off,
            `minmax` keeps everything.
        percentile: Of `percentile`: the share of values to keep, in percent.
        exclude: Names of nodes to leave in single precision.
    """

    mode: str = "dynamic"
    target: str = AUTO
    per_channel: bool = True
    embeddings: bool = True
    fuse: bool = True
    reduce_range: bool | None = None
    calibration_method: str = "mse"
    percentile: float = 99.99
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.target = find_target(self.target, self.mode).name
        if self.calibration_method not in CALIBRATION_METHODS:
            raise FlexCompressError(
                f"{self.calibration_method!r} is no calibration method."
                f"{nearest(self.calibration_method, CALIBRATION_METHODS)}"
            )
        if not 50 < self.percentile <= 100:
            raise FlexCompressError(f"percentile is {self.percentile}: it must lie above 50 and at most at 100.")
        if self.reduce_range is None:
            self.reduce_range = self.resolved_target.reduce_range

    @property
    def resolved_target(self) -> Target:
        """The target, with what it needs."""
        return find_target(self.target, self.mode)

    @property
    def is_static(self) -> bool:
        """Whether the mode is `static`."""
        return self.mode == "static"

    @classmethod
    def from_optimum(cls, config: QuantizationConfig, target: str = AUTO) -> FlexORTQuantizationConfig:
        """Reads what it can from one of Optimum's configurations, such as `AutoQuantizationConfig` makes."""
        if config.is_static and config.format == QuantFormat.QDQ and config.activations_symmetric:
            target = "tensorrt"
        return cls(
            mode="static" if config.is_static else "dynamic",
            target=target,
            per_channel=config.per_channel,
            reduce_range=config.reduce_range,
            calibration_method="minmax",
            exclude=list(config.nodes_to_exclude),
        )

    def to_optimum(self) -> QuantizationConfig:
        """The nearest configuration of Optimum's, which `ort_config.json` holds for tools that read it."""
        target = self.resolved_target
        return QuantizationConfig(
            is_static=self.is_static,
            format=QuantFormat.QDQ if target.qdq else QuantFormat.QOperator,
            mode=QuantizationMode.QLinearOps if target.qdq else QuantizationMode.IntegerOps,
            activations_dtype=QuantType.QInt8 if target.symmetric else QuantType.QUInt8,
            activations_symmetric=target.symmetric,
            weights_dtype=QuantType.QInt8,
            weights_symmetric=True,
            per_channel=self.per_channel,
            reduce_range=bool(self.reduce_range),
            nodes_to_exclude=list(self.exclude),
            operators_to_quantize=["MatMul", "Gemm", *(["Gather"] if self.embeddings else [])],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
