"""Lint, types, packaging, and what must not be in the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    # One letter of each is in brackets so that this file does not contain what it looks for.
    "a path of one machine": r"(?<![\w.])/(wor[k]|far[m]|roo[t]|op[t]/v|op[t]/wheels|op[t]/pypi|hom[e]/\w+)(/|\b)",
    "a place outside the project": r"[.][.]/share[d]|DEVELOPERS[.]md|CONTRACTS[.]md",
    "a registry": r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org",
    "who wrote it": r"(?i)\bsub-?agen[t]s?\b|\bhelper [A-F]\b",
    "unfinished work": r"\b(TOD[O]|FIXM[E]|XX[X]|NotImplemente[d]Error)\b",
    "a test that does not count": r"pytest[.](ski[p]|xfai[l])|mark[.](ski[p]|xfai[l])|assert Tru[e]\b|MagicMoc[k]",
}


def run_tool(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"


def project_files() -> Iterator[Path]:
    """Files of the project: everything but caches, environments and version control."""
    for directory, folders, files in os.walk(ROOT):
        here = Path(directory)
        folders[:] = sorted(
            name
            for name in folders
            if not (name.startswith(".") and name != ".ci")
            and name not in ("__pycache__", "dist")
            and not name.endswith(".egg-info")
            and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(files))


def test_lint() -> None:
    run_tool("ruff", "check", "--no-cache", ".")


def test_format() -> None:
    run_tool("ruff", "format", "--no-cache", "--check", ".")


def test_types() -> None:
    run_tool("mypy", "prism_trt", "plugins")


def test_nothing_forbidden_is_in_the_project() -> None:
    patterns = {name: re.compile(pattern) for name, pattern in FORBIDDEN.items()}
    read, found = 0, []
    for path in project_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        read += 1
        found += [
            f"{path.relative_to(ROOT)}:{number}: {name}: {line.strip()[:120]}"
            for number, line in enumerate(lines, 1)
            for name, pattern in patterns.items()
            if pattern.search(line)
        ]
    assert read > 50
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("a path of one machine", ("cd /", "work/main")),
        ("a path of one machine", ('Path("/', 'opt/v/venv")')),
        ("a place outside the project", ("see ..", "/shared/design")),
        ("a registry", ("https://pypi", ".org/simple")),
        ("unfinished work", ("# TO", "DO: later")),
        ("a test that does not count", ("@pytest.mark.", "skip")),
    ],
)
def test_the_patterns_find_what_they_are_for(name: str, pieces: tuple[str, str]) -> None:
    assert re.search(FORBIDDEN[name], "".join(pieces))
    assert not re.search(FORBIDDEN[name], "prism_trt/target/loading.py does its homework; /proc/cpuinfo is fine")


def test_wheel_holds_everything_needed_at_run_time(tmp_path: Path) -> None:
    run_tool("hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    package = {path.relative_to(ROOT).as_posix() for path in project_files() if path.is_relative_to(ROOT / "prism_trt")}
    assert {name for name in package if not name.endswith(".pyc")} <= names
    assert not [name for name in names if not name.startswith(("prism_trt/", "prism_trt-"))]
    assert "prism_trt/_resources/plugins/qdp.py" in names

    script = "import prism_trt, prism_trt.build.profile as p; print(prism_trt.__file__, p.load_profile('cpu').name)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "installed",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "installed" / "prism_trt" / "__init__.py"), "cpu"]
