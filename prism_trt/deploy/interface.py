"""The tensors of the served model.

Names and types are those of the `ensemble` model of TensorRT-LLM's Triton backend, so its clients work unchanged;
`stop` is one of its `tensorrt_llm` model; `chat`, `messages`, `user`, `top_log_probs`, `log_probs`, `finish_reason`,
`num_reused_tokens` and `num_target_passes` are additions. Inputs whose feature is absent here are accepted with their
neutral value, which many clients always send, and refused with any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

TRY_AGAIN = "try again later"
"""How the served model's refusals end when waiting helps."""

Fault = Literal["invalid", "unavailable", "internal"]
"""Whose fault an error is: the request's, nobody's (another server may do), or the server's."""

CODES: dict[Fault, str] = {"invalid": "INVALID_ARG", "unavailable": "UNAVAILABLE", "internal": "INTERNAL"}
"""Names of Triton's error codes."""
_ERROR = re.compile(rf"\[({'|'.join(CODES.values())})\] (.*)", re.DOTALL)


def error_text(fault: Fault, sentence: str) -> str:
    """What is sent for an error: a stream carries its text only, so the code is put before the sentence.

    (With the header ``triton_grpc_error`` streams would end with a code, but Triton 2.51 crashes of that now and then.)
    """
    return f"[{CODES[fault]}] {sentence}"


def parse_error(text: str) -> tuple[Fault | None, str]:
    """Fault and sentence of an error's text; the fault is None if the served model did not write it."""
    if found := _ERROR.fullmatch(text.strip()):
        return next(fault for fault, code in CODES.items() if code == found[1]), found[2]
    return None, text.strip()


@dataclass(frozen=True)
class Tensor:
    """One input or output of shape [1, `size`]; `size` -1 is any number of values."""

    name: str
    type: str
    size: int = 1


INPUTS = (
    Tensor("text_input", "STRING"),
    Tensor("max_tokens", "INT32"),
    Tensor("stream", "BOOL"),
    Tensor("stop", "BOOL"),
    Tensor("chat", "BOOL"),
    Tensor("messages", "STRING"),
    Tensor("exclude_input_in_output", "BOOL"),
    Tensor("user", "STRING"),
    Tensor("temperature", "FP32"),
    Tensor("top_k", "INT32"),
    Tensor("top_p", "FP32"),
    Tensor("seed", "UINT64"),
    Tensor("stop_words", "STRING", -1),
    Tensor("bad_words", "STRING", -1),
    Tensor("end_id", "INT32"),
    Tensor("pad_id", "INT32"),
    Tensor("min_tokens", "INT32"),
    Tensor("num_return_sequences", "INT32"),
    Tensor("beam_width", "INT32"),
    Tensor("length_penalty", "FP32"),
    Tensor("repetition_penalty", "FP32"),
    Tensor("presence_penalty", "FP32"),
    Tensor("frequency_penalty", "FP32"),
    Tensor("return_log_probs", "BOOL"),
    Tensor("top_log_probs", "INT32"),
    Tensor("return_context_logits", "BOOL"),
    Tensor("return_generation_logits", "BOOL"),
    Tensor("return_perf_metrics", "BOOL"),
    Tensor("return_num_input_tokens", "BOOL"),
    Tensor("return_num_output_tokens", "BOOL"),
)
REQUIRED = ("text_input", "max_tokens")

NEUTRAL: dict[str, tuple[float, ...]] = {
    "min_tokens": (0, 1),
    "num_return_sequences": (1,),
    "beam_width": (1,),
    "length_penalty": (0, 1),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "return_perf_metrics": (False,),
}
"""Values with which an input asks for nothing."""

OUTPUTS = (
    Tensor("text_output", "STRING"),
    Tensor("output_log_probs", "FP32", -1),
    Tensor("log_probs", "STRING"),
    Tensor("finish_reason", "STRING"),
    Tensor("num_input_tokens", "INT32"),
    Tensor("num_reused_tokens", "INT32"),
    Tensor("num_output_tokens", "INT32"),
    Tensor("num_target_passes", "INT32"),
    Tensor("total_draft_tokens", "INT32"),
    Tensor("total_accepted_draft_tokens", "INT32"),
    Tensor("acceptance_rate", "FP32"),
)
"""Every response has `text_output` and, if asked for, log-probabilities; the rest comes with the last one only."""
