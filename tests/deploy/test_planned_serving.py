"""A server as it is by default: each round's tree is chosen while requests run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prism_trt.client.generate import Options, stream_generate
from prism_trt.deploy.repository import read_repository, write_repository
from prism_trt.deploy.server import TritonServer
from prism_trt.engines.protocol import Engine
from prism_trt.speculative.decoder import generate
from prism_trt.speculative.request import Request
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.tokenizer import Tokenizer
from tests.deploy.conftest import SLOTS


@pytest.fixture(scope="module")
def planned(engine_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = write_repository(engine_path, tmp_path_factory.mktemp("planned") / "repository", threads=1)
    assert "tree" not in read_repository(repository)["parameters"]
    with TritonServer(repository, grace=2.0) as running:
        yield running


def test_answers_are_the_targets_and_a_seed_gives_those_of_the_default_tree(
    planned: TritonServer, engine: Engine, tokenizer: Tokenizer
) -> None:
    prompts = [f"The quick brown fox {i}" for i in range(2 * SLOTS)]
    seeded = SamplingParams(temperature=0.8, seed=4)

    def ask(number: int, options: Options) -> str:
        return "".join(chunk.text for chunk in stream_generate(planned.grpc_url, prompts[number], options))

    def expected(number: int, request: Request) -> str:
        tokens = generate(engine, [request])[0].tokens
        return tokenizer.decode([token for token in tokens if token not in tokenizer.eos_token_ids])

    greedy = Options(max_tokens=60, chat=False)
    sampled = Options(max_tokens=60, chat=False, temperature=0.8, seed=4)
    settings = [sampled if number % 4 == 3 else greedy for number in range(len(prompts))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts)), settings))
    for number, text in enumerate(answers):
        request = Request(tokenizer.encode(prompts[number]), 60, eos_token_ids=tokenizer.eos_token_ids)
        if settings[number] is sampled:
            request = Request(request.prompt, 60, seeded, eos_token_ids=request.eos_token_ids, tree=engine.default_tree)
        assert text == expected(number, request)
