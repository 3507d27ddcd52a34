"""Export configurations whose cache shapes and widths are those of the model, not those of its `config.json`.

Optimum's configurations compute every layer's cache as `hidden_size // num_attention_heads` wide with
`num_attention_heads` heads. In a compressed decoder each layer has its own number of heads, layers may have no
self-attention (and then no cache), and the residual stream may be narrower than `config.json` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum.exporters.onnx.base import ConfigBehavior, OnnxConfig, OnnxConfigWithPast, OnnxSeq2SeqConfigWithPast
from optimum.exporters.onnx.config import TextEncoderOnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyInputGenerator, NormalizedTextConfig
from transformers import PreTrainedModel

from ..architectures import find_architecture
from ..errors import FlexCompressError
from ..structure import AttentionSize, ModelStructure


@dataclass(frozen=True)
class CacheLayer:
    """Shape of what one decoder layer caches: `(batch, heads, length, head_size)` for keys and for values."""

    heads: int
    head_size: int

    @classmethod
    def of(cls, size: AttentionSize) -> CacheLayer:
        return cls(size.kv_heads, size.head_size)


@dataclass(frozen=True)
class ExportSizes:
    """What the exporter has to know about a model.

    Attributes:
        hidden_size: Width of the residual stream, hence of what an encoder hands to its decoder.
        self_attention: One entry for each decoder layer; None where self-attention was removed.
        cross_attention: The same for cross-attention.
    """

    hidden_size: int
    self_attention: tuple[CacheLayer | None, ...] = ()
    cross_attention: tuple[CacheLayer | None, ...] = ()

    @property
    def self_cache(self) -> list[CacheLayer]:
        """The layers of the cache: those that have self-attention, which Transformers numbers without gaps."""
        return [layer for layer in self.self_attention if layer is not None]

    def check_encoder_decoder_cache(self) -> None:
        """Checks that an encoder-decoder can be exported with its cache.

        The cache of an encoder-decoder is one tuple of four tensors for each layer, in Transformers and in the files
        that Optimum runs, so that a layer with two of them cannot be told.

        Raises:
            FlexCompressError: A decoder layer lacks self- or cross-attention.
        """
        for kind, layers in (("self", self.self_attention), ("cross", self.cross_attention)):
            if None in layers:
                index = layers.index(None)
                raise FlexCompressError(
                    f"Decoder layer {index} has no {kind}-attention, and the cache of an ONNX encoder-decoder holds "
                    f"both attentions of every layer: keep at least one {kind}-attention head in layer {index}, "
                    "remove the whole layer, or export without a cache (use_cache=False)."
                )


def read_sizes(model: PreTrainedModel) -> ExportSizes:
    """Reads off the model what the exporter has to know.

    Args:
        model: A model of a supported family, compressed or stock.

    Raises:
        UnsupportedArchitectureError: The family has no architecture table.
    """
    structure = ModelStructure.of(model)
    decoder = structure.stacks.get("decoder")
    layers = decoder.layers if decoder is not None else ()
    return ExportSizes(
        structure.hidden_size,
        tuple(None if layer.attention is None else CacheLayer.of(layer.attention) for layer in layers),
        tuple(None if layer.cross_attention is None else CacheLayer.of(layer.cross_attention) for layer in layers),
    )


class _TrueSizes:
    """Mixed into an export configuration of Optimum: takes cache shapes and widths from `sizes`."""

    sizes: ExportSizes

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        inputs = super().generate_dummy_inputs(framework=framework, **kwargs)
        if "past_key_values" in inputs:
            inputs["past_key_values"] = self._with_true_shapes(inputs["past_key_values"], framework)
        if "encoder_outputs" in inputs:
            hidden, *rest = inputs["encoder_outputs"]
            inputs["encoder_outputs"] = (self._noise((*hidden.shape[:-1], self.sizes.hidden_size), framework), *rest)
        return inputs

    def _noise(self, shape: tuple[int, ...], framework: str) -> Any:
        return DummyInputGenerator.random_float_tensor(shape, framework=framework, dtype=self.float_dtype)

    def _with_true_shapes(self, past: list[tuple[Any, ...]], framework: str) -> list[tuple[Any, ...]]:
        """Takes batch and length from Optimum's dummy cache, heads and head size from the model."""
        first = past[0]

        def tensor(like: Any, layer: CacheLayer) -> Any:
            return self._noise((like.shape[0], layer.heads, like.shape[2], layer.head_size), framework)

        layers = []
        for index, own in enumerate(self.sizes.self_cache):
            tensors = [tensor(like, own) for like in first[:2]]
            if len(first) == 4:
                tensors += [tensor(like, self.sizes.cross_attention[index]) for like in first[2:]]
            layers.append(tuple(tensors))
        return layers


