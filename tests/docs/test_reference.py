"""The API reference names everything that is public, and everything public says what it is."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from transformers import Trainer

from optimum_flexcompress.recipes.stages.base import _STAGES
from tests.docs.pages import GUIDES, REFERENCE


PACKAGE = "optimum_flexcompress"
PUBLIC = (
    "",
    "architectures",
    "evaluation",
    "export",
    "methods",
    "methods.distillation",
    "methods.length_adaptive",
    "methods.modular",
    "methods.vib",
    "quantization",
    "recipes",
    "search",
    "tasks",
    "token_dropping",
)


# What a class overrides methods of without deriving from it.
MIXED_INTO = {"trainer.FlexCompressMixin": Trainer.__mro__}


def public_objects():
    """Path below the package, and object, of every public name."""
    for module_name in PUBLIC:
        module = importlib.import_module(f"{PACKAGE}.{module_name}".rstrip("."))
        for name in module.__all__:
            yield f"{module_name}.{name}".lstrip("."), getattr(module, name)


def documented() -> set[str]:
    """What the pages of the reference document, or (values, which have no docstring) name."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.mdx"))
    return {*re.findall(r"\[\[autodoc\]\] (\S+)", text), *re.findall(r"`((?:\w+\.)*[A-Z_0-9]+)`", text)}


def test_every_public_name_is_in_the_reference():
    there = documented()
    objects = {id(importlib_object(name)) for name in there}
    missing = [
        name
        for name, value in public_objects()
        if name not in there and name != "__version__" and (isinstance(value, str | int) or id(value) not in objects)
    ]
    assert missing == []


def test_every_type_of_stage_is_in_the_guide_and_its_settings_in_the_reference():
    guide = (GUIDES / "usage_guides" / "recipes.mdx").read_text(encoding="utf-8")
    _, _, listed = guide.partition("The types of stages:")
    objects = {id(importlib_object(name)) for name in documented()}
    ours = {name: stage for name, stage in _STAGES.items() if is_ours(stage)}
    assert ours and set(re.findall(r"`([a-z-]+)`", listed.partition("Their settings")[0])) == ours.keys()
    assert [name for name, stage in ours.items() if id(stage.Settings) not in objects] == []


def importlib_object(path: str):
    """What a path of the reference names; every one of them must name something."""
    module, names = importlib.import_module(PACKAGE), path.split(".")
    for index, name in enumerate(names):
        if not hasattr(module, name):
            importlib.import_module(".".join([PACKAGE, *names[: index + 1]]))
        module = getattr(module, name)
    return module


def is_ours(value) -> bool:
    return getattr(value, "__module__", "").startswith(PACKAGE)


def test_everything_public_has_a_docstring():
    """Methods that override something may leave the words to what they override."""
    bare = []
    for path in sorted(documented()):
        value = importlib_object(path)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not (value.__doc__ or "").strip() or (value.__doc__ or "").startswith(f"{value.__name__}("):
            bare.append(path)
        for name, member in vars(value).items() if inspect.isclass(value) else ():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if name.startswith("_") or not inspect.isfunction(function) or not is_ours(function):
                continue
            # A default of a dataclass that is a function is described with the field.
            if name in getattr(value, "__dataclass_fields__", ()):
                continue
            overrides = any(name in vars(base) for base in (*value.__mro__[1:], *MIXED_INTO.get(path, ())))
            if not overrides and not inspect.getdoc(getattr(value, name)):
                bare.append(f"{path}.{name}")
    assert bare == []


def test_the_reference_builds(tmp_path):
    build_doc = pytest.importorskip("doc_builder", reason="needs the extra docs").build_doc
    build_doc(
        PACKAGE, REFERENCE.parent, tmp_path / "built", is_python_module=True, version_tag_suffix="", watch_mode=False
    )
    for page in REFERENCE.glob("*.mdx"):
        built = (tmp_path / "built" / REFERENCE.name / page.name).read_text(encoding="utf-8")
        assert "[[autodoc]]" not in built
        assert built.count("<docstring>") >= page.read_text(encoding="utf-8").count("[[autodoc]]")
