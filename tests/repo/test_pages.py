# SPDX-License-Identifier: Apache-2.0
"""README and pages name commands, options, files and rooms that exist, and their code runs as it stands."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

from bench.__main__ import main as bench
from drseg_core.cli.main import main as drseg
from drseg_core.config import methods
from drseg_core.config.load import load_config
from drseg_core.data import benchmarks
from drseg_core.data.open import open_dataset
from drseg_core.models.build import build_model
from tests.repo import test_imports

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, without the indent that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in a page, comments and line ends taken away."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    found = [shlex.split(line.replace("<", "").replace(">", ""), comments=True) for line in re.split(r"\n|&&", text)]
    spans = re.findall(r"`((?:drseg|make|python -m bench|bench/gpu\.sh) [^`]+)`", page.read_text(encoding="utf-8"))
    return [words for words in found if words] + [shlex.split(span.replace("|", "")) for span in spans]


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


@functools.cache
def help_of(program: str, *command: str) -> str:
    """What a command says of itself; nothing where there is no such command."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = {"drseg": drseg, "bench": bench}[program]([*command, "--help"])
        except SystemExit as stop:
            code = stop.code
    return said.getvalue() if code == 0 else ""


# commands of two words
DRSEG = {("data", "prepare"), ("data", "check"), ("data", "tile"), ("predict", "zero-shot")}


def problems(words: list[str]) -> list[str]:
    """What a command names that there is not."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    torchrun = words[:1] == ["torchrun"]
    if torchrun:
        words = ["drseg", *words[words.index("drseg_core") + 1 :]]
    if words[:1] == ["drseg"]:
        two = tuple(words[1:3]) in DRSEG
        if words[1:2] == ["data"] and not two and not options(words[2:3]):
            return words[2:3]
        text = help_of("drseg", *words[1 : 3 if two else 2])
    elif words[:3] == ["python", "-m", "bench"]:
        text = help_of("bench", words[3])
    elif words[:2] == ["python", "-m"]:
        return [] if (ROOT / f"{words[2].replace('.', '/')}.py").exists() else words[2:3]
    elif words[:1] == ["make"]:
        rules = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        return [target for target in targets if not re.search(rf"^[\w %-]*\b{target}\b[\w %-]*:", rules, re.MULTILINE)]
    elif words[:1] == ["pytest"]:
        return [word for word in words[1:] if "/" in word and not (ROOT / word.split("::")[0]).exists()]
    elif "pip" in words[:1] and "[" in " ".join(words):
        extras = re.search(r"\[(.*)\]", " ".join(words)).group(1).split(",")
        table = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        return [extra for extra in extras if not re.search(rf"^{extra} = \[", table, re.MULTILINE)]
    else:
        return [words[0]] if words[0].startswith("bench/") and not (ROOT / words[0]).exists() else []
    if not text:
        return [" ".join(words[:3])]
    return [option for option in options(words) if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text)]


@by_page
def test_commands_and_their_options_exist(page: Path):
    assert [(" ".join(words), wrong) for words in commands(page) if (wrong := problems(words))] == []


@pytest.mark.parametrize(
    "command",
    [
        "drseg predct run scene.tif",
        "drseg predict run scene.tif --clases x",
        "drseg data cut x",
        "python -m bench rnu",
        "python -m bench run --gates",
        "make tests",
        "pytest tests/ops/test_absent.py -k mine",
        "pip install '.[al]'",
        "bench/cpu.sh OUT",
    ],
)
def test_a_command_that_is_not_there_is_found(command: str):
    assert problems(shlex.split(command))


@by_page
def test_links_and_paths_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    tracked = r"`((?:drseg_core|kernels|csrc|bench|tests|docs|examples|integrations)/[\w./-]*)`"
    for path in re.findall(tracked, text):
        assert (ROOT / path).exists(), path


def test_the_site_has_every_page():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    named = set(re.findall(r"[\w/]+\.md", str(site["nav"])))
    assert {path.name for path in DOCS.glob("*.md")} | {"studies/index.md"} == named


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


RUN = [page for page in PAGES if page.name not in ("extending.md", "CONTRIBUTING.md") and blocks(page, "python")]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_code_runs_as_it_stands(page: Path, here):
    # the blocks of a page are read in order; real weights are not here
    code = "\n".join(blocks(page, "python")).replace('zero_shot("b")', 'zero_shot("tiny")')
    exec(compile(code, str(page), "exec"), {"__name__": "page"})


def block_with(words: str) -> str:
    return next(text for text in blocks(DOCS / "extending.md", "python") if words in text)


def test_a_data_set_is_added_as_the_page_says(here, monkeypatch):
    town = eval(block_with("Benchmark("), vars(benchmarks))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "town", town)
    Path("datasets/UDD5/all/src").rename("datasets/images")
    Path("datasets/UDD5/all/gt").rename("datasets/masks")
    Path("datasets/Town").mkdir()
    Path("datasets/images").rename("datasets/Town/imgs")
    Path("datasets/masks").rename("datasets/Town/D2masks")
    found = open_dataset("town:datasets", "all")
    assert found.class_names == ("roof", "street") and len(found) > 0


def test_a_method_is_added_as_the_page_says(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    exec(block_with("METHODS["), vars(methods))
    config = methods.apply_method(load_config("tiny"), "mine")
    assert config.model.fusion.kind == "mean" and config.model.rotations == 1
    build_model(config.model)


OPS = [path.parent.name for path in (ROOT / "drseg_core" / "ops").glob("*/registration.py")]
IN_CUDA = [path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")]


@pytest.mark.parametrize(("title", "ops"), [("A Triton kernel", OPS), ("A CUDA C++ kernel", IN_CUDA)])
def test_kernels_lie_where_the_page_says(title: str, ops: list[str]):
    section = (DOCS / "extending.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    patterns = re.findall(r"`([\w/.]*<op>[\w/.]*)`", section)
    assert len(patterns) >= 2 and len(ops) >= 4
    places = [ROOT / ("csrc/cuda" if "/" not in pattern else "") / pattern for pattern in patterns]
    assert [path for place in places for op in ops if not (path := Path(str(place).replace("<op>", op))).exists()] == []


# the drawing of the rooms


def drawing() -> list[list[str]]:
    text = next(text for text in blocks(DOCS / "architecture.md", "text") if "│" in text)
    return [re.findall(r"\w+", line) for line in text.splitlines() if re.search(r"\w", line)]


def test_rooms_import_only_what_the_drawing_has_below_them():
    level = {room: place for place, rooms in enumerate(drawing()) for room in rooms}
    rooms = {room for room in test_imports.MAY_IMPORT if (ROOT / "drseg_core" / room / "__init__.py").exists() and room}
    assert rooms == set(level) - {"drseg_kernels", "csrc"}
    for room, allowed in test_imports.MAY_IMPORT.items():
        for other in allowed & set(level):
            assert room not in level or level[room] < level[other], (room, other)
