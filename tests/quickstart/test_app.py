from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from prism_trt.errors import PrismError
from prism_trt.quickstart.app import app
from tests.bench.engines import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def scratch(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where temporary files go while the quickstart is that of a tiny target whose drafter comes with the package."""
    directory = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prism_trt.quickstart.app.find_smollm2", lambda: models[0])
        patch.setattr("prism_trt.quickstart.app.shipped_drafter", lambda: models[1])
        patch.setattr(tempfile, "tempdir", str(directory))
        yield directory


@pytest.fixture(scope="module")
def strangers() -> set[int]:
    """Processes that ran before this module's."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def first(scratch: Path, strangers: set[int]) -> Result:
    """A first run with all options."""
    options = {"--work": "work", "--json": "q.json", "--plot": "q.png"}
    arguments = [text for name, file in options.items() for text in (name, str(scratch / file))]
    arguments += ["--threads", "1", "--prompt", "The quick"]
    return CliRunner().invoke(app(), arguments, catch_exceptions=False)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def temporary(directory: Path) -> list[str]:
    """What is left of our temporary files; torch keeps an empty cache directory there as well."""
    return [name for name in names(directory) if name.startswith((".", "tmp", "prism"))]


def children(strangers: set[int]) -> list[str]:
    """Processes this module started and that still run; `strangers` are other modules' servers."""
    running = psutil.Process().children(recursive=True)
    return [" ".join(child.cmdline()) for child in running if child.pid not in strangers]


def test_builds_serves_and_measures(first: Result, scratch: Path, strangers: set[int]) -> None:
    assert first.exit_code == 0, first.output
    for part in ("1/5", "2/5", "3/5", "4/5", "5/5", "> The quick", "output identical", "built: "):
        assert part in first.output
    assert json.loads((scratch / "q.json").read_text())["identical"] is True
    assert (scratch / "q.png").read_bytes().startswith(b"\x89PNG")
    assert not temporary(scratch)
    assert names(scratch / "work") == ["engine", "repository"]
    assert not children(strangers)


@pytest.mark.usefixtures("first")
def test_the_second_run_reuses_the_engine(scratch: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(scratch / "work", tmp_path / "work"))
    built = (work / "engine" / "engine.json").stat().st_mtime_ns
    done = CliRunner().invoke(app(), ["--work", str(work), "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"reusing {work / 'engine'}" in done.output
    assert (work / "engine" / "engine.json").stat().st_mtime_ns == built
    assert names(work) == ["engine", "quickstart.json", "quickstart.png", "repository"]


@pytest.mark.usefixtures("scratch")
def test_a_taken_port_is_refused_before_any_work(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(PrismError, match=rf"port {port} cannot be used .* --port"):
            CliRunner().invoke(app(), ["--work", str(tmp_path / "work"), "--port", port], catch_exceptions=False)
    assert not (tmp_path / "work").exists()


@pytest.mark.usefixtures("first")
def test_an_interruption_while_streaming_stops_the_server(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strangers: set[int]
) -> None:
    work = Path(shutil.copytree(scratch / "work", tmp_path / "work"))
    seen: list[str] = []

    def interrupt(*_: object) -> None:
        seen.extend(children(strangers))
        raise KeyboardInterrupt

    monkeypatch.setattr("prism_trt.quickstart.app.stream_answer", interrupt)
    done = CliRunner().invoke(app(), ["--work", str(work), "--threads", "1"])
    assert done.exit_code != 0
    assert any("tritonserver" in command for command in seen)
    assert not children(strangers)
    assert not temporary(scratch)
    assert names(work) == ["engine", "repository"]