class _TrueDecoderSizes(_TrueSizes):
    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return self._with_own_cache(super().inputs, "inputs")

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self._with_own_cache(super().outputs, "outputs")

    def _with_own_cache(self, axes: dict[str, dict[int, str]], direction: str) -> dict[str, dict[int, str]]:
        # Some configurations (BART) name the layers of the cache without asking `add_past_key_values`.
        own = {name: value for name, value in axes.items() if not name.startswith(("past_key_values.", "present."))}
        if len(own) < len(axes):
            self.add_past_key_values(own, direction)
        return own

    def add_past_key_values(self, inputs_or_outputs: dict[str, dict[int, str]], direction: str) -> None:
        length = "past_sequence_length" if direction == "inputs" else "past_sequence_length + sequence_length"
        name = "past_key_values" if direction == "inputs" else "present"
        for index in range(len(self.sizes.self_cache)):
            for part in ("key", "value"):
                inputs_or_outputs[f"{name}.{index}.{part}"] = {0: "batch_size", 2: length}


def export_configs(
    model: PreTrainedModel, task: str, sizes: ExportSizes, preprocessors: list[Any] | None = None
) -> dict[str, OnnxConfig]:
    """The configurations to hand to `onnx_export_from_model(custom_onnx_configs=...)`.

    Args:
        model: The model to export.
        task: Optimum's task name, with its `-with-past` where a cache is wanted.
        sizes: What [`read_sizes`] returned.
        preprocessors: Tokenizer or image processor, from which Optimum takes dummy sizes.

    Returns:
        One configuration for each file, by the name of the file; empty where Optimum's own are right as they are.

    Raises:
        FlexCompressError: An encoder-decoder with a decoder layer that lacks self- or cross-attention, or a
            configuration that the exporter cannot take.
    """
    objection = find_architecture(model.config.model_type).export_objection(model.config)
    if objection is not None:
        raise FlexCompressError(objection)
    constructor = TasksManager.get_exporter_config_constructor(
        model=model, exporter="onnx", task=task, library_name="transformers"
    )
    stock = constructor(model.config, preprocessors=preprocessors)
    if not isinstance(stock, OnnxConfigWithPast):
        return {}
    if not isinstance(stock, OnnxSeq2SeqConfigWithPast) or stock.task == "text-generation":
        if not stock.use_past:
            return {}
        config_class = _with_sizes(type(stock), _TrueDecoderSizes, sizes)
        config = config_class(
            model.config, task=stock.task, use_past=True, use_past_in_inputs=True, preprocessors=preprocessors
        )
        return {"model": config}
    if stock.task != "text2text-generation":
        return {}
    if stock.use_past:
        sizes.check_encoder_decoder_cache()
    config = _with_sizes(type(stock), _TrueSizes, sizes)(
        model.config, task=stock.task, use_past=stock.use_past, preprocessors=preprocessors
    )
    configs = {
        "encoder_model": config.with_behavior(ConfigBehavior.ENCODER),
        "decoder_model": config.with_behavior(ConfigBehavior.DECODER, use_past=config.use_past),
    }
    if config.use_past:
        configs["decoder_with_past_model"] = config.with_behavior(
            ConfigBehavior.DECODER, use_past=True, use_past_in_inputs=True
        )
    return configs


class PlainTextOnnxConfig(TextEncoderOnnxConfig):
    """Token ids and mask in, logits out: for heads that Optimum's table lacks, such as question answering on GPT-2."""

    # Only the vocabulary size is read, to draw dummy token ids, and every configuration has it under this name.
    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": dict(axes), "attention_mask": dict(axes)}

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        inputs = super().generate_dummy_inputs(framework=framework, **kwargs)
        end = self._config.eos_token_id
        if self._config.is_encoder_decoder and isinstance(end, int):
            # Sentence heads of encoder-decoders read the last end-of-sentence token, one in every row.
            ids = inputs["input_ids"]
            ids[ids == end] = (end + 1) % self._normalized_config.vocab_size
            ids[:, -1] = end
        return inputs


def _with_sizes(stock: type[OnnxConfig], mixin: type, sizes: ExportSizes) -> type[OnnxConfig]:
    # A class and not an instance attribute: Optimum makes further instances from the class of the first.
    return type(f"Sized{stock.__name__}", (mixin, stock), {"sizes": sizes})
