from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prism_trt.speculative.sampling import SamplingParams, draw, make_generator, uniforms, warp


@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 30),
    temperature=st.floats(0.05, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None)
def test_warp_equals_a_plain_reference(seed: int, vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
    probs = warp(logits[None], SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))[0]
    p = (logits.double() / temperature).softmax(0)
    ranked = sorted(range(vocab), key=lambda x: -p[x].item())[: top_k or vocab]
    total = sum(p[x].item() for x in ranked)
    kept, mass = [], 0.0
    for x in ranked:
        if abs(mass - top_p) < 1e-5:  # on the edge, rounding decides
            return
        if mass < top_p:
            kept.append(x)
        mass += p[x].item() / total
    expected = torch.zeros(vocab, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(probs.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.999])
def test_nuclei_of_large_vocabularies_are_those_of_sorting_everything(spread: float, top_p: float) -> None:
    logits = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * spread * 8).round() / 8  # many ties
    ranked, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
    expected = torch.zeros_like(ranked).scatter_(-1, order, ranked)
    expected /= expected.sum(-1, keepdim=True)
    assert torch.equal(warp(logits, SamplingParams(temperature=1.0, top_p=top_p)), expected)


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    assert warp(torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]]), SamplingParams()).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 9e-6, 1e-5, 1e-4])
def test_the_least_temperatures_give_probabilities(temperature: float) -> None:
    probs = warp(torch.tensor([[900.0, -900.0, 901.0, 0.0]]), SamplingParams(temperature=temperature, top_p=0.9))
    assert probs.tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_draw_is_the_inverse_cdf() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    points = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53]
    drawn = draw(probs.expand(len(points), -1), torch.tensor(points, dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]
    unnormalised = draw(3 * probs.expand(len(points), -1), torch.tensor(points, dtype=torch.float64))
    assert torch.equal(drawn, unnormalised)


def test_seeds() -> None:
    def first(seed: int | None) -> list[float]:
        generator = make_generator(SamplingParams(temperature=1, seed=seed))
        assert generator is not None
        return uniforms(generator, 4)

    assert first(7) == first(7) != first(8)
    assert first(None) != first(None)
    assert make_generator(SamplingParams(seed=7)) is None


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"unknown": 1},
    ],
)
def test_invalid_parameters_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams.model_validate(values)
