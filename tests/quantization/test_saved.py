"""The record beside saved int8 models: it finds every kind of damage, and says what to do in one sentence."""

from __future__ import annotations

import json

import pytest

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.quantization.saved import (
    RECORD_NAME,
    has_saved,
    installed_versions,
    peek_saved,
    read_saved,
    sha256_of,
    write_saved,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.xml").write_text("<net/>")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.bin").write_bytes(bytes(range(256)) * 8)
    versions = installed_versions("torch", "there-is-no-such-package")
    write_saved(tmp_path, "openvino", "main", versions, ["model.xml", "parts/model.bin"], mode="static", inputs=["a"])
    return tmp_path


def change(folder, **entries):
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, **entries}))


def test_what_is_written_is_read(folder):
    saved = read_saved(folder, "openvino", same_versions=["torch"])
    assert has_saved(folder) and saved == peek_saved(folder)
    assert (saved.backend, saved.lane, list(saved.versions)) == ("openvino", "main", ["torch"])
    assert saved.files == {name: folder / name for name in ("model.xml", "parts/model.bin")}
    assert saved.facts == {"mode": "static", "inputs": ["a"]}
    record = json.loads((folder / RECORD_NAME).read_text())
    assert record["format"] == 1
    # The digest that `printf '<net/>' | sha256sum` prints.
    digest = "9d6a064fb2248075588a97f3e7233521dadb5a5eabd1560a849c01b9f4b5c732"
    assert record["files"]["model.xml"] == {"sha256": digest, "bytes": 6}


def test_a_pin_is_the_digest_of_the_record(folder):
    pin = sha256_of(folder / RECORD_NAME)
    assert read_saved(folder, "openvino", expected_sha256=pin.upper()).folder == folder
    (folder / "model.xml").write_text("<evil>")
    write_saved(folder, "openvino", "main", {}, ["model.xml", "parts/model.bin"])
    assert read_saved(folder, "openvino")
    with pytest.raises(FlexCompressError, match="is not the model that you pinned"):
        read_saved(folder, "openvino", expected_sha256=pin)


def test_damaged_files(folder):
    binary = folder / "parts" / "model.bin"
    whole = binary.read_bytes()
    binary.write_bytes(whole[:-1])
    with pytest.raises(FlexCompressError, match="2047 bytes where 2048 were written: it is incomplete"):
        read_saved(folder, "openvino")
    binary.write_bytes(whole[:100] + b"x" + whole[101:])
    with pytest.raises(FlexCompressError, match="SHA-256 differs"):
        read_saved(folder, "openvino")
    binary.unlink()
    with pytest.raises(FlexCompressError, match="model.bin is missing"):
        read_saved(folder, "openvino")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "1"}', '{"format": 1}', '{"format": 1, "backend": "x", "lane": "main", "files": {}}'],
)
def test_damaged_records(folder, text):
    (folder / RECORD_NAME).write_text(text)
    with pytest.raises(FlexCompressError, match="is damaged"):
        read_saved(folder, "openvino")


@pytest.mark.parametrize("name", ["../model.xml", "/model.xml"])
def test_a_record_cannot_name_files_elsewhere(folder, name):
    change(folder, files={name: {"sha256": "0", "bytes": 6}})
    with pytest.raises(FlexCompressError, match="is damaged"):
        read_saved(folder, "openvino")


def test_other_formats_backends_and_versions(folder):
    with pytest.raises(FlexCompressError, match="made for the backend openvino, not for ipex"):
        read_saved(folder, "ipex")
    change(folder, versions={"torch": "1.13.1"})
    assert read_saved(folder, "openvino")
    with pytest.raises(FlexCompressError, match=r"made with torch 1\.13\.1, and \d.* is installed"):
        read_saved(folder, "openvino", same_versions=["torch"])
    with pytest.raises(FlexCompressError, match="made with nncfx of an unknown version, and none is installed"):
        read_saved(folder, "openvino", same_versions=["nncfx"])
    change(folder, format=0)
    with pytest.raises(FlexCompressError, match="format 0, .* quantize the original model again"):
        peek_saved(folder)
    change(folder, format=2)
    with pytest.raises(FlexCompressError, match="format 2, .* update optimum-flexcompress"):
        read_saved(folder, "openvino")


def test_no_record(tmp_path):
    assert not has_saved(tmp_path)
    with pytest.raises(FlexCompressError, match="has no flexcompress_backend.json"):
        read_saved(tmp_path, "openvino")


def test_facts_cannot_hide_the_record(folder):
    with pytest.raises(ValueError, match="belong to the record itself: format"):
        write_saved(folder, "openvino", "main", {}, ["model.xml"], format=3)
