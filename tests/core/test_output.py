"""Output folders are complete or absent, and what existed stays when something fails."""

from __future__ import annotations

import os
import stat

import pytest

from optimum_flexcompress.errors import FlexCompressError, MissingExtraError, nearest
from optimum_flexcompress.output import atomic_folder, check_output_folder, write_text_atomically


def test_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "whole").read_text() == "x"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "deep" / "out").stat().st_mode) == 0o777 & ~umask


def test_overwriting_is_asked_for_and_loses_nothing(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("precious")
    with pytest.raises(FlexCompressError, match="not empty.*--overwrite"):
        check_output_folder(target)
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "old").read_text() == "precious"
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FlexCompressError, match="is a file: give -o/--output the name of a new folder"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(FlexCompressError, match="is a file: give --save-pick the name of a new folder"):
        check_output_folder(tmp_path / "file", option="--save-pick")
    with pytest.raises(FlexCompressError, match=r"is not empty: remove it\."):
        check_output_folder(tmp_path, advice="remove it")
    with pytest.raises(FlexCompressError, match=r"cannot be created.*choose another folder"):
        check_output_folder(tmp_path / "file" / "below")
    with pytest.raises(FlexCompressError, match="cannot be created"):
        check_output_folder("/proc/out")


def test_text_files_are_replaced_whole(tmp_path):
    write_text_atomically(tmp_path / "a.json", "1")
    write_text_atomically(tmp_path / "a.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_hints():
    assert nearest("epoch", ["epochs", "seed"]) == ' Did you mean "epochs"? Known: epochs, seed.'
    assert nearest("zzz", ["epochs"]) == " Known: epochs."
    with pytest.raises(ImportError, match=r"pip install optimum-flexcompress\[report\]"):
        raise MissingExtraError("jinja2", "report")
