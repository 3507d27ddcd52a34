"""Token dropping written out plainly: one sample at a time, without padding, one token after the other."""

from __future__ import annotations

import contextlib
import math

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from optimum_flexcompress.architectures import describe
from optimum_flexcompress.methods.capture import eager_attention


def _bert(layer, hidden, bias):
    hidden, maps = layer.attention(hidden, output_attentions=True)
    return hidden, maps, layer.feed_forward_chunk


def _distilbert(layer, hidden, bias):
    mask = torch.ones(1, hidden.shape[1])
    context, maps = layer.attention(hidden, hidden, hidden, mask, output_attentions=True)
    between = layer.sa_layer_norm(context + hidden)
    return between, maps, lambda x: layer.output_layer_norm(layer.ffn(x) + x)


def _vit(layer, hidden, bias):
    context, maps = layer.attention.attention(layer.layernorm_before(hidden))
    between = layer.attention.output(context, None) + hidden
    return between, maps, lambda x: layer.output(layer.intermediate(layer.layernorm_after(x)), x)


def _bart(layer, hidden, bias):
    context, maps = layer.self_attn(hidden, output_attentions=True)
    between = layer.self_attn_layer_norm(hidden + context)
    return between, maps, lambda x: layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))


def _t5(layer, hidden, bias):
    outputs = layer.layer[0](hidden, position_bias=bias, output_attentions=True)
    return outputs[0], outputs[2], layer.layer[-1]


SUB_LAYERS = {"bert": _bert, "roberta": _bert, "distilbert": _distilbert, "vit": _vit, "bart": _bart, "t5": _t5}


def encode(view, stack, embedded, lengths, keep_first):
    """Runs the layers over one sample.

    Args:
        view: The model.
        stack: Its encoder.
        embedded: `[length, hidden size]`, what enters the first layer.
        lengths: Counts, or fractions where they are floats.
        keep_first: Whether the first token always stays.

    Returns:
        The last hidden state of every token, `[length, hidden size]`, and for each layer the positions it kept.
    """
    total = len(embedded)
    last = {position: embedded[position] for position in range(total)}
    alive = list(range(total))
    bias = None
    if view.family == "t5":
        bias = stack.layers[0].attention.module.compute_bias(total, total)
    survivors = []
    for layer, length in zip(stack.layers, lengths):
        hidden = torch.stack([last[position] for position in alive])[None]
        here = None if bias is None else bias[:, :, alive][:, :, :, alive]
        between, maps, feed_forward = SUB_LAYERS[view.family](layer.module, hidden, here)
        wanted = math.ceil(length * total - 1e-4) if isinstance(length, float) else length
        scores = {position: maps[0, :, :, place].sum().item() for place, position in enumerate(alive)}
        if keep_first:
            scores[0] = math.inf
        ranked = sorted(alive, key=lambda position: -scores[position])
        kept = sorted(ranked[:wanted])
        output = feed_forward(between[:, [alive.index(position) for position in kept]])[0]
        for place, position in enumerate(kept):
            last[position] = output[place]
        alive = kept
        survivors.append(kept)
    return torch.stack([last[position] for position in range(total)]), survivors


@torch.no_grad()
def outputs(model, inputs, lengths, keep_first):
    """What the model returns when its encoder is replaced by [`encode`], sample by sample without padding."""
    view = describe(model)
    stack = next(stack for stack in view.stacks.values() if not stack.is_causal)
    path, _, _ = stack.table.layers.rpartition(".")
    module = view.base.get_submodule(path)
    seen = {}
    handle = stack.layers[0].module.register_forward_pre_hook(lambda _, args: seen.__setitem__("embedded", args[0]))
    model(**inputs)
    handle.remove()
    embedded = seen["embedded"]
    mask = inputs.get("attention_mask", torch.ones(embedded.shape[:2]))
    result = torch.zeros_like(embedded)
    survivors = []
    with eager_attention(model):
        for sample, valid in enumerate(mask.bool()):
            encoded, kept = encode(view, stack, embedded[sample, valid], lengths, keep_first)
            result[sample, valid] = encoded
            survivors.append(kept)
    if view.family == "t5":
        result = module.final_layer_norm(result)
    module.forward = lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=result)
    with contextlib.ExitStack() as stack_:
        stack_.callback(lambda: delattr(module, "forward"))
        values = model(**inputs)
    found = {name: value for name, value in values.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    found.pop("encoder_last_hidden_state", None)
    return found, survivors
