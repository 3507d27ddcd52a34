"""A recorded graph serves other batch sizes and lengths than those it was recorded with."""

from __future__ import annotations

import io

import onnxruntime
import pytest
import torch
from torch import nn

from optimum_flexcompress.token_dropping import set_lengths
from tests.methods.length_adaptive.families import assert_close
from tests.tiny import build, inputs_for


class _Plain(nn.Module):
    """Positional tensors in, a tuple of tensors out."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        outputs = self.model(**dict(zip(self.names, tensors)))
        return tuple(outputs[key] for key in self.keys(outputs))

    @staticmethod
    def keys(outputs) -> list[str]:
        return [key for key, value in outputs.items() if isinstance(value, torch.Tensor)]


SHAPES = [(1, 4), (2, 9), (5, 17), (3, 7)]
CASES = [
    ("bert", "BertModel"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForQuestionAnswering"),
    ("roberta", "RobertaForTokenClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("t5", "T5EncoderModel"),
    ("vit", "ViTForImageClassification"),
]


def cases(model):
    for batch, length in SHAPES:
        yield inputs_for(model, seed=batch, batch=batch, length=length)


@pytest.mark.parametrize("lengths", [[7, 4, 2], [0.8, 0.6, 0.3]])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_torchscript_and_onnx(family, name, lengths):
    model = set_lengths(build(family, name), lengths)
    example = inputs_for(model, batch=2, length=11)
    plain = _Plain(model, list(example)).eval()
    keys = _Plain.keys(model(**example))
    with torch.no_grad():
        traced = torch.jit.trace(plain, tuple(example.values()))
        buffer = io.BytesIO()
        axes = {key: {0: "batch", 1: "length"} for key in example}
        torch.onnx.export(
            plain,
            tuple(example.values()),
            buffer,
            input_names=list(example),
            output_names=keys,
            dynamic_axes=axes if family != "vit" else {"pixel_values": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for inputs in cases(model):
        with torch.no_grad():
            values = model(**inputs)
            expected = {key: values[key] for key in keys}
            recorded = dict(zip(keys, traced(*inputs.values())))
        assert_close(recorded, expected, inputs, family, atol=1e-5, rtol=1e-4)
        feeds = {key: value.numpy() for key, value in inputs.items()}
        exported = dict(zip(keys, map(torch.from_numpy, session.run(keys, feeds))))
        assert_close(exported, expected, inputs, family, atol=1e-4, rtol=1e-3)


def test_the_feed_forward_network_runs_over_kept_tokens_only():
    model = set_lengths(build("bert", "BertForSequenceClassification"), [6, 4, 2])
    example = inputs_for(model, batch=2, length=11)
    seen = []
    handle = model.bert.encoder.layer[2].intermediate.register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    model(**example)
    assert seen == [(2, 2, 40)]
    handle.remove()
