"""Int8 through torchao: saved without pickle, loaded by plain `from_pretrained`, near what it was made of."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_flexcompress import FlexCompressError, Kept, KeptLayer, int8_weights, select, set_lengths
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.errors import MissingExtraError, UnsupportedArchitectureError
from optimum_flexcompress.evaluation import open_artifact
from optimum_flexcompress.evaluation.dropping import lengths_in
from optimum_flexcompress.int8_weights import round_weight
from optimum_flexcompress.quantization.backends import find_backend
from optimum_flexcompress.quantization.torchao_int8 import quantize_torchao
from tests.export.exported import make, relative_error
from tests.quantization.real_model import check_embeddings, demo_model, encoded_questions
from tests.tiny import build, inputs_for, outputs_of


HEADS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForQuestionAnswering",
    "vit": "ViTForImageClassification",
}
# As in test_families: random weights.
BOUND = 0.12


def aligned(model):
    """Fewer dims, heads and FFN dims, different in every layer, and a removed sub-layer; all multiples of eight."""
    view = describe(model)
    layers = []
    for index, layer in enumerate(view.stacks["encoder"].layers):
        heads = range(layer.attention.num_kv_heads)
        layers.append(KeptLayer(index, [heads, heads[:2], []][index], ffn=[range(8), range(16), range(24)][index]))
    return select(model, Kept(range(24), {"encoder": layers}))


def logits(model, inputs):
    outputs = outputs_of(model, inputs)
    return outputs["start_logits" if "start_logits" in outputs else "logits"]


@pytest.mark.parametrize("family", HEADS)
def test_saved_and_loaded(family, tmp_path):
    model = build(family, HEADS[family])
    inputs = inputs_for(model)
    before = logits(model, inputs)
    result = quantize_torchao(model, tmp_path / "int8")
    assert result.products == 18 and result.left == 0 and "18 int8 products" in result.summary()
    after = logits(model, inputs)
    assert 0 < relative_error(after.numpy(), before.numpy()) < BOUND
    loaded = type(model).from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded, inputs), after)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again"), inputs), after)
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in stored.items()}
    assert kinds["weight_int8"] == torch.int8 and kinds["weight_scale"] == torch.float32
    with pytest.raises(ValueError, match="half|quantized"):
        loaded.half()


def test_half_precision_costs_the_scales_nothing(tmp_path):
    model = build("bert", HEADS["bert"])
    quantize_torchao(model, tmp_path / "int8")
    single = describe(model).stacks["encoder"].layers[0].attention.o.weight
    for dtype in (torch.bfloat16, torch.float16):
        loaded = type(model).from_pretrained(tmp_path / "int8", dtype=dtype)
        weight = describe(loaded).stacks["encoder"].layers[0].attention.o.weight
        assert torch.equal(weight.scale, single.scale) and torch.equal(weight.qdata, single.qdata)
        assert weight.dtype == loaded.dtype == dtype
        inputs = inputs_for(model)
        assert relative_error(logits(loaded, inputs).float().numpy(), logits(model, inputs).numpy()) < 0.05


def test_rounding():
    weight = torch.randn(16, 24) * torch.logspace(-2, 1, 16)[:, None]
    weight[3] = 0
    values, scale = round_weight(weight)
    assert values.dtype == torch.int8 and scale.shape == (16, 1) and values.abs().max() <= 127
    assert torch.equal(scale.bfloat16().float(), scale) and torch.equal(scale.half().float(), scale)
    assert ((values * scale - weight).abs() <= scale / 2 + 1e-12).all() and not values[3].any()
    # Rounded up, by less than the last of eight bits: every row but that of zeros reaches 126.
    assert (values.abs().amax(1)[[0, 1, 2, *range(4, 16)]] >= 126).all()


def test_a_compressed_model_that_drops_tokens(tmp_path):
    model = set_lengths(aligned(build("bert", HEADS["bert"])), [8, 6, 4])
    inputs = inputs_for(model, length=10)
    before = logits(model, inputs)
    result = quantize_torchao(model, tmp_path / "int8")
    assert result.products == 14 and result.left == 0
    artifact = open_artifact(tmp_path / "int8")
    assert (artifact.backend, artifact.precision) == ("torchao", "int8")
    assert lengths_in(artifact).values == lengths_in(artifact).in_counts().values
    found = torch.from_numpy(artifact.predict(inputs))
    assert torch.equal(found, logits(model, inputs))
    assert relative_error(found.numpy(), before.numpy()) < 2 * BOUND
    # The digest is looked at before the weights.
    weights = tmp_path / "int8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FlexCompressError, match="incomplete or was changed"):
        open_artifact(tmp_path / "int8")


@pytest.mark.parametrize("change", ["flipped", "cut"])
def test_damage_is_found_without_being_asked_for(tmp_path, change):
    model = build("bert", HEADS["bert"])
    quantize_torchao(model, tmp_path / "int8")
    weights = tmp_path / "int8" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content if change == "flipped" else content[:-10])
    with pytest.raises(FlexCompressError, match="is damaged or was changed|is incomplete or was changed"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    if change == "flipped":
        with pytest.raises(FlexCompressError, match="SHA-256 differs"):
            type(model).from_pretrained(tmp_path / "int8")


def test_agreement_on_a_real_model(tmp_path):
    encoded, labels = encoded_questions()

    @torch.inference_mode()
    def embed(folder):
        model = transformers.AutoModel.from_pretrained(folder)
        batches = [{name: torch.tensor([value]) for name, value in row.items()} for row in encoded]
        return torch.stack([model(**batch).last_hidden_state[0].mean(0) for batch in batches]).numpy()

    quantize_torchao(demo_model(), tmp_path / "int8")
    assert (tmp_path / "int8" / "tokenizer.json").is_file()
    check_embeddings(embed(demo_model()), embed(tmp_path / "int8"), labels)


def test_sizes_that_int8_products_cannot_have(tmp_path):
    with pytest.raises(FlexCompressError, match="multiples of 8.*align=8"):
        quantize_torchao(make("bert", HEADS["bert"], "compressed"), tmp_path / "int8")
    assert list(tmp_path.iterdir()) == []


def test_it_compiles(tmp_path):
    model = build("bert", HEADS["bert"])
    quantize_torchao(model, tmp_path / "int8")
    inputs = inputs_for(model)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        assert relative_error(compiled(**inputs).logits.numpy(), logits(model, inputs).numpy()) < 1e-4


def test_without_the_plugin_it_fails_loudly(tmp_path):
    quantize_torchao(build("bert", HEADS["bert"]), tmp_path / "int8")
    script = "from transformers import BertForSequenceClassification as M; import sys; M.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", script, tmp_path / "int8"], capture_output=True, text=True)
    assert result.returncode != 0 and "size" in result.stderr


def test_a_model_is_not_replaced_by_its_int8(tmp_path):
    build("bert", HEADS["bert"]).save_pretrained(tmp_path / "model")
    with pytest.raises(FlexCompressError, match="holds what the output is made of, which would be lost"):
        quantize_torchao(tmp_path / "model", tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_refusals(tmp_path, monkeypatch):
    model = build("bert", HEADS["bert"])
    with pytest.raises(FlexCompressError, match="choose --mode dynamic, or --backend ort --target tensorrt"):
        find_backend("torchao").find_target("auto", "static")
    with pytest.raises(FlexCompressError, match="no target of the backend torchao.*Known: auto, cuda"):
        find_backend("torchao").find_target("avx2", "dynamic")
    with pytest.raises(FlexCompressError, match="leave --per-tensor out"):
        quantize_torchao(model, tmp_path / "int8", per_channel=False)
    with pytest.raises(FlexCompressError, match="no setting 'calibration_method'"):
        quantize_torchao(model, tmp_path / "int8", calibration_method="mse")
    with pytest.raises(UnsupportedArchitectureError, match=r"encoders int8 \(bert.*and a gpt2 model generates"):
        quantize_torchao(build("gpt2", "GPT2LMHeadModel"), tmp_path / "int8")
    quantize_torchao(model, tmp_path / "int8")
    with pytest.raises(FlexCompressError, match="int8 already"):
        quantize_torchao(tmp_path / "int8", tmp_path / "twice")
    monkeypatch.setattr(int8_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"optimum-flexcompress\[torchao\]"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]
