"""Makes `from_pretrained` load compressed checkpoints.

`config.json` of a compressed checkpoint names the method `flexcompress` under `quantization_config`. Transformers
then asks the quantizer that is registered under that name to prepare the model, on the meta device, before weights
are loaded; ours gives it the sizes that the checkpoint's structure says. Afterwards it sets the lengths under
`length_config`, if there are some.

Where the entry also names modules with int8 weights, it lets torchao compute with them; see `int8_weights.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config_sizes import LENGTHS_KEY, QUANT_METHOD, TAG
from .errors import FlexCompressError
from .int8_weights import insert_weights, make_room, require_torchao, state_with_int8
from .structure import ModelStructure
from .surgery import resize
from .token_dropping import set_lengths


@register_quantization_config(QUANT_METHOD)
class FlexCompressStructureConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of a compressed checkpoint.

    Args:
        structure: What [`ModelStructure.to_dict`] returns; `None` where the model has the sizes that `config.json`
            says.
        int8: The names of the modules whose weights are int8, for torchao.
    """

    def __init__(self, structure: dict[str, Any] | None = None, int8: list[str] | None = None, **kwargs):
        if kwargs.keys() - {"quant_method"}:
            raise FlexCompressError(
                f"config.json has unknown entries beside the structure ({', '.join(sorted(kwargs))}): upgrade "
                "optimum-flexcompress."
            )
        self.quant_method = QUANT_METHOD
        self.structure = None if structure is None else ModelStructure.from_dict(structure).to_dict()
        self.int8 = None if int8 is None else list(int8)

    def entry(self) -> dict[str, Any]:
        """What stands in `config.json`."""
        parts = {"structure": self.structure, "int8": self.int8}
        return {"quant_method": QUANT_METHOD, **{name: part for name, part in parts.items() if part is not None}}


@register_quantizer(QUANT_METHOD)
class FlexCompressQuantizer(HfQuantizer):
    """Shrinks the empty model before its weights are loaded, and leaves no trace of a quantizer behind.

    The marks that Transformers puts on quantized models would make `.half()` raise, `save_pretrained(state_dict=...)`
    ignore its argument and the Trainer refuse to train. Weights here are ordinary ones, so the marks come off; int8
    weights are not, so they stay.
    """

    requires_calibration = True

    _checked: Path | None = None

    def validate_environment(self, *args, **kwargs) -> None:
        if self.quantization_config.int8 is not None:
            require_torchao()

    def update_tp_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        """Does nothing to the plan: of what is called before the weights are opened, this alone knows the folder.

        The auto classes have written it down by then, the classes of single families do it later.
        """
        self._check_files(config)
        return super().update_tp_plan(config)

    def _check_files(self, config: PretrainedConfig) -> None:
        """Checks int8 weights against the record beside them, where there is one.

        Raises:
            FlexCompressError: They are damaged.
        """
        if self.quantization_config.int8 is None or not config.name_or_path:
            return
        from .quantization.saved import has_saved, read_saved

        folder = Path(config.name_or_path)
        if folder != self._checked and has_saved(folder):
            read_saved(folder, "torchao")
            self._checked = folder

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        self._check_files(model.config)
        if self.quantization_config.structure is not None:
            resize(model, ModelStructure.from_dict(self.quantization_config.structure))
        elif self.quantization_config.int8 is None and not hasattr(model.config, LENGTHS_KEY):
            raise FlexCompressError(
                "config.json names the method flexcompress but holds no structure and no lengths: save the model "
                "again with save_pretrained()."
            )
        if self.quantization_config.int8 is not None:
            make_room(model, self.quantization_config.int8)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        if self.quantization_config.int8 is not None:
            insert_weights(model, self.quantization_config.int8)
        else:
            self._take_marks_off(model)
        if hasattr(model.config, "_pre_quantization_dtype"):
            del model.config._pre_quantization_dtype
        model.add_model_tags(TAG)
        # A dictionary, as surgery leaves it: both ways to a compressed model end in the same configuration.
        config = model.config.quantization_config
        if not isinstance(config, dict):
            model.config.quantization_config = config.entry()
        if hasattr(model.config, LENGTHS_KEY):
            set_lengths(model, getattr(model.config, LENGTHS_KEY))
        return model

    @staticmethod
    def _take_marks_off(model: PreTrainedModel) -> None:
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, name):
                delattr(model, name)

    def get_state_dict_and_metadata(self, model: PreTrainedModel, safe_serialization: bool | None = False):
        return state_with_int8(model, self.quantization_config.int8 or []), {}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.int8 is None
