"""The tensors of the served model.

Names and types are those of the `ensemble` model of TensorRT-LLM's Triton backend, so its clients work unchanged;
`chat`, `messages`, `user`, `top_log_probs`, `log_probs`, `finish_reason`, `num_reused_tokens` and `num_target_passes`
are additions. Inputs whose feature is absent here are accepted with their neutral value, which many clients always
send, and refused with any other.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BATCH_SIZE = 64
"""Upper bound on the requests Triton hands over at once; every request holds one prompt, of shape [1, 1]."""

TRY_AGAIN = "try again later"
"""How the served model's refusals end when waiting helps."""


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
