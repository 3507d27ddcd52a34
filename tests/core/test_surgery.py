"""The family matrix: what is masked equals what is removed, and what is saved is what is loaded."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import pytest
import torch
import transformers

from optimum_flexcompress import FlexCompressError, Kept, KeptLayer, ModelStructure, keep_layers, resize, select
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.masking import Masks, fold, masked
from optimum_flexcompress.structure import count_parameters
from tests.tiny import ALL, GENERATIVE, build, inputs_for, outputs_of


def ragged(model, seed: int = 0, hidden: bool = True) -> Kept:
    """Different sizes in every layer; the attention of layer 1 and an FFN of layer 2 gone, cross-attention of 0 too."""
    random_ = random.Random(seed)
    view = describe(model)

    def some(size: int) -> list[int]:
        return sorted(random_.sample(range(size), random_.randint(1, size - 1)))

    stacks = {}
    for name, stack in view.stacks.items():
        layers = []
        for layer in stack.layers:
            kept = KeptLayer(
                layer.index, some(layer.attention.num_kv_heads), ffn=some(layer.ffn.size) if layer.index < 2 else []
            )
            if layer.index == 1:
                kept.attention = []
            if layer.cross_attention is not None:
                kept.cross_attention = [] if layer.index == 0 else some(layer.cross_attention.num_heads)
            layers.append(kept)
        stacks[name] = layers
    return Kept(some(view.hidden_size) if hidden else None, stacks)


def same(actual: dict, expected: dict, kept=None, atol: float = 1e-4) -> None:
    """Compares outputs; those over the residual stream only in its kept dims."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.shape[-1] == 32 and kept is not None:
            value = value[..., kept]
        torch.testing.assert_close(actual[name], value, atol=atol, rtol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_masked_equals_removed(family, name):
    model = build(family, name)
    inputs = inputs_for(model)
    kept = ragged(model)
    before = outputs_of(model, inputs)
    with masked(model, kept):
        expected = outputs_of(model, inputs)
    same(outputs_of(model, inputs), before, atol=0)  # the masks are gone again
    assert any(not torch.allclose(expected[key], before[key], atol=1e-2) for key in before)

    select(model, kept)
    same(outputs_of(model, inputs), expected, kept.hidden)
    structure = ModelStructure.of(model)
    assert structure.hidden_size == len(kept.hidden)
    for stack_name, layers in kept.stacks.items():
        for layer, wanted in zip(structure.stacks[stack_name].layers, layers):
            assert (layer.attention.kv_heads if layer.attention else 0) == len(wanted.attention)
            assert (layer.ffn or 0) == len(wanted.ffn)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_saved_is_loaded(family, name, tmp_path):
    model = build(family, name)
    select(model, ragged(model, seed=1))
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    same(outputs_of(loaded, inputs), expected, atol=0)
    assert ModelStructure.of(loaded) == ModelStructure.of(model)
    assert [layer.source for layer in ModelStructure.of(loaded).stacks.popitem()[1].layers] == [0, 1, 2]
    assert count_parameters(loaded) == count_parameters(model)
    loaded.save_pretrained(tmp_path / "again")
    same(outputs_of(type(model).from_pretrained(tmp_path / "again"), inputs), expected, atol=0)
    assert loaded.config.to_dict() == model.config.to_dict() | {
        key: loaded.config.to_dict()[key] for key in ("_name_or_path", "dtype") if key in loaded.config.to_dict()
    }


def test_loaded_model_is_an_ordinary_one(tmp_path):
    model = build("bert", "BertForSequenceClassification")
    select(model, ragged(model))
    model.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        assert not hasattr(loaded, mark)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "zeros", state_dict=zeros)
    reloaded = type(model).from_pretrained(tmp_path / "zeros")
    assert not any(parameter.any() for parameter in reloaded.parameters())
    assert loaded.half().dtype == torch.float16
    half = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    base = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert ModelStructure.of(base) == ModelStructure.of(model)
    other_head = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert other_head(**inputs_for(other_head)).logits.isfinite().all()


