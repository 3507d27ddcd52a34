"""The models that can drop tokens, and comparing what they return."""

from __future__ import annotations

import torch
import transformers

from optimum_flexcompress.architectures import find_architecture
from tests.methods.toys import model_of
from tests.tiny import ALL, CONFIGS


def has_encoder(config_name: str) -> bool:
    stacks = find_architecture(getattr(transformers, config_name).model_type).stacks
    return any(not stack.causal for stack in stacks.values())


ENCODERS = tuple(family for family, (config_name, _) in CONFIGS.items() if has_encoder(config_name))
MATRIX = [(family, name) for family, name in ALL if family in ENCODERS and name != "BartForCausalLM"]
DECODERS = [(family, name) for family, name in ALL if family not in ENCODERS or name == "BartForCausalLM"]

FIRST_ALONE = ("ForSequenceClassification", "ForImageClassification")


def length_of(family: str) -> int:
    """Length of the inputs of `tests.tiny` at the encoder: tokens, or patches and the class token."""
    return 5 if family == "vit" else 9


def keeps_first(family: str, name: str) -> bool:
    if family.startswith(("t5", "bart")):
        return False
    bare = name in ("BertModel", "RobertaModel", "DistilBertModel", "ViTModel")
    return bare or name.endswith(FIRST_ALONE)


def counts_of(family: str) -> list[int]:
    return [4, 3, 2] if family == "vit" else [7, 4, 2]


def fractions_of(family: str) -> list[float]:
    return [0.8, 0.6, 0.3]


def valid_only(values: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], family: str) -> dict:
    """Outputs per token only where there is no padding."""
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs:
        return values
    mask = mask.bool()
    return {
        name: value[mask] if value.dim() > 1 and value.shape[:2] == mask.shape else value
        for name, value in values.items()
    }


def assert_close(actual: dict, expected: dict, inputs: dict, family: str, **tolerance) -> None:
    actual, expected = valid_only(actual, inputs, family), valid_only(expected, inputs, family)
    assert actual.keys() == expected.keys()
    tolerance = tolerance or {"atol": 1e-4, "rtol": 1e-4}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def wide(family: str, **kwargs):
    """A toy model of the trainer's tests with weights so wide that dropping a token matters."""
    model = model_of(family, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.25 / parameter.std())
    return model
