"""The serving bench over a deployment of a tiny engine, and its arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2

from prism_trt.bench.serving.deployment import Deployment
from prism_trt.bench.serving.fuzzing import run_fuzzing, send_broken
from prism_trt.bench.serving.load import percentiles, run_load
from prism_trt.bench.serving.malformed import KINDS, BrokenRequest, broken_requests
from prism_trt.bench.serving.results import Memory, Sample
from prism_trt.bench.serving.soak import slopes
from prism_trt.bench.serving.streams import ask, connect, expected_answers
from prism_trt.client.generate import Options

OPTIONS = Options(max_tokens=12, timeout=600)
MIB = 2**20


@pytest.fixture(scope="module")
def deployment(engine_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    repository = tmp_path_factory.mktemp("deployment") / "repository"
    with Deployment(engine_path, repository, 600, ("--threads", "1", "--grace", "0")) as running:
        yield running


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> dict[str, str]:
    return asyncio.run(expected_answers(deployment.grpc_url, ("fox", "a dog"), OPTIONS))


def test_load(deployment: Deployment, expected: dict[str, str]) -> None:
    point = asyncio.run(run_load(deployment, 6, 0.5, OPTIONS, expected))
    assert point.outcomes.answers >= 6
    assert point.outcomes.lost == point.outcomes.failed == point.different == 0
    assert point.tokens == 12 * point.outcomes.answers
    assert point.first_text is not None
    assert 0 < point.first_text.p50 <= point.first_text.p99 < point.seconds
    assert point.memory_after.model > 50 * MIB


def test_answered_streams_leave_nothing_in_the_server(deployment: Deployment) -> None:
    """Triton 2.51 keeps 3 KB and more for each stream that is cancelled after its last response."""

    async def ask_often(times: int) -> None:
        client = connect(deployment.grpc_url)
        for _ in range(times):
            attempts = await asyncio.gather(*(ask(client, "fox", Options(max_tokens=1)) for _ in range(4)))
            assert {attempt.outcome for attempt in attempts} == {"answers"}
        await client.close()

    asyncio.run(ask_often(50))
    before = deployment.memory().server
    asyncio.run(ask_often(150))
    assert deployment.memory().server - before < MIB


def test_different_answers_are_noticed(deployment: Deployment, expected: dict[str, str]) -> None:
    wrong = {"fox": expected["fox"], "a dog": "not this"}
    point = asyncio.run(run_load(deployment, 2, 0.5, OPTIONS, wrong))
    assert 0 < point.different < point.outcomes.answers


def test_broken_requests_do_not_disturb_valid_ones(deployment: Deployment, expected: dict[str, str]) -> None:
    fuzzing = asyncio.run(run_fuzzing(deployment, 10 * len(KINDS), 1, OPTIONS, expected, lambda: None))
    assert fuzzing.valid.answers > len(expected)
    assert fuzzing.valid.refused == fuzzing.valid.failed == fuzzing.valid.lost == fuzzing.different == 0
    assert fuzzing.kinds.keys() == set(KINDS)
    for kind, counts in fuzzing.kinds.items():
        assert counts.sent == 10
        assert counts.silent == counts.connection_lost == counts.leaks == 0, (kind, fuzzing.examples)
    assert fuzzing.kinds["missing input"].refused == 10
    assert fuzzing.kinds["huge max_tokens"].accepted == 10


def test_a_broken_string_fails_no_other_request(deployment: Deployment) -> None:
    """Triton's Python backend refuses all requests of a batch when a string of one of them is broken."""
    kinds = ("wrong string length", "huge max_tokens")
    requests = [request for request in islice(broken_requests("prism", 0), 2000) if request.kind in kinds]

    async def run() -> list[tuple[str, str]]:
        six = asyncio.Semaphore(6)

        async def send(request: BrokenRequest) -> tuple[str, str]:
            async with six:
                return request.kind, (await send_broken(channel, request))[0]

        async with grpc.aio.insecure_channel(deployment.grpc_url) as channel:
            return await asyncio.gather(*map(send, requests))

    assert set(asyncio.run(run())) == {("wrong string length", "refused"), ("huge max_tokens", "accepted")}


def test_an_unbroken_request_is_accepted(deployment: Deployment) -> None:
    """The broken ones are refused for what is broken about them."""

    async def send(request: BrokenRequest) -> tuple[str, str]:
        async with grpc.aio.insecure_channel(deployment.grpc_url) as channel:
            return await send_broken(channel, request)

    huge = next(request for request in broken_requests("prism", 0) if request.kind == "huge max_tokens")
    assert asyncio.run(send(huge)) == ("accepted", "")
    broken = service_pb2.ModelInferRequest.FromString(huge.message)
    broken.inputs[0].datatype = "FP16"
    outcome, sentence = asyncio.run(send(replace(huge, message=broken.SerializeToString())))
    assert outcome == "refused"
    assert "text_input" in sentence


def test_broken_requests_follow_their_seed() -> None:
    first, again, other = (list(islice(broken_requests("prism", seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert [request.kind for request in first[: len(KINDS)]] == list(KINDS)


def test_percentiles() -> None:
    found = percentiles([float(value) for value in range(101)])
    assert found is not None
    assert (found.p50, found.p99, found.count) == (50.0, 99.0, 101)
    assert percentiles([]) is None


def test_slopes_leave_out_the_first_quarter() -> None:
    growth = [1000, 0, 1, 2, 3]  # MiB, one sample a quarter of an hour
    samples = [
        Sample(seconds=900.0 * index, memory=Memory(server=0, model=mib * MIB, shared=7))
        for index, mib in enumerate(growth)
    ]
    assert slopes(samples) == pytest.approx({"server": 0, "model": 4, "shared": 0}, abs=1e-6)
