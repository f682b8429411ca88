"""Drafters of other projects, written here with their documented names, against a plain forward of their networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_trt.cli import run
from prism_trt.config import RopeScaling
from prism_trt.drafter.app import app
from prism_trt.drafter.checkpoint import drafter_tensors, load_drafter, save_drafter
from prism_trt.drafter.foreign.exporting import export_eagle
from prism_trt.drafter.foreign.importing import ImportChoices, ImportedDrafter, import_drafter
from prism_trt.engines.protocol import EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target, save_hf
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target

HIDDEN, MLP, HEADS, GROUPS, WIDTH = 64, 96, 4, 2, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 320,
}
DEEP = {"num_layers": 8}
"""A target deep enough for the artifact's rule of fused layers."""


@dataclass(frozen=True)
class Source:
    """A published drafter: what its directory holds, and how its project names and runs it."""

    target: Target
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    layer: str = "layers.{layer}"
    fc: str = "fc"
    layers: int = 1
    step_map: tuple[int, ...] = (0,)
    fused: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    choices: ImportChoices = field(default_factory=ImportChoices)

    def write(self, directory: Path, safetensors: bool = False) -> Path:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        tensors = {name: value.to(self.dtype) for name, value in self.tensors.items()}
        if safetensors:
            save_file({name: value.clone() for name, value in tensors.items()}, directory / "model.safetensors")
        else:
            torch.save(tensors, directory / "pytorch_model.bin")
        return directory

    def load(self, directory: Path) -> ImportedDrafter:
        return import_drafter(self.write(directory), self.target, self.choices)

    def with_tensors(self, **changes: Tensor | None) -> Source:
        tensors = self.tensors | {name.replace("__", "."): value for name, value in changes.items()}
        return replace(self, tensors={name: value for name, value in tensors.items() if value is not None})

    def with_config(self, **changes: Any) -> Source:
        return replace(self, config=self.config | changes)


