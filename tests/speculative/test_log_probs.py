"""Log-probabilities are those of one causal pass, whatever rounds the tokens come from."""

from __future__ import annotations

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder
from prism_trt.speculative.log_probs import ScoredToken, score_tokens
from prism_trt.speculative.request import Event, Request
from prism_trt.speculative.sampling import SamplingParams
from tests.speculative.engines import ENGINES, tiny_engine
from tests.tiny import tiny_target

TREE = TreeShape(depth=3, width=3, size=8)
LIMITS = EngineLimits(slots=6, context=96, tokens_per_call=64)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return tiny_engine(request.param, LIMITS)


def test_every_kind_of_round(engine: Engine) -> None:
    prompt = torch.randint(0, 320, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    sampled = SamplingParams(temperature=0.7, top_k=5, seed=2)
    requests = [
        Request(prompt, 30, tree=TREE, log_probs=3),
        Request(prompt[3:], 30, sampled, tree=TREE, log_probs=0),
        Request(prompt[1:], 30, tree=TREE),
        Request(prompt, 30, log_probs=20),
        Request(prompt[2:], 30, sampled, log_probs=1),
        Request(prompt, 2, tree=TREE, log_probs=3),
    ]
    decoder = Decoder(engine)
    events: dict[int, list[Event]] = {decoder.add(request): [] for request in requests}
    while decoder.active:
        for event in decoder.step():
            events[event.id].append(event)
    # The C++ engine gives the same bits however the tokens are spread over calls.
    tolerance = 1e-3 if isinstance(engine, TorchEngine) else 0.0
    for request, happened in zip(requests, events.values(), strict=True):
        tokens = [token for event in happened for token in event.tokens]
        scored = [token for event in happened for token in event.scored]
        if request.log_probs is None:
            assert scored == []
            continue
        assert [token.token for token in scored] == tokens
        assert all(len(event.tokens) == len(event.scored) for event in happened)
        sequence = torch.tensor(request.prompt + tokens[:-1])
        logits = engine.forward(TokenBatch.one_row(sequence, 0)).logits
        assert logits is not None
        expected = logits[0, len(request.prompt) - 1 :].log_softmax(-1)
        for token, row in zip(scored, expected, strict=True):
            assert token.log_prob == pytest.approx(row[token.token].item(), abs=tolerance)
            assert len(token.alternatives) == request.log_probs
            for word, log_prob in token.alternatives:
                assert log_prob == pytest.approx(row[word].item(), abs=tolerance)
            if request.sampling.greedy and token.alternatives:
                assert token.alternatives[0] == (token.token, token.log_prob)


def test_scores() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    log_probs = logits.log_softmax(-1)
    assert score_tokens(logits, [2, 1], 0) == [
        ScoredToken(2, log_probs[0, 2].item(), ()),
        ScoredToken(1, log_probs[1, 1].item(), ()),
    ]
    assert [word for word, _ in score_tokens(logits, [0, 0], 20)[0].alternatives] == [1, 2, 0]


@pytest.mark.parametrize("count", [-1, 21])
def test_too_many_alternatives_are_refused(count: int) -> None:
    decoder = Decoder(TorchEngine(tiny_target(), None, LIMITS, torch.device("cpu")))
    with pytest.raises(PrismError, match="ask for 0 to 20"):
        decoder.add(Request([1], 5, log_probs=count))
