"""`inspect --data` shows what the target will see, and where the loss is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prism_trt.cli import load, run
from prism_trt.inspect.data import LOSS, Sample, show, view_data
from prism_trt.target.loading import save_hf
from tests.tiny import tiny_target

RECORDS = [
    {"conversations": [{"from": name, "value": text} for name, text in zip(("human", "gpt") * 2, "abcd", strict=True)]},
    {"conversations": []},
    {"prompt": "dog"},
    {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "<think>x</think>jumps"}]},
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target's directory without its weights, which are not needed to look at data."""
    path = tmp_path_factory.mktemp("target")
    save_hf(tiny_target(), path)
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data[1].jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def inspect(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        run(load("inspect"), [str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_only_the_last_answer_and_its_end_carry_a_loss(data: Path, target: Path) -> None:
    first, second, third = view_data(data, target, 9).samples
    assert isinstance(first, Sample) and isinstance(second, Sample) and isinstance(third, Sample)
    assert "".join(piece.text for piece in first.pieces) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    assert [(piece.text, piece.special) for piece in first.pieces if piece.loss] == [("d", False), ("<|im_end|>", True)]
    assert first.loss_tokens == 2
    assert {piece.text for piece in first.pieces if piece.special} == {"<|im_start|>", "<|im_end|>"}
    assert second.loss_tokens == 0
    assert [piece.text for piece in third.pieces if piece.loss] == ["jumps", "<|im_end|>"]


def test_loss_is_coloured_or_in_brackets(data: Path, target: Path) -> None:
    view = view_data(data, target, 2)
    coloured, plain = io.StringIO(), io.StringIO()
    show(view, Console(file=coloured, force_terminal=True, color_system="standard", width=100))
    show(view, Console(file=plain, color_system=None, width=100))
    assert "\x1b[1;32md\x1b[0m" in coloured.getvalue() and LOSS == "bold green"
    assert "<|im_start|>assistant↵\n[[d<|im_end|>]]↵\n" in plain.getvalue()
    assert "<|im_start|>assistant↵\n(here the target answers)" in plain.getvalue()


def test_command_line(data: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--data", data) == 0
    text = capsys.readouterr().out
    assert "data[1].jsonl:4records,3usable" in "".join(text.split()), "lines are folded where the path is long"
    assert "skipped: no messages" in text and "line 2" in text
    assert "im_start" not in text

    assert inspect("--data", data, "--target", target, "--records", 1) == 0
    assert capsys.readouterr().out.count("usable record") == 1

    assert inspect("--data", data, "--target", target, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["formats"] == {"conversations": 2, "prompt": 1, "messages": 1}
    assert report["skipped"] == {"no messages": {"records": 1, "first": "line 2"}}
    assert report["tokens"]["prompt"]["number"] == 3
    assert report["tokens"]["answer in the file"]["number"] == 2

    assert inspect() == 2
    assert "either PATH or --data" in capsys.readouterr().err
    assert inspect(target, "--data", data) == 2
