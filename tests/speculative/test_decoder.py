from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import LogitsFor, TargetOutput, TokenBatch
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder, Event, Request, Result, generate
from prism_trt.speculative.sampling import SamplingParams
from tests.speculative.bag_engine import BagEngine, FusedBagEngine
from tests.speculative.distributions import p_value

CHAIN = TreeShape(depth=4, width=1, size=5)
SMALL = TreeShape(depth=3, width=2, size=6)
LARGE = TreeShape(depth=4, width=4, size=20)
FLAT = TreeShape(depth=1, width=5, size=5)
DEEP = TreeShape(depth=6, width=4, size=6)  # more draft entries in flight than nodes verified
TREES = [CHAIN, SMALL, LARGE, FLAT, DEEP]


def prompts(count: int, seed: int = 0, longest: int = 30, vocab: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def full_features(engine: BagEngine, tokens: list[int]) -> Tensor:
    """[T, F] features of one causal pass over a fresh pool."""
    zeros = torch.zeros(1, dtype=torch.int64)
    batch = TokenBatch(
        torch.tensor([tokens]), torch.arange(len(tokens))[None], zeros, zeros, torch.tensor([len(tokens)])
    )
    pool = torch.full_like(engine.target_pool, torch.nan)
    return engine._attend(pool, batch, engine.embedding[batch.tokens])[0]


def reference(engine: BagEngine, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that recomputes the whole sequence for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int((2 * full_features(engine, tokens)[-1] @ engine.head).float().argmax()))
    return tokens[len(prompt) :]


def run(engine: BagEngine, requests: list[Request]) -> list[Result]:
    results = generate(engine, requests)
    assert len(results) == len(requests)
    return results


@pytest.mark.parametrize("tree", [None, *TREES], ids=str)
@pytest.mark.parametrize("engine_type", [BagEngine, FusedBagEngine])
def test_greedy_output_is_the_targets(tree: TreeShape | None, engine_type: type[BagEngine]) -> None:
    engine = engine_type(seed=1, tokens_per_call=32)
    inputs = prompts(10, longest=50)
    results = run(engine, [Request(prompt, 24, tree=tree) for prompt in inputs])
    for prompt, result in zip(inputs, results, strict=True):
        assert result.tokens == reference(engine, prompt, 24)
        assert result.finish_reason == "length"
        assert result.statistics.num_input_tokens == len(prompt)
        assert result.statistics.num_output_tokens == 24
    if tree is not None:
        assert sum(result.statistics.accepted for result in results) > 0


@given(
    seed=st.integers(0, 10**6),
    trees=st.lists(st.sampled_from([None, *TREES]), min_size=1, max_size=7),
    noise=st.floats(0, 2),
    slots=st.integers(1, 4),
    tokens_per_call=st.integers(20, 70),
    narrow=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_mix_of_requests_gives_what_each_gives_alone(
    seed: int, trees: list[TreeShape | None], noise: float, slots: int, tokens_per_call: int, narrow: bool
) -> None:
    draft_vocab = list(range(0, 40, 3)) if narrow else None
    engine = BagEngine(seed, 40, draft_vocab, slots, 60, tokens_per_call, noise, modules=3)
    inputs = prompts(len(trees), seed, longest=40)
    requests = [
        Request(prompt, 5 + 3 * i, tree=tree, sampling=SamplingParams(temperature=0.8 * (i % 2), seed=i))
        for i, (prompt, tree) in enumerate(zip(inputs, trees, strict=True))
    ]
    for request, result in zip(requests, run(engine, requests), strict=True):
        assert result.tokens == run(engine, [request])[0].tokens
        if request.sampling.greedy:
            assert result.tokens == reference(engine, request.prompt, len(result.tokens))


def test_sampled_output_depends_on_the_seed_only() -> None:
    engine = BagEngine(2)
    prompt = prompts(1, 5)[0]

    def sample(seed: int | None, tree: TreeShape | None) -> list[int]:
        return run(engine, [Request(prompt, 20, SamplingParams(temperature=1.2, seed=seed), tree=tree)])[0].tokens

    for tree in (None, SMALL):
        assert sample(3, tree) == sample(3, tree)
        assert len({tuple(sample(seed, tree)) for seed in range(5)}) == 5
        assert len({tuple(sample(None, tree)) for _ in range(5)}) == 5


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("tree", [SMALL, FLAT], ids=str)
def test_sampled_sequences_follow_the_targets_distribution(temperature: float, tree: TreeShape) -> None:
    vocab, draws = 5, 6000
    engine = BagEngine(3, vocab, slots=500, context=24, tokens_per_call=4000)
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(draws)]
    results = run(engine, [Request([2, 0], 3, sampling, tree=tree) for sampling in params])
    assert sum(result.statistics.accepted for result in results) > draws / 4

    tables = []
    for depth in range(3):
        table = torch.empty(*[vocab] * (depth + 1))
        for prefix in product(range(vocab), repeat=depth):
            logits = (2 * full_features(engine, [2, 0, *prefix])[-1] @ engine.head).float()
            table[prefix] = (logits / temperature).softmax(0)
        tables.append(table)
    assert p_value(torch.tensor([result.tokens for result in results]), tables) > 1e-3


def test_batched_calls_stay_within_the_engines_limit() -> None:
    engine = BagEngine(3, slots=8, tokens_per_call=25)  # the engine asserts it
    results = run(engine, [Request(prompt, 12, tree=LARGE) for prompt in prompts(8, longest=60)])
    assert all(len(result.tokens) == 12 for result in results)
    engine.calls.clear()
    run(engine, [Request([1, 2, 3], 12, tree=CHAIN) for _ in range(5)])
    assert ("forward", 25) in engine.calls  # five chains of five nodes in one call


def test_events_add_up_and_the_first_token_comes_with_the_prefill() -> None:
    engine = BagEngine(4, tokens_per_call=20)
    decoder = Decoder(engine)
    number = decoder.add(Request(prompts(1, longest=1)[0] * 45, 15, tree=SMALL))
    steps: list[list[Event]] = []
    while decoder.active:
        steps.append(decoder.step())
    assert [len(events) for events in steps[:3]] == [0, 0, 1]  # 45 tokens are three chunks
    assert len(steps[2][0].tokens) == 1
    events = [event for step in steps for event in step]
    assert all(event.id == number for event in events)
    assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
    assert all(event.stats is None for event in events[:-1])
    stats = events[-1].stats
    assert stats is not None
    assert sum(len(event.tokens) for event in events) == stats.num_output_tokens == 15
    assert stats.target_passes == len(events) - 1


def test_running_requests_advance_while_another_prefills() -> None:
    decoder = Decoder(BagEngine(4, tokens_per_call=20))
    running = decoder.add(Request([1, 2], 30, tree=SMALL))
    decoder.step()
    decoder.add(Request([3] * 50, 5))
    for _ in range(2):
        assert [event.id for event in decoder.step()] == [running]


class CountingEngine(BagEngine):
    """Counts the tokens that are not padding."""

    computed = 0

    def forward(self, batch: TokenBatch, logits_for: LogitsFor = "all") -> TargetOutput:
        self.computed += int(batch.counts.sum())
        return super().forward(batch, logits_for)


@pytest.mark.parametrize("prefill_tokens", [8, 20, 1000])
def test_prompts_are_computed_little_by_little_between_rounds(prefill_tokens: int) -> None:
    engine = CountingEngine(4, slots=5, tokens_per_call=64)
    decoder = Decoder(engine, prefill_tokens=prefill_tokens)
    running = [decoder.add(Request([1, 2], 80, tree=CHAIN)) for _ in range(2)]
    decoder.step()
    long, short = decoder.add(Request([3] * 90, 5)), decoder.add(Request([4] * 6, 5))
    firsts: dict[int, int] = {}
    for number in range(1, 40):
        engine.computed = 0
        events = decoder.step()
        # No running request misses a round, and no round waits for more prompt tokens than it must.
        assert {event.id for event in events} >= set(running)
        rounds = len(running) * CHAIN.size + sum(event.id in firsts for event in events)
        assert engine.computed - rounds <= min(prefill_tokens, 64)
        for event in events:
            firsts.setdefault(event.id, number)
        if {long, short} <= firsts.keys():
            break
    assert firsts[short] <= math.ceil(6 / (prefill_tokens / 2)) < firsts[long] <= 1 + 96 / min(prefill_tokens, 64)


def test_a_prompt_has_whole_calls_when_nobody_waits_for_a_round() -> None:
    engine = BagEngine(4, tokens_per_call=64)
    decoder = Decoder(engine, prefill_tokens=8)
    decoder.add(Request([3] * 90, 5))
    while not decoder.step():
        pass
    assert [size for name, size in engine.calls if name == "forward"] == [64, 26]


def test_requests_wait_for_a_slot() -> None:
    engine = BagEngine(5, slots=2)
    decoder = Decoder(engine)
    assert decoder.room == 2
    numbers = [decoder.add(Request([i + 1], 4)) for i in range(5)]
    assert (decoder.active, decoder.room) == (5, -3)
    finished = []
    while decoder.active:
        finished += [event.id for event in decoder.step() if event.finished]
    assert sorted(finished) == numbers
    assert decoder.active == 0
    assert decoder.step() == []


def test_cancelled_requests_free_their_slot_and_disturb_nobody() -> None:
    engine = BagEngine(6, slots=2, tokens_per_call=20)
    decoder = Decoder(engine)
    keep = decoder.add(Request([1, 2, 3], 20, tree=SMALL))
    decode = decoder.add(Request([4, 5], 20, tree=CHAIN))
    decoder.step()
    wait = decoder.add(Request([6], 20))
    tokens: dict[int, list[int]] = {keep: [], decode: [], wait: []}
    assert decoder.cancel(wait)
    assert decoder.cancel(decode)
    assert not decoder.cancel(decode)
    prefill = decoder.add(Request([7] * 50, 20))
    decoder.step()
    assert decoder.cancel(prefill)
    late = decoder.add(Request([8, 9], 6, tree=LARGE))
    tokens[late] = []
    while decoder.active:
        for event in decoder.step():
            tokens[event.id] += event.tokens
    assert tokens[wait] == tokens[decode] == []
    assert tokens[late] == reference(engine, [8, 9], 6)
    whole = reference(engine, [1, 2, 3], 20)
    assert tokens[keep] == whole[-len(tokens[keep]) :] and len(tokens[keep]) > 5
    assert decoder._slots.free == 2


@pytest.mark.parametrize("tree", [None, *TREES], ids=str)
def test_end_of_sequence_ends_a_request_wherever_it_comes(tree: TreeShape | None) -> None:
    engine = BagEngine(1)
    prompt = prompts(1)[0]
    whole = reference(engine, prompt, 30)
    for eos in set(whole):
        result = run(engine, [Request(prompt, 30, eos_token_ids=(eos,), tree=tree)])[0]
        assert result.tokens == whole[: whole.index(eos) + 1]
        assert result.finish_reason == "stop"
        assert result.statistics.num_output_tokens == len(result.tokens)


@pytest.mark.parametrize("tree", [None, *TREES], ids=str)
def test_max_tokens_is_exact(tree: TreeShape | None) -> None:
    engine = BagEngine(1)
    prompt = prompts(1)[0]
    whole = reference(engine, prompt, 12)
    for limit in range(1, 13):
        result = run(engine, [Request(prompt, limit, tree=tree)])[0]
        assert result.tokens == whole[:limit]
        assert result.finish_reason == "length"


@pytest.mark.parametrize("tree", [None, *TREES], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 30, 39, 40])
def test_the_context_is_used_to_its_last_entry(tree: TreeShape | None, prompt_length: int) -> None:
    engine = BagEngine(7, context=40, slots=2)  # writing past the context raises
    prompt = prompts(1, 3, longest=1)[0] * prompt_length
    result = run(engine, [Request(prompt, 1000, tree=tree)] * 2)[1]
    assert result.finish_reason == "length"
    # The last token needs no entry of its own.
    assert len(prompt) + len(result.tokens) == 41
    assert result.tokens == reference(BagEngine(7, context=41), prompt, len(result.tokens))


