"""FlexCompressConfig and the method configs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from optimum_flexcompress.configuration import (
    METHOD_CONFIGS,
    DistillationConfig,
    FlexCompressConfig,
    MethodConfig,
    MiniLMConfig,
)
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.methods import CompressionMethod, create_method, register_method


def test_round_trip_through_a_folder(tmp_path):
    config = FlexCompressConfig(
        methods=[
            DistillationConfig(temperature=4.0, layer_map={"encoder": [[0, 0], [1, 2]]}, hidden_states_weight=0.5),
            MiniLMConfig(relation_heads=8, teacher_layer=3, relation_weights={"value": 2.0}, task_loss_weight=0.0),
        ]
    )
    config.save_pretrained(tmp_path)
    assert FlexCompressConfig.from_pretrained(tmp_path) == config
    data = json.loads((tmp_path / "flexcompress_config.json").read_text())
    assert sorted(data) == [
        "flexcompress_version",
        "format_version",
        "methods",
        "optimum_version",
        "transformers_version",
    ]
    assert data["methods"][1]["relation_weights"] == {"query": 1.0, "key": 1.0, "value": 2.0}
    assert FlexCompressConfig.from_dict(data) == config


def test_defaults_are_written_out(tmp_path):
    FlexCompressConfig(methods=[DistillationConfig()]).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "flexcompress_config.json").read_text())
    assert data["methods"][0]["temperature"] == 2.0


def test_configs_differ_by_methods():
    assert FlexCompressConfig() == FlexCompressConfig(methods=[])
    assert FlexCompressConfig(methods=[DistillationConfig()]) != FlexCompressConfig(methods=[MiniLMConfig()])
    assert "temperature" in repr(FlexCompressConfig(methods=[DistillationConfig()]))


def test_methods_may_be_dicts():
    config = FlexCompressConfig(methods=[{"method_type": "distillation", "temperature": 3}])
    assert config.methods == [DistillationConfig(temperature=3)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FlexCompressConfig(method=[]), 'Did you mean "methods"'),
        (lambda: FlexCompressConfig(format_version=99), "upgrade"),
        (lambda: FlexCompressConfig(methods=DistillationConfig()), "give a list"),
        (lambda: FlexCompressConfig(methods=[3]), "give method configs"),
        (lambda: FlexCompressConfig(methods=[{"temperature": 1}]), 'needs a "method_type"'),
        (lambda: FlexCompressConfig(methods=[{"method_type": "destillation"}]), 'Did you mean "distillation"'),
        (
            lambda: FlexCompressConfig(methods=[{"method_type": "distillation", "temprature": 1}]),
            'Did you mean "temperature"',
        ),
        (lambda: FlexCompressConfig(methods=[MiniLMConfig(), MiniLMConfig()]), "twice"),
        (lambda: DistillationConfig(temperature=0), "above 0"),
        (lambda: DistillationConfig(logits_weight=-1), "at least 0"),
        (lambda: DistillationConfig(logits_weight=float("nan")), "at least 0"),
        (lambda: DistillationConfig(logits_weight="1"), "a number"),
        (lambda: DistillationConfig(logits_weight=0), "no term"),
        (lambda: DistillationConfig(projection_learning_rate=0), "above 0"),
        (lambda: DistillationConfig(layer_map="unifrom"), '"uniform"'),
        (lambda: DistillationConfig(layer_map=[1, 2]), "give pairs"),
        (lambda: DistillationConfig(layer_map=[[1, -2]]), "layers are 0"),
        (lambda: DistillationConfig(layer_map={"enc": [[1, 1]]}), 'Did you mean "encoder"'),
        (lambda: MiniLMConfig(version=3), "give 1 or 2"),
        (lambda: MiniLMConfig(version=1, relation_heads=4), "belongs to version 2"),
        (lambda: MiniLMConfig(relation_heads=0), "at least 1"),
        (lambda: MiniLMConfig(relation_heads=2.0), "an integer"),
        (lambda: MiniLMConfig(teacher_layer=0), "count from 1"),
        (lambda: MiniLMConfig(relation_weights={"queri": 1}), 'Did you mean "query"'),
        (lambda: MiniLMConfig(version=1, relation_weights={"query": 1}), "not a relation of version 1"),
        (lambda: MiniLMConfig(relation_weights={"query": 0, "key": 0, "value": 0}), "all 0"),
    ],
)
def test_bad_values_get_one_clear_sentence(build, message):
    with pytest.raises(FlexCompressError, match=message):
        build()


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FlexCompressError, match=r"flexcompress_config\.json"):
        FlexCompressConfig.from_pretrained(tmp_path)
    (tmp_path / "flexcompress_config.json").write_text("{")
    with pytest.raises(FlexCompressError, match=r"flexcompress_config\.json"):
        FlexCompressConfig.from_pretrained(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FlexCompressError, match="is a file"):
        FlexCompressConfig().save_pretrained(file)


def test_a_new_method_registers_its_config_and_its_class(tmp_path):
    @dataclass(kw_only=True)
    class ToyConfig(MethodConfig):
        method_type: ClassVar[str] = "toy"
        strength: float = 1.0

    class ToyMethod(CompressionMethod):
        pass

    try:
        with pytest.raises(FlexCompressError, match="register_method"):
            create_method(ToyConfig())
        register_method(ToyConfig, ToyMethod)
        assert isinstance(create_method(ToyConfig()), ToyMethod)
        FlexCompressConfig(methods=[ToyConfig(strength=3.0)]).save_pretrained(tmp_path)
        assert FlexCompressConfig.from_pretrained(tmp_path).methods == [ToyConfig(strength=3.0)]
    finally:
        del METHOD_CONFIGS["toy"]


def test_a_method_config_needs_a_name():
    with pytest.raises(TypeError, match="method_type"):

        class Nameless(MethodConfig):
            pass
