"""Loss masks of rendered conversations, found by rendering their beginnings.

An answer's tokens are those that the chat template adds to the prompt before it (rendered with the generation prompt)
when the answer follows. Nothing is searched for in the text, so a template's own markers never have to be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_trt.data.records import Message
from prism_trt.errors import PrismError
from prism_trt.target.tokenizer import TRAINING_DATE, Tokenizer


@dataclass(frozen=True)
class MaskedConversation:
    """A rendered conversation and where its answers lie."""

    tokens: list[int]
    answers: tuple[range, ...]
    """Positions of each answer's tokens in `tokens`, the token that ends its turn included."""

    @property
    def mask(self) -> list[bool]:
        """One per token: it belongs to an answer, so it carries a loss."""
        carrying = {position for answer in self.answers for position in answer}
        return [position in carrying for position in range(len(self.tokens))]


def mask_answers(messages: Sequence[Message], tokenizer: Tokenizer) -> MaskedConversation:
    """Tokens of a whole conversation and the positions of its answers.

    An answer starts after the generation prompt and ends with the last of the tokenizer's EOS tokens in its turn: what
    a template writes after that (such as a line break) the target never generates. Without an EOS token the whole turn
    is the answer.

    Raises:
        PrismError: the rendering of a beginning is not the beginning of the rendering, in text or in tokens, so that
            the mask would not be what the target sees; or there is no answer, or the template leaves it out.
    """
    tokenizer = tokenizer.dated(TRAINING_DATE)
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    tokens = tokenizer.encode(text, add_special_tokens=False)

    def length(count: int, add_generation_prompt: bool) -> int:
        part = tokenizer.render_chat(messages[:count], add_generation_prompt)
        if not text.startswith(part):
            raise PrismError(
                f"the chat template writes messages 1 to {count} differently once more follow, so the answers have no "
                "fixed place: use a template that only appends, or conversations of one turn"
            )
        ids = tokenizer.encode(part, add_special_tokens=False)
        if tokens[: len(ids)] != ids:
            raise PrismError(
                f"the tokens of messages 1 to {count} change once more follow, so none is the first of what follows: "
                "use a chat template that puts a special token or a line break there"
            )
        return len(ids)

    eos = set(tokenizer.eos_token_ids)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = range(length(index, True), length(index + 1, False))
        if not turn:
            raise PrismError("the chat template leaves an answer out: use one that writes assistant messages")
        ends = [position for position in turn if tokens[position] in eos]
        answers.append(range(turn.start, ends[-1] + 1) if ends else turn)
    if not answers:
        raise PrismError("the conversation has no answer, so nothing would carry a loss: add an assistant message")
    return MaskedConversation(tokens, tuple(answers))


def require_generation_prompt(tokenizer: Tokenizer) -> None:
    """Refuse a chat template that writes something before each answer but ignores ``add_generation_prompt``.

    A target asked with such a template would not know that it is its turn. Templates whose answers directly follow the
    user's message, such as that of LLaMA-2, need no generation prompt.

    Raises:
        PrismError: the template is such a one, or there is none.
    """
    question = {"role": "user", "content": "?"}
    prompt = tokenizer.render_chat([question], add_generation_prompt=True)
    if prompt != tokenizer.render_chat([question], add_generation_prompt=False):
        return
    answered = tokenizer.render_chat([question, {"role": "assistant", "content": "Yes"}], add_generation_prompt=False)
    header = answered.removeprefix(prompt).partition("Yes")[0].strip()
    if answered.startswith(prompt) and header:
        raise PrismError(
            f"the chat template ignores add_generation_prompt but writes {header!r} before an answer, so the target "
            "would not know that it is its turn: add a generation prompt to the template"
        )
