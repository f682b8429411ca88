"""The documentation's commands exist, its links lead somewhere, and its figures are the measured ones."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import dropwhile
from pathlib import Path

import pytest
import typer

from prism_trt.bench.report import HEADER, rows
from prism_trt.bench.results import BenchResult
from prism_trt.cli import COMMANDS, load
from prism_trt.config import parse_json_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results" / "bench_cpu.json"
README_COLUMNS = {
    "set": "set",
    "vanilla tok/s": "vanilla tok/s",
    "PRISM tok/s": "tok/s",
    "speed-up [95 % CI]": "speed-up [95 % CI]",
    "AL pooled [95 % CI]": "AL pooled [95 % CI]",
    "identical": "identical",
}
"""Columns of the README's table and what the bench's report calls them."""
MODULES = {
    "bench.merge": "prism_trt.bench.merge",
    "bench.peers": "prism_trt.bench.peers.app",
    "bench.scaling": "prism_trt.bench.scaling",
    "bench.sweep": "prism_trt.bench.sweep",
    "bench.serving": "prism_trt.bench.serving.app",
}
"""Command lines that are not subcommands of `prism-trt`."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def code_lines(text: str) -> Iterator[str]:
    """Commands of the ```bash blocks of a page, continuation lines joined."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.split(r"&&|;", line) if part.strip())


def commands() -> list[tuple[str, str]]:
    return [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in code_lines(page.read_text("utf-8"))]


def links() -> list[tuple[str, str]]:
    found = [
        (page.relative_to(ROOT).as_posix(), link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    ]
    return [(page, link) for page, link in found if not link.startswith(("http://", "https://", "#"))]


def arguments_of(line: str) -> tuple[str, list[str]] | None:
    """Subcommand and arguments of a line that runs one of ours; None when it runs something else."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[:1] == ["torchrun"]:
        words = ["python", *words[words.index("-m") :]]
    if words[:1] == ["prism-trt"]:
        return words[1], words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("prism_trt."):
        return words[2].removeprefix("prism_trt."), words[3:]
    return None


def parse(app: typer.Typer, arguments: list[str]) -> None:
    """Parse `arguments` as the command line of `app` would, without running it."""
    typer.main.get_command(app).make_context("command", list(arguments))


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_parse(page: str, line: str) -> None:
    found = arguments_of(line)
    if found is not None:
        module = MODULES.get(found[0])
        parse(import_module(module).app() if module else load(found[0]), found[1])
    else:
        words = shlex.split(line, comments=True)
        first = list(dropwhile(re.compile(r"[A-Z_]+=").match, words))[:1]  # past a command's environment
        known = ("pip", "python", "cd", "curl", "docker", "kubectl", "tensorboard", ".ci/run", "prism-trt", "git", ".")
        ours = bool(first) and first[0].startswith("scripts/") and (ROOT / first[0]).is_file()
        assert not first or ours or first[0] in known, f"{page}: {line}"


def test_a_wrong_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse(load("build"), ["--no-such-option", "x"])


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_shows_every_command(name: str) -> None:
    assert any(found and found[0] == name for found in map(arguments_of, code_lines(README)))


@pytest.mark.parametrize(("page", "line"), [entry for entry in commands() if "pip install" in entry[1]])
def test_extras_exist(page: str, line: str) -> None:
    extras = PROJECT["optional-dependencies"]
    for group in re.findall(r"\[([\w,]+)\]", line):
        assert set(group.split(",")) <= set(extras), f"{page}: {line}"


def test_continuous_integration_runs_the_readme_command() -> None:
    lines = [line for line in README.splitlines() if "python -m pytest" in line]
    assert lines == ['pip install -e ".[test]" && python -m pytest -n auto']
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 -F 'python -m pytest' README.md" in script
    assert 'bash -euo pipefail -c "$command"' in script


@pytest.mark.parametrize(("page", "link"), links())
def test_links_lead_somewhere(page: str, link: str) -> None:
    assert ((ROOT / page).parent / link.split("#")[0]).exists()


def test_every_extra_is_pinned_to_the_tested_torch_or_leaves_it_alone() -> None:
    pins = {
        name: [entry for entry in entries if entry.startswith("torch")]
        for name, entries in PROJECT["optional-dependencies"].items()
    }
    assert {name: entries for name, entries in pins.items() if entries} == {"quickstart": ["torch==2.13.0"]}
    assert "prism-trt[quickstart]" in PROJECT["optional-dependencies"]["test"]


def results_table() -> str:
    """The README's table, from the committed result of the bench."""
    places = [HEADER.index(name) for name in README_COLUMNS.values()]
    result = parse_json_file(BenchResult, RESULTS)
    first = str(result.settings.trees[0])
    lines = [tuple(README_COLUMNS), ("---",) * len(places)]
    lines += [tuple(row[place] for place in places) for row in rows(result) if row[HEADER.index("tree")] == first]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_readme_figures_are_the_measured_ones() -> None:
    shown = [line for line in README.splitlines() if line.startswith("|")]
    expected = results_table().splitlines() if RESULTS.exists() else []
    assert [line for line in shown if line in expected] == expected, "the README must hold\n" + "\n".join(expected)
    speeds = [line for line in shown if "tok/s" in line]
    assert speeds == expected[:1]


def test_verification_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for path, test in named:
        source = ROOT / path
        assert source.is_file(), path
        assert not test or f"def {test}(" in source.read_text(encoding="utf-8"), f"{path}::{test}"
