"""The report of a pruning as files, as pictures, and on a benchmark's page."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from matplotlib import image

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.evaluation import file_size, run_benchmark
from optimum_flexcompress.evaluation.pruning import JSON_NAME, LayerPruning, PruningReport
from optimum_flexcompress.evaluation.pruning_plots import figures, of_folder
from tests.tiny import build


def report_of(stacks=("encoder",), attention=True, curves=True) -> PruningReport:
    """Two layers of four heads in each stack, of which the second has lost its attention."""
    kinds = ["special", "current", "previous", "next", "content", "other"]
    layers = [LayerPruning(4, [0, 2], 16, 8), LayerPruning(4, [], 16, 0)]
    share = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    shares = {
        "kinds": kinds,
        "tokens": 40,
        "before": {name: [[share] * 4] * 2 for name in stacks},
        "after": {name: [[share, None, share, None], [None] * 4] for name in stacks},
    }
    logs = [
        {"step": step, "learning_rate": 0.1, "loss": 2 / step, "loss_task": 1 / step, "loss_vib_kl": 1e5}
        | {"vib_sparsity": step / 10, "vib_target": step / 10}
        for step in range(1, 6)
    ]
    counts = {"total": 100, "prunable": 80, "embeddings": 15, "other": 5}
    return PruningReport(
        hidden={"kept": 12, "of": 16},
        parameters={"before": counts, "after": {**counts, "total": 40, "prunable": 20}},
        stacks=dict.fromkeys(stacks, layers),
        attention=shares if attention else None,
        curves=logs if curves else [],
    )


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("options", "pictures"),
    [
        ({}, ["attention", "curves", "heads", "sizes"]),
        ({"stacks": ("encoder", "decoder")}, ["attention", "curves", "heads_decoder", "heads_encoder", "sizes"]),
        ({"attention": False}, ["curves", "sizes"]),
        ({"attention": False, "curves": False}, ["sizes"]),
    ],
)
def test_pictures_are_written(tmp_path, options, pictures):
    report = report_of(**options)
    report.save(tmp_path)
    assert names_of(tmp_path) == ["pruning.json", *(f"pruning_{name}.png" for name in pictures)]
    for name in pictures:
        pixels = image.imread(tmp_path / f"pruning_{name}.png")
        assert min(pixels.shape[:2]) > 150 and pixels[..., :3].std() > 0.03
    assert PruningReport.load(tmp_path) == report
    assert report.sparsity == 0.75


def test_without_pictures(tmp_path):
    report_of().save(tmp_path, pictures=False)
    assert names_of(tmp_path) == [JSON_NAME]


def test_what_the_maps_of_heads_show():
    drawn = dict(figures(report_of()))
    meshes = [
        axes.collections[0].get_array().filled(math.nan) for axes in drawn["heads"].axes[:12] if axes.collections
    ]
    kept, special, *_ = meshes
    assert kept.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert special.tolist() == [[0.5] * 4] * 2
    after = meshes[6]
    assert [[math.isnan(value) for value in row] for row in after] == [[False, True, False, True], [True] * 4]
    assert after[0, 0] == 0.5
    texts = [text.get_text() for axes in drawn["heads"].axes for text in axes.texts]
    assert "2 of 8\nheads left" in texts
    lines = {line.get_label(): line.get_ydata() for axes in drawn["curves"].axes for line in axes.lines}
    assert list(lines["reached"]) == [0.1, 0.2, 0.3, 0.4, 0.5] and list(lines["task"]) == [1, 0.5, 1 / 3, 0.25, 0.2]
    assert not any("kl" in name for name in lines)
    assert drawn["sizes"].get_suptitle() == "75.0% of the parameters of the layers are gone"


def test_on_the_page_of_a_benchmark(tmp_path, classifiers, rows):
    shutil.copytree(classifiers / "teacher", tmp_path / "pruned")
    size = file_size(tmp_path / "pruned")
    report_of().save(tmp_path / "pruned", pictures=False)
    # A model of its own below it, as a pruning run leaves on its way.
    shutil.copytree(classifiers / "student", tmp_path / "pruned" / "sparsity-0.5")
    assert file_size(tmp_path / "pruned") == size
    assert of_folder(classifiers / "teacher") == []
    report = run_benchmark(
        {"dense": classifiers / "teacher", "pruned": tmp_path / "pruned"},
        task="text-classification",
        data=rows,
        output=tmp_path / "report",
        batch_sizes=[1],
        lengths=[8],
        stream_rows=0,
        rounds=3,
        max_seconds=0.05,
        memory=False,
        progress=False,
    )
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "What was pruned: pruned" in page and "What was pruned: dense" not in page
    assert "heads that are left" in page and "sparsity of the masks" in page
    assert page.count("<svg") == page.count("</svg>") and "<script" not in page
    assert report["pruned"].size == size


def test_overflows_in_the_log_are_left_out(tmp_path):
    model = build("bert", "BertModel")
    entry = {"step": 1, "learning_rate": 1e-3, "loss": 1.0, "grad_norm": float("inf")}
    report = PruningReport.of(model, model, None, [entry])
    report.save(tmp_path, pictures=False)
    assert PruningReport.load(tmp_path).curves == [{"step": 1.0, "learning_rate": 1e-3, "loss": 1.0}]


def test_models_of_two_families_are_no_pair():
    with pytest.raises(FlexCompressError, match="not known which heads"):
        PruningReport.of(build("roberta", "RobertaModel"), build("bert", "BertModel"), None, [])


def test_damaged_and_missing_reports(tmp_path):
    with pytest.raises(FlexCompressError, match="holds no pruning.json: give the folder of a pruned model"):
        PruningReport.load(tmp_path)
    report_of().save(tmp_path, pictures=False)
    content = json.loads((tmp_path / JSON_NAME).read_text())
    for text, message in (
        ("{", "is damaged: prune again"),
        (json.dumps({**content, "stacks": {"encoder": [{"heads": 4}]}}), "is damaged: prune again"),
        (json.dumps({**content, "version": 99}), "written by a newer version: upgrade"),
    ):
        (tmp_path / JSON_NAME).write_text(text)
        with pytest.raises(FlexCompressError, match=message):
            PruningReport.load(tmp_path)
