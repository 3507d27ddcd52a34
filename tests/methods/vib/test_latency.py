"""Pruning to a latency: the table, its cost, and runs that meet it."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from optimum_flexcompress import ModelStructure
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.methods.vib import latency, timing
from optimum_flexcompress.methods.vib.latency import LatencyTable, fingerprint, load_or_measure
from optimum_flexcompress.methods.vib.latency_cost import PER_MILLISECOND, LatencyCost
from optimum_flexcompress.methods.vib.masks import as_masks
from optimum_flexcompress.methods.vib.timing import Workload, plan_copies, time_forward
from optimum_flexcompress.surgery import select
from tests.methods.toys import FAMILIES, assert_same, model_of, twin, weights
from tests.methods.vib.helpers import config_of, layout_of, random_masks, trainer_of


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch):
    for name, value in (("FEWEST_RUNS", 1), ("MOST_RUNS", 2), ("WARMUP_RUNS", 0)):
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(latency, "busy_cores", lambda: 0.0)


def _workload(model, batch_size=2, length=9):
    return Workload.of(describe(model), batch_size, length, torch.device("cpu"))


def _table_of(model, workload=None, slowdown=1.0) -> LatencyTable:
    """Times that bend: a fixed amount for every sub-layer, and then more than in proportion."""
    view, layout = describe(model), layout_of(model)
    width = view.hidden_size
    widths = [width // 4, width // 2, width]
    sizes, times = {}, {}
    for part in layout.sublayers:
        name = f"{part.stack}.{part.kind}"
        sizes[name] = sorted({1, max(part.units // 2, 1), part.units})
        times[name] = [
            [slowdown * (0.05 + 0.4 * (size / part.units) ** 1.5 * d / width) for size in sizes[name]] for d in widths
        ]
    rest = [slowdown * (0.1 + 0.2 * d / width) for d in widths]
    return LatencyTable(
        workload or _workload(model), {"processor": "a toy"}, fingerprint(model), widths, rest, sizes, times
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_covers_the_sizes(family):
    model = model_of(family, layers=2, hidden=32, heads=4)
    before = weights(model)
    table = LatencyTable.measure(model, _workload(model))
    assert_same(weights(model), before)
    assert table.widths == [8, 16, 24, 32] and len(table.rest) == 4
    kinds = {f"{part.stack}.{part.kind}" for part in layout_of(model).sublayers}
    assert set(table.sizes) == kinds == set(table.times)
    for name, sizes in table.sizes.items():
        times = np.array(table.times[name])
        most = max(part.units for part in layout_of(model).sublayers if name == f"{part.stack}.{part.kind}")
        assert (sizes[0], sizes[-1]) == (8 if name.endswith("ffn") else 1, most) and sizes == sorted(set(sizes))
        assert times.shape == (4, len(sizes)) and (times > 0).all()
        assert (np.diff(times, axis=0) >= 0).all() and (np.diff(times, axis=1) >= 0).all()
    assert np.diff(table.rest).min() >= 0
    # One width only, where the residual stream stays.
    assert LatencyTable.measure(model, _workload(model), vary_width=False).widths == [32]
    assert LatencyTable.from_dict(json.loads(table.to_json())) == table


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_time_adds_up_to_that_of_the_model(family, monkeypatch):
    """By a clock that goes on by a millisecond whenever somebody looks at it."""
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count(0.0, 1e-3).__next__)
    model = model_of(family, layers=3, hidden=32, heads=4)
    workload = _workload(model)
    cost = LatencyCost(layout_of(model), LatencyTable.measure(model, workload))
    assert cost.dense / PER_MILLISECOND == pytest.approx(time_forward(model, workload))
    inside = cost.sublayers(np.arange(len(cost.layout.sublayers)), 4, 32) / PER_MILLISECOND
    assert inside.tolist() == pytest.approx([1.0] * len(inside))


def test_a_copy_of_every_size_is_planned():
    model = model_of("t5", layers=2, hidden=32, heads=4)
    plans = plan_copies(describe(model))
    seen = {(name, kind): set() for plan in plans for name, _, kind in plan}
    for plan in plans:
        for (name, _, kind), size in plan.items():
            seen[name, kind].add(size)
    assert seen["decoder", "cross_attention"] == {1, 2, 3, 4}
    # The first self-attention computes the position bias too, so only the second tells about heads.
    assert seen["encoder", "attention"] == {1, 2, 3, 4}
    assert all(("encoder", 0, "attention") not in plan for plan in plans)
    assert 64 in seen["encoder", "ffn"]


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_read_off_the_table(family):
    model = model_of(family, layers=2, hidden=32, heads=4)
    table = _table_of(model)
    for seed in range(3):
        masks = random_masks(model, seed)
        layout = masks.layout
        cost = LatencyCost(layout, table)
        small = select(copy.deepcopy(model), as_masks(layout, masks.evaluation_values()).kept())
        structure = ModelStructure.of(small)
        expected = np.interp(structure.hidden_size, table.widths, table.rest)
        for name, stack in structure.stacks.items():
            for layer in stack.layers:
                for kind in ("attention", "cross_attention", "ffn"):
                    part = getattr(layer, kind)
                    if part is None:
                        continue
                    units = part if kind == "ffn" else part.kv_heads
                    key = f"{name}.{kind}"
                    row = [np.interp(structure.hidden_size, table.widths, column) for column in zip(*table.times[key])]
                    expected += np.interp(units, table.sizes[key], row)
        values = masks.evaluation_values()
        units = [
            torch.nonzero(values[part.start : part.stop] * values[part.gate]).flatten() for part in layout.sublayers
        ]
        exact = cost.exact(int((values[: layout.hidden] != 0).sum()), units)
        assert exact / PER_MILLISECOND == pytest.approx(expected, rel=1e-6)
        counted = cost.differentiable()(masks.counts(masks.keep(0.4)))
        assert counted.item() == pytest.approx(exact, rel=1e-6)
        assert exact < cost.dense


def test_gradients_are_slopes_of_the_table():
    model = model_of("bert", layers=2, hidden=32, heads=4)
    table = _table_of(model)
    layout = layout_of(model)
    keep = torch.ones(layout.size)
    part = next(part for part in layout.sublayers if part.kind == "ffn")
    keep[part.start : part.start + 44] = 0  # 20 of 64 are left, between the sizes 1 and 32
    keep.requires_grad_()
    cost = LatencyCost(layout, table).differentiable()
    cost(random_masks(model).counts(keep)).backward()
    low, high = (table.times["encoder.ffn"][-1][i] for i in (0, 1))
    slope = PER_MILLISECOND * (high - low) / 31
    assert keep.grad[part.start].item() == pytest.approx(slope, rel=1e-5)
    assert keep.grad[0].item() > 0 and keep.grad[part.gate].item() > 20 * slope


def _settings(path, **others):
    return {
        "target_sparsity": None,
        "latency_table": str(path),
        "latency_batch_size": 2,
        "sequence_length": 9,
        **others,
    }


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_run_meets_the_table(family, uniform, tmp_path):
    model = model_of(family, layers=2, hidden=32, heads=4)
    table = _table_of(model)
    table.save(tmp_path / "table.json")
    cost = LatencyCost(layout_of(model), table)
    target = 0.6 * cost.dense / PER_MILLISECOND
    settings = _settings(tmp_path / "table.json", target_latency=target, uniform=uniform)
    trainer = trainer_of(tmp_path, model=twin(model), family=family, settings=settings)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "vib_latency_table_ms" in entry)
    assert logs["vib_latency_table_ms"] == pytest.approx(target, rel=0.01)
    assert logs["vib_latency_dense_ms"] == pytest.approx(cost.dense / PER_MILLISECOND)
    assert logs["vib_latency_measured_ms"] > 0
    structure = ModelStructure.of(trainer.model)
    assert structure.is_uniform or not uniform
    if not uniform:
        counted = _exact(structure, cost)
        assert counted / PER_MILLISECOND == pytest.approx(logs["vib_latency_table_ms"])


def _exact(structure, cost) -> int:
    units = []
    for part in cost.layout.sublayers:
        size = getattr(structure.stacks[part.stack].layers[part.layer], part.kind)
        units.append(range(0 if size is None else size if part.kind == "ffn" else size.kv_heads))
    return cost.exact(structure.hidden_size, units)


def test_a_resumed_run_keeps_its_table(tmp_path):
    model = model_of("bert", layers=2, hidden=32, heads=4)
    fast, slow = _table_of(model), _table_of(model, slowdown=1.2)
    target = 0.5 * LatencyCost(layout_of(model), fast).dense / PER_MILLISECOND

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    settings = _settings(tmp_path / "table.json", target_latency=target)
    common = {"settings": settings, "save_strategy": "steps", "save_steps": 30, "lr_scheduler_type": "constant"}
    fast.save(tmp_path / "table.json")
    whole = trainer_of(tmp_path / "whole", model=twin(model), **common)
    whole.train()
    killed = trainer_of(tmp_path / "killed", model=twin(model), callbacks=[Kill()], **common)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    slow.save(tmp_path / "table.json")
    resumed = trainer_of(tmp_path / "killed", model=twin(model), **common)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(whole.model))


def test_a_busy_machine_is_noticed(monkeypatch, caplog):
    model = model_of("bert", layers=1, hidden=16, heads=2)
    LatencyTable.measure(model, _workload(model))
    assert not caplog.records
    monkeypatch.setattr(latency, "busy_cores", lambda: 1.6)
    LatencyTable.measure(model, _workload(model))
    assert "1.6 cores busy" in caplog.text and "anew" in caplog.text


def test_the_cache_is_filled_once(tmp_path, monkeypatch):
    model = model_of("bert", layers=2, hidden=32, heads=4)
    monkeypatch.setattr(latency, "HF_HOME", str(tmp_path))
    measured = []

    def measure(*args):
        measured.append(args)
        return _table_of(model, args[1])

    monkeypatch.setattr(LatencyTable, "measure", measure)
    first = load_or_measure(model, _workload(model), None, True)
    assert load_or_measure(model, _workload(model), None, True) == first and len(measured) == 1
    load_or_measure(model, _workload(model, batch_size=4), None, True)
    load_or_measure(model_of("bert", layers=3, hidden=32, heads=4), _workload(model), None, True)
    assert len(measured) == 3
    assert len(list((tmp_path / "flexcompress" / "latency").iterdir())) == 3


def test_what_cannot_be_asked_for(tmp_path):
    model = model_of("bert", layers=2, hidden=32, heads=4)
    table = _table_of(model)
    path = tmp_path / "table.json"
    table.save(path)

    def build(model=model, **settings):
        return trainer_of(tmp_path, model=twin(model), settings=_settings(path, **settings))

    dense = LatencyCost(layout_of(model), table).dense / PER_MILLISECOND
    with pytest.raises(
        FlexCompressError, match=rf"the whole model takes {dense:.4g} ms .*2 x 9 tokens on \d+ threads"
    ):
        build(target_latency=dense)
    # Nothing but the least width and one head is left.
    with pytest.raises(
        FlexCompressError, match=r"0.01 ms cannot be reached .*: the nearest is 0.2125 ms by the table"
    ):
        build(target_latency=0.01)
    with pytest.raises(FlexCompressError, match="measured for 2 x 9 tokens .*, not 2 x 8 tokens"):
        build(target_latency=0.5, sequence_length=8)
    with pytest.raises(FlexCompressError, match="those of another model"):
        build(model_of("bert", layers=3, hidden=32, heads=4), target_latency=0.5)
    with pytest.raises(FlexCompressError, match=r"cannot be written to .* set latency_table"):
        table.save(path / "below-a-file.json")
    with pytest.raises(FlexCompressError, match="latency_device is 'gpu'.*give cpu"):
        build(target_latency=0.5, latency_device="gpu")
    with pytest.raises(FlexCompressError, match="latency_table is the folder"):
        trainer_of(tmp_path, model=twin(model), settings=_settings(tmp_path, target_latency=0.5))
    path.write_text("{}")
    with pytest.raises(FlexCompressError, match="no table of latencies.*remove it"):
        build(target_latency=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_latency": 5.0}, "target_sparsity and target_latency"),
        ({"target_latency": 0.0, "target_sparsity": None}, "above 0"),
        ({"target_latency": 5.0, "target_sparsity": None, "include_embeddings": True}, "leave it out"),
        ({"latency_table": "table.json"}, "goes with target_latency"),
        ({"latency_batch_size": 0}, "at least 1"),
        ({"latency_table": 5, "target_latency": 5.0, "target_sparsity": None}, "path of a file"),
        ({"latency_device": 0, "target_latency": 5.0, "target_sparsity": None}, "name of a device"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(FlexCompressError, match=message):
        config_of(**settings)
