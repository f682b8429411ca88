"""The decoding loop: requests join and leave a running batch, each with its own tree, sampling and seed.

A request whose last token has index L in its sequence holds, between rounds, K/V of tokens 0..L-1 in the target. Draft
entry p pairs the target's feature at p with token p + 1; the entries that a round adds at its start bring the draft
K/V to L entries as well. The last token is the root of the round's tree, or the one input of a vanilla pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, FusedRoundEngine, TargetOutput, TokenBatch, Tree
from prism_trt.errors import PrismError
from prism_trt.speculative.kv_pool import SlotPool
from prism_trt.speculative.sampling import SamplingParams, draw, make_generator, uniforms, warp
from prism_trt.speculative.stopping import FinishReason, StopRule, TextStream
from prism_trt.speculative.tree import grow_tree
from prism_trt.speculative.verify import Verdict, verify_greedy, verify_sampling
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.tokenizer import Tokenizer

GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt: list[int]
    """Token ids; at least one."""
    max_tokens: int
    """Tokens to generate at most; an end-of-sequence token counts."""
    sampling: SamplingParams = GREEDY
    stop_words: tuple[str, ...] = ()
    """Generation ends when the generated text holds one of them."""
    eos_token_ids: tuple[int, ...] = ()
    """Generation ends after one of them; empty ignores the end of sequence."""
    tree: TreeShape | None = None
    """Draft tree of each round; None decodes without the drafter."""
    collect_features: bool = False
    """Return the target's features of every token but the last."""


@dataclass
class Statistics:
    """Counts and times of one request.

    `accepted` is what the target accepted; tokens that were then cut because the request ended inside an accepted path
    are in it, but not in `num_output_tokens`.
    """

    num_input_tokens: int
    num_output_tokens: int = 0
    target_passes: int = 0
    """Target passes after the prefill."""
    drafted: int = 0
    """Tree nodes verified, roots excluded."""
    prefill_seconds: float = 0.0
    """From the first prefill call to the first token."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    accepted_counts: list[int] = field(default_factory=list)
    """Entry a: passes in which exactly a drafted tokens were accepted."""

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted."""
        return sum(a * passes for a, passes in enumerate(self.accepted_counts))

    @property
    def acceptance_length(self) -> float:
        """Tokens put out per target pass, bonus included; NaN without a pass.

        The prefill and the token that it gives count in neither.
        """
        return (self.num_output_tokens - 1) / self.target_passes if self.target_passes else float("nan")


@dataclass(frozen=True)
class Event:
    """What a round did for one request."""

    id: int
    tokens: list[int]
    """Generated since the previous event; the last may be an end-of-sequence token."""
    finished: bool = False
    finish_reason: FinishReason | None = None
    stats: Statistics | None = None
    """Only when finished."""
    features: Tensor | None = None
    """[P + O - 1, F] bfloat16 on the CPU for P prompt and O output tokens; only when finished and asked for."""


@dataclass(frozen=True)
class Result:
    """A finished request."""

    tokens: list[int]
    statistics: Statistics
    finish_reason: FinishReason
    features: Tensor | None = None


class _Row:
    """A request inside the decoder."""

    def __init__(self, number: int, request: Request, stop: StopRule) -> None:
        self.id = number
        self.request = request
        self.stop = stop
        self.slot = -1
        self.length = 0
        """Target K/V entries; after the prefill also the index of the last token."""
        self.draft_length = 0
        self.root = -1
        """The last committed token, not yet in the target's K/V."""
        self.pending: list[int] = []
        """Committed tokens not yet in the draft K/V, with the features that precede them."""
        self.pending_features: Tensor | None = None
        self.generator = make_generator(request.sampling)
        self.collected: list[Tensor] = []
        self.stats = Statistics(len(request.prompt))
        self.started = 0.0
        self.first_token = 0.0


