"""What errors of other libraries mean."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

from optimum_flexcompress.errors import disk_is_full


def test_a_write_that_failed_on_a_disk_with_no_room_left(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 729984 vs 729872")
    assert not disk_is_full(error, tmp_path)
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or SimpleNamespace(free=4096))
    assert disk_is_full(error, tmp_path / "not" / "there")
    assert seen == [tmp_path]
