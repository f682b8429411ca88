from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prism_trt.data.feature_cache import FeatureCache
from prism_trt.data.regenerate import first_answers
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.checkpoint import load_drafter, save_drafter, weights_sha256
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.train.checkpoints import LATEST
from prism_trt.train.loop import Trainer, TrainingResult, UpdateReport
from prism_trt.train.simulate import SimulatedAcceptance
from prism_trt.train.stages import Stage
from tests.tiny import tiny_drafter, tiny_target
from tests.train.synthetic import small_training


class Recorder:
    """An observer that keeps what it is told; `stop_at` interrupts the run there as Ctrl-C would."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.stop_at = stop_at
        self.start: tuple[int, int] | None = None
        self.updates: list[UpdateReport] = []
        self.simulations: list[tuple[str, int, SimulatedAcceptance]] = []
        self.maps: list[tuple[int, ...]] = []

    def started(self, planned: list[Stage], stage: int, update: int) -> None:
        self.start = (stage, update)

    def updated(self, report: UpdateReport) -> None:
        self.updates.append(report)
        if self.stop_at == (report.stage.name, report.update):
            raise KeyboardInterrupt

    def simulated(self, stage: Stage, update: int, acceptance: SimulatedAcceptance) -> None:
        self.simulations.append((stage.name, update, acceptance))

    def mapped(self, step_map: tuple[int, ...], acceptance: SimulatedAcceptance) -> None:
        self.maps.append(step_map)


def run(
    data: Path, work: Path, recorder: Recorder | None = None, init: Drafter | None = None, **changes: object
) -> TrainingResult:
    work.mkdir(exist_ok=True)
    target, config = tiny_target(), small_training(**changes)
    trainer = Trainer(target, FeatureCache(data / "cache", target, config.features), config, work, init)
    return trainer.run([recorder or Recorder()])


def same_weights(a: Drafter, b: Drafter) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_stages_follow_each_other_and_are_measured(trained_on: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    result = run(trained_on, tmp_path / "work", recorder)
    assert [(r.stage.name, r.update) for r in recorder.updates] == [
        *(("one_step", i) for i in range(1, 7)),
        *(("alignment", i) for i in range(1, 5)),
        *(("tuning", i) for i in range(1, 5)),
    ]
    assert [r.update for r in recorder.updates if r.measured and r.stage.name == "one_step"] == [1, 3, 5, 6]
    assert [len(r.measured.agreement) for r in recorder.updates if r.measured and r.update == 1] == [1, 3, 4]
    assert [(name, update) for name, update, _ in recorder.simulations] == [
        *(("one_step", 5), ("one_step", 6), ("alignment", 4), ("tuning", 4)),
    ]
    assert result.acceptance == recorder.simulations[-1][2]
    assert result.rows == sum(r.rows for r in recorder.updates)
    assert result.vocabulary is not None and result.acceptance is not None
    assert result.vocabulary.chain == result.acceptance.chain
    assert 0.5 < result.vocabulary.coverage < 1
    drafter = result.drafter
    assert (drafter.config.num_modules, drafter.config.step_map) == (2, (0, 1))
    assert drafter.draft_vocab is not None
    assert set(tiny_target().tokenizer.eos_token_ids) <= set(drafter.draft_vocab.tolist())


def test_training_lowers_the_loss_and_raises_the_acceptance_length(trained_on: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    run(trained_on, tmp_path / "work", recorder, one_step_updates=80, alignment_updates=0, tuning_updates=0, modules=1)
    losses = [r.measured.cross_entropy[0] for r in recorder.updates if r.measured]
    assert losses[-1] < 0.8 * losses[0]
    assert recorder.simulations[-1][2].top4[0] > recorder.simulations[0][2].top4[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [("one_step", 3), ("alignment", 1), ("tuning", 3)])
def test_an_interrupted_run_continues_to_the_same_weights(
    stop: tuple[str, int], optimizer: str, trained_on: Path, tmp_path: Path
) -> None:
    whole = run(trained_on, tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(trained_on, tmp_path / "cut", Recorder(stop_at=stop), optimizer=optimizer)
    recorder = Recorder()
    continued = run(trained_on, tmp_path / "cut", recorder, optimizer=optimizer)
    assert recorder.start != (0, 0)
    assert same_weights(whole.drafter, continued.drafter)
    assert (whole.rows, whole.acceptance) == (continued.rows, continued.acceptance)


def test_changed_options_of_a_later_stage_keep_the_earlier_stages(trained_on: Path, tmp_path: Path) -> None:
    run(trained_on, tmp_path / "work")
    recorder = Recorder()
    changed = run(trained_on, tmp_path / "work", recorder, tuning_updates=3, modules=3)
    assert recorder.start == (1, 4)
    assert {r.stage.name for r in recorder.updates} == {"tuning"}
    assert same_weights(changed.drafter, run(trained_on, tmp_path / "new", tuning_updates=3, modules=3).drafter)


def test_changed_options_of_the_first_stage_are_refused(trained_on: Path, tmp_path: Path) -> None:
    run(trained_on, tmp_path / "work")
    with pytest.raises(PrismError, match="another --work"):
        run(trained_on, tmp_path / "work", seed=1)


def test_a_damaged_checkpoint_is_named(trained_on: Path, tmp_path: Path) -> None:
    run(trained_on, tmp_path / "work")
    path = tmp_path / "work" / LATEST
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PrismError, match=r"checkpoint\.pt is damaged"):
        run(trained_on, tmp_path / "work")


def test_a_diverging_run_stops_and_keeps_its_checkpoint(trained_on: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(PrismError, match=r"no longer finite .* lower --one-step-lr"):
        run(trained_on, tmp_path / "work", recorder, one_step_lr=1e30, one_step_updates=20, save_every=1)
    kept = torch.load(tmp_path / "work" / LATEST, weights_only=True)
    assert kept["update"] <= len(recorder.updates)
    assert all(bool(torch.isfinite(value).all()) for value in kept["weights"].values())


def test_the_advice_after_a_divergence_works(trained_on: Path, tmp_path: Path) -> None:
    """What the first stage saved belongs to its learning rate; later stages continue where the one before ended."""
    work = tmp_path / "work"
    stopped = {"one_step_updates": 20, "save_every": 1}
    with pytest.raises(PrismError, match=r"lower --one-step-lr and pass another --work, with --cache .*cache for the"):
        run(trained_on, work, one_step_lr=1e20, **stopped)
    with pytest.raises(PrismError, match="another --work"):
        run(trained_on, work, one_step_lr=1e-3, **stopped)
    work = tmp_path / "other"
    with pytest.raises(PrismError, match=r"of stage tuning: lower --tuning-lr \(the stages before it are kept"):
        run(trained_on, work, tuning_lr=1e30)
    recorder = Recorder()
    run(trained_on, work, recorder, tuning_lr=1e-3)
    assert recorder.start == (1, 4)
    unsaved = tmp_path / "unsaved"
    with pytest.raises(PrismError, match=r"lower --one-step-lr$"):
        run(trained_on, unsaved, one_step_lr=1e30, save_every=100)
    run(trained_on, unsaved)
    with pytest.raises(PrismError, match="lower the --\\*-weight options"):
        run(trained_on, tmp_path / "weights", hidden_weight=1e300)


def test_an_initial_drafter_is_where_training_starts(trained_on: Path, tmp_path: Path) -> None:
    target = tiny_target()
    init = tiny_drafter(target, modules=1).requires_grad_(True)
    vocab = init.draft_vocab
    untouched = run(trained_on, tmp_path / "work", init=init, one_step_updates=0, alignment_updates=0, tuning_updates=0)
    assert untouched.drafter.draft_vocab is vocab
    assert all(same_weights(module, init.modules_[0]) for module in untouched.drafter.modules_)  # type: ignore[arg-type]


def test_an_initial_drafter_with_several_modules_is_tuned_further(trained_on: Path, tmp_path: Path) -> None:
    init = tiny_drafter(tiny_target(), modules=2).requires_grad_(True)
    first = [{name: value.clone() for name, value in module.state_dict().items()} for module in init.modules_]
    with pytest.raises(PrismError, match="--modules 2 --step-map 0,1"):
        run(trained_on, tmp_path / "early", init=init)
    only = {"one_step_updates": 0, "alignment_updates": 0, "modules": 2, "step_map": "0,1"}
    with pytest.raises(PrismError, match="can only be tuned as it is"):
        run(trained_on, tmp_path / "other", init=init, **only | {"modules": 3, "step_map": "0,1,2"})
    tuned = run(trained_on, tmp_path / "work", init=init, **only).drafter
    assert tuned.config.num_modules == 2
    for module, before in zip(tuned.modules_, first, strict=True):
        assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    again = run(trained_on, tmp_path / "work", init=init, **only).drafter
    assert all(map(same_weights, tuned.modules_, again.modules_))  # type: ignore[arg-type]


def test_only_the_first_answers_are_trained_on_when_asked(trained_on: Path, tmp_path: Path) -> None:
    cache = FeatureCache(trained_on / "cache", tiny_target())
    read: set[int] = set()
    whole = cache.sequence

    def sequence(index: int) -> FeatureSequence:
        read.add(index)
        return whole(index)

    cache.sequence = sequence  # type: ignore[method-assign]
    updates = {"one_step_updates": 12, "alignment_updates": 0, "tuning_updates": 0, "simulate_every": 1000}
    trainer = Trainer(tiny_target(), cache, small_training(max_answers=4, hold_back=0, **updates), tmp_path)
    trainer.run([Recorder()])
    assert read == set(first_answers(np.flatnonzero(cache.roots > 0), 4, seed=0).tolist())


def test_nothing_left_to_train_on_is_refused(trained_on: Path, tmp_path: Path) -> None:
    target = tiny_target()
    cache = FeatureCache(trained_on / "cache", target)
    cache.greedy = np.ones(len(cache), dtype=bool)
    with pytest.raises(PrismError, match="lower --hold-back"):
        Trainer(target, cache, small_training(hold_back=1000), tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "eagle2"}, {"kind": "eagle2", "step_map": (0,), "features": "last"}),
        ({"kind": "hass", "layers": 2}, {"kind": "hass", "step_map": (0,), "num_layers": 2}),
        ({"kind": "standard", "layers": 2, "width": 32}, {"kind": "standard", "features": "none", "hidden_size": 32}),
        ({"features": "multi"}, {"kind": "prism", "features": "multi", "feature_layers": (0, 1, 1)}),
        ({"kv_mode": "current", "step_map": "0,1,0"}, {"kv_mode": "current", "step_map": (0, 1, 0)}),
    ],
)
def test_every_kind_trains_and_learns(
    trained_on: Path, tmp_path: Path, changes: dict[str, object], expected: dict[str, object]
) -> None:
    recorder = Recorder()
    updates = {"one_step_updates": 30, "alignment_updates": 6, "tuning_updates": 6, "log_every": 1}
    drafter = run(trained_on, tmp_path / "work", recorder, **updates, **changes).drafter
    config = drafter.config.model_dump()
    assert {name: config[name] for name in expected} == expected
    entropy = [r.measured.cross_entropy[0] for r in recorder.updates if r.measured and r.stage.name == "one_step"]
    assert sum(entropy[-5:]) < 0.97 * sum(entropy[:5])
    save_drafter(drafter, tmp_path / "drafter")
    assert weights_sha256(load_drafter(tmp_path / "drafter", tiny_target())) == weights_sha256(drafter)


def test_the_measured_step_map_is_kept_when_the_run_is_interrupted(trained_on: Path, tmp_path: Path) -> None:
    options = {"step_map": "auto", "modules": 3}
    whole = Recorder()
    result = run(trained_on, tmp_path / "whole", whole, **options)
    assert whole.maps == [result.drafter.config.step_map]
    assert set(result.drafter.config.step_map) == {0, 1, 2}
    cut, rest = Recorder(stop_at=("tuning", 3)), Recorder()
    with pytest.raises(KeyboardInterrupt):
        run(trained_on, tmp_path / "cut", cut, **options)
    continued = run(trained_on, tmp_path / "cut", rest, **options)
    assert rest.maps == []
    assert continued.drafter.config.step_map == result.drafter.config.step_map
    assert same_weights(continued.drafter, result.drafter)


def test_tuning_reaches_every_module_of_a_measured_step_map(
    trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the five measured steps differs most, but four are tuned."""
    measured = SimulatedAcceptance(9, (0.6, 0.58, 0.57, 0.56, 0.3), (1.0,) * 5, 1.0, 1.0)
    monkeypatch.setattr(Trainer, "_simulate", lambda *_: measured)
    recorder = Recorder()
    result = run(trained_on, tmp_path / "work", recorder, step_map="auto")
    assert recorder.maps == [(0, 1, 1, 1)] == [result.drafter.config.step_map]