def test_without_the_plugin_compressed_folders_fail_and_stock_ones_load(tmp_path):
    """One process that never imports the plugin tries a folder of every family and kind of removal."""
    expected = {}
    for family, name in [
        *GENERATIVE,
        ("bert", "BertModel"),
        ("roberta", "RobertaModel"),
        ("distilbert", "DistilBertModel"),
        ("vit", "ViTModel"),
    ]:
        view = describe(build(family, name))
        first = next(iter(view.stacks))
        count = len(view.stacks[first].layers)

        def layers(first_layer: KeptLayer, count=count) -> list[KeptLayer]:
            return [first_layer, *(KeptLayer(i) for i in range(1, count))]

        removals = {
            "heads": Kept(stacks={first: layers(KeptLayer(0, [0]))}),
            "ffn": Kept(stacks={first: layers(KeptLayer(0, ffn=range(8)))}),
            "attention": Kept(stacks={first: layers(KeptLayer(0, []))}),
            "network": Kept(stacks={first: layers(KeptLayer(0, ffn=[]))}),
            "hidden": Kept(hidden=range(9)),
        }
        for removal, kept in removals.items():
            model = select(build(family, name), kept)
            folder = tmp_path / f"{family}-{removal}"
            model.save_pretrained(folder)
            expected[str(folder)] = (name, "needs" if hasattr(model.config, "quantization_config") else "stock")
        model = keep_layers(build(family, name), {key: [0, 2] for key in view.stacks})
        model.save_pretrained(tmp_path / f"{family}-layers")
        expected[str(tmp_path / f"{family}-layers")] = (name, "stock")
    script = (
        "import sys, warnings, transformers\n"
        "transformers.logging.set_verbosity_error()\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    folder, name = line.split('|')\n"
        "    try:\n"
        "        model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)\n"
        "        print(folder + '|' + ('stock' if not info['missing_keys'] else 'RANDOM WEIGHTS'))\n"
        "    except RuntimeError:\n"
        "        print(folder + '|needs')\n"
        "assert 'optimum_flexcompress' not in sys.modules\n"
    )
    lines = "\n".join(f"{folder}|{name}" for folder, (name, _) in expected.items())
    done = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    seen = dict(line.split("|") for line in done.stdout.splitlines())
    assert seen == {folder: kind for folder, (_, kind) in expected.items()}
    # LLaMA's configuration can express any uniform width.
    assert seen[str(tmp_path / "llama-hidden")] == "stock"
    assert list(seen.values()).count("needs") >= 4 * 11


