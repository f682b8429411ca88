from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_trt.data.prompts import read_messages, tokenize_prompts
from prism_trt.errors import PrismError
from prism_trt.target.tokenizer import Tokenizer, TokenizerSettings
from tests.tiny import tiny_tokenizer


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_three_forms_of_records(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s"}
    path = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "one", "source": "ignored"},
        "",
        {"turns": ["two", "later"], "question_id": 7},
        {"messages": [system, user("three"), {"role": "assistant", "content": "dropped"}]},
        {"messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")]},
    )
    assert read_messages(path) == [
        [user("one")],
        [user("two")],
        [system, user("three")],
        [user("a"), {"role": "assistant", "content": "b"}, user("c")],
    ]


@pytest.mark.parametrize(
    "bad",
    [
        '{"prompt": "cut',
        '["prompt"]',
        {"prompt": ""},
        {"prompt": 3},
        {"turns": []},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "only"}]},
        {"text": "unknown key"},
    ],
)
def test_a_bad_line_is_named_by_its_number(bad: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "good"}, bad)
    with pytest.raises(PrismError, match="line 2"):
        read_messages(path)


def test_an_empty_a_missing_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="holds no prompts"):
        read_messages(write(tmp_path / "empty.jsonl"))
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
    assert (len(prompts.prompts), prompts.too_long, prompts.duplicates) == (2, 1, 1)
    rendered = "<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts.prompts[0], skip_special_tokens=False) == rendered


def test_no_usable_prompt_and_no_template_are_refused() -> None:
    with pytest.raises(PrismError, match="raise --max-prompt-tokens"):
        tokenize_prompts([[user("dog")]], tiny_tokenizer(), max_tokens=2)
    plain = Tokenizer(tiny_tokenizer()._fast, TokenizerSettings())
    with pytest.raises(PrismError, match="no chat template"):
        tokenize_prompts([[user("dog")]], plain, max_tokens=60)
