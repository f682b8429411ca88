"""What a quantisation costs, as manifests record it."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from prism_trt.config import StrictModel
from prism_trt.quantize.scales import Quantization, Scales


class QuantizationReport(StrictModel):
    """Measured on a quarter of the calibration prompts, which the scales do not come from."""

    quantization: Quantization
    calibration_sha256: str = Field(description="of the file of calibration prompts")
    calibrated_prompts: int
    measured_prompts: int
    measured_tokens: int = Field(description="of answers")
    kl_divergence: float = Field(description="mean, in nats, of the next token's distribution from the unquantised one")
    same_first_choice: float = Field(description="share of tokens whose most likely successor is the same")
    acceptance_length: tuple[float, float] | None = Field(
        description="simulated for a greedy chain of five steps, before and after; None without a drafter"
    )

    def __str__(self) -> str:
        text = (
            f"{self.quantization}: KL divergence {self.kl_divergence:.2g} nats, same first choice "
            f"{self.same_first_choice:.1%} of {self.measured_tokens} tokens"
        )
        if self.acceptance_length is not None:
            before, after = self.acceptance_length
            text += f", simulated acceptance length {before:.2f} -> {after:.2f}"
        return text


@dataclass(frozen=True)
class Quantized:
    """Everything a build needs to know about a quantisation."""

    scales: Scales
    report: QuantizationReport
