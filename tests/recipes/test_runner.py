"""What the runner promises: stages are skipped, run again, replaced and interrupted as its documentation says."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.recipes import load_recipe, run_recipe
from optimum_flexcompress.recipes.runner import clock
from optimum_flexcompress.recipes.stages import INPUT, Stage, register_stage, stage_class


RUNS: list[str] = []
"""Names of the stages that were run, in order."""


@dataclass
class WriteSettings:
    text: str = "a"
    model: str = INPUT
    fail: str = ""


@register_stage("test-write")
class Write(Stage):
    """Writes its text after that of the stage it reads."""

    Settings = WriteSettings

    def inputs(self):
        return [self.settings.model]

    def describe(self):
        return "writing"

    def check(self, models):
        return models[self.settings.model]

    def run(self, context):
        RUNS.append(context.name)
        before = ""
        if self.settings.model != INPUT:
            before = (context.artifact(self.settings.model) / "text").read_text()
        (context.output / "text").write_text(before + self.settings.text)
        if self.settings.fail == "error":
            raise FlexCompressError("it did not work.")
        if self.settings.fail == "interrupt":
            raise KeyboardInterrupt
        if self.settings.fail == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.settings.fail == "disk, says safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        if self.settings.fail == "a mistake":
            raise RuntimeError("inline_container.cc: something else")
        return {"score": 0.5}


RECIPE = """\
stages:
  one: {type: test-write, text: "1"}
  two: {type: test-write, text: "2", model: one}
  three: {type: test-write, text: "3", model: two}
  aside: {type: test-write, text: "x", model: one}
