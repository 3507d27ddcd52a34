"""The output folder of a recipe: one folder per finished stage, and what is needed to go on after an interruption.

```
OUT/run.json             what was asked, and which stages have finished
OUT/STAGE/...            what the stage wrote: a model folder, ONNX files, a report
OUT/STAGE/stage.json     its manifest
OUT/.scratch/STAGE/      checkpoints of a stage that has not finished
```
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import FlexCompressError
from ..output import atomic_folder, check_output_folder, write_text_atomically
from .fingerprint import RUN_FILE, file_sizes, fingerprint


MANIFEST = "stage.json"
CARD = "README.md"
# What a stage that was interrupted can go on from, in its scratch folder: a checkpoint, the scores of a search.
PROGRESS = ("checkpoint-*/trainer_state.json", "search/search.db")
_FORMAT = 1


@dataclass
class Manifest:
    """What a finished stage says about itself.

    Attributes:
        digest: Of its type, its settings and its inputs.
        id: New each time the stage runs, so that stages which read this one notice.
        seconds: How long it took, or its last part where it went on from a checkpoint.
        metrics: Figures that the stage reported.
        files: Size of every file it wrote, to notice damage.
    """

    digest: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


def resolved(source: str | os.PathLike) -> str:
    """One form for all spellings of a model or a data set: its path where it is here, else its Hub id."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)


class Workspace:
    """An output folder that a recipe runs in.

    Args:
        path: The folder.

    Raises:
        FlexCompressError: The folder cannot be made, or holds something that is no run of a recipe.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = check_output_folder(path, overwrite=True)
        if self.path.is_dir():
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise FlexCompressError(f"{self.path} is not writable: choose another output folder.")
            is_run = (self.path / RUN_FILE).is_file()
            if not is_run and any(self.path.iterdir()):
                raise FlexCompressError(
                    f"{self.path} is not empty and is no earlier run of `compress`: choose another output folder."
                )

    def stage_folder(self, name: str) -> Path:
        """Where stage `name` writes."""
        return self.path / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out of the folder while the block runs."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise FlexCompressError(
                f"another run is writing to {self.path}: wait for it, or choose another output folder."
            ) from error
        try:
            self._remove_leftovers()
            yield
        finally:
            self._remove_if_worthless()
            file.unlink(missing_ok=True)
            lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def _remove_leftovers(self) -> None:
        """Removes what a process that was killed outright could not: half-written folders and files."""
        for path in [*self.path.glob(".*.tmp-*"), *self.path.glob(".*.old-*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _remove_if_worthless(self) -> None:
        """Leaves nothing behind when no stage was completed, and none has left anything to go on from."""
        worthy = (f"*/{MANIFEST}", *(f".scratch/*/{progress}" for progress in PROGRESS))
        if not any(any(self.path.glob(pattern)) for pattern in worthy):
            self.clear_scratch()
            (self.path / RUN_FILE).unlink(missing_ok=True)

    def read_run(self) -> dict[str, Any]:
        """What `run.json` says; empty where there is none.

        Raises:
            FlexCompressError: It was written by a newer version, or is damaged.
        """
        file = self.path / RUN_FILE
        if not file.is_file():
            return {}
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            known = run["format"] <= _FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise FlexCompressError(f"{file} is damaged: choose another output folder.") from error
        if not known:
            raise FlexCompressError(
                f"{file} was written by a newer optimum-flexcompress: upgrade, or choose another folder."
            )
        return run

    def read_run_of(self, recipe: str) -> dict[str, Any]:
        """The same, and an error where it was another recipe's.

        Raises:
            FlexCompressError: See above.
        """
        run = self.read_run()
        if run and run["recipe"]["name"] != recipe:
            raise FlexCompressError(
                f"{self.path} holds a run of the recipe {run['recipe']['name']}: choose another output folder, or add "
                "--overwrite to replace it."
            )
        return run

    def check_sources(self, run: dict[str, Any], model: str, dataset: str) -> None:
        """Refuses to replace what was made of another model or data set: a slip would cost hours of work.

        One and the same under another path, or with other content under the same path, is none.

        Args:
            run: What [`Workspace.read_run`] returned.
            model: Folder or Hub id.
            dataset: Anything that [`load_data`] takes.

        Raises:
            FlexCompressError: See above.
        """
        for key, what, source in (("model", "model", model), ("dataset", "data set", dataset)):
            before = run.get("sources", {}).get(key)
            if before is not None and run["resolved"][key] != resolved(source) and before != fingerprint(source):
                raise FlexCompressError(
                    f"{self.path} holds a run of another {what}, {run[key]}: choose another output folder, or add "
                    "--overwrite to replace it."
                )

    def write_run(self, run: dict[str, Any]) -> None:
        """Writes `run.json`."""
        text = json.dumps({"format": _FORMAT, **run}, indent=2, ensure_ascii=False)
        write_text_atomically(self.path / RUN_FILE, text + "\n")

    def finished(self, name: str) -> Manifest | None:
        """The manifest of stage `name`, if it has finished and its files are as it left them."""
        folder = self.stage_folder(name)
        try:
            manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            # Absent, or not written by us: either way the stage has to run.
            return None
        sizes = file_sizes(folder)
        # Cards are written once more when all stages have finished, and by users.
        if any(sizes.get(file) != size for file, size in manifest.files.items() if file != CARD):
            return None
        return manifest

    def scratch(self, name: str, digest: str) -> Path:
        """A folder for checkpoints of stage `name`; emptied when it was left by a stage with other settings."""
        folder = self.path / ".scratch" / name
        mark = folder / "digest"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != digest:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_text_atomically(mark, digest)
        return folder

    def clear_scratch(self, name: str | None = None) -> None:
        """Removes the checkpoints of stage `name`, or of all stages."""
        top = self.path / ".scratch"
        shutil.rmtree(top / name if name else top, ignore_errors=True)
        with contextlib.suppress(OSError):
            top.rmdir()

    @contextlib.contextmanager
    def write_stage(self, name: str, manifest: Manifest) -> Iterator[Path]:
        """A folder that takes the place of `OUT/name`, manifest included, when the block ends without an error."""
        with atomic_folder(self.stage_folder(name), overwrite=True) as folder:
            yield folder
            manifest.files = file_sizes(folder)
            write_text_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")

    def remove_stages(self, names: list[str]) -> None:
        """Removes the folders of stages that the recipe no longer has; only such as carry a manifest."""
        for name in names:
            if (self.stage_folder(name) / MANIFEST).is_file():
                shutil.rmtree(self.stage_folder(name))
