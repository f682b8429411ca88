"""The images are built from named files alone, hold what their engines need, and no secret lies in a layer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from prism_trt.engines.tensorrt.files import BINDINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
OPERATORS_FILES = [
    "keys",
    "prism.env",
    "cert.pem",
    "repository/prism/1/model.py",
    "engine/engine.json",
    ".git/config",
    ".env",
    "deploy/.env",
    "deploy/compose.override.yaml",
    "deploy/kubernetes/secret.yaml",
    "build/keys",
    "plugins/prism.env",
]
"""Files that docs/operations.md has operators write here, and others that may hold a secret."""


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of the Dockerfile, by stage."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "")
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            stage = rest.split()[-1]
            found[stage] = []
        found[stage].append((instruction, rest))
    return found


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of every copy from the directory that images are built from."""
    return [
        (rest.split()[:-1], rest.split()[-1])
        for instructions in stages().values()
        for instruction, rest in instructions
        if instruction in ("COPY", "ADD") and not rest.startswith("--from")
    ]


def ignored(path: str) -> bool:
    """Whether `.dockerignore` keeps `path` from the builder: the last pattern decides that fits it or a parent."""
    verdict = False
    parents = ["/".join(path.split("/")[: depth + 1]) for depth in range(path.count("/") + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\[", "[").replace(r"\]", "]")
        pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, parent) for parent in parents):
            verdict = not line.startswith("!")
    return verdict


def files_under(name: str) -> list[str]:
    """Relative paths of the file or of the files of the directory `name`."""
    path = ROOT / name
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file.relative_to(ROOT).as_posix() for file in found if file.is_file()]


def test_secrets_are_neither_sent_to_the_builder_nor_copied() -> None:
    assert copied()
    for sources, _ in copied():
        for source in sources:
            assert not set(source) & set("*?["), f"name what is copied, not {source}"
            assert source not in (".", "./", "deploy")
    for path in OPERATORS_FILES:
        assert ignored(path), path
    for stage in ("server", "frontend"):
        assert "COPY" not in dict(stages()[stage])


def test_what_is_copied_suffices_for_the_wheel(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for names, destination in copied():
        for file in (file for name in names for file in files_under(name) if not ignored(file)):
            into = source / destination
            target = into / Path(file).name if destination == "./" else into / Path(file).relative_to(destination)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
    (command,) = (rest for instruction, rest in stages()["wheel"] if instruction == "RUN")
    # Without a network; the build backend is installed here.
    offline = command.replace("pip wheel", f"{sys.executable} -m pip wheel --no-build-isolation --quiet")
    assert offline != command
    subprocess.run(["sh", "-e", "-c", offline.replace("/wheels", str(wheels))], cwd=source, check=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = [file for file in files_under("prism_trt") if "__pycache__" not in file]
    resources = [f"prism_trt/_resources/{file}" for file in (*files_under("build"), *files_under("plugins"))]
    assert {file for file in (*package, *resources) if not file.endswith(".pyc")} <= names
    assert not [name for name in names if name.startswith("prism_trt/_resources/deploy/")]


def installed_by(stage: str, directory: Path, **build_arguments: str) -> str:
    """What the stage has pip install."""
    for name in ("bin", "wheels"):
        (directory / name).mkdir(exist_ok=True)
    (directory / "wheels" / "prism_trt-1-py3-none-any.whl").touch()
    pip = directory / "bin" / "pip"
    pip.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    pip.chmod(0o755)
    (command,) = (rest for instruction, rest in stages()[stage] if instruction == "RUN")
    command = re.sub(r"^--mount=\S+\s+", "", command).replace("/wheels", str(directory / "wheels"))
    environment = {"PATH": f"{directory / 'bin'}:/usr/bin:/bin", **build_arguments}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=True)
    installed: str = json.loads(done.stdout)[-1]
    return installed


@pytest.mark.parametrize("extras", ["tensorrt-rtx", "tensorrt", ""])
def test_the_server_image_installs_the_extras_asked_for(extras: str, tmp_path: Path) -> None:
    wheel = str(tmp_path / "wheels" / "prism_trt-1-py3-none-any.whl")
    assert installed_by("server", tmp_path, SERVER_EXTRAS=extras) == (f"{wheel}[{extras}]" if extras else wheel)
    assert installed_by("frontend", tmp_path) == f"{wheel}[frontend]"


def test_the_server_image_holds_the_runtime_of_engines_compiled_elsewhere() -> None:
    (default,) = (
        rest.removeprefix("SERVER_EXTRAS=")
        for instruction, rest in stages()["server"]
        if instruction == "ARG" and rest.startswith("SERVER_EXTRAS=")
    )
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert compose["services"]["triton-a"]["build"]["args"]["SERVER_EXTRAS"] == f"${{SERVER_EXTRAS-{default}}}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    required = {re.split("[=<>;]", line)[0].replace("-", "_") for line in extras[default]}
    assert {name.replace("-", "_") for name in packages_distributions()[BINDINGS["tensorrt-rtx"]]} <= required
