"""The search of assemblies: its space, and whole searches."""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np
import pytest
import torch
from optimum.commands.flexcompress.search import SearchCommand
from transformers import T5ForConditionalGeneration

from optimum_flexcompress import Assembly, FlexCompressError
from optimum_flexcompress.evaluation.artifact import model_artifact
from optimum_flexcompress.evaluation.cost import count_macs
from optimum_flexcompress.evaluation.inputs import example_batch
from optimum_flexcompress.evaluation.workloads import forward_inputs
from optimum_flexcompress.search import Front, search_assemblies
from optimum_flexcompress.search.assembly_space import AssemblySpace
from optimum_flexcompress.tasks import get_task
from tests.methods.modular.helpers import deep, with_modules
from tests.tasks.toys import splits, word_tokenizer


NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
FEW = {"population": 4, "trials": 6, "max_length": 16, "picture": False, "progress": False}
REVIEWS = splits(train={"text": ["the film was good", "bad plot", "very bad"] * 4, "label": ["a", "b", "c"] * 4})


@pytest.fixture(scope="module")
def bert():
    model = deep("bert", "BertForSequenceClassification")
    model.config.update(NAMES)
    return with_modules(model)


@pytest.fixture(scope="module")
def t5():
    return with_modules(deep("t5", "T5ForConditionalGeneration", layers=4), granularities=[2])


def valid(space, candidate):
    assembly = space.assembly(candidate)
    space._modular.checked(assembly)
    assert space.decode(space.genes(candidate)) == candidate
    return True


def test_the_space_of_one_stack(bert):
    space = AssemblySpace(bert)
    everything = list(space.all())
    # By hand: six layers in pairs, in threes, and mixed.
    assert len(everything) == len(set(everything)) == space.size
    assert (1,) * 6 in everything and (3,) * 6 in everything and (1, 1, 2, 2, 1, 1) in everything
    assert (1, 2, 2, 1, 1, 1) not in everything
    assert all(valid(space, candidate) for candidate in everything)
    brute = set()
    for sizes in itertools.product((1, 2, 3), repeat=6):
        brute.add(space.decode({f"encoder_{i}": size for i, size in enumerate(sizes)}))
    assert brute == set(everything)


def test_a_t5_decoder_is_never_the_deeper_one(t5):
    space = AssemblySpace(t5)
    everything = list(space.all())
    # Five tilings of four layers, of 4, 3, 3 and 2 layers: of their pairs those whose decoder is no deeper.
    assert len(everything) == space.size == 4 + 2 * 3 + 1
    assert all(valid(space, candidate) for candidate in everything)
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, second = space.random(rng), space.random(rng)
        assert {first, second, space.mutate(first, rng), space.cross(first, second)} <= set(everything)


def test_searches_start_from_the_full_model_and_from_both_strategies(t5):
    space = AssemblySpace(t5)
    start = space.start(8)
    assert start[0] == (1,) * 8 and (2,) * 8 in start
    assert (1, 1, 1, 1, 2, 2, 2, 2) in start and len(set(start)) == len(start)
    assert space.start(2)[0] == start[0]


def test_a_search_of_an_encoder(bert, tmp_path):
    options = {**FEW, "processor": word_tokenizer(), "metric": "loss"}
    front = search_assemblies(bert, REVIEWS, "text-classification", tmp_path / "front", **options)
    assert front.kind == "assembly" and len(front.scored) == 6
    task = get_task("text-classification")
    for point in front.scored:
        assembly = Assembly.from_dict(point.candidate)
        small = bert.assemble(assembly).eval()
        batch = forward_inputs(model_artifact(small, task), example_batch(small.config, task, 1, 16), 32)
        assert point.cost == count_macs(small, batch)
        assert point.details["layers"] == assembly.layers
    costs = [point.cost for point in front.points]
    metrics = [point.metric for point in front.points]
    assert costs == sorted(costs) and metrics == sorted(metrics, reverse=True)
    # Going on from there scores nothing twice; weights that differ are another search.
    again = search_assemblies(bert, REVIEWS, "text-classification", tmp_path / "front", **options)
    assert again.scored == front.scored
    loaded = Front.load(tmp_path / "front")
    assert loaded.points == front.points and "encoder: " in str(loaded)


