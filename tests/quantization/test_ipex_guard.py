"""Without IPEX and its torch: imports work, use is refused in one sentence, and the settings can be read and written."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from optimum_flexcompress import FlexCompressError, IPEXQuantizationConfig, IPEXQuantizer
from optimum_flexcompress import IPEXQuantizedModelForSequenceClassification as IPEXModel
from optimum_flexcompress.quantization.backends import find_backend
from optimum_flexcompress.quantization.ipex_lane import check_ipex
from tests.tiny import build


PAIR = "`pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0 optimum-flexcompress`"


def pretend(monkeypatch, **versions: str | None) -> None:
    """Makes the environment look as if these versions were installed; None for a package that is not."""
    true = metadata.version

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            return true(name)
        if versions[key] is None:
            raise metadata.PackageNotFoundError(name)
        return versions[key]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.13.0+cpu", "intel_extension_for_pytorch": None}, "is not installed beside torch 2.13.0+cpu"),
        ({"torch": "2.13.0", "intel_extension_for_pytorch": "2.8.0+cpu"}, "2.8.0+cpu does not run with torch 2.13.0"),
        ({"torch": "2.8.0", "intel_extension_for_pytorch": "2.7.1"}, "2.7.1 does not run with torch 2.8.0"),
    ],
)
def test_one_sentence_names_the_pair(monkeypatch, versions, message):
    pretend(monkeypatch, **versions)
    uses = [
        check_ipex,
        lambda: IPEXQuantizer.from_pretrained(build("bert", "BertModel")),
        lambda: IPEXModel.from_pretrained("anything"),
        lambda: find_backend("ipex").find_target("auto", "static"),
        lambda: find_backend("ipex").quantize("anything", "out"),
    ]
    for use in uses:
        with pytest.raises(FlexCompressError) as error:
            use()
        assert message in str(error.value) and PAIR in str(error.value) and "\n" not in str(error.value)


def test_the_fitting_pair_is_accepted(monkeypatch):
    pretend(monkeypatch, torch="2.8.0+cpu", intel_extension_for_pytorch="2.8.0+gitabc")
    check_ipex()


def test_importing_does_not_import_ipex():
    program = (
        "import sys; from optimum_flexcompress import IPEXQuantizer, IPEXQuantizedModelForMaskedLM; "
        "assert 'intel_extension_for_pytorch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_settings_keep(tmp_path):
    config = IPEXQuantizationConfig(mode="static", target="avx2", calibration_method="minmax", exclude=["*.output.*"])
    config.save_pretrained(tmp_path)
    again = IPEXQuantizationConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.is_static and again.exclude == ["*.output.*"]


def test_processors_without_vnni(monkeypatch):
    monkeypatch.setattr("optimum_flexcompress.quantization.targets.cpu_flags", lambda: {"avx2", "avx512f"})
    config = IPEXQuantizationConfig()
    assert config.target == "avx512" and config.reduce_range
    assert "no VNNI and no AMX" in config.expectation()
    vnni = IPEXQuantizationConfig(target="avx512_vnni")
    assert not vnni.reduce_range and vnni.expectation() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "tensorrt"}, "IPEX runs on x86 processors only, not on tensorrt"),
        ({"target": "avx"}, "'avx' is no quantization target"),
        ({"mode": "statik"}, 'Did you mean "static"?'),
        ({"calibration_method": "entropy"}, "'entropy' is no calibration method"),
        ({"percentile": 20}, "percentile is 20"),
        ({"per_chanel": True}, "no IPEX quantization setting 'per_chanel'. Did you mean \"per_channel\"?"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(FlexCompressError, match=message.replace("?", r"\?")):
        IPEXQuantizationConfig(**settings)


def test_arm_is_refused(monkeypatch):
    monkeypatch.setattr("optimum_flexcompress.quantization.targets.detect_target", lambda: "arm64")
    with pytest.raises(FlexCompressError, match="this one is arm64"):
        IPEXQuantizationConfig()