@pytest.mark.parametrize(("family", "name"), GENERATIVE)
def test_generation_after_removal(family, name):
    model = build(family, name)
    select(model, ragged(model, seed=2))
    inputs = inputs_for(model, batch=2)
    inputs.pop("decoder_input_ids", None)
    if not model.config.is_encoder_decoder:  # decoder-only models are padded on the left
        inputs = {key: value.flip(1) for key, value in inputs.items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

    def generate(**more) -> list:
        return model.generate(**inputs, **options, **more).tolist()

    expected = generate(use_cache=False)
    assert generate() == expected
    assert generate(cache_implementation="static") == expected
    assert generate(num_beams=3) == generate(num_beams=3, use_cache=False)
    # Padding a batch does not change a sample's result.
    alone = {key: value[:1] for key, value in inputs.items()}
    assert model.generate(**alone, **options).tolist() == expected[:1]


@pytest.mark.parametrize(("family", "name"), [entry for entry in GENERATIVE if entry[0] in ("gpt2", "llama")])
def test_manual_decoding_loop(family, name):
    model = build(family, name)
    select(model, ragged(model, seed=3))
    ids = inputs_for(model)["input_ids"][:1]
    whole = model(ids).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_kept_layers_are_those_layers(family, name):
    model = build(family, name)
    reference = copy.deepcopy(model)
    view = describe(reference)
    for stack in view.stacks.values():
        first = stack.layers[0].module
        last = stack.layers[2].module
        if family.startswith("t5"):
            bias = first.layer[0].SelfAttention
            last.layer[0].SelfAttention.relative_attention_bias = bias.relative_attention_bias
            last.layer[0].SelfAttention.has_relative_attention_bias = True
        last_attention = [module for module in last.modules() if hasattr(module, "layer_idx")]
        for module in last_attention:
            module.layer_idx = 0
        middle = stack.layers[1].module
        for module in [module for module in middle.modules() if hasattr(module, "layer_idx")]:
            module.layer_idx = 1
        if family.startswith("t5"):
            first.layer[0].SelfAttention.has_relative_attention_bias = False
        del stack.module_list[:]
        stack.module_list.extend([last, middle])
    if hasattr(reference.config, "num_hidden_layers") and family in ("llama", "mistral", "qwen2"):
        reference.config.num_hidden_layers = 2
    keep_layers(model, {stack: [2, 1] for stack in view.stacks})
    inputs = inputs_for(model)
    same(outputs_of(model, inputs), outputs_of(reference, inputs), atol=0)
    assert not hasattr(model.config, "quantization_config")
    rebuilt = type(model)(model.config)
    rebuilt.load_state_dict(model.state_dict())
    same(outputs_of(rebuilt.eval(), inputs), outputs_of(reference, inputs), atol=0)


@pytest.mark.parametrize(
    ("family", "name", "kept", "sizes"),
    [
        (
            "llama",
            "LlamaForCausalLM",
            Kept(range(20), {"decoder": [KeptLayer(i, [1], ffn=range(3, 9)) for i in range(3)]}),
            {
                "hidden_size": 20,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "intermediate_size": 6,
            },
        ),
        (
            "t5",
            "T5ForConditionalGeneration",
            Kept(
                None,
                {
                    "encoder": [KeptLayer(i, [1, 3], ffn=range(6)) for i in range(3)],
                    "decoder": [KeptLayer(i, [0, 2], [1, 2], range(6)) for i in range(3)],
                },
            ),
            {"num_heads": 2, "d_ff": 6, "d_model": 32},
        ),
        (
            "bert",
            "BertForMaskedLM",
            Kept(range(16), {"encoder": [KeptLayer(0, [0, 1]), KeptLayer(2, [1, 3])]}),
            {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
        ),
        (
            "vit",
            "ViTForImageClassification",
            Kept(range(8, 32), {"encoder": [KeptLayer(i, [0, 1, 3]) for i in range(3)]}),
            {"hidden_size": 24, "num_attention_heads": 3},
        ),
    ],
)
def test_uniform_sizes_become_a_stock_configuration(family, name, kept, sizes, tmp_path):
    model = select(build(family, name), kept)
    assert not hasattr(model.config, "quantization_config")
    assert {key: getattr(model.config, key) for key in sizes} == sizes
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    inputs = inputs_for(model)
    same(outputs_of(rebuilt, inputs), outputs_of(model, inputs), atol=0)


def test_width_that_a_constant_depends_on_is_not_written_as_stock():
    # T5 scales its tied output by d_model ** -0.5, BART its embeddings by d_model ** 0.5: both keep the old constant.
    for family, name in (("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")):
        model = select(build(family, name), Kept(range(24)))
        assert model.config.d_model == 32
        assert model.config.quantization_config["structure"]["hidden_size"] == 24
    untied = select(build("t5-gated-untied", "T5ForConditionalGeneration"), Kept(range(24)))
    assert untied.config.d_model == 24


@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")],
)
def test_removal_twice_and_ties(family, name):
    model = build(family, name)
    inputs = inputs_for(model)
    select(model, ragged(model, seed=4))
    layers = {stack.name: [KeptLayer(0), KeptLayer(2)] for stack in describe(model).stacks.values()}
    kept = Kept(range(0, ModelStructure.of(model).hidden_size, 2), layers)
    for stack in kept.stacks.values():
        stack[0].ffn = range(1)
    whole = copy.deepcopy(model)
    keep_layers(whole, {stack: [0, 2] for stack in layers})
    with masked(whole, Kept(kept.hidden, {s: [KeptLayer(0, ffn=range(1)), KeptLayer(1)] for s in layers})):
        expected = outputs_of(whole, inputs)
    select(model, kept)
    same(outputs_of(model, inputs), expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert [layer.source for layer in next(iter(ModelStructure.of(model).stacks.values())).layers] == [0, 2]


def test_removed_parts_are_no_parameters():
    model = build("bert", "BertModel")
    kept = Kept(stacks={"encoder": [KeptLayer(0, [], ffn=[]), KeptLayer(1), KeptLayer(2)]})
    before = count_parameters(model)["prunable"]
    select(model, kept)
    layer = describe(model).stacks["encoder"].layers[0].module
    # Two layer norms of 32 scales and 32 biases stay: BERT normalises after the residual sum.
    assert sum(p.numel() for p in layer.parameters()) == 4 * 32
    attention, ffn = 4 * (32 * 32 + 32), 32 * 40 + 40 + 40 * 32 + 32
    assert before - count_parameters(model)["prunable"] == attention + ffn
    llama = build("llama", "LlamaModel")
    select(llama, Kept(stacks={"decoder": [KeptLayer(0, [], ffn=[]), KeptLayer(1), KeptLayer(2)]}))
    assert not list(describe(llama).stacks["decoder"].layers[0].module.parameters())


def test_structure_round_trip_and_resize(tmp_path):
    for family, name in ALL:
        model = build(family, name)
        whole = ModelStructure.of(model)
        assert ModelStructure.from_dict(whole.to_dict()) == whole
        small = select(model, ragged(model, seed=5))
        structure = ModelStructure.from_dict(ModelStructure.of(small).to_dict())
        assert structure == ModelStructure.of(small)
        with torch.device("meta"):
            empty = type(model)(build(family, name).config)
        assert ModelStructure.of(resize(empty, structure)) == structure


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (Kept(hidden=[]), "keep at least one"),
        (Kept(hidden=[40]), "numbered 0 to 31"),
        (Kept(hidden=[1, 1]), "twice"),
        (Kept(stacks={"decoder": []}), "no layer left"),
        (Kept(stacks={"decoder": [KeptLayer(0), KeptLayer(0)]}), "name each layer once"),
        (Kept(stacks={"decoder": [KeptLayer(5)]}), "from 0 to 2"),
        (Kept(stacks={"encoder": [KeptLayer(0)]}), 'no stack "encoder"'),
        (Kept(stacks={"decoder": [KeptLayer(0, [])]}), "no self-attention"),
        (Kept(stacks={"decoder": [KeptLayer(0, torch.ones(7, dtype=torch.bool))]}), "7 entries"),
    ],
)
def test_bad_selections_change_nothing(kept, message):
    model = build("gpt2", "GPT2LMHeadModel")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FlexCompressError, match=message):
        select(model, kept)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_family_and_unknown_head_are_named():
    tiny = transformers.ElectraModel(
        transformers.ElectraConfig(
            hidden_size=16,
            embedding_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=20,
        )
    )
    with pytest.raises(FlexCompressError, match=r"electra.*bert.*architectures/"):
        describe(tiny)
    double = build("gpt2", "GPT2DoubleHeadsModel")
    with pytest.raises(FlexCompressError, match=r"multiple_choice_head.*architectures/gpt2.py"):
        select(double, Kept(hidden=range(8)))
    layer_scaled = build("gpt2", "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(FlexCompressError, match="scale_attn_by_inverse_layer_idx"):
        keep_layers(layer_scaled, [0, 2])


def _damaged(change) -> dict:
    data = ModelStructure.of(build("bert", "BertModel")).to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(hidden_size=10**9), "can only shrink"),
        (lambda d: d.update(hidden_size=0), "from 1 up"),
        (lambda d: d.update(hidden_size=True), "from 1 up"),
        (lambda d: d.update(hidden_size="32"), "from 1 up"),
        (lambda d: d.pop("hidden_size"), "no 'hidden_size'"),
        (lambda d: d.update(family="gpt2"), "no stack"),
        (lambda d: d.update(format_version=99), "upgrade"),
        (lambda d: d["stacks"]["encoder"].update(layers=[]), "no layer left"),
        (lambda d: d["stacks"]["encoder"]["layers"][0].update(ffn=10**12), "can only shrink"),
        (lambda d: d["stacks"]["encoder"]["layers"][0]["attention"].update(heads=3, kv_heads=2), "multiple"),
        (lambda d: d["stacks"]["encoder"]["layers"][0]["attention"].update(head_size=4), "whole heads"),
        (lambda d: d["stacks"]["encoder"]["layers"].append(d["stacks"]["encoder"]["layers"][0]), "can only shrink"),
        (lambda d: d["stacks"]["encoder"]["layers"].insert(0, None), "malformed"),
    ],
)
def test_bad_structures_are_refused_before_anything_is_allocated(change, message, tmp_path):
    model = build("bert", "BertModel")
    select(model, ragged(model))
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["structure"] = _damaged(change)
    config.save_pretrained(tmp_path)
    with pytest.raises(FlexCompressError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_structure_files(tmp_path):
    with pytest.raises(FlexCompressError, match="Cannot read"):
        ModelStructure.from_json_file(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(FlexCompressError, match="not JSON"):
        ModelStructure.from_json_file(tmp_path / "text.json")


def test_compressed_models_train_in_the_stock_trainer(tmp_path):
    model = build("bert", "BertForSequenceClassification")
    select(model, ragged(model))
    model.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    rows = [{"input_ids": [5, 6, 7, i + 8], "attention_mask": [1] * 4, "labels": i % 3} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    trainer = transformers.Trainer(loaded, arguments, train_dataset=rows)
    before = loaded.classifier.weight.clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert not torch.equal(before, again.classifier.weight)
    same(outputs_of(again, inputs_for(again)), outputs_of(loaded.eval(), inputs_for(again)), atol=0)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_scales_fold_into_the_weights(family, name):
    """Masks that are neither 0 nor 1, on every head, FFN dim and dim of the residual stream; tied and untied."""
    model = build(family, name)
    inputs = inputs_for(model)
    masks = Masks.of(describe(model), ragged(model, seed=6))
    generator = torch.Generator().manual_seed(0)
    flat = [masks.hidden]
    for layers in masks.stacks.values():
        flat += [mask for layer in layers for mask in (layer.attention, layer.cross_attention, layer.ffn)]
    for mask in flat:
        if mask is not None:
            mask.mul_(0.5 + torch.rand(mask.shape, generator=generator))
    with masked(model, masks):
        expected = outputs_of(model, inputs)
    select(fold(model, masks), masks.kept())
    same(outputs_of(model, inputs), expected, masks.kept().hidden)