class Decoder:
    """Runs requests on an engine with continuous batching.

    Requests wait in order of arrival until one of the engine's slots is free. A request's output depends on its own
    prompt, parameters and seed only. Not thread-safe.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` is needed only for requests with stop words."""
        self.engine = engine
        self.tokenizer = tokenizer
        # Decided once: the check looks up every method of the protocol.
        self._fused = engine if isinstance(engine, FusedRoundEngine) else None
        self._slots = SlotPool(engine.limits.slots)
        self._waiting: deque[_Row] = deque()
        self._prefilling: list[_Row] = []
        self._decoding: list[_Row] = []
        self._next_id = 0

    @property
    def active(self) -> int:
        """Requests not finished yet, those waiting for a slot included."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            PrismError: the engine can never run it.
        """
        _check(request, self.engine, self.tokenizer)
        text = None
        if request.stop_words and self.tokenizer is not None:
            text = TextStream(DetokenizerStream(self.tokenizer), request.stop_words)
        row = _Row(self._next_id, request, StopRule(request.max_tokens, request.eos_token_ids, text))
        self._next_id += 1
        self._waiting.append(row)
        return row.id

    def cancel(self, request_id: int) -> bool:
        """Drop a request, without a further event; False when it has finished already."""
        for rows in (self._waiting, self._prefilling, self._decoding):
            for row in rows:
                if row.id == request_id:
                    rows.remove(row)
                    if rows is not self._waiting:
                        self._slots.release(row.slot)
                    return True
        return False

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """At most one prefill call, then one round for every request that had its first token before.

        Returns:
            One event for each request that got tokens, none for those still prefilling or waiting.
        """
        events: list[Event] = []
        running = list(self._decoding)
        while self._waiting and self._slots.free:
            row = self._waiting.popleft()
            row.slot = self._slots.acquire()
            self._prefilling.append(row)
        if self._prefilling:
            self._prefill(events)
        context = self.engine.limits.context
        groups: dict[TreeShape | None, list[_Row]] = {}
        for row in running:
            groups.setdefault(_fit(row.request.tree, context - row.length), []).append(row)
        for shape, rows in groups.items():
            per_row = 1 if shape is None else _tokens_per_row(shape)
            limit = max(1, self.engine.limits.tokens_per_call // per_row)
            for first in range(0, len(rows), limit):
                if shape is None:
                    self._vanilla_round(rows[first : first + limit], events)
                else:
                    self._tree_round(rows[first : first + limit], shape, events)
        return events

    def _prefill(self, events: list[Event]) -> None:
        """One target call over the next chunk of the oldest prefilling request and of those that go well with it."""
        now = time.perf_counter()
        rows, chunks = self._next_chunks()
        for row in rows:
            row.started = row.started or now
        starts = [row.length for row in rows]
        batch = self._batch(rows, chunks, starts)
        last = [row.length + len(chunk) == len(row.request.prompt) for row, chunk in zip(rows, chunks, strict=True)]
        output = self.engine.forward(batch, "last" if any(last) else "none")
        # Before the next call, which may overwrite the logits.
        tokens = [self._next_token(row, output, i) if last[i] else -1 for i, row in enumerate(rows)]
        self._extend_prompt(rows, chunks, starts, output.features)
        for i, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            row.length += len(chunk)
            features = output.features[i : i + 1, : len(chunk)]
            if row.request.collect_features:
                row.collected.append(_archived(features[0]))
            if last[i]:
                row.pending_features = features[:, -1:].clone()
                self._prefilling.remove(row)
                self._decoding.append(row)
                row.first_token = time.perf_counter()
                row.stats.prefill_seconds = row.first_token - row.started
                self._put_out(row, [tokens[i]], None, events)

    def _next_chunks(self) -> tuple[list[_Row], list[list[int]]]:
        """Rows of the next prefill call; a row joins when the call stays within its limit and at most half padding."""
        limit = self.engine.limits.tokens_per_call
        rows: list[_Row] = []
        chunks: list[list[int]] = []
        longest = total = 0
        for row in self._prefilling:
            chunk = row.request.prompt[row.length : row.length + limit]
            padded = (len(rows) + 1) * max(longest, len(chunk))
            if rows and padded > min(limit, 2 * (total + len(chunk))):
                continue
            rows.append(row)
            chunks.append(chunk)
            longest, total = max(longest, len(chunk)), total + len(chunk)
        return rows, chunks

    def _extend_prompt(self, rows: list[_Row], chunks: list[list[int]], starts: list[int], features: Tensor) -> None:
        """Extend the drafter over the prompt entries whose following token is known (all but the prompt's last)."""
        drafted, entries, lengths, index = [], [], [], []
        for i, (row, chunk, start) in enumerate(zip(rows, chunks, starts, strict=True)):
            following = row.request.prompt[start + 1 : start + len(chunk) + 1]
            if row.request.tree is not None and following:
                drafted.append(row)
                entries.append(following)
                lengths.append(start)
                index.append(i)
                row.draft_length = start + len(following)
        if drafted:
            longest = max(map(len, entries))
            self.engine.extend(self._batch(drafted, entries, lengths), features[index, :longest])

    def _next_token(self, row: _Row, output: TargetOutput, index: int) -> int:
        if row.generator is None:
            assert output.greedy is not None
            return int(output.greedy[index, 0])
        assert output.logits is not None
        chance = torch.tensor(uniforms(row.generator, 1), dtype=torch.float64)
        return int(draw(warp(output.logits[index], row.request.sampling), chance)[0])

    def _vanilla_round(self, rows: list[_Row], events: list[Event]) -> None:
        batch = self._batch(rows, [[row.root] for row in rows], [row.length for row in rows])
        output = self.engine.forward(batch, "last")
        assert output.greedy is not None
        greedy = output.greedy[:, 0].tolist()
        for i, row in enumerate(rows):
            token = greedy[i] if row.generator is None else self._next_token(row, output, i)
            self._advance(row, [token], output.features[i : i + 1], 0, events)

    def _tree_round(self, rows: list[_Row], shape: TreeShape, events: list[Event]) -> None:
        engine, fused = self.engine, self._fused
        newly = self._batch(rows, [row.pending for row in rows], [row.draft_length for row in rows])
        pending = _stacked(rows, newly.tokens.shape[1])
        if fused is not None and all(row.generator is None for row in rows):
            output = fused.speculate(newly, pending, shape)
            committed = zip(rows, output.tokens.tolist(), output.counts.tolist(), strict=True)
            for i, (row, tokens, count) in enumerate(committed):
                self._finish_round(row, tokens[:count], output.features[i : i + 1, :count], shape, events)
            return
        tree = grow_tree(engine, newly, pending, shape)
        lengths = newly.lengths + newly.counts
        batch = TokenBatch(
            tokens=tree.tokens,
            positions=tree.depths + lengths[:, None],
            slots=newly.slots,
            lengths=lengths,
            counts=torch.full_like(lengths, shape.size),
            mask=tree.mask,
        )
        verified = engine.forward(batch, "all")
        verdict = self._verify(rows, tree, verified)
        features = verified.features.gather(1, verdict.path[:, :, None].expand(-1, -1, verified.features.shape[2]))
        engine.commit(newly.slots, lengths, verdict.path, verdict.counts)
        accepted = tree.tokens.gather(1, verdict.path).tolist()
        counts, bonus = verdict.counts.tolist(), verdict.bonus.tolist()
        for i, row in enumerate(rows):
            tokens = accepted[i][1 : counts[i]]
            tokens.append(bonus[i])
            self._finish_round(row, tokens, features[i : i + 1, : counts[i]], shape, events)

    def _finish_round(
        self, row: _Row, tokens: list[int], features: Tensor, shape: TreeShape, events: list[Event]
    ) -> None:
        row.draft_length = row.length
        row.stats.drafted += shape.size - 1
        self._advance(row, tokens, features, len(tokens) - 1, events)

    def _verify(self, rows: list[_Row], tree: Tree, output: TargetOutput) -> Verdict:
        assert output.greedy is not None
        sampled = [i for i, row in enumerate(rows) if row.generator is not None]
        if not sampled:
            return verify_greedy(tree, output.greedy)
        logits = output.logits
        assert logits is not None

        def probs(picked: list[int], nodes: list[int]) -> Tensor:
            return torch.stack(
                [
                    warp(logits[sampled[b], n], rows[sampled[b]].request.sampling)
                    for b, n in zip(picked, nodes, strict=True)
                ]
            )

        generators = [generator for row in rows if (generator := row.generator) is not None]
        if len(sampled) == len(rows):
            return verify_sampling(tree, probs, generators)
        drawn = verify_sampling(_rows_of(tree, sampled), probs, generators)
        verdict = verify_greedy(tree, output.greedy)
        longest = max(verdict.path.shape[1], drawn.path.shape[1])
        path = verdict.path.new_zeros(len(rows), longest)
        path[:, : verdict.path.shape[1]] = verdict.path
        path[sampled, : drawn.path.shape[1]] = drawn.path
        verdict.counts[sampled] = drawn.counts
        verdict.bonus[sampled] = drawn.bonus
        return Verdict(path, verdict.counts, verdict.bonus)

    def _advance(self, row: _Row, tokens: list[int], features: Tensor, accepted: int, events: list[Event]) -> None:
        """Commit a pass: `tokens` (bonus last) follow the nodes whose `features` [1, len(tokens), F] are given."""
        row.length += len(tokens)
        row.pending_features = features
        row.stats.target_passes += 1
        counts = row.stats.accepted_counts
        if accepted >= len(counts):
            counts.extend([0] * (accepted + 1 - len(counts)))
        counts[accepted] += 1
        self._put_out(row, tokens, features, events)

    def _put_out(self, row: _Row, tokens: list[int], features: Tensor | None, events: list[Event]) -> None:
        """Append `tokens` to the request and report them; end it when they say so.

        `features` [1, len(tokens), F] are those of the tokens before them; None when they are archived already.
        """
        row.root, row.pending = tokens[-1], tokens
        kept, reason = row.stop.admit(tokens)
        row.stats.num_output_tokens += len(kept)
        if features is not None and row.request.collect_features:
            row.collected.append(_archived(features[0, : len(kept)]))
        if reason is None:
            if row.length < self.engine.limits.context:
                events.append(Event(row.id, kept))
                return
            reason = "length"
        row.stats.decode_seconds = time.perf_counter() - row.first_token
        self._decoding.remove(row)
        self._slots.release(row.slot)
        events.append(Event(row.id, kept, True, reason, row.stats, _joined(row.collected)))

    def _batch(self, rows: list[_Row], tokens: list[list[int]], lengths: list[int]) -> TokenBatch:
        """A causal batch of the tokens that follow `lengths` entries of each row's slot, padded with zeros."""
        device = self.engine.device
        counts = [len(row) for row in tokens]
        longest = max(counts)
        if min(counts) < longest:
            tokens = [row + [0] * (longest - len(row)) for row in tokens]
        table = torch.tensor([[row.slot for row in rows], lengths, counts], device=device)
        slots, starts, valid = table.unbind(0)
        positions = starts[:, None]
        if longest > 1:
            positions = positions + torch.arange(longest, device=device)
        return TokenBatch(torch.tensor(tokens, device=device), positions, slots, starts, valid)


def generate(
    engine: Engine,
    requests: Iterable[Request],
    tokenizer: Tokenizer | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[Result]:
    """Run `requests` to completion, at most ``engine.limits.slots`` at once; results in the order of the requests.

    Args:
        tokenizer: needed only for stop words.
        on_event: called with every event; an event's id is the index of its request.

    Raises:
        PrismError: a request that the engine can never run; nothing is run then.
    """
    decoder = Decoder(engine, tokenizer)
    tokens = {decoder.add(request): list[int]() for request in requests}
    results: dict[int, Result] = {}
    while decoder.active:
        for event in decoder.step():
            if on_event is not None:
                on_event(event)
            tokens[event.id] += event.tokens
            if event.finish_reason is not None and event.stats is not None:
                results[event.id] = Result(tokens[event.id], event.stats, event.finish_reason, event.features)
    return [results[number] for number in tokens]


def _check(request: Request, engine: Engine, tokenizer: Tokenizer | None) -> None:
    limits, tree = engine.limits, request.tree
    if not request.prompt:
        raise PrismError("the prompt is empty: send at least one token")
    if len(request.prompt) > limits.context:
        raise PrismError(
            f"the prompt has {len(request.prompt)} tokens but the engine's context is {limits.context}: shorten it or "
            "build the engine with a larger context"
        )
    if min(request.prompt) < 0 or max(request.prompt) >= engine.vocab_size:
        raise PrismError(f"the prompt holds a token id outside 0..{engine.vocab_size - 1}: use the target's tokenizer")
    if request.max_tokens < 1:
        raise PrismError(f"max_tokens is {request.max_tokens}: ask for at least 1 token")
    if "" in request.stop_words:
        raise PrismError("a stop word is empty: remove it")
    if request.stop_words and tokenizer is None:
        raise PrismError("stop words need a tokenizer: pass the engine's tokenizer to the decoder")
    if tree is None:
        return
    if not engine.has_drafter:
        raise PrismError("this engine has no drafter: ask for vanilla decoding or build it with a drafter")
    if _tokens_per_row(tree) > limits.tokens_per_call:
        raise PrismError(
            f"the tree {tree} needs {_tokens_per_row(tree)} tokens per call but the engine allows "
            f"{limits.tokens_per_call}: choose a smaller tree"
        )
    words = engine.vocab_size if engine.draft_vocab is None else len(engine.draft_vocab)
    if tree.width > words:
        raise PrismError(
            f"the tree's width {tree.width} exceeds the draft vocabulary of {words}: choose a smaller width"
        )


def _tokens_per_row(shape: TreeShape) -> int:
    """The longest of a round's calls: extend (at most depth + 1 tokens), step, verification."""
    return max(shape.depth + 1, shape.width, shape.size)


def _fit(shape: TreeShape | None, room: int) -> TreeShape | None:
    """`shape`, or the largest part of it whose K/V in flight fits into `room` >= 1 entries; None when only one does."""
    if shape is None or max(shape.size, (shape.depth - 1) * shape.width) <= room:
        return shape
    depth = min(shape.depth, 1 + room // shape.width)
    size = min(shape.size, room, 1 + shape.width + (depth - 1) * shape.width**2)
    return None if size < 2 else TreeShape(depth=depth, width=shape.width, size=size)


def _stacked(rows: list[_Row], longest: int) -> Tensor:
    """[B, longest, F] the rows' pending features, padded with zeros."""
    pending = [row.pending_features for row in rows if row.pending_features is not None]
    if len(rows) == 1:
        return pending[0]
    stacked = pending[0].new_zeros(len(rows), longest, pending[0].shape[2])
    for i, features in enumerate(pending):
        stacked[i, : features.shape[1]] = features[0]
    return stacked


def _rows_of(tree: Tree, rows: list[int]) -> Tree:
    return Tree(tree.tokens[rows], tree.parents[rows], tree.depths[rows], tree.mask[rows], tree.log_probs[rows])


def _archived(features: Tensor) -> Tensor:
    return features.to("cpu", torch.bfloat16, copy=True)


def _joined(pieces: list[Tensor]) -> Tensor | None:
    """One tensor that autograd accepts as an input; None when nothing was collected."""
    with torch.inference_mode(False):
        return torch.cat(pieces) if pieces else None
