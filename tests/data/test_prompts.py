"""From a file of records to the prompts the target is asked, every record accounted for."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from prism_trt.data.accounting import DataReport
from prism_trt.data.masks import mask_answers
from prism_trt.data.prompts import PromptConfig, prepare_prompts, tokenize_prompts
from prism_trt.data.reading import read_records
from prism_trt.data.turns import planned_prompts
from prism_trt.errors import PrismError
from prism_trt.target.tokenizer import Tokenizer, TokenizerSettings
from tests.data.chat_templates import GEMMA, WITHOUT_GENERATION_PROMPT
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """What is asked by default: one prompt of each usable record."""
    return [planned_prompts(conversation)[0] for conversation in read_records(path).conversations]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_lines_of_any_form_and_a_json_array_are_read(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s"}
    records = [
        {"prompt": "one", "source": "ignored"},
        {"turns": ["two", "later"], "question_id": 7},
        {"messages": [system, user("three"), {"role": "assistant", "content": "dropped"}]},
        {"messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")]},
    ]
    expected = [
        [user("one")],
        [user("two")],
        [system, user("three")],
        [user("a"), {"role": "assistant", "content": "b"}, user("c")],
    ]
    assert read_messages(write(tmp_path / "lines.jsonl", records[0], "", *records[1:])) == expected
    (tmp_path / "array.json").write_text("\ufeff\n" + json.dumps(records, indent=1))
    assert read_messages(tmp_path / "array.json") == expected


@pytest.mark.parametrize("bad", ['{"prompt": "cut', '["prompt"]', {"prompt": 3}, {"question": "unknown key"}])
def test_a_bad_line_is_named_by_its_number(bad: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "good"}, bad)
    with pytest.raises(PrismError, match=r"prompts\.jsonl, line 2: "):
        read_messages(path)
    with pytest.raises(PrismError, match=r"array\.json, record 2: a record must be"):
        read_messages(write(tmp_path / "array.json", '[{"prompt": "good"}, 3]'))


def test_files_without_a_usable_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="holds no records"):
        read_messages(write(tmp_path / "empty.jsonl"))
    with pytest.raises(PrismError, match=r"none of the 2 records .* \(line 1: an empty message\)"):
        read_messages(write(tmp_path / "blank.jsonl", {"prompt": ""}, {"prompt": " "}))
    with pytest.raises(PrismError, match="cannot read"):
        read_messages(tmp_path / "missing.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"prompt": "\xff\xfe"}')
    with pytest.raises(PrismError, match="not UTF-8"):
        read_messages(binary)


def test_prompts_are_rendered_with_the_chat_template_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    conversations = [[user("dog")], [user("x" * 500)], [user("dog")], [user("fox")]]
    prompts = tokenize_prompts(conversations, tokenizer, max_tokens=60)
    assert (len(prompts.prompts), prompts.too_long, prompts.duplicates, prompts.refused) == (2, 1, 1, 0)
    rendered = "<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts.prompts[0], skip_special_tokens=False) == rendered


def test_no_usable_prompt_and_an_unusable_template_are_refused() -> None:
    with pytest.raises(PrismError, match="raise --max-prompt-tokens"):
        tokenize_prompts([[user("dog")]], tiny_tokenizer(), max_tokens=2)
    plain = Tokenizer(tiny_tokenizer()._fast, TokenizerSettings())
    with pytest.raises(PrismError, match="no chat template"):
        tokenize_prompts([[user("dog")]], plain, max_tokens=60)
    with pytest.raises(PrismError, match="ignores add_generation_prompt"):
        tokenize_prompts([[user("dog")]], WITHOUT_GENERATION_PROMPT.tokenizer(), max_tokens=60)


def test_conversations_that_the_template_refuses_are_counted() -> None:
    system = [{"role": "system", "content": "s"}, user("dog")]
    prompts = tokenize_prompts([system, [user("dog")]], GEMMA.tokenizer(), max_tokens=60)
    assert (len(prompts.prompts), prompts.refused) == (1, 1)
    with pytest.raises(PrismError, match="System role not supported"):
        tokenize_prompts([system], GEMMA.tokenizer(), max_tokens=60)


def test_a_template_with_the_date_gives_the_same_prompts_on_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Tomorrow:
            return super().now(tz) + timedelta(days=1)

    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} " + CHAT_TEMPLATE
    settings = tiny_tokenizer().settings.model_copy(update={"chat_template": template})
    tokenizer = Tokenizer(tiny_tokenizer()._fast, settings)
    messages = [user("dog"), {"role": "assistant", "content": "yes"}]
    today = tokenize_prompts([messages[:1]], tokenizer, max_tokens=200), mask_answers(messages, tokenizer)
    served = tokenizer.render_chat(messages)
    monkeypatch.setattr("prism_trt.target.tokenizer.datetime", Tomorrow)
    tokenizer = Tokenizer(tiny_tokenizer()._fast, settings)
    assert (tokenize_prompts([messages[:1]], tokenizer, 200), mask_answers(messages, tokenizer)) == today
    assert tokenizer.render_chat(messages) != served


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PrismError, match=r"pipe is not a regular file, .*: pass the path of a file"):
        read_records(tmp_path / "pipe")
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "dog"}')
    os.close(writing)
    with pytest.raises(PrismError, match="is not a regular file"):
        read_records(Path(f"/dev/fd/{reading}"))
    os.close(reading)


LONG = "why does the quick brown fox jump over the lazy dog that sleeps under the old apple tree all day"


def dirty_file(path: Path) -> Path:
    answer = {"role": "assistant", "content": "<think>hm</think>yes"}
    return write(
        path,
        {"prompt": "dog"},
        {"prompt": " dog", "conversations": []},
        {"conversations": [{"from": "gpt", "value": "hello"}]},
        {"messages": [user("fox"), answer, user("and the dog?")]},
        {"turns": ["the dog sleeps", "why?"]},
        {"prompt": "dog"},
        {"prompt": "x" * 500},
        {"prompt": f"Please tell me: {LONG.upper()}!"},
        {"prompt": f"{LONG}, please"},
        {"prompt": ""},
    )


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    evaluation = write(tmp_path / "question.jsonl", {"question_id": 1, "turns": ["quick", "The dog: sleeps?"]})
    config = PromptConfig(turns=2, near_duplicates=0.6, exclude=[evaluation])
    prompts, report = prepare_prompts(dirty_file(tmp_path / "dirty.jsonl"), tiny_tokenizer(), 200, config)
    assert report.formats == {"prompt": 6, "conversations": 2, "messages": 1, "turns": 1}
    assert {reason: (skip.records, skip.first) for reason, skip in report.skipped.items()} == {
        "no messages": (1, "line 2"),
        "starts with an answer": (1, "line 3"),
        "an empty message": (1, "line 10"),
    }
    assert (report.excluded, report.near_duplicates, report.thinking_removed) == (1, 2, 1)
    assert (report.too_long, report.duplicates, report.refused) == (1, 0, 0)
    skipped = sum(skip.records for skip in report.skipped.values())
    assert report.records == sum(report.formats.values()) == 10
    assert report.records == skipped + report.excluded + report.near_duplicates + report.conversations
    assert report.asked == report.conversations + 1 == report.too_long + report.prompts
    assert report.prompts == len(prompts) == 4

    report.save(tmp_path / "report.json")
    assert DataReport.model_validate_json((tmp_path / "report.json").read_text()) == report
    text = "\n".join(report.lines())
    assert "10 records (6 prompt, 2 conversations, 1 messages, 1 turns), 4 prompts; thinking removed from 1" in text
    assert "1 skipped: starts with an answer (first: line 3)" in text
    assert "1 with text of an excluded file; 2 much like an earlier one; 1 too long" in text


def test_by_default_only_the_same_tokens_are_a_repetition(tmp_path: Path) -> None:
    path = dirty_file(tmp_path / "dirty.jsonl")
    prompts, report = prepare_prompts(path, tiny_tokenizer(), 200, PromptConfig())
    assert (report.duplicates, report.near_duplicates, report.excluded) == (1, 0, 0)
    assert prompts == tokenize_prompts(read_messages(path), tiny_tokenizer(), 200).prompts


def test_a_file_that_is_excluded_from_itself_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "dog"}, {"prompt": LONG})
    with pytest.raises(PrismError, match="pass another --exclude"):
        prepare_prompts(path, tiny_tokenizer(), 200, PromptConfig(exclude=[path]))
