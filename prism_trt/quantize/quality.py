"""What quantisation changes: the target's distributions, and how many drafted tokens would be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.model import Drafter
from prism_trt.target.model import LlamaModel
from prism_trt.train.batch import pack
from prism_trt.train.simulate import simulate_acceptance


class Divergence(NamedTuple):
    """Of one model's next-token distributions from another's, over the tokens of answers."""

    tokens: int
    kl: float
    """Mean of ``sum(p log(p / q))``, in nats."""
    same_first_choice: float
    """Share of tokens with the same most likely successor."""


@torch.inference_mode()
def divergence(model: LlamaModel, quantized: LlamaModel, sequences: Sequence[FeatureSequence]) -> Divergence:
    """How far `quantized` (q) is from `model` (p) where the answers of `sequences` are predicted."""
    kl, same = [], []
    for sequence in sequences:
        p, q = (_log_probs(each, sequence) for each in (model, quantized))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    every_kl = torch.cat(kl)
    return Divergence(len(every_kl), float(every_kl.mean()), float(torch.cat(same).double().mean()))


def _log_probs(model: LlamaModel, sequence: FeatureSequence) -> Tensor:
    """[answer tokens, V] float32."""
    states = model.forward_sequence(sequence.tokens[None])[0, sequence.prompt_length - 1 : -1]
    return model.head(states).log_softmax(-1)


@torch.no_grad()
def with_features(
    model: LlamaModel, drafter: Drafter | None, tokens: Tensor, prompt_length: int, greedy: bool = True
) -> FeatureSequence:
    """The answer `tokens` [n] with the features of `model` that `drafter` is fed."""
    config = None if drafter is None else drafter.config
    if config is None or config.features == "none":
        return FeatureSequence(tokens, torch.empty(len(tokens) - 1, 0), prompt_length, greedy)
    layers = (*config.feature_layers, model.config.num_layers)
    states = model.forward_sequence(tokens[None, :-1], layers)[0]
    return FeatureSequence.of(tokens, states, len(layers), prompt_length, greedy)


def acceptance_length(drafter: Drafter, model: LlamaModel, sequences: Sequence[FeatureSequence]) -> float:
    """That of a greedy chain (`simulate_acceptance`) when `drafter` is fed with the features of `sequences`."""
    embedding, head = model.model.embed_tokens.weight, drafter.head_rows(model.head_weight)
    batches = (pack([sequence]) for sequence in sequences)
    return simulate_acceptance(drafter, embedding, head, batches, torch.float32).chain
