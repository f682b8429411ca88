"""The drafter gives the same hidden states and logits when it is trained as when it serves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prism_trt.config import TreeShape
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.speculative.decoder import Decoder, Request, generate
from prism_trt.target.loading import Target
from prism_trt.train.alignment import aligned_steps
from prism_trt.train.batch import PackedBatch, pack
from prism_trt.train.simulate import simulate_acceptance
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target

STEPS = 4
LIMITS = EngineLimits(slots=4, context=128, tokens_per_call=256)


def true_sequence(target: Target, tokens: list[int], prompt: int, layers: tuple[int, ...] = ()) -> FeatureSequence:
    ids = torch.tensor(tokens)
    with torch.inference_mode():
        final = target.model.forward_sequence(ids[None, :-1])[0].clone()
        features = target.model.forward_sequence(ids[None, :-1], layers)[0].clone()
    return FeatureSequence(ids, features, prompt, True, final if layers else None)


def call(tokens: list[int], position: int, length: int, offset: int | None = None) -> TokenBatch:
    """A call on slot 1: causal over committed tokens, or (with `offset`) one token of a chain `offset` entries deep."""
    return TokenBatch(
        tokens=torch.tensor([tokens]),
        positions=torch.arange(position, position + len(tokens))[None],
        slots=torch.tensor([1]),
        lengths=torch.tensor([length]),
        counts=torch.tensor([len(tokens)]),
        mask=None if offset is None else torch.ones(1, 1, offset + 1, dtype=torch.bool),
        offset=offset or 0,
    )


def served_steps(engine: TorchEngine, sequence: FeatureSequence, root: int) -> list[tuple[Tensor, Tensor]]:
    """Logits and hidden states of a chain of draft steps from `root`, fed with the sequence's own tokens."""
    tokens, features = sequence.tokens.tolist(), sequence.features[None]
    context = root + 1
    cut = context // 2  # the draft K/V arrives in two pieces, as it does when the decoder runs
    if cut:
        engine.extend(call(tokens[1 : cut + 1], 0, 0), features[:, :cut])
    outputs = [engine.extend(call(tokens[cut + 1 : context + 1], cut, cut), features[:, cut:context])]
    for step in range(1, STEPS):
        fed = call([tokens[root + 1 + step]], root + step, context, offset=step - 1)
        outputs.append(engine.step(step, fed, outputs[-1].hidden))
    return [(output.logits[0, -1], output.hidden[0, -1]) for output in outputs]


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding (of sums over large residual streams), relative to the largest entry."""
    assert float((found - expected).abs().max()) < 3e-5 * float(expected.abs().max())


@pytest.mark.parametrize("shape", DRAFTERS)
def test_training_and_serving_give_the_same_logits(shape: str) -> None:
    target = tiny_target(seed=3)
    drafter = tiny_drafter(target, **DRAFTERS[shape])
    layers = drafter.config.feature_layers
    generator = torch.Generator().manual_seed(4)
    sequences = [
        true_sequence(target, torch.randint(3, 320, (length,), generator=generator).tolist(), prompt, layers)
        for length, prompt in ((17, 6), (9, 1), (30, 20))
    ]
    batch = pack(sequences)
    head = drafter.head_rows(target.model.head_weight)
    with torch.inference_mode():
        trained = aligned_steps(drafter, target.model.model.embed_tokens.weight, batch, STEPS)

    engine = TorchEngine(target, drafter, LIMITS, torch.device("cpu"))
    compared = 0
    for sequence, span in zip(sequences, batch.spans, strict=True):
        for i in range(span.roots - STEPS + 1):
            row = span.root_start + i
            for step, (logits, hidden) in enumerate(served_steps(engine, sequence, int(batch.root_positions[row]))):
                assert_near(trained[step][row], hidden)
                assert_near(trained[step][row] @ head.T, logits)
                compared += 1
    assert compared == STEPS * sum(span.roots - STEPS + 1 for span in batch.spans)


def test_simulated_acceptance_is_the_acceptance_of_the_decoder() -> None:
    target = tiny_target(seed=5)
    drafter = tiny_drafter(target, modules=2, draft_vocab_size=None).requires_grad_(True)
    prompt = torch.randint(3, 320, (8,), generator=torch.Generator().manual_seed(6)).tolist()
    vanilla = TorchEngine(target, None, LIMITS, torch.device("cpu"))
    answer = generate(vanilla, [Request(prompt, max_tokens=60, collect_features=True)])[0]
    sequence = true_sequence(target, prompt + answer.tokens, len(prompt))
    batch = pack([sequence])
    embedding, head = target.model.model.embed_tokens.weight, target.model.head_weight
    fit(drafter, batch, embedding, head)

    with torch.inference_mode():
        steps = aligned_steps(drafter, embedding, batch, 5)
    right = torch.stack([(h @ head.T).argmax(-1) == batch.next_tokens.roll(-k) for k, h in enumerate(steps)], dim=1)
    complete = right[: batch.rows - 4].long().cumprod(1).sum(1)
    simulated = simulate_acceptance(drafter, embedding, head, [batch], torch.float32)
    assert simulated.chain == pytest.approx(1 + float(complete.float().mean()))

    # The decoder's rounds start at the first root and go on behind what was accepted.
    rounds, root = [], 0
    while root < len(complete):
        rounds.append(int(complete[root]))
        root += rounds[-1] + 1
    assert 10 < sum(rounds) < 50, "the drafter must be right often, but not always, for this to mean anything"
    engine = TorchEngine(target, drafter.requires_grad_(False), LIMITS, torch.device("cpu"))
    decoder = Decoder(engine)
    decoder.add(Request(prompt, max_tokens=60, tree=TreeShape(depth=5, width=1, size=6)))
    committed = []
    while decoder.active:
        committed += [len(event.tokens) for event in decoder.step()]
    assert committed[0] == 1  # the prefill's token
    assert committed[1 : len(rounds) + 1] == [accepted + 1 for accepted in rounds]


def fit(drafter: Drafter, batch: PackedBatch, embedding: Tensor, head: Tensor) -> None:
    """Fit `drafter` to the tokens of `batch`, so that its chains are accepted now and then."""
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-3)
    for _ in range(14):
        loss = torch.zeros(())
        for step, hidden in enumerate(aligned_steps(drafter, embedding, batch, 5)):
            valid = batch.remaining >= step
            loss = loss + functional.cross_entropy(hidden[valid] @ head.T, batch.next_tokens.roll(-step)[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
