"""Log-probabilities as clients get them."""

from __future__ import annotations

from typing import Any

from prism_trt.speculative.log_probs import ScoredToken
from prism_trt.target.tokenizer import Tokenizer


def describe(scored: list[ScoredToken], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The objects of `logprobs.content` in OpenAI's chat API."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": log_prob, "bytes": list(data)}

    return [
        {
            **entry(token.token, token.log_prob),
            "top_logprobs": [entry(other, log_prob) for other, log_prob in token.alternatives],
        }
        for token in scored
    ]
