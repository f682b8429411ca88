from __future__ import annotations

import math
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from typer.testing import CliRunner

from prism_trt.bench.peers.app import app
from prism_trt.bench.peers.engine_peer import EnginePeer
from prism_trt.bench.peers.gguf_writer import gguf_name, interleave_heads, write_gguf
from prism_trt.bench.peers.llama_peer import LlamaPeer
from prism_trt.bench.peers.results import PeersResult, compare
from prism_trt.bench.peers.runner import run_peers
from prism_trt.bench.peers.timing import PassShape, Timing, pass_shapes
from prism_trt.bench.peers.transformers_peer import TransformersPeer
from prism_trt.config import RopeScaling
from prism_trt.engines.protocol import EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.target.loading import save_hf
from prism_trt.target.model import apply_rope
from tests.bench.engines import TREE, agreeing_models
from tests.tiny import tiny_target


def test_transformers_and_our_torch_engine_agree(tmp_path: Path) -> None:
    """The peer times the same computation: same weights, same tokens, end-of-sequence tokens ignored by both."""
    target, drafter = agreeing_models()
    save_hf(target, tmp_path / "hf")
    engine = TorchEngine(target, drafter, EngineLimits(1, 256, 64), torch.device("cpu"), torch.float32)
    prompt = target.tokenizer.encode_chat([{"role": "user", "content": "The quick brown fox"}])
    timings = [
        peer.decode(prompt, 20)
        for peer in (
            TransformersPeer("transformers", tmp_path / "hf", torch.float32),
            EnginePeer("vanilla", engine, None),
            EnginePeer("tree", engine, TREE),
        )
    ]
    assert len(timings[0].tokens) == 20
    assert timings[0].tokens == timings[1].tokens == timings[2].tokens
    assert all(timing.prefill_seconds > 0 and timing.decode_seconds > 0 for timing in timings)


def test_timed_passes_compute_what_decoding_does(tmp_path: Path) -> None:
    """The passes leave K/V from which each contestant goes on as from its own prefill."""
    target, drafter = agreeing_models()
    save_hf(target, tmp_path / "hf")
    engine = TorchEngine(target, drafter, EngineLimits(1, 256, 16), torch.device("cpu"), torch.float32)
    tokens = [int(token) for token in torch.randint(3, 40, (60,), generator=torch.Generator().manual_seed(0))]
    assert EnginePeer("vanilla", engine, None).time_pass(tokens, 40) > 0
    following = TokenBatch.one_row(torch.tensor([5]), 60)
    logits = engine.forward(following).logits
    model = TransformersPeer("transformers", tmp_path / "hf", torch.float32)
    assert model.time_pass(tokens, 40) > 0
    expected = model._model(torch.tensor([[*tokens, 5]])).logits[:, -1:]
    assert logits is not None
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_passes_fit_the_context() -> None:
    assert [str(shape) for shape in pass_shapes(2048)] == ["256 after 0", "1 after 256", "8 after 256", "16 after 256"]
    assert all(shape.context + shape.tokens <= 20 and shape.tokens > 0 for shape in pass_shapes(20))


class Counter:
    """A peer that notes when it is asked."""

    version = "1"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self._log = log

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        self._log.append(self.name)
        return Timing(prompt + [0] * (tokens - len(prompt)), 0.1, 0.5)

    def time_pass(self, tokens: list[int], context: int) -> float:
        return 1e3 * len(tokens) + context


def test_contestants_take_turns() -> None:
    log: list[str] = []
    answered: list[None] = []
    passes = [PassShape(0, 5), PassShape(5, 2)]
    run = run_peers([Counter("a", log), Counter("b", log)], [[1], [2], [3]], 4, passes, lambda: answered.append(None))
    assert run.pass_seconds == [[[5000.0] * 3, [7005.0] * 3]] * 2
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [[entry.tokens[0] for entry in runs] for runs in run.timings] == [[1, 2, 3]] * 2
    assert len(answered) == 6
    assert len(run.bandwidth) == 3
    assert min(run.bandwidth) > 0.1


def test_comparison_is_arithmetic_on_the_timings() -> None:
    base = [Timing([1] * 11, 9.0, 1.0), Timing([2] * 11, 9.0, 3.0), Timing([3] * 11, 9.0, 2.0)]
    slow = [Timing([1] * 11, 9.0, 4.0), Timing([0] * 11, 9.0, 5.0), Timing([3] * 11, 9.0, 9.0)]
    first, second = compare(["base", "slow"], ["1", "2"], [base, slow], [{"8 after 256": 3.0}, {"8 after 256": 4.0}])
    assert (first.pass_ms, second.pass_ms) == ({"8 after 256": 3.0}, {"8 after 256": 4.0})
    assert first.decode_tps == pytest.approx((10, 10 / 3, 5))
    assert first.median_tps == 5
    assert (first.ratio, first.ratio_interval.low, first.ratio_interval.high) == (1, 1, 1)
    assert first.same_output == 1
    assert second.pooled_tps == pytest.approx(30 / 18)
    assert second.median_tps == statistics.median([10 / 4, 10 / 5, 10 / 9])
    assert second.ratio == pytest.approx(18 / 6)
    assert 5 / 3 <= second.ratio_interval.low <= 3 <= second.ratio_interval.high <= 4.5
    assert second.same_output == pytest.approx(2 / 3)


