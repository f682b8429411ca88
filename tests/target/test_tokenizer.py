"""Tokenizer, chat template and incremental detokenisation."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.errors import PrismError
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.loading import Target
from prism_trt.target.tokenizer import TRAINING_DATE, Tokenizer, TokenizerSettings
from tests.tiny import tiny_tokenizer

CHATS = [
    [{"role": "user", "content": "Hello there!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Größe 🙂"},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(smollm2: Target, messages: list[dict[str, str]], prompt: bool) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(smollm2.path.parent), gguf_file=smollm2.path.name)
    options = {"add_generation_prompt": prompt}
    rendered = reference.apply_chat_template(messages, tokenize=False, **options)
    assert smollm2.tokenizer.render_chat(messages, prompt) == rendered
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert smollm2.tokenizer.encode_chat(messages, prompt) == ids


def test_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("fox jumps") == tokenizer.encode("fox jumps")
    assert loaded.eos_token_ids == tokenizer.eos_token_ids


def test_missing_or_failing_templates_are_explained(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "prism_tokenizer.json").write_text(TokenizerSettings().model_dump_json())
    with pytest.raises(PrismError, match="no chat template"):
        Tokenizer.load(tmp_path).encode_chat(CHATS[0])
    refusing = TokenizerSettings(chat_template="{{ raise_exception('roles must alternate') }}")
    (tmp_path / "prism_tokenizer.json").write_text(refusing.model_dump_json())
    with pytest.raises(PrismError, match="roles must alternate"):
        Tokenizer.load(tmp_path).encode_chat(CHATS[0])
    for expression, reason in {"m.content + 1": "TypeError: can only", "1 // 0": "ZeroDivisionError: .*"}.items():
        wrong = TokenizerSettings(chat_template=f"{{% for m in messages %}}{{{{ {expression} }}}}{{% endfor %}}")
        (tmp_path / "prism_tokenizer.json").write_text(wrong.model_dump_json())
        with pytest.raises(PrismError, match=rf"cannot render the messages \({reason}.*\): correct the template"):
            Tokenizer.load(tmp_path).encode_chat(CHATS[0])
    (tmp_path / "prism_tokenizer.json").write_text('{"colour": "red"}')
    with pytest.raises(PrismError, match="colour"):
        Tokenizer.load(tmp_path)


def test_a_template_prints_the_date_that_is_chosen() -> None:
    settings = TokenizerSettings(chat_template="{{ strftime_now('%d %B %Y') }}")
    tokenizer = Tokenizer(tiny_tokenizer()._fast, settings)
    dated = tokenizer.dated(TRAINING_DATE)
    assert dated.render_chat(CHATS[0]) == "01 January 2025"
    assert dated.fingerprint == tokenizer.fingerprint
    assert datetime.strptime(tokenizer.render_chat(CHATS[0]), "%d %B %Y") > TRAINING_DATE


@given(text=st.text(), data=st.data())
def test_stream_never_splits_characters(text: str, data: st.DataObject) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    stream, pieces, at = DetokenizerStream(tokenizer), [], 0
    while at < len(ids):
        count = data.draw(st.integers(1, len(ids) - at))
        pieces.append(stream.push(ids[at : at + count]))
        at += count
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_unfinished_characters_end_as_replacement() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    stream = DetokenizerStream(tokenizer)
    assert stream.push(ids[:-1]) == ""
    assert "\ufffd" in stream.flush()