def test_the_metric_is_that_of_the_assembled_model(bert):
    front = search_assemblies(
        bert, REVIEWS, "text-classification", processor=word_tokenizer(), samples=12, **{**FEW, "metric": "loss"}
    )
    prepared = get_task("text-classification").prepare(
        splits(validation=REVIEWS["train"][:]), word_tokenizer(), max_length=16, model=bert.model.config
    )
    batch = prepared.collator(list(prepared.dataset["validation"]))
    for point in (front.points[0], front.scored[-1]):
        with torch.no_grad():
            loss = bert.assemble(Assembly.from_dict(point.candidate)).eval()(**batch).loss
        assert point.metric == pytest.approx(loss.item(), rel=1e-4)


def test_a_search_of_an_encoder_decoder_that_saves_its_pick(t5, tmp_path):
    t5.save_pretrained(tmp_path / "modular")
    word_tokenizer().save_pretrained(tmp_path / "modular")
    data = splits(train={"source": ["the film was good"] * 6, "target": ["bad plot"] * 6})
    front = search_assemblies(
        tmp_path / "modular",
        data,
        output=tmp_path / "front",
        objective="latency",
        max_cost=1.0,
        save_pick=tmp_path / "pick",
        latency_batch_size=1,
        new_tokens=4,
        **{**FEW, "picture": True, "metric": "loss"},
    )
    assert (tmp_path / "front" / "front.png").is_file()
    assembly = Assembly.from_dict(front.picked.candidate)
    small = T5ForConditionalGeneration.from_pretrained(tmp_path / "pick")
    assert small.config.num_decoder_layers == len(assembly.stacks["decoder"])
    assert json.loads((tmp_path / "pick" / "assembly.json").read_text()) == assembly.to_dict()
    assert all(point.details["milliseconds"] > 0 for point in front.scored)


def test_what_it_refuses(bert, tmp_path):
    with pytest.raises(FlexCompressError, match="needs task=... and processor="):
        search_assemblies(bert, REVIEWS)
    with pytest.raises(FlexCompressError, match="There is no folder"):
        search_assemblies(tmp_path / "nowhere", REVIEWS)
    with pytest.raises(FlexCompressError, match='Did you mean "latency"'):
        search_assemblies(bert, REVIEWS, objective="latencies")
    for name in ("batch_size", "latency_batch_size", "new_tokens"):
        with pytest.raises(FlexCompressError, match=f"{name} .* is 0: give a whole number of at least 1"):
            search_assemblies(bert, REVIEWS, output=tmp_path / "front", **{name: 0})
    assert not (tmp_path / "front").exists()
    with pytest.raises(FlexCompressError, match="save_pick needs something to pick by"):
        search_assemblies(bert, REVIEWS, save_pick=tmp_path / "pick")


def test_the_command_searches_assemblies_of_a_modular_checkpoint(bert, tmp_path, capsys):
    bert.save_pretrained(tmp_path / "modular")
    word_tokenizer().save_pretrained(tmp_path / "modular")
    (tmp_path / "reviews.csv").write_text("text,label\nthe film was good,a\nbad plot,b\nvery bad,c\n")
    parser = argparse.ArgumentParser("optimum-cli")
    SearchCommand(parser.add_subparsers())

    def run(*more):
        arguments = [
            "search",
            "-m",
            tmp_path / "modular",
            "--dataset",
            tmp_path / "reviews.csv",
            "--no-picture",
            *more,
        ]
        args = parser.parse_args([*map(str, arguments), "-o", str(tmp_path / "front")])
        try:
            args.func(args).run()
        except SystemExit as end:
            return end.code
        return 0

    for option in (["--unit", "counts"], ["--runtime", "ort"], ["--bf16"]):
        assert run(*option) == 1
        said = capsys.readouterr().err
        assert "is a modular checkpoint" in said and f"leave {option[0]} out" in said
    assert run("--trials", "4", "--population", "2", "--metric", "loss", "--max-cost", "100%") == 0
    assert "picked: encoder: " in capsys.readouterr().out