def test_command_compares_with_transformers(engine_directories: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_directories["good"]
    arguments = ["--engine", engine, "--target", engine.parent / "target", "--tokens", 6]
    arguments += ["--json", tmp_path / "p.json", "--markdown", tmp_path / "p.md", "--threads", 1]
    done = CliRunner().invoke(app(), list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    result = PeersResult.model_validate_json((tmp_path / "p.json").read_text())
    names = [peer.name for peer in result.peers]
    assert names == ["prism_trt vanilla", "prism_trt tree 8/3/3", "transformers bf16", "transformers fp32"]
    assert all(len(peer.decode_tps) == result.prompts == 8 for peer in result.peers)
    assert result.peers[1].same_output == 1
    assert all(len(peer.pass_ms) == 4 and min(peer.pass_ms.values()) > 0 for peer in result.peers)
    table = [line for line in (tmp_path / "p.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(names)


def test_command_needs_an_interpreter_for_gguf_files(engine_directories: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_directories["good"]
    arguments = ["--engine", engine, "--target", engine, "--gguf", "x", "--json", tmp_path / "p"]
    with pytest.raises(PrismError, match=r"--gguf needs llama\.cpp"):
        CliRunner().invoke(app(), list(map(str, arguments)), catch_exceptions=False)


def test_llama_rotation_of_reordered_rows_is_the_hugging_face_rotation() -> None:
    heads, width = 3, 8
    weight = torch.randn(heads * width, 5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, generator=torch.Generator().manual_seed(1))
    angles = torch.tensor([0.3, 1.1, 2.0, 0.7])
    expected = apply_rope((weight @ x).view(heads, width), angles.cos(), angles.sin())
    pairs = (interleave_heads(weight, heads) @ x).view(heads, width // 2, 2)
    turned = torch.stack(
        (
            pairs[..., 0] * angles.cos() - pairs[..., 1] * angles.sin(),
            pairs[..., 1] * angles.cos() + pairs[..., 0] * angles.sin(),
        ),
        dim=-1,
    )
    torch.testing.assert_close(turned, expected.view(heads, 2, width // 2).transpose(1, 2))


def test_gguf_file_holds_the_target(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    target = tiny_target(tie_word_embeddings=False, rope_scaling=scaling)
    config = target.config
    write_gguf(target, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    reader = GGUFReader(tmp_path / "model.gguf")

    def field(name: str) -> object:
        return reader.fields[name].contents()

    assert field("general.architecture") == "llama"
    assert field("llama.vocab_size") == config.vocab_size
    assert field("llama.block_count") == config.num_layers
    assert field("llama.attention.head_count_kv") == config.num_kv_heads
    assert field("llama.attention.key_length") == config.head_dim
    assert field("llama.rope.freq_base") == config.rope_theta
    assert math.isclose(float(str(field("llama.attention.layer_norm_rms_epsilon"))), config.rms_norm_eps, rel_tol=1e-6)

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight").data
    assert factors[0] == 1
    assert factors[-1] == 8
    state = target.model.state_dict()
    assert set(tensors) == {gguf_name(name) for name in state}
    for name, weight in state.items():
        tensor = tensors[gguf_name(name)]
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if weight.dim() == 2:
            weight = weight.bfloat16().float()
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if part in name:
                weight = interleave_heads(weight, heads)
        assert torch.equal(values, weight), name


def test_a_worker_that_cannot_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"cannot run .*missing for llama\.cpp"):
        LlamaPeer("x", tmp_path / "missing", tmp_path / "m.gguf", 1, 64, False)
    ends = shutil.which("false")
    assert ends is not None
    with pytest.raises(PrismError, match=r"llama\.cpp worker ended; check that --llama-python"):
        LlamaPeer("x", Path(ends), tmp_path / "m.gguf", 1, 64, False)
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -S -c 'import llama_cpp'\n")
    script.chmod(0o755)
    with pytest.raises(PrismError, match="No module named 'llama_cpp'"):
        LlamaPeer("x", script, tmp_path / "m.gguf", 1, 64, False)
