"""Settings, targets, backends, and what is refused."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from optimum.onnxruntime import AutoQuantizationConfig
from optimum.onnxruntime.configuration import ORTConfig

from optimum_flexcompress import FlexCompressError, FlexORTQuantizer
from optimum_flexcompress.quantization import (
    FlexORTQuantizationConfig,
    QuantizedFolder,
    quantize_folder,
    targets,
)
from optimum_flexcompress.quantization.backends import find_backend
from optimum_flexcompress.quantization.ort import FileReport
from tests.quantization.test_families import examples


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, "avx2"),
        ("x86_64", {"avx2", "avx512f"}, "avx512"),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, "avx512_vnni"),
        ("AMD64", {"avx2", "avx_vnni"}, "avx512_vnni"),
        ("aarch64", {"asimd"}, "arm64"),
        ("x86_64", set(), "avx2"),
    ],
)
def test_auto_takes_the_target_of_the_processor(monkeypatch, machine, flags, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "cpu_flags", lambda: flags)
    config = FlexORTQuantizationConfig()
    assert config.target == expected and config.reduce_range is (expected in ("avx2", "avx512"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "dynamical"}, 'is no quantization mode. Did you mean "dynamic"?'),
        ({"target": "avx512vnni"}, 'is no quantization target. Did you mean "avx512_vnni"?'),
        ({"target": "tensorrt"}, "runs static int8 only"),
        ({"calibration_method": "entropy"}, "is no calibration method. Known: minmax, mse, percentile."),
        ({"percentile": 30}, "percentile is 30"),
        ({"per_chanel": True}, "no quantization setting 'per_chanel'. Did you mean \"per_channel\"?"),
    ],
)
def test_settings_that_cannot_be(exported, tmp_path, settings, message):
    _, folder = exported("bert", "BertForSequenceClassification", "stock")
    with pytest.raises(FlexCompressError) as caught:
        quantize_folder(folder, tmp_path / "int8", **settings)
    assert message in str(caught.value) and list(tmp_path.iterdir()) == []


def test_static_needs_examples_that_fit(exported, tmp_path):
    model, folder = exported("bert", "BertForSequenceClassification", "stock")
    for rows, message in (
        (None, "needs calibration examples"),
        ([], "no calibration examples"),
        ([{"text": "words"}], "no column input_ids"),
        ([{"pixel_values": examples(model)[0]["input_ids"]}], "no column input_ids"),
    ):
        with pytest.raises(FlexCompressError, match=message):
            quantize_folder(folder, tmp_path / "int8", "static", calibration_dataset=rows)
    assert list(tmp_path.iterdir()) == []


def test_a_merged_decoder_alone_cannot_be_static(exported, tmp_path):
    model, folder = exported("t5", "T5ForConditionalGeneration", "stock")
    quantizer = FlexORTQuantizer.from_pretrained(folder)
    quantizer.files = [file for file in quantizer.files if "merged" in file.name or "encoder" in file.name]
    with pytest.raises(FlexCompressError, match="decoder_model_merged.onnx cannot be quantized statically"):
        quantizer.quantize(save_dir=tmp_path / "int8", mode="static", calibration_dataset=examples(model, 2))


def test_int8_twice_is_refused(exported, tmp_path):
    _, folder = exported("bert", "BertForSequenceClassification", "stock")
    quantize_folder(folder, tmp_path / "int8")
    with pytest.raises(FlexCompressError, match="may be int8 already"):
        quantize_folder(tmp_path / "int8", tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlexCompressError, match="no config.json"):
        quantize_folder(tmp_path / "empty", tmp_path / "int8")
    with pytest.raises(FlexCompressError, match="save_dir"):
        FlexORTQuantizer(tmp_path / "model.onnx").quantize()


def test_optimum_configurations_go_in_and_out(exported, tmp_path):
    model, folder = exported("bert", "BertForSequenceClassification", "stock")
    given = AutoQuantizationConfig.avx2(is_static=False, per_channel=True, reduce_range=True)
    FlexORTQuantizer.from_pretrained(folder).quantize(given, tmp_path / "int8")
    saved = ORTConfig.from_pretrained(tmp_path / "int8").quantization
    assert saved.per_channel and saved.reduce_range and not saved.is_static
    pairs = FlexORTQuantizationConfig.from_optimum(AutoQuantizationConfig.tensorrt())
    assert pairs.target == "tensorrt" and pairs.is_static


def test_ranges_that_were_measured_before(exported, tmp_path):
    model, folder = exported("bert", "BertForSequenceClassification", "stock")
    quantizer = FlexORTQuantizer.from_pretrained(folder)
    quantizer.quantize(save_dir=tmp_path / "a", mode="static", calibration_tensors_range={"nothing": (-1.0, 1.0)})
    report = quantizer.reports["model.onnx"]
    assert report.static == 0 and report.dynamic == 20


def test_backends():
    assert find_backend("ort").quantize is quantize_folder
    with pytest.raises(
        FlexCompressError, match="\"onnx\" is no quantization backend|'onnx' is no quantization backend"
    ):
        find_backend("onnx")


def test_the_summary_says_what_to_expect():
    files = {"model.onnx": FileReport(dynamic=3, left=2)}
    without, with_vnni = (
        QuantizedFolder(Path("int8"), FlexORTQuantizationConfig(target=target), files).summary()
        for target in ("avx2", "avx512_vnni")
    )
    assert "3 int8 products (dynamic), 2 products of weights left in single precision" in with_vnni
    assert "neither VNNI nor AMX: weights are 7-bit" in without and "VNNI" not in with_vnni
