"""A target's tokenizer and chat template, on `tokenizers` and jinja2 alone so that a server starts fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError
from tokenizers import Tokenizer as FastTokenizer

from prism_trt.config import StrictModel, parse_json_file
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_json
from prism_trt.target.token_bytes import TokenBytes

TRAINING_DATE = datetime(2025, 1, 1)
"""What chat templates that print the date print in training prompts, so that they are the same on every day."""

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "prism_tokenizer.json"


class TokenizerSettings(StrictModel):
    """What a chat template needs besides the vocabulary."""

    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, fast: FastTokenizer, settings: TokenizerSettings, date: datetime | None = None) -> None:
        """`date` is what the chat template takes for the present; None for the clock's."""
        # A stored tokenizer may truncate or pad, which would silently change prompts.
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self.settings = settings
        self._date = date
        self._template: jinja2.Template | None = None
        self._bytes: TokenBytes | None = None

    def dated(self, date: datetime) -> Tokenizer:
        """The same tokenizer, with a chat template that takes `date` for the present."""
        return Tokenizer(self._fast, self.settings, date)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._fast.get_vocab_size()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generation."""
        return self.settings.eos_token_ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges and settings."""
        return sha256_json([json.loads(self._fast.to_str()), self.settings.model_dump()])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer adds around a text (such as a BOS token)."""
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What one token id stands for; not always whole characters."""
        if self._bytes is None:
            self._bytes = TokenBytes(self._fast)
        return self._bytes(token)

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat template's text of `messages` (``role`` and ``content`` each).

        Raises:
            PrismError: there is no template, it refuses the messages, or it is wrong.
        """
        if self.settings.chat_template is None:
            raise PrismError("the tokenizer has no chat template: use plain text, or add one to tokenizer_config.json")
        try:
            if self._template is None:
                self._template = _environment(self._date).from_string(self.settings.chat_template)
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.settings.bos_token or "",
                eos_token=self.settings.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise PrismError(f"the chat template refused the messages: {error}") from None
        except Exception as error:  # an expression in a template may raise anything
            raise PrismError(
                f"the chat template cannot render the messages ({type(error).__name__}: {error}): correct the template"
            ) from None

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `render_chat`, without adding special tokens the template has written itself."""
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `prism_tokenizer.json` into `directory`, creating it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._fast.save(str(directory / TOKENIZER_FILE))
        (directory / SETTINGS_FILE).write_text(self.settings.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            PrismError: a file is missing or damaged.
        """
        directory = Path(directory)
        settings = parse_json_file(TokenizerSettings, directory / SETTINGS_FILE)
        return cls(load_fast(directory / TOKENIZER_FILE), settings)


def load_fast(path: Path) -> FastTokenizer:
    """Read a `tokenizer.json`.

    Raises:
        PrismError: it is missing or damaged.
    """
    if not path.is_file():
        raise PrismError(f"{path} does not exist: the model directory needs a tokenizer.json")
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise PrismError(f"{path} is not a valid tokenizer.json: {error}") from None


def load_hf_tokenizer(directory: Path, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`).

    Raises:
        PrismError: a file is missing or damaged.
    """
    directory = Path(directory)
    if (directory / SETTINGS_FILE).is_file():
        return Tokenizer.load(directory)
    fast = load_fast(directory / TOKENIZER_FILE)
    config: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        try:
            config = json.loads((directory / "tokenizer_config.json").read_text())
        except ValueError as error:
            raise PrismError(f"{directory / 'tokenizer_config.json'} is not valid JSON: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text()
    eos = _token_text(config.get("eos_token"))
    ids = eos_token_ids or tuple(i for i in [fast.token_to_id(eos) if eos else None] if i is not None)
    try:
        settings = TokenizerSettings(
            chat_template=template, bos_token=_token_text(config.get("bos_token")), eos_token=eos, eos_token_ids=ids
        )
    except ValidationError as error:
        raise PrismError(f"{directory / 'tokenizer_config.json'}: {error.errors()[0]['msg']}") from None
    return Tokenizer(fast, settings)


def _token_text(value: str | dict[str, Any] | None) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _environment(date: datetime | None) -> ImmutableSandboxedEnvironment:
    """The environment chat templates are written for (`transformers`' ``_compile_jinja_template``)."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: (date or datetime.now()).strftime(form)
    return environment
