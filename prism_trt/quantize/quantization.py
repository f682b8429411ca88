"""From a target, its drafter and a file of prompts to scales and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from prism_trt.data.prompts import PromptConfig, prepare_prompts
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.model import Drafter
from prism_trt.engines.loading import make_engine
from prism_trt.engines.protocol import Engine, EngineLimits
from prism_trt.errors import PrismError
from prism_trt.progress import progress
from prism_trt.quantize.calibration import calibrate, import_modelopt, serving_copy
from prism_trt.quantize.quality import acceptance_length, divergence, with_features
from prism_trt.quantize.report import QuantizationReport, Quantized
from prism_trt.quantize.scales import Quantization, Scales
from prism_trt.speculative.decoder import Request, generate
from prism_trt.target.loading import Target
from prism_trt.train.simulate import STEPS

MOST_PROMPTS = 128
"""Prompts used of a calibration file; the first ones."""
PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
"""Longest prompts and answers."""
_MEASURED = 4
"""One in so many answers measures instead of calibrating."""
_SLOTS = 8


def quantize(
    target: Target, drafter: Drafter | None, calibration: Path, quantization: Quantization, steps: int
) -> Quantized:
    """Calibrate on three quarters of the target's own answers to `calibration`, and measure on the rest.

    The acceptance length after quantisation is that of the quantised drafter fed by the quantised target, on the
    answers of the unquantised one.

    Args:
        target: float32.
        drafter: float32.
        calibration: prompts in any format of `prism_trt.data.prompts`.
        quantization: the kind.
        steps: draft steps of a round.

    Raises:
        PrismError: ModelOpt is not installed, or `calibration` cannot be read or has too few prompts.
    """
    import_modelopt()  # before minutes of work
    longest = min(PROMPT_TOKENS, target.config.max_position_embeddings - ANSWER_TOKENS)
    prompts, data = prepare_prompts(calibration, target.tokenizer, longest, PromptConfig.model_validate({}))
    prompts = prompts[:MOST_PROMPTS]
    limits = EngineLimits(_SLOTS, longest + ANSWER_TOKENS, longest)
    with progress("answering the calibration prompts"):
        answers = greedy_answers(make_engine(target, None, limits), prompts, target.tokenizer.eos_token_ids)
    # Shorter answers have no root with a whole chain of steps after it.
    long = [answer for answer in answers if len(answer[0]) - answer[1] > STEPS]
    if len(long) < _MEASURED:
        raise PrismError(
            f"{calibration} leads to {len(long)} answers of more than {STEPS} tokens but calibration needs "
            f"{_MEASURED}: pass a file with more prompts"
        )
    with progress("calibrating", 3) as reporter:
        sequences = [with_features(target.model, drafter, tokens, length) for tokens, length in long]
        reporter.advance()
        report, scales = calibrate_and_measure(target, drafter, sequences, quantization, steps, data.sha256)
        reporter.advance(2)
    return Quantized(scales, report)


def calibrate_and_measure(
    target: Target,
    drafter: Drafter | None,
    sequences: Sequence[FeatureSequence],
    quantization: Quantization,
    steps: int,
    calibration_sha256: str,
) -> tuple[QuantizationReport, Scales]:
    """The part of `quantize` after the answers; at least 4 `sequences`."""
    measured = sequences[_MEASURED - 1 :: _MEASURED]
    calibrated = [sequence for number, sequence in enumerate(sequences) if (number + 1) % _MEASURED]
    steps = steps if drafter is None else max(steps, len(drafter.config.step_map))
    models = calibrate(target.model, drafter, calibrated, quantization, steps)
    difference = divergence(target.model, models.model, measured)
    lengths = None
    if drafter is not None and models.drafter is not None:
        fed = [with_features(models.model, drafter, each.tokens, each.prompt_length) for each in measured]
        before = acceptance_length(serving_copy(drafter), target.model, measured)
        lengths = (before, acceptance_length(models.drafter, target.model, fed))
    report = QuantizationReport(
        quantization=quantization,
        calibration_sha256=calibration_sha256,
        calibrated_prompts=len(calibrated),
        measured_prompts=len(measured),
        measured_tokens=difference.tokens,
        kl_divergence=difference.kl,
        same_first_choice=difference.same_first_choice,
        acceptance_length=lengths,
    )
    return report, models.scales


def greedy_answers(
    engine: Engine, prompts: Sequence[list[int]], eos_token_ids: Sequence[int]
) -> list[tuple[torch.Tensor, int]]:
    """Tokens [n] of each prompt with the target's answer, and the prompt's length."""
    requests = [Request(prompt, ANSWER_TOKENS, eos_token_ids=tuple(eos_token_ids)) for prompt in prompts]
    results = generate(engine, requests)
    return [(torch.tensor(p + r.tokens), len(p)) for p, r in zip(prompts, results, strict=True)]
