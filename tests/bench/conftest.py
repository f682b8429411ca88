from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.engines import build, no_compiler


@pytest.fixture(scope="session")
def engine_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny torch engines of one target with a good drafter, two worse ones and none; the target lies beside each."""
    with no_compiler():
        return {
            "good": build(tmp_path_factory.mktemp("good")),
            "worse": build(tmp_path_factory.mktemp("worse"), noise=0.1),
            "bad": build(tmp_path_factory.mktemp("bad"), noise=0.2),
            "plain": build(tmp_path_factory.mktemp("plain"), with_drafter=False),
        }


@pytest.fixture(scope="session")
def question_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sets of three questions."""
    directory = tmp_path_factory.mktemp("questions")
    files = []
    for name in ("alpha", "beta"):
        path = directory / name / "question.jsonl"
        path.parent.mkdir()
        lines = [{"question_id": i, "turns": [f"{name} {i}"]} for i in range(3)]
        path.write_text("\n".join(map(json.dumps, lines)))
        files.append(path)
    return files
