"""What goes into the decoding loop and what comes out of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, draft_vocab_size
from prism_trt.errors import PrismError
from prism_trt.speculative.log_probs import MOST_ALTERNATIVES, ScoredToken
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.speculative.stopping import FinishReason
from prism_trt.target.tokenizer import Tokenizer

GREEDY = SamplingParams()
AUTO: Literal["auto"] = "auto"
RequestTree = TreeShape | Literal["auto"] | None


@dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt: list[int]
    """Token ids; at least one."""
    max_tokens: int
    """Tokens to generate at most; an end-of-sequence token counts."""
    sampling: SamplingParams = GREEDY
    stop_words: tuple[str, ...] = ()
    """Generation ends when the generated text holds one of them."""
    eos_token_ids: tuple[int, ...] = ()
    """Generation ends after one of them; empty ignores the end of sequence."""
    tree: RequestTree = None
    """Draft tree of each round; None decodes without the drafter, "auto" leaves each round to the decoder's planner.

    What a seed draws depends on the trees, and the planner's on what else runs. So a sampled request with a seed and
    "auto" gets the engine's default tree in every round."""
    collect_features: bool = False
    """Return the target's features of every token but the last."""
    log_probs: int | None = None
    """Return the tokens' log-probabilities, and as many alternatives for each; None: neither."""


@dataclass
class Statistics:
    """Counts and times of one request.

    `accepted` is what the target accepted; tokens that were then cut because the request ended inside an accepted path
    are in it, but not in `num_output_tokens`.
    """

    num_input_tokens: int
    reused_tokens: int = 0
    """Input tokens whose K/V an earlier request had left."""
    num_output_tokens: int = 0
    drafted: int = 0
    """Tree nodes verified, roots excluded."""
    prefill_seconds: float = 0.0
    """From the first prefill call to the first token."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    accepted_counts: list[int] = field(default_factory=list)
    """Entry a: passes in which exactly a drafted tokens were accepted."""
    passes_by_tree: Counter[TreeShape | None] = field(default_factory=Counter)
    """Target passes by the tree they verified; None: they had no draft."""

    @property
    def target_passes(self) -> int:
        """Target passes after the prefill."""
        return sum(self.accepted_counts)

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted."""
        return sum(a * passes for a, passes in enumerate(self.accepted_counts))

    @property
    def accepted_by_step(self) -> list[int]:
        """Entry k: passes in which the token drafted at step k was accepted."""
        return [sum(self.accepted_counts[k + 1 :]) for k in range(len(self.accepted_counts) - 1)]

    @property
    def acceptance_length(self) -> float:
        """Tokens put out per target pass, bonus included; NaN without a pass.

        The prefill and the token that it gives count in neither.
        """
        return (self.num_output_tokens - 1) / self.target_passes if self.target_passes else float("nan")


@dataclass(frozen=True)
class Event:
    """What a round did for one request."""

    id: int
    tokens: list[int]
    """Generated since the previous event; the last may be an end-of-sequence token."""
    finished: bool = False
    finish_reason: FinishReason | None = None
    stats: Statistics | None = None
    """Only when finished."""
    features: Tensor | None = None
    """[P + O - 1, F] bfloat16 on the CPU for P prompt and O output tokens; only when finished and asked for."""
    scored: list[ScoredToken] = field(default_factory=list)
    """`tokens` with their log-probabilities; empty unless asked for."""


@dataclass(frozen=True)
class Result:
    """A finished request."""

    tokens: list[int]
    statistics: Statistics
    finish_reason: FinishReason
    features: Tensor | None = None


def check_request(request: Request, engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Raises PrismError when `engine` can never run `request`."""
    limits, tree = engine.limits, request.tree
    if not request.prompt:
        raise PrismError("the prompt is empty: send at least one token")
    if len(request.prompt) > limits.context:
        raise PrismError(
            f"the prompt has {len(request.prompt)} tokens but the engine's context is {limits.context}: shorten it or "
            "build the engine with a larger context"
        )
    if min(request.prompt) < 0 or max(request.prompt) >= engine.vocab_size:
        raise PrismError(f"the prompt holds a token id outside 0..{engine.vocab_size - 1}: use the target's tokenizer")
    if request.max_tokens < 1:
        raise PrismError(f"max_tokens is {request.max_tokens}: ask for at least 1 token")
    if "" in request.stop_words:
        raise PrismError("a stop word is empty: remove it")
    if request.log_probs is not None and not 0 <= request.log_probs <= MOST_ALTERNATIVES:
        raise PrismError(
            f"log-probabilities of {request.log_probs} alternatives per token are asked for: ask for 0 to "
            f"{MOST_ALTERNATIVES}"
        )
    if request.stop_words and tokenizer is None:
        raise PrismError("stop words need a tokenizer: pass the engine's tokenizer to the decoder")
    if tree is None or tree == AUTO:
        return
    if not engine.has_drafter:
        raise PrismError("this engine has no drafter: ask for vanilla decoding or build it with a drafter")
    if tokens_per_row(tree) > limits.tokens_per_call:
        raise PrismError(
            f"the tree {tree} needs {tokens_per_row(tree)} tokens per call but the engine allows "
            f"{limits.tokens_per_call}: choose a smaller tree"
        )
    words = draft_vocab_size(engine)
    if tree.width > words:
        raise PrismError(
            f"the tree's width {tree.width} exceeds the draft vocabulary of {words}: choose a smaller width"
        )


def tokens_per_row(shape: TreeShape) -> int:
    """The longest of a round's calls: extend (at most depth + 1 tokens), step, verification."""
    return max(shape.depth + 1, shape.width, shape.size)
