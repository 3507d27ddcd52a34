"""Plans and strategies: what tiles a stack, and which tiling a ratio gets."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from optimum_flexcompress import Assembly, FlexCompressConfig, FlexCompressError, ModularConfig
from optimum_flexcompress.methods.modular import Piece, tilings
from optimum_flexcompress.methods.modular.curriculum import draw_route, open_granularities, replacing_rate
from optimum_flexcompress.methods.modular.strategies import choose, smallest


DEPTHS = {"encoder": 12, "decoder": 12}
ALL = {"encoder": [2, 3, 4, 6], "decoder": [2, 3, 4, 6]}


def sizes(pieces):
    return [piece.granularity for piece in pieces]


def every_tiling(depth, granularities, start=0):
    """By brute force."""
    if start == depth:
        yield ()
        return
    for size in (1, *granularities):
        if start % size == 0 and start + size <= depth:
            for rest in every_tiling(depth, granularities, start + size):
                yield (Piece(size, start // size), *rest)


@pytest.mark.parametrize(("depth", "granularities"), [(12, [2, 3, 4, 6]), (8, [2, 4]), (9, [3]), (6, [2, 3, 6])])
def test_tilings_change_least(depth, granularities):
    everything = list(every_tiling(depth, granularities))
    found = tilings(depth, granularities)
    assert set(found) == {len(pieces) for pieces in everything}
    for count, pieces in found.items():
        Assembly({"encoder": pieces}).checked({"encoder": depth}, {"encoder": granularities})
        costs = {p: sum((size - 1) ** 2 for size in sizes(p)) for p in everything if len(p) == count}
        least = min(costs.values())
        # Among equals the modules stand at the bottom.
        assert list(pieces) == max((list(p) for p, cost in costs.items() if cost == least), key=sizes)


@pytest.mark.parametrize(
    ("strategy", "ratio", "counts"),
    [
        ("size-first", 1.0, (12, 12)),
        ("size-first", 1.1, (11, 11)),
        ("size-first", 1.5, (8, 8)),
        ("size-first", 2, (6, 6)),
        ("size-first", 3, (4, 4)),
        ("size-first", 4, (3, 3)),
        ("size-first", 6, (2, 2)),
        ("size-first", 24 / 7, (4, 3)),
        ("speed-first", 1.1, (12, 10)),
        ("speed-first", 1.5, (12, 4)),
        ("speed-first", 2, (10, 2)),
        ("speed-first", 3, (6, 2)),
        ("speed-first", 6, (2, 2)),
    ],
)
def test_strategies(strategy, ratio, counts):
    assembly = choose(strategy, ratio, DEPTHS, ALL)
    assert tuple(len(pieces) for pieces in assembly.stacks.values()) == counts
    assert assembly.ratio == pytest.approx(24 / sum(counts))
    assembly.checked(DEPTHS, ALL)


def test_which_pieces():
    assembly = choose("size-first", 12 / 7, {"encoder": 12}, {"encoder": [2, 3, 4, 6]})
    assert assembly.summary() == "encoder: [0-1] [2-3] [4-5] [6-7] [8-9] 10 11"
    assembly = choose("size-first", 12 / 5, {"encoder": 12}, {"encoder": [2, 3, 4, 6]})
    assert assembly.summary() == "encoder: [0-2] [3-5] [6-7] [8-9] [10-11]"
    assert smallest(DEPTHS, {"decoder": [4]}).summary() == (
        "encoder: 0 1 2 3 4 5 6 7 8 9 10 11\ndecoder: [0-3] [4-7] [8-11]"
    )


@pytest.mark.parametrize(
    ("strategy", "ratio", "depths", "message"),
    [
        (
            "size-first",
            7,
            DEPTHS,
            r"ratio of 7 is out of reach: these 24 layers can become 4 at least.* nearest is 6\.",
        ),
        ("size-first", 0.5, DEPTHS, r"out of reach.* nearest is 1\."),
        ("speed-first", 2, {"decoder": 12}, "this model has the decoder alone: use size-first"),
        ("speed-frist", 2, DEPTHS, 'Did you mean "speed-first"?'),
    ],
)
def test_what_strategies_refuse(strategy, ratio, depths, message):
    with pytest.raises(FlexCompressError, match=message):
        choose(strategy, ratio, depths, ALL)


def test_of_two_equally_near_the_nearer_ratio():
    # Four and a half layers would be right: five are 1.2 times fewer, and four 1.5 times.
    assert choose("size-first", 4 / 3, {"encoder": 6}, {"encoder": [2]}).layers == 5


def test_strategies_keep_the_decoder_from_being_the_deeper_one():
    depths, granularities = {"encoder": 6, "decoder": 4}, {"encoder": [2, 3, 6], "decoder": [2]}
    for strategy, ratio in itertools.product(("size-first", "speed-first"), (1.0, 1.4, 2.0, 2.5)):
        stacks = choose(strategy, ratio, depths, granularities, deeper_decoder=False).stacks
        assert len(stacks["decoder"]) <= len(stacks["encoder"])
    assert smallest(depths, granularities).layers == 3
    assert smallest(depths, granularities, deeper_decoder=False).layers == 4
    with pytest.raises(FlexCompressError, match=r"can become 4 at least.* nearest is 2\.5\."):
        choose("size-first", 10 / 3, depths, granularities, deeper_decoder=False)


def test_plans_as_json(tmp_path):
    assembly = choose("speed-first", 1.5, DEPTHS, ALL)
    assembly.to_json_file(tmp_path / "plan.json")
    assert Assembly.from_json_file(tmp_path / "plan.json") == assembly
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["encoder"][3] == {"layer": 3} and data["decoder"][1] == {"granularity": 3, "block": 1}
    part = Assembly.from_dict({"decoder": data["decoder"]}).checked(DEPTHS, ALL)
    assert part == assembly


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            [(1, 0), (1, 1), (2, 2)],
            r"gap between layer 1 and module 2.2 \(layers 4 to 5\): nothing stands for layers 2 to 3",
        ),
        ([(2, 1), (2, 2)], r"gap before module 2.1 \(layers 2 to 3\): nothing stands for layers 0 to 1"),
        ([(3, 0), (1, 3), (1, 4)], "gap after layer 4: nothing stands for layer 5"),
        ([(3, 0), (2, 1), (1, 4)], r"overlap: both module 3.0 .* and module 2.1 .* stand for layer 2"),
        ([(3, 1), (3, 0)], r"gap before module 3.1 .* layers 0 to 2; list pieces bottom layer first\."),
        ([(1, 0), (1, 0)], "overlap: both layer 0 and layer 0 stand for layer 0"),
        ([(3, 0), (3, 2)], r"module 3.2 \(layers 6 to 8\) of the encoder, which has the layers 0 to 5"),
        ([(6, 0)], "module of granularity 6, and this checkpoint was trained for 2, 3 there"),
    ],
)
def test_plans_that_do_not_tile(plan, message):
    assembly = Assembly({"encoder": tuple(Piece(*piece) for piece in plan)})
    with pytest.raises(FlexCompressError, match=message):
        assembly.checked({"encoder": 6}, {"encoder": [2, 3]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "A plan maps stacks to lists.*; this is list"),
        ({}, "A plan maps stacks to lists.*; this one is empty"),
        ({"encoder": []}, "give a list with at least one piece"),
        ({"encoder": [{"layer": 0, "block": 1}]}, "a piece is"),
        ({"encoder": [3]}, "a piece is"),
        ({"encoder": [{"layer": -1}]}, "whole numbers"),
        ({"encoder": [{"granularity": 2.5, "block": 0}]}, "whole numbers"),
        ({"encoderr": [{"layer": 0}]}, 'Did you mean "encoder"?'),
    ],
)
def test_what_is_no_plan(data, message, tmp_path):
    with pytest.raises(FlexCompressError, match=message):
        Assembly.from_dict(data).checked(DEPTHS, ALL)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(FlexCompressError, match="is not JSON"):
        Assembly.from_json_file(tmp_path / "plan.json")
    with pytest.raises(FlexCompressError, match="Cannot read the plan"):
        Assembly.from_json_file(tmp_path / "nothing.json")


# The walk


def draws(config, steps=1000, depths=DEPTHS, granularities=ALL, progress=1.0):
    generator = torch.Generator().manual_seed(0)
    return [draw_route(config, depths, granularities, progress, generator) for _ in range(steps)]


def test_every_route_tiles_and_replaces_something():
    for progress in (0.0, 0.3, 0.7, 1.0):
        for route, _ in draws(ModularConfig(replacing_rate=0.0, uniform_fraction=0.5), 200, progress=progress):
            route.checked(DEPTHS, ALL)
            assert route.layers < 24


def test_the_walk_reaches_every_tiling():
    seen = {
        route.stacks["encoder"]
        for route, _ in draws(ModularConfig(), 3000, {"encoder": 6}, {"encoder": [2, 3, 6]}, progress=0.5)
    }
    whole = tuple(Piece(1, index) for index in range(6))
    assert seen == set(every_tiling(6, [2, 3, 6])) - {whole}


def test_rates_and_curriculum():
    config = ModularConfig(replacing_rate=0.2, replacing_fraction=0.5, curriculum_fraction=0.4)
    assert [replacing_rate(config, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    opened = [open_granularities(config, [6, 2, 4, 3], p) for p in (0.0, 0.11, 0.21, 0.31, 0.4, 1.0)]
    assert opened == [[2], [2, 3], [2, 3, 4], *[[2, 3, 4, 6]] * 3]
    # To the end three in ten steps draw the rates of their own.
    rates = [rates for _, rates in draws(config, 3000)]
    drawn = [r for r in rates if set(r.values()) != {1.0}]
    assert len(drawn) / len(rates) == pytest.approx(0.3, abs=0.03)
    encoder = torch.tensor([r["encoder"] for r in drawn])
    assert (encoder == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert encoder[encoder > 0].mean().item() == pytest.approx(0.5, abs=0.05)
    assert any(abs(r["encoder"] - r["decoder"]) > 0.3 for r in drawn)
    # A rate of 1 leaves originals only where no module starts.
    full = [route for route, r in draws(config, 500) if set(r.values()) == {1.0}]
    for route in full:
        assert all(piece.is_module or piece.start % 2 or piece.start % 3 for p in route.stacks.values() for piece in p)
    counts = {len(route.stacks["decoder"]) for route in full}
    assert {2, 3, 4, 6} <= counts


def test_the_last_steps_run_what_is_wanted():
    config = ModularConfig(ratios=[1.5, 3], ratios_fraction=0.6)
    wanted = [choose("size-first", ratio, DEPTHS, ALL) for ratio in config.ratios]
    generator = torch.Generator().manual_seed(0)
    routes = [draw_route(config, DEPTHS, ALL, 0.39, generator, wanted)[0] for _ in range(200)]
    assert len({str(route) for route in routes}) > 50
    last = [draw_route(config, DEPTHS, ALL, 0.4, generator, wanted) for _ in range(1000)]
    assert all(rates == {"encoder": 1.0, "decoder": 1.0} for _, rates in last)
    shares = [sum(route == assembly for route, _ in last) / 1000 for assembly in wanted]
    assert sum(shares) == 1 and shares[0] == pytest.approx(0.5, abs=0.05)


def test_config_round_trip(tmp_path):
    config = ModularConfig(granularities=[6, 2, 2], stacks=["decoder"], ratios=[3, 1.5, 3], evaluated_ratio=3.0)
    FlexCompressConfig(methods=[config]).save_pretrained(tmp_path)
    (loaded,) = FlexCompressConfig.from_pretrained(tmp_path).methods
    assert loaded == config and loaded.granularities == [2, 6] and loaded.ratios == [1.5, 3.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularities": []}, "give a list such as"),
        ({"granularities": [1]}, "an integer of at least 2"),
        ({"granularities": 2}, "give a list such as"),
        ({"stacks": ["encodr"]}, 'Did you mean "encoder"'),
        ({"stacks": "encoder"}, "give a list of encoder and decoder"),
        ({"initialization": "frist"}, 'Did you mean "first"'),
        ({"uniform_fraction": 1.5}, "a share between 0 and 1"),
        ({"temperature": 0}, "above 0"),
        ({"evaluated_ratio": 0.5}, "at least 1"),
        ({"ratios": []}, r"give a list such as \[1.5, 3, 6\]"),
        ({"ratios": 3}, "give a list such as"),
        ({"ratios": [2, 1]}, "above 1"),
        ({"ratios_strategy": "sped-first"}, 'Did you mean "speed-first"'),
        ({"ratios_fraction": 0}, "above 0"),
        ({"ratios_fraction": 1.5}, "a share of up to 1"),
        (
            dict.fromkeys(
                [f"{name}_weight" for name in ("logits", "hidden_states", "blocks", "attention", "task_loss")], 0.0
            ),
            "no loss",
        ),
    ],
)
def test_what_the_config_refuses(settings, message):
    with pytest.raises(FlexCompressError, match=message):
        ModularConfig(**settings)


def test_theseus_is_a_setting():
    config = ModularConfig.theseus(3, replacing_rate=0.5)
    assert config.granularities == [3] and not config.has_teacher and config.replacing_rate == 0.5
    routes = draws(config, 50, {"encoder": 6}, {"encoder": [3]})
    assert all(sizes(route.stacks["encoder"]) == [3, 3] for route, _ in routes)
    half = draws(config, 400, {"encoder": 6}, {"encoder": [3]}, progress=0.0)
    replaced = [piece.is_module for route, _ in half for piece in route.stacks["encoder"]]
    blocks = itertools.chain.from_iterable(sizes(r.stacks["encoder"]) for r, _ in half)
    assert sum(size == 3 for size in blocks) / (2 * len(half)) == pytest.approx(0.58, abs=0.08) and any(replaced)
