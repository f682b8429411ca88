from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_trt.bench.questions import load_questions
from prism_trt.errors import PrismError

GOOD = {"question_id": 1, "category": "c", "turns": ["one", "two"], "reference": ["not read"]}


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_reads_turns_and_names_the_set_after_the_directory_or_the_file(tmp_path: Path) -> None:
    first = write(tmp_path / "gsm" / "question.jsonl", GOOD, "", {"question_id": "x", "turns": ["hi"]})
    second = write(tmp_path / "own.jsonl", GOOD)
    questions = load_questions([first, second])
    assert [(q.set_name, q.question_id, q.turns) for q in questions] == [
        ("gsm", 1, ("one", "two")),
        ("gsm", "x", ("hi",)),
        ("own", 1, ("one", "two")),
    ]
    assert questions[0].category == "c"


def test_takes_a_window_of_each_set(tmp_path: Path) -> None:
    files = [
        write(tmp_path / name / "question.jsonl", *({"question_id": i, "turns": [f"{i}"]} for i in range(6)))
        for name in "ab"
    ]
    chosen = load_questions(files, per_set=2, skip_first=3)
    assert [(q.set_name, q.question_id) for q in chosen] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    with pytest.raises(PrismError, match="holds 6 questions, so skipping 6"):
        load_questions(files, skip_first=6)


def test_every_line_break_but_the_newline_may_be_in_a_question(tmp_path: Path) -> None:
    turn = "one\u2028two\x85three"
    path = tmp_path / "set.jsonl"
    path.write_text("\ufeff" + json.dumps({"question_id": 1, "turns": [turn]}, ensure_ascii=False) + "\r\n")
    assert load_questions([path])[0].turns == (turn,)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line 2 is not valid JSON"),
        ("[1, 2]", "line 2: "),
        ({"question_id": 2}, "line 2: turns"),
        ({"question_id": 2, "turns": []}, "line 2: turns"),
        ({"question_id": 2, "turns": "text"}, "line 2: turns"),
        ({"question_id": 2, "turns": [3]}, "line 2: turns.0"),
        ({"question_id": 2, "turns": ["  "]}, "line 2 has an empty turn"),
        ({"question_id": None, "turns": ["a"]}, "line 2: question_id"),
        ({"question_id": 2, "turns": ["\ud800"]}, "line 2 holds half a character"),
        ("[" * 100_000, "line 2 is nested too deeply"),
        ({"question_id": 1, "turns": ["a"]}, "line 2 repeats question_id 1"),
    ],
)
def test_malformed_lines_are_refused_by_number(tmp_path: Path, line: object, reason: str) -> None:
    path = write(tmp_path / "set.jsonl", GOOD, line)
    with pytest.raises(PrismError) as error:
        load_questions([path])
    assert str(error.value).startswith(f"{path} {reason}")


def test_files_that_cannot_be_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="cannot read questions from"):
        load_questions([tmp_path / "missing.jsonl"])
    with pytest.raises(PrismError, match="holds no questions"):
        load_questions([write(tmp_path / "empty.jsonl", "")])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PrismError, match="not UTF-8"):
        load_questions([tmp_path / "binary.jsonl"])
    same = write(tmp_path / "set" / "question.jsonl", GOOD), write(tmp_path / "set.jsonl", GOOD)
    with pytest.raises(PrismError, match="both set 'set'"):
        load_questions(list(same))
