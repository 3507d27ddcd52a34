"""The package as users install it: from a wheel, with `pip install .` and with `pip install -e .`.

Each way gets a virtual environment of its own that borrows everything else from the one that runs the tests.
"""

from __future__ import annotations

import configparser
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "optimum_flexcompress"
COMMANDS = SOURCE / "commands"
IGNORED = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "out")


def modules_in_the_sources() -> set[str]:
    """The import name of every Python file below `optimum_flexcompress`."""
    names = set()
    for file in SOURCE.rglob("*.py"):
        if COMMANDS in file.parents:
            parts = ("optimum", "commands", *file.relative_to(COMMANDS).with_suffix("").parts)
            if parts[2] != "register":
                parts = ("optimum", "commands", "flexcompress", *parts[2:])
        else:
            parts = file.relative_to(ROOT).with_suffix("").parts
        names.add(".".join(parts).removesuffix(".__init__"))
    return names


def run(*command, cwd, **options):
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=600, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves no traces in the real ones."""
    target = tmp_path_factory.mktemp("checkout") / "optimum-flexcompress"
    target.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(SOURCE, target / "optimum_flexcompress", ignore=IGNORED)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout, cwd=checkout)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["wheel", "folder", "editable"])
def installed(request, checkout, wheel, tmp_path_factory):
    """The folder of programs of an environment in which the package was installed that way."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # As a plain path entry, without processing its own .pth files: an editable install of the environment that runs
    # the tests must not lend us the package.
    borrowed = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    what = {"wheel": [wheel], "folder": [checkout], "editable": ["-e", checkout]}[request.param]
    run(
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--ignore-installed",
        *what,
        cwd=folder,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return folder / "bin"


def test_every_package_is_listed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    assert listed == {name.rpartition(".")[0] for name in modules_in_the_sources() if "." in name} - {
        "optimum",
        "optimum.commands",
    }


def test_the_namespaces_stay_namespaces(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    shared = {"optimum/__init__.py", "optimum/commands/__init__.py", "optimum/commands/register/__init__.py"}
    assert not files & shared
    assert "optimum/commands/register/register_flexcompress.py" in files
    # Mapped elsewhere, so a second copy would only confuse.
    assert not any(name.startswith("optimum_flexcompress/commands/") for name in files)


def test_data_files_are_in_the_wheel(wheel):
    expected = {
        file.relative_to(ROOT).as_posix()
        for file in SOURCE.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert any(name.endswith(".yaml") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_every_module_imports(installed, tmp_path):
    program = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    names = sorted(modules_in_the_sources())
    files = run(installed / "python", "-c", program, *names, cwd=tmp_path).split("\n")[:-1]
    assert len(files) == len(names)
    # Not the checkout that the tests run in.
    assert not [file for file in files if Path(file).is_relative_to(SOURCE)]


def test_optimum_cli_finds_the_commands(installed, tmp_path):
    program = (
        "import sys\nfrom optimum.commands.optimum_cli import main\nsys.argv = ['optimum-cli', *sys.argv[1:]]\n"
        "try: main()\nfinally: print('imported:', *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    printed = run(installed / "python", "-c", program, "--help", cwd=tmp_path)
    assert "flexcompress" in printed and printed.endswith("imported:\n")
    for command in ("compress", "benchmark", "quantize"):
        printed = run(installed / "python", "-c", program, "flexcompress", command, "--help", cwd=tmp_path)
        assert "--debug" in printed and printed.endswith("imported:\n")


def test_recipes_come_along(installed, tmp_path):
    program = "from optimum_flexcompress.recipes import list_recipes; print(*list_recipes())"
    assert "distil-int8" in run(installed / "python", "-c", program, cwd=tmp_path).split()


def test_the_version_is_the_same_everywhere(wheel):
    from optimum_flexcompress import __version__

    assert wheel.name == f"optimum_flexcompress-{__version__}-py3-none-any.whl"