"""


@pytest.fixture
def run(tmp_path, model_folder, data_folder):
    """Runs `RECIPE` with overrides into `tmp_path/out`; returns the result, and what was run and said."""
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE)

    def run(*overrides, output=tmp_path / "out", recipe=str(file), model=model_folder, data=data_folder, **options):
        RUNS.clear()
        said = []
        result = run_recipe(
            load_recipe(recipe, overrides),
            str(model),
            str(data),
            "text-classification",
            output,
            say=said.append,
            **options,
        )
        return result, list(RUNS), "\n".join(said)

    return run


def text(result, name):
    return (result.folders[name] / "text").read_text()


def test_runs_every_stage_in_order(run, tmp_path):
    result, ran, said = run()
    assert ran == ["one", "two", "three", "aside"]
    assert (text(result, "three"), text(result, "aside")) == ("123", "1x")
    assert result.metrics["two"] == {"score": 0.5}
    assert "[2/4] two: done in 0:00: score 0.5" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["aside", "one", "run.json", "three", "two"]
    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert described["recipe"]["stages"]["two"]["text"] == "2"


def test_a_second_run_skips_everything_and_says_so(run):
    run()
    result, ran, said = run()
    assert ran == []
    assert result.skipped == ["one", "two", "three", "aside"]
    assert said.count("finished in an earlier run, skipped") == 4
    assert result.metrics["two"] == {"score": 0.5}


def test_a_changed_setting_runs_that_stage_and_those_that_read_it(run):
    run()
    result, ran, said = run("stages.two.text=II")
    assert ran == ["two", "three"]
    assert (text(result, "three"), text(result, "aside")) == ("1II3", "1x")
    assert "[2/4] two: writing (at 0:00; its settings or inputs have changed)" in said


def test_the_time_that_is_left(run):
    expected = {"one": 10.0, "two": 60.0, "three": None, "aside": 3600.0}
    _, _, said = run(expected=expected)
    assert "[1/4] one: writing (at 0:00, about 1:01:10 left)" in said
    assert "[4/4] aside: writing (at 0:00, about 1:00:00 left)" in said
    _, _, said = run("stages.three.text=III", expected=expected)
    assert "[3/4] three: writing (at 0:00, about 1:00:00 left; its settings or inputs have changed)" in said


@pytest.mark.parametrize("override", ["seed=1", "data.max_train_samples=8"])
def test_seed_and_data_settings_concern_every_stage(run, override):
    run()
    assert run(override)[1] == ["one", "two", "three", "aside"]


def test_other_content_of_the_data_runs_everything(run, tmp_path, data_folder):
    copy = tmp_path / "data"
    copy.mkdir()
    for file in data_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    run()
    # The same content under another path changes nothing; a row less does.
    assert run(data=copy)[1] == []
    lines = (copy / "train.csv").read_text().splitlines(keepends=True)
    (copy / "train.csv").write_text("".join(lines[:-1]))
    assert run(data=copy)[1] == ["one", "two", "three", "aside"]


def test_another_model_or_data_set_needs_overwrite(run, tmp_path, data_folder, model_folder):
    shutil.copytree(data_folder, tmp_path / "questions")
    shutil.copytree(model_folder, tmp_path / "other")
    (tmp_path / "questions" / "test.csv").write_text("text,category\nwhere is it,card_arrival\n")
    (tmp_path / "other" / "extra.txt").write_text("x")
    first, _, _ = run()
    for change, what in (({"data": tmp_path / "questions"}, "data set"), ({"model": tmp_path / "other"}, "model")):
        with pytest.raises(
            FlexCompressError, match=f"holds a run of another {what}, .*: choose another output folder"
        ):
            run(**change)
        assert run()[1] == [] and text(first, "three") == "123"
        assert run(**change, overwrite=True)[1] == ["one", "two", "three", "aside"]
        assert run(overwrite=True)[1] == ["one", "two", "three", "aside"]


def test_an_output_within_the_data_or_the_model_does_not_change_them(run, tmp_path, data_folder, model_folder):
    shutil.copytree(data_folder, tmp_path / "data")
    shutil.copytree(model_folder, tmp_path / "model")
    for output in (tmp_path / "data" / "out", tmp_path / "model" / "out"):
        given = {"data": tmp_path / "data", "model": tmp_path / "model", "output": output}
        run(**given)
        assert run(**given)[1] == []


def test_overwrite_runs_everything(run):
    run()
    assert run(overwrite=True)[1] == ["one", "two", "three", "aside"]


def test_a_damaged_stage_runs_again(run):
    result, _, _ = run()
    (result.folders["two"] / "text").write_text("")
    result, ran, _ = run()
    assert ran == ["two", "three"]
    assert text(result, "three") == "123"


def test_a_failed_stage_keeps_the_others_and_the_next_run_goes_on(run, tmp_path):
    with pytest.raises(FlexCompressError, match="it did not work"):
        run("stages.three.fail=error")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".scratch", "one", "run.json", "two"]
    assert run()[1] == ["three", "aside"]


def test_a_stage_that_fails_leaves_its_earlier_result_in_place(run):
    result, _, _ = run()
    with pytest.raises(KeyboardInterrupt):
        run("stages.two.text=II", "stages.two.fail=interrupt")
    assert (text(result, "two"), text(result, "three")) == ("12", "123")
    # The earlier settings are still finished, so going back to them costs nothing.
    assert run()[1] == []


def test_a_stage_is_stale_when_its_input_ran_again_and_it_did_not(run):
    run()
    with pytest.raises(KeyboardInterrupt):
        run("stages.two.fail=interrupt", "stages.one.text=I")
    result, ran, _ = run("stages.one.text=I")
    assert ran == ["two", "three", "aside"]
    assert text(result, "three") == "I23"


@pytest.mark.parametrize("failure", ["disk", "disk, says safetensors"])
def test_a_full_disk(run, failure):
    with pytest.raises(FlexCompressError, match="is full: make room and run the same command again"):
        run(f"stages.two.fail={failure}")
    assert run()[1] == ["two", "three", "aside"]


def test_a_mistake_of_ours_is_not_blamed_on_the_disk(run):
    with pytest.raises(RuntimeError, match="something else"):
        run("stages.two.fail=a mistake")


@pytest.mark.parametrize("failure", ["error", "interrupt"])
def test_a_run_that_completes_nothing_leaves_nothing(run, tmp_path, failure):
    with pytest.raises((FlexCompressError, KeyboardInterrupt)):
        run(f"stages.one.fail={failure}")
    assert not (tmp_path / "out").exists()


def test_another_recipe_needs_overwrite_and_then_tidies_up(run, tmp_path):
    run()
    other = tmp_path / "other.yaml"
    other.write_text("stages:\n  one: {type: test-write, text: '1'}\n  four: {type: test-write, model: one}\n")
    with pytest.raises(FlexCompressError, match="holds a run of the recipe mine"):
        run(recipe=str(other))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(recipe=str(other), overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["four", "notes.txt", "one", "run.json"]


def test_a_foreign_folder_is_left_alone(run, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FlexCompressError, match="is not empty and is no earlier run"):
            run(overwrite=overwrite)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert RUNS == []


def test_a_file_in_the_way(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FlexCompressError, match="is a file"):
        run()
    assert (tmp_path / "out").read_text() == "a file"


def test_an_output_below_a_file(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexCompressError, match="cannot be created"):
        run(output=tmp_path / "file" / "out")


def test_a_second_run_at_the_same_time_is_refused(run, tmp_path):
    run()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(FlexCompressError, match="another run is writing"):
        run()
    assert run()[1] == []


def test_what_a_killed_process_left_is_removed(run, tmp_path):
    run()
    out = tmp_path / "out"
    for name in (".two.tmp-x1", ".two.old-77"):
        (out / name).mkdir()
        (out / name / "text").write_text("half")
    (out / ".run.json.tmp-x2").write_text("{")
    assert run()[1] == []
    assert sorted(path.name for path in out.iterdir()) == ["aside", "one", "run.json", "three", "two"]


def test_a_damaged_run_file(run, tmp_path):
    run()
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(FlexCompressError, match="is damaged"):
        run()


def test_a_run_file_of_a_newer_version(run, tmp_path):
    run()
    (tmp_path / "out" / "run.json").write_text('{"format": 999}')
    with pytest.raises(FlexCompressError, match="newer optimum-flexcompress"):
        run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/folder"}, "There is no folder no/such/folder"),
        ({"data": "no-such-file.csv"}, "There is no file or folder no-such-file.csv"),
        ({"model": "."}, "is no model folder"),
    ],
)
def test_bad_input_writes_nothing(run, tmp_path, monkeypatch, change, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FlexCompressError, match=message):
        run(**change)
    assert not (tmp_path / "out").exists()


def test_data_without_the_columns(run, tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\na,b\nc,d\n")
    with pytest.raises(FlexCompressError, match="needs a column 'text'"):
        run(data=tmp_path / "train.csv")
    assert not (tmp_path / "out").exists()
    _, ran, said = run("data.columns.text=question", "data.columns.label=answer", data=tmp_path / "train.csv")
    assert ran == ["one", "two", "three", "aside"]
    assert "1 of its examples are held out" in said


def test_a_truncated_model(run, tmp_path, model_folder):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(FlexCompressError, match="are damaged"):
        run(model=copy)
    assert not (tmp_path / "out").exists()


def test_registering_a_name_twice_is_a_mistake():
    with pytest.raises(ValueError, match="already"):
        register_stage("test-write")(Write)
    assert stage_class("test-write") is Write


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown
