"""The settings of int8 quantization for Intel Extension for PyTorch."""

from __future__ import annotations

from typing import Any

from optimum.configuration_utils import BaseConfig

from ..errors import FlexCompressError, nearest
from ..output import write_text_atomically
from .configuration import CALIBRATION_METHODS
from .targets import AUTO, TARGETS, Target, find_target


IPEX_TARGETS = ("avx2", "avx512", "avx512_vnni")
# What a file holds beside the settings.
_STAMPS = ("flexcompress_version", "optimum_version", "transformers_version", "_commit_hash")


def find_ipex_target(name: str, mode: str) -> Target:
    """The target of that name, if IPEX runs on it.

    Raises:
        FlexCompressError: IPEX does not, or it is not installed with the torch that it needs.
    """
    from .ipex_lane import check_ipex

    check_ipex()
    return _x86_target(name, mode)


def _x86_target(name: str, mode: str) -> Target:
    if name != AUTO and name in TARGETS and name not in IPEX_TARGETS:
        raise FlexCompressError(
            f"IPEX runs on x86 processors only, not on {name}: choose {', '.join(IPEX_TARGETS)} or {AUTO}, or --backend "
            "ort."
        )
    target = find_target(name, mode)
    if target.name not in IPEX_TARGETS:
        raise FlexCompressError(
            f"IPEX runs on x86 processors only, and this one is {target.name}: use --backend ort or openvino, or name "
            f"the processor that the model is for ({', '.join(IPEX_TARGETS)})."
        )
    return target


class IPEXQuantizationConfig(BaseConfig):
    """How [`IPEXQuantizer`] makes a model int8; kept in `ipex_quantization_config.json`.

    Args:
        mode: `dynamic` makes the products with weights int8 and takes the range of their inputs at run time; `static`
            takes ranges from calibration, which needs examples, and makes attention int8 as well.
        target: The processor: `avx2`, `avx512`, `avx512_vnni` (also for AMX), or `auto` for this machine's.
        per_channel: One weight scale for each output feature; off, one for each matrix.
        embeddings: Whether embedding tables become int8 as well, with one scale for each row.
        attention: Of static mode: whether the products inside attention are int8 too.
        reduce_range: 7-bit activations, without which products overflow on processors without VNNI and AMX; by
            default, what the target needs.
        calibration_method: Of static mode: `mse` takes the range that rounds best, `percentile` cuts outliers off,
            `minmax` keeps everything.
        percentile: Of `percentile`: the share of values to keep, in percent.
        exclude: `fnmatch` patterns for names of linear layers to leave in single precision.

    Raises:
        FlexCompressError: A setting or its value is not known.
    """

    CONFIG_NAME = "ipex_quantization_config.json"
    FULL_CONFIGURATION_FILE = "ipex_quantization_config.json"

    def __init__(
        self,
        mode: str = "dynamic",
        target: str = AUTO,
        per_channel: bool = True,
        embeddings: bool = True,
        attention: bool = True,
        reduce_range: bool | None = None,
        calibration_method: str = "mse",
        percentile: float = 99.99,
        exclude: list[str] | tuple[str, ...] = (),
        **kwargs: Any,
    ):
        known = [name for name in self._settings() if name != "self"]
        for name in kwargs.keys() - set(_STAMPS):
            raise FlexCompressError(f"There is no IPEX quantization setting {name!r}.{nearest(name, known)}")
        # The base class would otherwise carry label maps, token ids and generation settings of a model.
        super().__init__()
        resolved = _x86_target(target, mode)
        if calibration_method not in CALIBRATION_METHODS:
            raise FlexCompressError(
                f"{calibration_method!r} is no calibration method.{nearest(calibration_method, CALIBRATION_METHODS)}"
            )
        if not 50 < percentile <= 100:
            raise FlexCompressError(f"percentile is {percentile}: it must lie above 50 and at most at 100.")
        self.mode, self.target = mode, resolved.name
        self.per_channel, self.embeddings, self.attention = bool(per_channel), bool(embeddings), bool(attention)
        self.reduce_range = resolved.reduce_range if reduce_range is None else bool(reduce_range)
        self.calibration_method, self.percentile = calibration_method, float(percentile)
        self.exclude = list(exclude)

    @staticmethod
    def _settings() -> tuple[str, ...]:
        code = IPEXQuantizationConfig.__init__.__code__
        return code.co_varnames[1 : code.co_argcount]

    @property
    def is_static(self) -> bool:
        """Whether the mode is `static`."""
        return self.mode == "static"

    def expectation(self) -> str | None:
        """What to expect of the target, where that is not what int8 is for."""
        if self.target == "avx512_vnni":
            return None
        return (
            f"{self.target}: no VNNI and no AMX, so int8 saves memory but is about as fast as single precision at best, "
            "and activations are kept to 7 bits, which costs some accuracy"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the settings and the versions that wrote them."""
        stamps = super().to_dict()
        return {
            **{name: getattr(self, name) for name in self._settings()},
            "optimum_version": stamps["optimum_version"],
            "transformers_version": stamps["transformers_version"],
        }

    def to_diff_dict(self) -> dict[str, Any]:
        # Defaults are written out, so that a file keeps its meaning when a default changes.
        return self.to_dict()

    def to_json_file(self, json_file_path: str, use_diff: bool = True) -> None:
        write_text_atomically(json_file_path, self.to_json_string(use_diff=use_diff))
