"""Chooses each round's draft tree, or none, so that a batch gets the most tokens per second.

For every tree of a fixed list, and for no tree, the expected rate is

    requests * (1 + expected accepted tokens) / (draft round + target pass),

with times from the engine's latency table (`prism_trt.engines.latency`) and acceptance from running estimates
(`prism_trt.speculative.acceptance`). Both are corrected while requests run:

- Times. What a plan's rounds take, relative to the table, is compared with what the rounds of the plan in use take at
  about the same time. Whatever slows all calls alike (another machine, a busy one) cancels in the comparison.
- Exploration. A plan that is not in use can only be judged by using it. Plans whose rate could be the best, given how
  often and how long ago they were measured, are tried for single rounds, no plan at all included. A trial may cost what
  it loses against the plan in use. All trials together may cost `exploration` of the decoding time.
- Caution. What is used is the plan that is best by what its rate is at least. Of many plans that were measured a few
  times, the one that looks best was mostly lucky. The engine's default tree, which was tuned for one request, and no
  speculation need no such proof: the others have to be better by a margin on top of the doubt.

Nothing here affects which tokens are put out, only when: verification is lossless whatever tree it is given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prism_trt.config import TreeShape
from prism_trt.engines.latency import LatencyModel, LatencyTable
from prism_trt.engines.protocol import Engine, FusedRoundEngine, draft_vocab_size
from prism_trt.speculative.acceptance import AcceptanceEstimate, AcceptancePrior
from prism_trt.speculative.request import tokens_per_row

Plan = TreeShape | None
"""A round's tree; None for no speculation."""

_TREES = tuple(
    TreeShape.parse(text)
    for text in ("2/1/1", "3/1/2", "4/1/3", "6/1/5", "4/2/2", "8/2/5", "8/4/5", "16/4/6", "32/8/6", "60/10/6")
)
_PRUNED_TREES = tuple(TreeShape.parse(text) for text in ("4/1/3@0.4", "8/2/5@0.15", "12/4/6@0.06"))
"""Their rounds end early where the draft is unsure; for engines that fuse a greedy round."""
_MARGIN = 1.02
"""A tree must promise so many times the rate without speculation, and any change so many times the present plan's."""
_PROOF = 1.05
"""A tree that is not the engine's default must promise so many times the rate of what needs no proof."""
_DECIDE_EVERY = 16
"""Rounds between two decisions for the same load."""
_PACE_GAIN = 0.1
_LARGEST_SURPRISE = math.log(2)
"""What one round may add to the logarithm of a time ratio: a round that was interrupted says little."""
_FIRST_ROUNDS = 3
"""Measurements that may say anything; trials begin when the plan in use has so many."""
_LONG = 30
"""Trials that a comparison of times looks back."""
_DOUBT = 0.4
"""Relative uncertainty of the rate of a plan that was never measured, for one request."""
_DOUBT_DOUBLES = 1000
"""Rounds without a measurement after which the uncertainty has doubled."""
_MOST_DOUBT = 0.9
_BASE_EVERY = 50
"""Rounds after which no speculation is measured again, whatever is thought of it: all else has to beat it."""
_TRIAL_EVERY = 4
"""Rounds from one trial to the next at least."""
_MOST_CREDIT = 5
"""Rounds of the plan in use that may be saved up for trials."""


class Load(NamedTuple):
    """Requests of a round."""

    greedy: int
    sampled: int
    fused: bool = True
    """Whether an engine that fuses rounds may do so."""

    @property
    def requests(self) -> int:
        return self.greedy + self.sampled


class _Place(NamedTuple):
    """Where times are compared: rounds of about as many requests, on the same path of the decoder."""

    magnitude: int
    fused: bool


@dataclass
class _Pace:
    """Logarithm of measured to predicted time of the plan in use."""

    value: float = 0.0
    rounds: int = 0
    credit: float = 0.0
    """Predicted milliseconds that trials may cost; earned in the same place, so that no load pays for another."""


@dataclass
class _Correction:
    """Logarithm of measured to predicted time of a plan, relative to the pace."""

    value: float
    comparisons: int = 0
    """Trials that the value comes from: the plan's own, and others' while it was in use."""
    rounds: int = 0
    last: int = 0
    """Number of the last round that measured it."""


class _Decision(NamedTuple):
    plan: Plan
    """To use."""
    rival: Plan
    cost: float
    """Predicted milliseconds that a trial of the rival loses, without catching up; infinite when there is no rival."""
    milliseconds: float
    """Predicted time of a round of `plan`."""


def possible_plans(engine: Engine) -> tuple[Plan, ...]:
    """What an engine can do in a round, no speculation first."""
    if not engine.has_drafter:
        return (None,)
    words = draft_vocab_size(engine)
    pruned = _PRUNED_TREES if isinstance(engine, FusedRoundEngine) else ()
    trees = dict.fromkeys((engine.default_tree, *_TREES, *pruned))
    limit = engine.limits.tokens_per_call
    return (None, *(tree for tree in trees if tokens_per_row(tree) <= limit and tree.width <= words))