def test_agreement_on_held_back_answers_is_what_training_measures(trained_on: Path, tmp_path: Path) -> None:
    """Trained on the answers it is simulated on, the drafter agrees as much by either measure."""
    target = tiny_target()
    cache = FeatureCache(trained_on / "cache", target)
    cache.greedy = np.ones(len(cache), dtype=bool)
    everything = {"rows_per_update": 10**6, "noise": 0.0, "log_every": 1, "hold_back": 20, "one_step_lr": 1e-20}
    updates = {"one_step_updates": 1, "alignment_updates": 0, "tuning_updates": 0, "modules": 1}
    trainer = Trainer(target, cache, small_training(**everything, **updates), tmp_path)
    trainer._training = trainer._held_back
    recorder = Recorder()
    result = trainer.run([recorder])
    assert recorder.updates[0].measured is not None and result.acceptance is not None
    assert result.acceptance.agreement == pytest.approx(recorder.updates[0].measured.agreement[0])
    assert result.acceptance.agreement != pytest.approx(result.acceptance.top1[0])


def test_updates_in_several_passes_give_the_same_drafter(trained_on: Path, tmp_path: Path) -> None:
    whole = run(trained_on, tmp_path / "whole")
    parts = run(trained_on, tmp_path / "parts", rows_per_pass=50)
    for name, value in whole.drafter.state_dict().items():
        torch.testing.assert_close(parts.drafter.state_dict()[name], value, rtol=1e-3, atol=2e-4)