@pytest.mark.parametrize("tree", [None, SMALL], ids=str)
@pytest.mark.parametrize("eos", [(), (0, 5, 7)])
def test_collected_features_are_those_of_a_full_pass(tree: TreeShape | None, eos: tuple[int, ...]) -> None:
    engine = BagEngine(8, tokens_per_call=20, slots=3)
    inputs = prompts(5, 1, longest=45)
    requests = [Request(prompt, 17, tree=tree, eos_token_ids=eos, collect_features=True) for prompt in inputs]
    for prompt, result in zip(inputs, run(engine, requests), strict=True):
        assert result.features is not None
        sequence = prompt + result.tokens
        expected = full_features(engine, sequence[:-1])
        assert result.features.dtype == torch.bfloat16
        assert result.features.shape == expected.shape
        torch.testing.assert_close(result.features.double(), expected, atol=0.005, rtol=0.01)
        assert (result.features.float().requires_grad_() * 2).requires_grad  # usable as a training input


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_committed_draft_entries_pair_a_true_feature_with_the_next_token(tree: TreeShape) -> None:
    engine = BagEngine(9, tokens_per_call=24, slots=3)
    inputs = prompts(3, 2, longest=45)
    requests = [Request(prompt, 30, tree=tree, collect_features=True) for prompt in inputs]
    for slot, (prompt, result) in enumerate(zip(inputs, run(engine, requests), strict=True)):
        tokens = torch.tensor(prompt + result.tokens)
        features = full_features(engine, tokens[:-1].tolist())
        entries = engine.embedding[tokens[1:]] + 0.2 * features @ engine.fuse[0]
        entries = entries * torch.cos(torch.arange(len(features))[:, None] * engine.frequency)
        committed = len(features) - tree.depth - 1  # what the last round committed was not extended over
        assert committed > len(prompt)
        torch.testing.assert_close(engine.draft_pool[slot, :committed], entries[:committed], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine_type", [BagEngine, FusedBagEngine])
def test_log_probabilities_are_those_of_a_full_pass(engine_type: type[BagEngine]) -> None:
    engine = engine_type(1, slots=4, tokens_per_call=64)
    sampled = SamplingParams(temperature=0.7, top_k=9, seed=2)
    prompt = prompts(1)[0]
    for tree, sampling in product((None, SMALL, LARGE), (SamplingParams(), sampled)):
        decoder = Decoder(engine)
        decoder.add(Request(prompt, 30, sampling, tree=tree, log_probs=3))
        decoder.add(Request(prompt[1:], 30, sampling, tree=tree))
        events: list[Event] = []
        while decoder.active:
            events += [event for event in decoder.step() if event.id == 0 or event.scored]
        tokens = [token for event in events for token in event.tokens]
        scored = [entry for event in events for entry in event.scored]
        assert [entry.token for entry in scored] == tokens
        assert events[-1].stats is not None and (events[-1].stats.accepted > 0) == (tree is not None)
        features = full_features(engine, prompt + tokens[:-1])[len(prompt) - 1 :]
        expected = (2 * features @ engine.head).float().log_softmax(-1)
        for entry, row in zip(scored, expected, strict=True):
            assert entry.log_prob == pytest.approx(row[entry.token].item(), abs=1e-4)
            best = row.topk(3)
            assert [word for word, _ in entry.alternatives] == best.indices.tolist()
            assert [value for _, value in entry.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_features_are_not_kept_unasked() -> None:
    assert run(BagEngine(8), [Request([1, 2], 5)])[0].features is None


def test_statistics_count_what_happened() -> None:
    engine = BagEngine(1)
    prompt = prompts(1)[0]
    result = run(engine, [Request(prompt, 40, tree=SMALL)])[0]
    stats = result.statistics
    passes = sum(1 for name, size in engine.calls if (name, size) == ("forward", SMALL.size))
    assert stats.target_passes == passes
    assert stats.drafted == passes * (SMALL.size - 1)
    assert stats.passes_by_tree == {SMALL: passes}
    assert stats.accepted_by_step[0] == passes - stats.accepted_counts[0]
    assert sum(stats.accepted_by_step) == stats.accepted
    assert stats.acceptance_length == 39 / passes
    # The last pass may have accepted tokens beyond max_tokens.
    assert 0 <= stats.accepted + passes - 39 <= SMALL.depth
    assert sum(stats.accepted_counts) == passes
    assert len(stats.accepted_counts) <= SMALL.depth + 1
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0

    vanilla = run(engine, [Request(prompt, 40)])[0].statistics
    assert (vanilla.target_passes, vanilla.drafted, vanilla.accepted) == (39, 0, 0)
    assert vanilla.passes_by_tree == {None: 39}
    assert vanilla.accepted_by_step == []
    assert vanilla.acceptance_length == 1
    assert math.isnan(run(engine, [Request(prompt, 1)])[0].statistics.acceptance_length)


def test_vanilla_requests_leave_the_drafter_alone() -> None:
    engine = BagEngine(1, has_drafter=False)
    run(engine, [Request([1, 2, 3], 5)])
    assert {name for name, _ in engine.calls} == {"forward"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 5), "prompt is empty"),
        (Request([1] * 97, 5), "97 tokens but the engine's context is 96"),
        (Request([1, 40], 5), "outside 0..39"),
        (Request([-1], 5), "outside 0..39"),
        (Request([1], 0), "max_tokens is 0"),
        (Request([1], 5, stop_words=("a",)), "need a tokenizer"),
        (Request([1], 5, stop_words=("",)), "stop word is empty"),
        (Request([1], 5, tree=TreeShape(depth=6, width=10, size=80)), "80 tokens per call but the engine allows 64"),
        (Request([1], 5, tree=LARGE), "width 4 exceeds the draft vocabulary of 3"),
    ],
)
def test_requests_that_cannot_run_are_refused(request_: Request, message: str) -> None:
    decoder = Decoder(BagEngine(draft_vocab=[1, 2, 3]))
    with pytest.raises(PrismError, match=message):
        decoder.add(request_)
    assert decoder.active == 0


def test_a_tree_needs_a_drafter() -> None:
    with pytest.raises(PrismError, match="has no drafter"):
        Decoder(BagEngine(has_drafter=False)).add(Request([1], 5, tree=SMALL))
