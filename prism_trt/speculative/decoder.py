"""The decoding loop: requests join and leave a running batch, each with its own tree, sampling and seed.

A request whose last token has index L in its sequence holds, between rounds, K/V of tokens 0..L-1 in the target. Draft
entry p pairs the target's feature at p with token p + 1; the entries that a round adds at its start bring the draft
K/V to L entries as well. The last token is the root of the round's tree, or the one input of a vanilla pass.

Rounds of planned requests may or may not draft. What a vanilla pass commits stays pending until the drafter needs it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine, FusedRoundEngine, PrefixCopyEngine, TargetOutput, TokenBatch, Tree
from prism_trt.errors import PrismError
from prism_trt.speculative.kv_pool import SlotPool
from prism_trt.speculative.planner import Load, Plan, Planner
from prism_trt.speculative.prefill import group, share
from prism_trt.speculative.request import AUTO, Event, Request, Result, Statistics, check_request, tokens_per_row
from prism_trt.speculative.row import Row
from prism_trt.speculative.sampling import draw, uniforms, warp
from prism_trt.speculative.stopping import StopRule, TextStream
from prism_trt.speculative.tree import grow_tree
from prism_trt.speculative.verify import Verdict, verify_greedy, verify_sampling
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.tokenizer import Tokenizer


class Decoder:
    """Runs requests on an engine with continuous batching.

    Requests wait in order of arrival until one of the engine's slots is free. A request's output depends on its own
    prompt, parameters and seed only. Not thread-safe.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        prefill_tokens: int | None = None,
        reuse_prefixes: bool = False,
        planner: Planner | None = None,
    ) -> None:
        """Start without requests.

        Args:
            engine: runs them; its K/V pools must not be used by others meanwhile.
            tokenizer: needed only for requests with stop words.
            prefill_tokens: prompt tokens computed between two rounds at most; None: as many as a call may have.
            reuse_prefixes: keep the K/V of requests that have ended, for those whose prompts begin alike.
            planner: chooses the trees of requests with tree "auto".
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self._prefill_tokens = min(prefill_tokens or engine.limits.tokens_per_call, engine.limits.tokens_per_call)
        self._reuse = reuse_prefixes
        self._planner = planner
        self._copying = engine if isinstance(engine, PrefixCopyEngine) else None
        # Decided once: the check looks up every method of the protocol.
        self._fused = engine if isinstance(engine, FusedRoundEngine) else None
        self._slots = SlotPool(engine.limits.slots)
        self._waiting: deque[Row] = deque()
        self._prefilling: list[Row] = []
        self._decoding: list[Row] = []
        self._next_id = 0

    @property
    def active(self) -> int:
        """Requests not finished yet, those waiting for a slot included."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    @property
    def room(self) -> int:
        """Requests that would start in the next step if they were added now."""
        return self._slots.free - len(self._waiting)

    @property
    def cached_slots(self) -> int:
        """Slots without a request that hold K/V for later ones."""
        return self._slots.cached

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            PrismError: the engine can never run it.
        """
        check_request(request, self.engine, self.tokenizer)
        text = None
        if request.stop_words and self.tokenizer is not None:
            text = TextStream(DetokenizerStream(self.tokenizer), request.stop_words)
        tree, planned = self._tree_of(request)
        row = Row(self._next_id, request, tree, planned, StopRule(request.max_tokens, request.eos_token_ids, text))
        self._next_id += 1
        self._waiting.append(row)
        return row.id

    def cancel(self, request_id: int) -> Statistics | None:
        """Drop a request, without a further event.

        Returns:
            What it did until now; None when it has finished already.
        """
        for rows in (self._waiting, self._prefilling, self._decoding):
            for row in rows:
                if row.id == request_id:
                    rows.remove(row)
                    if rows is not self._waiting:
                        self._release(row)
                    return row.stats
        return None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Some prompt tokens, then one round for every request that had its first token before.

        Returns:
            One event for each request that got tokens, none for those still prefilling or waiting.
        """
        events: list[Event] = []
        running = list(self._decoding)
        while self._waiting and self._slots.free:
            row = self._waiting.popleft()
            self._place(row)
            self._prefilling.append(row)
        if self._prefilling:
            self._prefill(events)
        context = self.engine.limits.context
        plan = self._plan(running)
        groups: dict[Plan, list[Row]] = {}
        for row in running:
            groups.setdefault(_fit(plan if row.planned else row.tree, context - row.length), []).append(row)
        for shape, rows in groups.items():
            self._round(rows, shape, events, planned=shape == plan and all(row.planned for row in rows))
        return events

    def _tree_of(self, request: Request) -> tuple[Plan, bool]:
        """The tree of a request's every round, and whether the planner decides instead."""
        if request.tree != AUTO:
            return request.tree, False
        if not self.engine.has_drafter:
            return None, False
        if not request.sampling.greedy and request.sampling.seed is not None:
            return self.engine.default_tree, False
        if self._planner is None:
            raise PrismError('the tree "auto" needs a planner: give the decoder one, or name a tree')
        return None, True

    def _plan(self, running: list[Row]) -> Plan:
        """The tree of the next round of all requests that leave it to the planner."""
        rows = [row for row in running if row.planned]
        if self._planner is None or not rows:
            return None
        # One token of each request is new in any case.
        behind = sum(len(row.pending) - 1 for row in rows)
        return self._planner.plan(_load(rows), behind)

    def _round(self, rows: list[Row], shape: Plan, events: list[Event], planned: bool) -> None:
        """A round of any number of rows with one tree; the planner learns from it when it was `planned`."""
        behind = 0 if shape is None else self._catch_up(rows, shape.depth + 1)
        load = _load(rows)
        start = time.perf_counter()
        per_row = 1 if shape is None else tokens_per_row(shape)
        limit = max(1, self.engine.limits.tokens_per_call // per_row)
        accepted: list[int] = []
        drafted = sum(row.stats.drafted for row in rows)
        for first in range(0, len(rows), limit):
            part = rows[first : first + limit]
            if shape is None:
                self._vanilla_round(part, events)
                accepted += [0] * len(part)
            else:
                accepted += self._tree_round(part, shape, events)
        if planned and self._planner is not None:
            seconds = time.perf_counter() - start
            greedy = [count for row, count in zip(rows, accepted, strict=True) if row.generator is None]
            sampled = [count for row, count in zip(rows, accepted, strict=True) if row.generator is not None]
            nodes = (sum(row.stats.drafted for row in rows) - drafted) / len(rows)
            self._planner.observe(shape, load, seconds, greedy, sampled, nodes, behind)

    def _catch_up(self, rows: list[Row], most: int) -> int:
        """Leave at most `most` tokens of each row pending; returns how many the drafter was extended over."""
        limit, total = self.engine.limits.tokens_per_call, 0
        while late := [row for row in rows if len(row.pending) > most]:
            counts = [min(len(row.pending) - 1, limit) for row in late]
            for picked in group(counts, limit):
                part = [late[i] for i in picked]
                tokens = [late[i].pending[: counts[i]] for i in picked]
                batch = self._batch(part, tokens, [row.draft_length for row in part])
                features = _stacked(part, max(len(row.pending) for row in part))
                self.engine.extend(batch, features[:, : batch.tokens.shape[1]])
                for i in picked:
                    row, count = late[i], counts[i]
                    row.draft_length += count
                    row.pending_features = [torch.cat(row.pending_features, 1)[:, count:].clone()]
                    row.pending = row.pending[count:]
                    total += count
        return total

    def _place(self, row: Row) -> None:
        """Give a waiting request a slot, and what is known of its prompt's K/V."""
        request = row.request
        if not self._reuse or request.collect_features:  # features of reused entries are stored nowhere
            row.slot = self._slots.acquire()
            return
        running = {other.slot: other.prefix for other in (*self._prefilling, *self._decoding)}
        drafting = row.drafts
        placement = self._slots.place(request.prompt, drafting, None if self._copying is None else running)
        if self._copying is not None and placement.donor is not None:
            self._copying.copy_prefix(placement.donor, placement.slot, placement.reused)
        row.slot = placement.slot
        row.length = row.stats.reused_tokens = placement.reused
        row.draft_length = placement.reused if drafting else 0

    def _release(self, row: Row) -> None:
        self._slots.release(row.slot, row.prefix if self._reuse else None)

    def _prefill(self, events: list[Event]) -> None:
        """Compute the next tokens of the prompts: few where rounds wait for it, a whole call where none does."""
        limit = self.engine.limits.tokens_per_call
        prefilling = list(self._prefilling)
        remaining = [len(row.request.prompt) - row.length for row in prefilling]
        shares = share(remaining, self._prefill_tokens if self._decoding else limit)
        for picked in group(shares, limit):
            rows = [prefilling[i] for i in picked]
            chunks = [
                row.request.prompt[row.length : row.length + shares[i]] for i, row in zip(picked, rows, strict=True)
            ]
            self._prefill_call(rows, chunks, events)

    def _prefill_call(self, rows: list[Row], chunks: list[list[int]], events: list[Event]) -> None:
        """Compute `chunks` of the rows' prompts, and the first tokens of those that end."""
        now = time.perf_counter()
        for row in rows:
            row.started = row.started or now
        starts = [row.length for row in rows]
        batch = self._batch(rows, chunks, starts)
        last = [row.length + len(chunk) == len(row.request.prompt) for row, chunk in zip(rows, chunks, strict=True)]
        output = self.engine.forward(batch, "last" if any(last) else "none")
        # Before the next call, which may overwrite the logits.
        tokens = [self._next_token(row, output, i) if last[i] else -1 for i, row in enumerate(rows)]
        for i, row in enumerate(rows):
            if last[i]:
                row.score(output.logits, i, [0], [tokens[i]])
        self._extend_prompt(rows, chunks, starts, output.features)
        for i, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            row.length += len(chunk)
            features = output.features[i : i + 1, : len(chunk)]
            if row.request.collect_features:
                row.collected.append(_archived(features[0]))
            if last[i]:
                row.pending_features = [features[:, -1:].clone()]
                self._prefilling.remove(row)
                self._decoding.append(row)
                row.first_token = time.perf_counter()
                row.stats.prefill_seconds = row.first_token - row.started
                self._put_out(row, [tokens[i]], None, events)

    def _extend_prompt(self, rows: list[Row], chunks: list[list[int]], starts: list[int], features: Tensor) -> None:
        """Extend the drafter over the prompt entries whose following token is known (all but the prompt's last)."""
        drafted, entries, lengths, index = [], [], [], []
        for i, (row, chunk, start) in enumerate(zip(rows, chunks, starts, strict=True)):
            following = row.request.prompt[start + 1 : start + len(chunk) + 1]
            if row.drafts and following:
                drafted.append(row)
                entries.append(following)
                lengths.append(start)
                index.append(i)
                row.draft_length = start + len(following)
        if drafted:
            longest = max(map(len, entries))
            self.engine.extend(self._batch(drafted, entries, lengths), features[index, :longest])

    def _next_token(self, row: Row, output: TargetOutput, index: int) -> int:
        if row.generator is None:
            assert output.greedy is not None
            return int(output.greedy[index, 0])
        assert output.logits is not None
        chance = torch.tensor(uniforms(row.generator, 1), dtype=torch.float64)
        return int(draw(warp(output.logits[index], row.request.sampling), chance)[0])

    def _vanilla_round(self, rows: list[Row], events: list[Event]) -> None:
        batch = self._batch(rows, [[row.root] for row in rows], [row.length for row in rows])
        output = self.engine.forward(batch, "last")
        assert output.greedy is not None
        greedy = output.greedy[:, 0].tolist()
        for i, row in enumerate(rows):
            token = greedy[i] if row.generator is None else self._next_token(row, output, i)
            row.score(output.logits, i, [0], [token])
            row.stats.passes_by_tree[None] += 1
            self._advance(row, [token], output.features[i : i + 1], 0, events)

    def _tree_round(self, rows: list[Row], shape: TreeShape, events: list[Event]) -> list[int]:
        """Returns the drafted tokens accepted of each row."""
        engine, fused = self.engine, self._fused
        newly = self._batch(rows, [row.pending for row in rows], [row.draft_length for row in rows])
        pending = _stacked(rows, newly.tokens.shape[1])
        for row in rows:
            row.stats.passes_by_tree[shape] += 1
        if fused is not None and all(row.fusable for row in rows):
            output = fused.speculate(newly, pending, shape)
            results = zip(rows, output.tokens.tolist(), output.counts.tolist(), output.drafted.tolist(), strict=True)
            for i, (row, tokens, count, drafted) in enumerate(results):
                self._finish_round(row, tokens[:count], output.features[i : i + 1, :count], drafted, events)
            return (output.counts - 1).tolist()
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
        accepted = tree.tokens.gather(1, verdict.path).tolist()
        counts, bonus = verdict.counts.tolist(), verdict.bonus.tolist()
        committed = [[*accepted[i][1 : counts[i]], bonus[i]] for i in range(len(rows))]
        # Before the next call, which may overwrite the logits.
        for i, (row, tokens) in enumerate(zip(rows, committed, strict=True)):
            row.score(verified.logits, i, verdict.path[i, : counts[i]].tolist(), tokens)
        engine.commit(newly.slots, lengths, verdict.path, verdict.counts)
        for i, (row, tokens) in enumerate(zip(rows, committed, strict=True)):
            self._finish_round(row, tokens, features[i : i + 1, : counts[i]], shape.size - 1, events)
        return [count - 1 for count in counts]

    def _finish_round(self, row: Row, tokens: list[int], features: Tensor, drafted: int, events: list[Event]) -> None:
        row.draft_length = row.length
        row.pending, row.pending_features = [], []
        row.stats.drafted += drafted
        self._advance(row, tokens, features, len(tokens) - 1, events)

    def _verify(self, rows: list[Row], tree: Tree, output: TargetOutput) -> Verdict:
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

    def _advance(self, row: Row, tokens: list[int], features: Tensor, accepted: int, events: list[Event]) -> None:
        """Commit a pass: `tokens` (bonus last) follow the nodes whose `features` [1, len(tokens), F] are given."""
        row.length += len(tokens)
        if row.drafts:
            row.pending_features.append(features)
        counts = row.stats.accepted_counts
        if accepted >= len(counts):
            counts.extend([0] * (accepted + 1 - len(counts)))
        counts[accepted] += 1
        self._put_out(row, tokens, features, events)

    def _put_out(self, row: Row, tokens: list[int], features: Tensor | None, events: list[Event]) -> None:
        """Append `tokens` to the request and report them; end it when they say so.

        `features` [1, len(tokens), F] are those of the tokens before them; None when they are archived already.
        """
        row.sequence += tokens
        row.root = tokens[-1]
        if row.drafts:
            row.pending += tokens
        kept, reason = row.stop.admit(tokens)
        row.stats.num_output_tokens += len(kept)
        if features is not None and row.request.collect_features:
            row.collected.append(_archived(features[0, : len(kept)]))
        if reason is None:
            if row.length < self.engine.limits.context:
                events.append(Event(row.id, kept, scored=row.scored[: len(kept)]))
                return
            reason = "length"
        row.stats.decode_seconds = time.perf_counter() - row.first_token
        self._decoding.remove(row)
        self._release(row)
        scored = row.scored[: len(kept)]
        events.append(Event(row.id, kept, True, reason, row.stats, _joined(row.collected), scored))

    def _batch(self, rows: list[Row], tokens: list[list[int]], lengths: list[int]) -> TokenBatch:
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
    planner: Planner | None = None,
) -> list[Result]:
    """Run `requests` to completion, at most ``engine.limits.slots`` at once; results in the order of the requests.

    Args:
        tokenizer: needed only for stop words.
        on_event: called with every event; an event's id is the index of its request.
        planner: chooses the trees of requests with tree "auto".

    Raises:
        PrismError: a request that the engine can never run; nothing is run then.
    """
    decoder = Decoder(engine, tokenizer, planner=planner)
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


def _fit(shape: TreeShape | None, room: int) -> TreeShape | None:
    """`shape`, or the largest part of it whose K/V in flight fits into `room` >= 1 entries; None when only one does."""
    if shape is None or max(shape.size, (shape.depth - 1) * shape.width) <= room:
        return shape
    depth = min(shape.depth, 1 + room // shape.width)
    size = min(shape.size, room, 1 + shape.width + (depth - 1) * shape.width**2)
    return None if size < 2 else shape.model_copy(update={"depth": depth, "size": size})


def _load(rows: list[Row]) -> Load:
    sampled = sum(row.generator is not None for row in rows)
    return Load(len(rows) - sampled, sampled, all(row.fusable for row in rows))


def _stacked(rows: list[Row], longest: int) -> Tensor:
    """[B, longest, F] the rows' pending features, padded with zeros."""
    pending = [torch.cat(row.pending_features, 1) for row in rows]
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