def random_tensors(target: Target, layers: list[str], fcs: list[str], bias: bool, fusion: bool) -> dict[str, Tensor]:
    """The target's embedding, and random weights of layers without `input_layernorm`, fcs and fusion layer."""
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    tensors = {"embed_tokens.weight": target.model.model.embed_tokens.weight.clone()}
    for prefix in layers:
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(GROUPS * WIDTH, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(GROUPS * WIDTH, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": matrix(MLP, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(MLP, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, MLP),
            f"{prefix}.post_attention_layernorm.weight": 1 + 0.1 * torch.randn(HIDDEN, generator=generator),
        }
    for prefix in fcs:
        tensors[f"{prefix}.weight"] = matrix(HIDDEN, 2 * HIDDEN)
        if bias:
            tensors[f"{prefix}.bias"] = torch.randn(HIDDEN, generator=generator)
    if fusion:
        tensors["fusion_layer.weight"] = matrix(HIDDEN, 3 * HIDDEN)
        tensors["fusion_layer.bias"] = torch.randn(HIDDEN, generator=generator)
    return tensors


def eagle(bias: bool = True) -> Source:
    """EAGLE-LLaMA2 has no key `bias` in its config and a bias in its file, EAGLE-LLaMA3 neither."""
    target = tiny_target()
    target.model.half().float()  # so that the file's embedding is the target's to the last bit
    tensors = random_tensors(target, ["layers.0"], ["fc"], bias, fusion=False)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(WIDTH // 2)
    return Source(target, tensors, CONFIG if bias else CONFIG | {"bias": False}, dtype=torch.float16)


def hass_two_layers() -> Source:
    target = tiny_target(tie_word_embeddings=False)
    tensors = random_tensors(target, ["layers.0", "layers.1"], ["fc"], bias=True, fusion=False)
    tensors["layers.1.input_layernorm.weight"] = 1 + 0.1 * torch.randn(HIDDEN)
    config = CONFIG | {"num_hidden_layers": 2, "rope_theta": 500000.0}
    return Source(target, tensors, config, layers=2, choices=ImportChoices(kind="hass"))


def prism(fusion: bool = False) -> Source:
    target = tiny_target(**(DEEP if fusion else {}))
    tensors = random_tensors(target, ["stepModels.0.0", "stepModels.1.0"], ["stepFCs.0", "stepFCs.1"], True, fusion)
    for name in list(tensors):  # the names of the module that was active last
        if name.startswith(("stepModels.1.", "stepFCs.1.")):
            alias = name.replace("stepModels.1", "layers").replace("stepFCs.1", "fc")
            tensors[alias] = tensors[name]
    mapping = {"0": 0, "1": 1, "2": 1}
    config = {"eagle_config": CONFIG, "num_steps": 3, "num_step_models": 2, "step_mapping": mapping}
    source = Source(target, tensors, config, "stepModels.{module}.{layer}", "stepFCs.{module}", step_map=(0, 1, 1))
    return replace(source, fused=(3, 5, 6)) if fusion else source


def sglang() -> Source:
    target = tiny_target()
    tensors = random_tensors(target, ["midlayer.0", "midlayer.1"], ["fc0", "fc1"], bias=True, fusion=True)
    tensors["lm_head.weight"] = target.model.head_weight.clone()
    choices = ImportChoices(feature_layers=(0, 1, 1))
    return Source(
        target, tensors, CONFIG, "midlayer.{module}", "fc{module}", step_map=(0, 1), fused=(0, 1, 1), choices=choices
    )


SOURCES: dict[str, Callable[[], Source]] = {
    "EAGLE": eagle,
    "EAGLE without bias": lambda: eagle(bias=False),
    "HASS of two layers": hass_two_layers,
    "PRISM": prism,
    "PRISM of three hidden states": lambda: prism(fusion=True),
    "SGLang": sglang,
}


class PlainDrafter:
    """The forward of ``cnets1.Model``, row by row over a growing cache, as its own project runs it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.weights = {name: value.to(source.dtype).float() for name, value in source.tensors.items()}
        self.theta = source.config.get("eagle_config", source.config).get("rope_theta", 10000.0)
        self.cache: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(source.layers)]

    def row(self, step: int, token: int, hidden: Tensor, position: int) -> Tensor:
        """Hidden state [H] that the module of draft step `step` gives for a token and a hidden state [H]."""
        weights, step_map = self.weights, self.source.step_map
        module = step_map[min(step, len(step_map) - 1)]
        fc = self.source.fc.format(module=module)
        x = weights[f"{fc}.weight"] @ torch.cat((weights["embed_tokens.weight"][token], hidden))
        x = x + weights.get(f"{fc}.bias", 0.0)
        for number in range(self.source.layers):
            prefix = self.source.layer.format(module=module, layer=number)
            x = self.layer(x, prefix, number, position)
        return x

    def layer(self, x: Tensor, prefix: str, number: int, position: int) -> Tensor:
        def linear(name: str, value: Tensor) -> Tensor:
            return self.weights[f"{prefix}.{name}_proj.weight"] @ value

        normed = self.norm(x, f"{prefix}.input_layernorm.weight") if number else x
        query, key, value = (linear(f"self_attn.{name}", normed).view(-1, WIDTH) for name in "qkv")
        keys, values = self.cache[number]
        keys.append(self.rotate(key, position))
        values.append(value)
        query, attended = self.rotate(query, position), []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = torch.stack([past[group] for past in keys]) @ query[head] / WIDTH**0.5
            attended.append(scores.softmax(0) @ torch.stack([past[group] for past in values]))
        x = x + linear("self_attn.o", torch.cat(attended))
        normed = self.norm(x, f"{prefix}.post_attention_layernorm.weight")
        gate = linear("mlp.gate", normed)
        return x + linear("mlp.down", gate * gate.sigmoid() * linear("mlp.up", normed))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * self.weights[name]

    def rotate(self, rows: Tensor, position: int) -> Tensor:
        turns = position * self.theta ** (-torch.arange(0, WIDTH, 2) / WIDTH)
        turned = torch.complex(*rows.chunk(2, dim=-1)) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def fuse(self, features: Tensor) -> Tensor:
        if not self.source.fused:
            return features
        return features @ self.weights["fusion_layer.weight"].T + self.weights["fusion_layer.bias"]


@pytest.mark.parametrize("name", SOURCES)
def test_imported_drafter_drafts_what_its_project_does(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]()
    save_drafter(source.load(tmp_path / "source").drafter, tmp_path / "drafter")
    drafter = load_drafter(tmp_path / "drafter", source.target)
    assert drafter.config.feature_layers == source.fused
    assert drafter.config.step_map == source.step_map

    tokens = torch.randint(0, 320, (10,), generator=torch.Generator().manual_seed(0))
    features = source.target.model.forward_sequence(tokens[None, :-1], source.fused)
    head = source.target.model.head_weight

    plain = PlainDrafter(source)
    states = [plain.row(0, int(tokens[t + 1]), plain.fuse(features[0, t]), t) for t in range(9)]
    engine = TorchEngine(source.target, drafter, EngineLimits(1, 32, 32), torch.device("cpu"))
    zero, committed = torch.zeros(1, dtype=torch.long), torch.tensor([9])
    output = engine.extend(TokenBatch(tokens[None, 1:], torch.arange(9)[None], zero, zero, committed), features)
    for step in range(5):
        expected = head @ states[-1]
        torch.testing.assert_close(output.logits[0, -1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        token, position = int(expected.argmax()), 9 + step
        states.append(plain.row(step + 1, token, states[-1], position))
        place = torch.tensor([position])
        batch = TokenBatch(torch.tensor([[token]]), place[None], zero, place, torch.ones(1, dtype=torch.long))
        output = engine.step(step + 1, batch, output.hidden)


def test_kinds_and_origin_are_recorded(tmp_path: Path) -> None:
    kinds = {name: make().load(tmp_path / name).drafter.config.kind for name, make in SOURCES.items()}
    assert kinds == {
        "EAGLE": "eagle2",
        "EAGLE without bias": "eagle2",
        "HASS of two layers": "hass",
        "PRISM": "prism",
        "PRISM of three hidden states": "prism",
        "SGLang": "prism",
    }
    origin = eagle().load(tmp_path / "again").drafter.config.provenance["imported"]
    assert origin["layout"] == "eagle"
    assert set(origin["sha256"]) == {"config.json", "pytorch_model.bin"}


def test_choices_override_the_defaults(tmp_path: Path) -> None:
    choices = ImportChoices(step_map=(0, 1, 0, 1))
    assert replace(prism(), choices=choices).load(tmp_path / "a").drafter.config.step_map == (0, 1, 0, 1)
    choices = ImportChoices(feature_layers=(1, 2, 8))
    fused = replace(prism(fusion=True), choices=choices).load(tmp_path / "b").drafter
    assert fused.config.feature_layers == (1, 2, 8)


def test_both_file_formats_hold_the_same(tmp_path: Path) -> None:
    source = eagle()
    first = source.load(tmp_path / "torch").drafter
    second = import_drafter(source.write(tmp_path / "safe", safetensors=True), source.target, source.choices).drafter
    for name, value in drafter_tensors(first).items():
        assert value.dtype == torch.float16
        assert torch.equal(value, drafter_tensors(second)[name])


def test_differences_that_are_allowed_are_noted(tmp_path: Path) -> None:
    assert eagle().load(tmp_path / "same").notes == []
    own = eagle().with_config(rope_theta=5e5, rms_norm_eps=1e-6, bias=False).load(tmp_path / "own")
    assert [note.split(" ")[0] for note in own.notes] == ["rope_theta", "rms_norm_eps", "config.json"]
    assert own.drafter.config.rope_theta == 5e5
    assert own.drafter.config.rms_norm_eps == 1e-6
    assert own.drafter.config.fc_bias
    without = replace(eagle(bias=False), config=CONFIG).load(tmp_path / "without")
    assert not without.drafter.config.fc_bias
    assert "no key bias" in without.notes[0]


ROW = torch.ones(HIDDEN)
REFUSED: dict[str, tuple[Callable[[], Source], str]] = {
    "another hidden size": (lambda: eagle().with_config(hidden_size=32), "hidden_size 32, but tiny has 64"),
    "another vocabulary": (lambda: eagle().with_config(vocab_size=300), "vocab_size 300, but tiny has 320"),
    "another target": (lambda: replace(eagle(), target=tiny_target(seed=5)), "differs from the target's in 320 of 320"),
    "no embedding": (lambda: eagle().with_tensors(embed_tokens__weight=None), "lacks embed_tokens"),
    "another head": (
        lambda: sglang().with_tensors(lm_head__weight=torch.ones(320, HIDDEN)),
        "lm_head.weight in .* differs",
    ),
    "unknown tensor": (lambda: eagle().with_tensors(layers__0__gate=ROW), r"holds the tensor layers\.0\.gate"),
    "qkv bias": (
        lambda: eagle().with_tensors(layers__0__self_attn__q_proj__bias=ROW),
        r"holds the tensor layers\.0\.self_attn\.q_proj\.bias",
    ),
    "missing tensor": (
        lambda: eagle().with_tensors(layers__0__mlp__up_proj__weight=None),
        r"lacks the tensor layers\.0\.mlp\.up_proj\.weight",
    ),
    "wrong shape": (lambda: eagle().with_config(intermediate_size=97), r"gate_proj\.weight has shape \[96, 64\]"),
    "promised bias": (lambda: eagle(bias=False).with_config(bias=True), "has no bias of fc"),
    "bias of one module only": (
        lambda: sglang().with_tensors(fc1__bias=None),
        r"lacks the tensor fc1\.bias",
    ),
    "layers of another config": (lambda: eagle().with_config(num_hidden_layers=2), "has 1 layers, .* says .* 2"),
    "EAGLE-3": (
        lambda: eagle().with_tensors(midlayer__hidden_norm__weight=ROW),
        r"midlayer\.hidden_norm\.weight, so it is an EAGLE-3 drafter",
    ),
    "a norm before the first layer": (
        lambda: eagle().with_tensors(layers__0__input_layernorm__weight=ROW),
        r"layers\.0\.input_layernorm\.weight, so it is an EAGLE-3 drafter",
    ),
    "a language model": (
        lambda: replace(eagle(), tensors={"model.norm.weight": ROW}),
        r"no drafter .* model\.norm\.weight",
    ),
    "aliases of no module": (lambda: prism().with_tensors(fc__bias=ROW), "equal none of its modules"),
    "step map without a module": (
        lambda: replace(prism(), choices=ImportChoices(step_map=(0, 0))),
        "must use every module",
    ),
    "step mapping with a gap": (lambda: prism().with_config(step_mapping={"0": 0, "2": 1}), "does not map steps"),
    "unknown kind": (lambda: replace(eagle(), choices=ImportChoices(kind="medusa")), "kind: Input should be"),
    "feature layers of one hidden state": (
        lambda: replace(eagle(), choices=ImportChoices(feature_layers=(1, 2, 3))),
        "no fusion_layer",
    ),
    "feature layers beyond the target": (
        lambda: replace(sglang(), choices=ImportChoices(feature_layers=(0, 1, 3))),
        r"not all among the target's 0\.\.2",
    ),
    "no rule for a shallow target": (lambda: replace(sglang(), choices=ImportChoices()), "pass --feature-layers"),
    "a fusion bias that later steps would see": (
        lambda: replace(prism(fusion=True), choices=ImportChoices(step_map=(0, 1, 0))),
        "serves later steps too",
    ),
    "quantised weights": (lambda: replace(eagle(), dtype=torch.int8), "not quantised"),
    "linear rope scaling": (
        lambda: eagle().with_config(rope_scaling={"type": "linear", "factor": 2.0}),
        "rope scaling 'linear' is not supported",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(PrismError, match=message):
        make().load(tmp_path / "source")


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, safetensors: bool, tmp_path: Path) -> None:
    weight = torch.ones(HIDDEN, HIDDEN)
    weight[3, 5] = value
    source = eagle().with_tensors(layers__0__self_attn__o_proj__weight=weight)
    with pytest.raises(PrismError, match=r"o_proj\.weight holds values that are not finite"):
        import_drafter(source.write(tmp_path / "source", safetensors), source.target, source.choices)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_damaged_and_harmful_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = eagle()
    directory = source.write(tmp_path / "source")
    weights = directory / "pytorch_model.bin"

    def refused(message: str) -> None:
        with pytest.raises(PrismError, match=message):
            import_drafter(directory, source.target, source.choices)

    whole = weights.read_bytes()
    for kept in (len(whole) // 2, 20, 0):
        weights.write_bytes(whole[:kept])
        refused(r"pytorch_model\.bin cannot be read, because it is truncated or not [^\n]*torch\.save again$")
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Harmful()}, weights)
    refused(r"cannot be read, because it holds more than tensors [^\n]*torch\.save$")
    assert not Path("harmed").exists()
    torch.load(weights, weights_only=False)
    assert Path("harmed").exists()
    torch.save({"model": {"fc.weight": ROW}}, weights)
    refused("model is a dict and not a tensor")
    torch.save([ROW], weights)
    refused("holds a list")
    weights.unlink()
    refused(r"neither model\.safetensors nor pytorch_model\.bin")
    (directory / "model.safetensors").write_bytes(b"not a file of tensors")
    refused("cannot be read")
    (directory / "config.json").write_text("{")
    refused("not readable JSON")
    (directory / "config.json").unlink()
    refused(r"has no config\.json")


@pytest.mark.parametrize("shape", ["one layer", "two layers"])
def test_exported_and_imported_again_it_is_the_same(shape: str, tmp_path: Path) -> None:
    target = tiny_target()
    layers = {"num_layers": 2} if shape == "two layers" else {"fc_bias": True}
    drafter = tiny_drafter(target, modules=1, kind="eagle2", draft_vocab_size=None, **layers)
    for dtype in (torch.float32, torch.float16):
        directory = tmp_path / str(dtype)
        export_eagle(drafter, target, directory, dtype)
        back = import_drafter(directory, target, ImportChoices())
        assert back.notes == []
        assert back.drafter.config == drafter.config.model_copy(update={"provenance": back.drafter.config.provenance})
        for name, value in drafter_tensors(drafter).items():
            assert torch.equal(drafter_tensors(back.drafter)[name], value.to(dtype))


def test_exported_file_has_eagles_names_and_only_its_own_bytes(tmp_path: Path) -> None:
    target = tiny_target(
        rope_scaling=RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
    )
    save_hf(target, tmp_path / "target")
    drafter = tiny_drafter(target, modules=1, draft_vocab_size=100)
    export_eagle(drafter, target, tmp_path / "out")
    file = tmp_path / "out" / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    expected = random_tensors(target, ["layers.0"], ["fc"], bias=False, fusion=False)
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert torch.equal(tensors["embed_tokens.weight"], target.model.model.embed_tokens.weight.half())
    assert file.stat().st_size < 1.2 * sum(2 * value.numel() for value in tensors.values()) + 10_000
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bias"] is False
    assert config["vocab_size"] == 320
    assert config["rope_scaling"]["rope_type"] == "llama3"
    export_eagle(drafter, target, tmp_path / "safe", torch.bfloat16, safetensors=True)
    stored = load_file(tmp_path / "safe" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("two modules", "one module for all steps"),
        ("standard", "language model of its own"),
        ("multi", "several, fused"),
    ],
)
def test_what_eagle_cannot_hold_is_not_exported(shape: str, reason: str, tmp_path: Path) -> None:
    target = tiny_target()
    fields = DRAFTERS[shape] | ({"modules": 1} if shape == "multi" else {})
    with pytest.raises(PrismError, match=reason):
        export_eagle(tiny_drafter(target, **fields), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_and_weights_that_do_not_fit_are_not_exported(tmp_path: Path) -> None:
    target = tiny_target()
    with pytest.raises(PrismError, match="heads divide the hidden size"):
        export_eagle(tiny_drafter(target, modules=1, head_dim=8), target, tmp_path / "out")
    large = tiny_drafter(target, modules=1)
    large.module(0).stack[0].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(PrismError, match=r"down_proj\.weight has values that are not finite"):
        export_eagle(large, target, tmp_path / "out")
    export_eagle(large, target, tmp_path / "out", torch.bfloat16)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = prism()
    save_hf(source.target, tmp_path / "target")
    source.write(tmp_path / "source")

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            run(app(), [*arguments, "--target", str(tmp_path / "target")])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    imported = ["import", str(tmp_path / "source"), "--out", str(tmp_path / "drafter")]
    assert command(*imported, "--step-map", "0,1") == 0
    assert "prism drafter from prism layout, M = 2, step map [0, 1]" in capsys.readouterr().out
    assert load_drafter(tmp_path / "drafter", source.target).config.step_map == (0, 1)
    assert command(*imported) == 2
    assert "already exists" in capsys.readouterr().err
    assert command(*imported, "--overwrite", "--step-map", "0;1") == 2
    assert "is not a list of numbers" in capsys.readouterr().err

    exported = ["export", str(tmp_path / "one"), "--out", str(tmp_path / "eagle")]
    save_drafter(tiny_drafter(source.target, modules=1), tmp_path / "one")
    assert command(*exported, "--dtype", "int8") == 2
    assert command(*exported, "--dtype", "bfloat16", "--safetensors") == 0
    assert (tmp_path / "eagle" / "model.safetensors").is_file()
    assert command("import", str(tmp_path / "eagle"), "--out", str(tmp_path / "back"), "--kind", "hass") == 0
    assert load_drafter(tmp_path / "back", source.target).config.kind == "hass"