def rate(load: Load, greedy: float, sampled: float, milliseconds: float) -> float:
    """Expected tokens per millisecond when each request gets so many drafted tokens accepted."""
    return (load.greedy * (1 + greedy) + load.sampled * (1 + sampled)) / milliseconds


def best_plan(rates: dict[Plan, float], current: Plan) -> Plan:
    """The plan with the highest rate; none is preferred to a tree, and `current` to others, by a margin."""

    def score(plan: Plan) -> float:
        return rates[plan] * (_MARGIN if plan is None else 1.0) * (_MARGIN if plan == current else 1.0)

    return max(rates, key=score)


def doubt(requests: int, rounds: int, age: int) -> float:
    """Relative uncertainty of a rate after so many measurements, the last of them `age` rounds ago.

    A round of many requests says more than a round of one: part of what makes rates uncertain is what each accepts.
    """
    one = _DOUBT * math.sqrt(0.1 + 0.9 / requests)
    return min(_MOST_DOUBT, one / math.sqrt(1 + rounds) * (1 + age / _DOUBT_DOUBLES))


class Planner:
    """Plans rounds and learns from them. One per engine; used by one decoder at a time."""

    def __init__(
        self,
        engine: Engine,
        table: LatencyTable,
        prior: AcceptancePrior | None = None,
        exploration: float = 0.02,
    ) -> None:
        """Start from a latency table and a prior of acceptance (None: a cautious one).

        Args:
            engine: what the rounds will run on; only its limits are read.
            table: its call times, of this machine or of another.
            exploration: share of the decoding time that trials of other plans may cost.
        """
        self._plans = possible_plans(engine)
        self._trusted = {None, engine.default_tree}
        self._tokens_per_call = engine.limits.tokens_per_call
        self._latency = LatencyModel(table)
        self._times: dict[tuple[Plan, int, float], float] = {}
        """Predicted milliseconds by plan, requests and verified nodes (to the nearest half)."""
        prior = prior or AcceptancePrior()
        self._acceptance = {sampled: AcceptanceEstimate(prior) for sampled in (False, True)}
        self._exploration = exploration
        self._round = self._next_trial = 0
        self._paces: dict[_Place, _Pace] = {}
        self._corrections: dict[tuple[Plan, _Place], _Correction] = {}
        self._in_use: dict[_Place, Plan] = {}
        self._decided: dict[Load, tuple[int, _Decision]] = {}
        self.rounds: Counter[Plan] = Counter()
        """Rounds by plan, trials included."""

    def plan(self, load: Load, behind: int = 0) -> Plan:
        """The next round's plan.

        Args:
            load: the requests that the round is for, at least one.
            behind: committed tokens that the drafter has not seen, in sum; a tree after rounds without one has to
                catch up with them.
        """
        decision = self._decide(load)
        pace = self._paces.get(_place(load))
        if self._round < self._next_trial or pace is None or pace.rounds < _FIRST_ROUNDS:
            return decision.plan
        cost = decision.cost
        if behind and decision.plan is None and decision.rival is not None:
            cost += self._latency.catch_up(behind)
        return decision.rival if cost <= pace.credit else decision.plan

    def observe(
        self,
        plan: Plan,
        load: Load,
        seconds: float,
        greedy: Sequence[int] = (),
        sampled: Sequence[int] = (),
        drafted: float = 0.0,
        behind: int = 0,
    ) -> None:
        """Learn from a round of `plan`. What follows `seconds` is of use for a tree only.

        Args:
            seconds: what it took, without catching up.
            greedy: drafted tokens accepted of each greedy request.
            sampled: the same of each sampled request.
            drafted: tree nodes verified besides the roots, on average.
            behind: committed tokens that the drafter caught up with before.
        """
        decision = self._decide(load)
        self._round += 1
        self.rounds[plan] += 1
        predicted = self._predicted(plan, load.requests)
        correction = self._known(plan, load)
        pace = self._paces.setdefault(_place(load), _Pace())
        surprise = math.log(max(seconds, 1e-9) * 1e3 / predicted) - pace.value - correction.value
        if plan == decision.plan:
            earned = pace.credit + self._exploration * decision.milliseconds
            pace.credit = min(earned, _MOST_CREDIT * decision.milliseconds)
            known = pace.rounds >= _FIRST_ROUNDS
            pace.value += (_clipped(surprise) if known else surprise) * max(_PACE_GAIN, 1 / (1 + pace.rounds))
            pace.rounds += 1
        else:
            self._next_trial = self._round + _TRIAL_EVERY
            _compare(correction, self._known(decision.plan, load), pace, surprise)
            pace.credit -= self._loss(plan, load, decision)
            if behind:
                pace.credit -= self._latency.catch_up(behind)
            for other in [other for other in self._decided if _place(other) == _place(load)]:
                del self._decided[other]
        correction.rounds += 1
        correction.last = self._round
        if plan is not None:
            for is_sampled, accepted in ((False, greedy), (True, sampled)):
                if accepted:
                    self._acceptance[is_sampled].observe(plan, accepted, drafted)

    def rates(self, load: Load) -> dict[Plan, float]:
        """Expected tokens per millisecond of every plan, for a machine as fast as the table's."""
        return {plan: self._rate(plan, load) for plan in self._plans}

    def _decide(self, load: Load) -> _Decision:
        known = self._decided.get(load)
        if known is not None and self._round - known[0] < _DECIDE_EVERY:
            return known[1]
        rates, place = self.rates(load), _place(load)
        measured = {plan: self._measured(plan, place) for plan in rates}
        doubts = {plan: doubt(load.requests, *measured[plan]) for plan in rates}
        least = {
            plan: value if plan in self._trusted else value * (1 - doubts[plan]) / _PROOF
            for plan, value in rates.items()
        }
        chosen = self._in_use[place] = best_plan(least, self._in_use.get(place))
        unknown = (None, place) not in self._corrections
        hoped = {plan: value * (1 + doubts[plan]) for plan, value in rates.items()}
        if unknown or measured[None][1] >= _BASE_EVERY:
            hoped[None] = math.inf
        hoped[chosen] = rates[chosen]
        rival = max(hoped, key=lambda plan: (hoped[plan], plan == chosen))
        decision = _Decision(chosen, rival, math.inf, self._milliseconds(chosen, load))
        if rival != chosen:
            free = rival is None and unknown
            decision = decision._replace(cost=0.0 if free else self._loss(rival, load, decision))
        self._decided[load] = self._round, decision
        return decision

    def _measured(self, plan: Plan, place: _Place) -> tuple[int, int]:
        """Rounds that measured the plan, and rounds since the last of them; since the first round if there is none."""
        known = self._corrections.get((plan, place))
        return (0, self._round) if known is None else (known.rounds, self._round - known.last)

    def _loss(self, plan: Plan, load: Load, decision: _Decision) -> float:
        """Milliseconds that a round of `plan` takes longer than the plan in use does for the same tokens."""
        share = self._rate(plan, load) / self._rate(decision.plan, load)
        return max(0.0, self._milliseconds(plan, load) * (1 - share))

    def _rate(self, plan: Plan, load: Load) -> float:
        greedy = sampled = 0.0
        if plan is not None:
            greedy, sampled = self._acceptance[False].accepted(plan), self._acceptance[True].accepted(plan)
        return rate(load, greedy, sampled, self._milliseconds(plan, load))

    def _milliseconds(self, plan: Plan, load: Load) -> float:
        """Corrected, for a machine as fast as the table's."""
        return self._predicted(plan, load.requests) * math.exp(self._correction(plan, load).value)

    def _predicted(self, plan: Plan, requests: int) -> float:
        """By the table alone. A batch that exceeds a call's limit is run in several, as the decoder does."""
        per_row = 1 if plan is None else tokens_per_row(plan)
        limit = max(1, self._tokens_per_call // per_row)
        full, rest = divmod(requests, limit)
        total = 0.0
        for count, calls in ((limit, full), (rest, 1)):
            if count and calls:
                total += calls * self._call(plan, count)
        return total

    def _call(self, plan: Plan, requests: int) -> float:
        verified = 1.0 if plan is None else 1 + round(2 * self._acceptance[False].drafted(plan)) / 2
        key = plan, requests, verified
        if key not in self._times:
            self._times[key] = self._latency.forward(requests, verified)
            if plan is not None:
                self._times[key] += self._latency.draft_round(requests, plan.width, plan.depth)
        return self._times[key]

    def _known(self, plan: Plan, load: Load) -> _Correction:
        """The plan's own correction, which is kept from now on."""
        return self._corrections.setdefault((plan, _place(load)), self._correction(plan, load))

    def _correction(self, plan: Plan, load: Load) -> _Correction:
        """The plan's own; before its first measurement, the mean of its kind (trees, or none)."""
        found = self._corrections.get((plan, _place(load)))
        if found is None:
            known = self._corrections.items()
            alike = [entry.value for (other, _), entry in known if (other is None) == (plan is None)]
            return _Correction(sum(alike) / len(alike) if alike else 0.0)
        return found


def _place(load: Load) -> _Place:
    # Half an octave wide, and a batch of 8, 16 or 32 shares its place with the slightly smaller ones that it is between
    # the end of a request and the first token of the next.
    return _Place(round(2 * math.log2(load.requests)), load.fused)


def _compare(tried: _Correction, used: _Correction, pace: _Pace, surprise: float) -> None:
    """Learn from a trial. The surprise may be due to what was thought of either plan.

    Of the many plans, the one in use is likely to be one that was flattered by chance, and its own rounds do not
    show it: they only set the pace.
    """
    if tried.comparisons >= _FIRST_ROUNDS:
        surprise = _clipped(surprise)
    share = surprise / (2 + min(used.comparisons, _LONG))
    tried.value += surprise / (2 + min(tried.comparisons, _LONG))
    used.value -= share
    pace.value += share
    for correction in (tried, used):
        correction.comparisons += 1


def _clipped(surprise: float) -> float:
    return max(-_LARGEST_SURPRISE, min(_LARGEST_SURPRISE, surprise))
