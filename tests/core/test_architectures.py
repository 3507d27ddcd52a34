"""The view of a live model: the named modules are the ones that compute what their names say."""

from __future__ import annotations

import pytest
import torch

import optimum_flexcompress
from optimum_flexcompress.architectures import ARCHITECTURES, describe, find_architecture
from optimum_flexcompress.structure import count_parameters
from tests.tiny import ALL, build, inputs_for, outputs_of


@pytest.mark.parametrize(("family", "name"), ALL)
def test_projections_are_where_the_table_says(family, name):
    """Zeroing what `v` writes, or what `down` reads, leaves nothing but the output bias of the sub-layer."""
    model = build(family, name)
    inputs = inputs_for(model)
    seen: dict[int, torch.Tensor] = {}

    def remember(key):
        return lambda module, args, output: seen.__setitem__(key, args[0])

    def zero(part):
        def hook(module, args, output):
            output = output.clone()
            output[..., part.start : part.stop] = 0
            return output

        return hook

    attentions, handles = [], []
    for stack in describe(model).stacks.values():
        assert len(stack.layers) == 3
        for layer in stack.layers:
            for attention in (layer.attention, layer.cross_attention):
                if attention is not None:
                    assert attention.q.size == attention.num_heads * attention.head_size == 32
                    assert attention.k.size == attention.v.size == attention.num_kv_heads * attention.head_size
                    attentions.append(attention)
                    handles.append(attention.v.module.register_forward_hook(zero(attention.v)))
                    handles.append(attention.o.register_forward_hook(remember(id(attention.o))))
            assert layer.ffn.size == 40
            handles.append(layer.ffn.down.register_forward_hook(remember(id(layer.ffn.down))))
            up = 2 if family in ("llama", "mistral", "qwen2", "t5-gated-untied") else 1
            assert len(layer.ffn.up) == up
            assert layer.ffn.down.weight.shape in ((32, 40), (40, 32))
    outputs_of(model, inputs)
    for attention in attentions:
        if id(attention.o) in seen:  # a decoder alone never calls its cross-attention
            assert seen[id(attention.o)].shape[-1] == 32
            assert not seen[id(attention.o)].any()
    assert sum(id(attention.o) in seen for attention in attentions) >= 3
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_parameter_is_counted_once(family, name):
    model = build(family, name)
    counts = count_parameters(model)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["total"] == counts["embeddings"] + counts["prunable"] + counts["other"]
    assert min(counts["embeddings"], counts["prunable"]) > 0


def test_tables_name_the_families_of_the_documentation():
    families = {architecture.family for architecture in ARCHITECTURES.values()}
    assert families == {"bert", "roberta", "distilbert", "gpt2", "llama", "t5", "bart", "vit"}
    assert find_architecture("qwen2").family == "llama"
    assert [stack.is_causal for stack in describe(build("t5", "T5Model")).stacks.values()] == [False, True]


def test_lazy_exports_all_resolve():
    for name in optimum_flexcompress.__all__:
        assert getattr(optimum_flexcompress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optimum_flexcompress.nothing
