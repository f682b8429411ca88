"""What OpenAI's own client, and clients with fewer manners, get from the front end."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from prism_trt.deploy.server import TritonServer, free_port
from prism_trt.engines.protocol import Engine
from prism_trt.speculative.decoder import Decoder, generate
from prism_trt.speculative.log_probs import ScoredToken
from prism_trt.speculative.request import Request
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.tokenizer import Tokenizer
from tests.deploy.load import LONG, busy
from tests.frontend.conftest import KEY, Frontend, running

CONVERSATION: list[Any] = [
    {"role": "developer", "content": "Be a dog."},
    {"role": "user", "content": [{"type": "text", "text": "Größe "}, {"type": "text", "text": "東京?"}]},
    {"role": "assistant", "content": 'The quick "brown" fox', "refusal": None},
    {"role": "user", "content": "And then?"},
]
RENDERED = [
    {"role": "system", "content": "Be a dog."},
    {"role": "user", "content": "Größe 東京?"},
    {"role": "assistant", "content": 'The quick "brown" fox'},
    {"role": "user", "content": "And then?"},
]
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"seed": -7}]


def expected(engine: Engine, tokenizer: Tokenizer, prompt: list[int], tokens: int, sampling: dict[str, Any]) -> str:
    """What must be answered, from the decoder."""
    params = SamplingParams(**{"temperature": 1.0, **sampling, **_seed(sampling)})
    request = Request(prompt, tokens, sampling=params, eos_token_ids=tokenizer.eos_token_ids, tree=engine.default_tree)
    (result,) = generate(engine, [request], tokenizer)
    assert len(result.tokens) == tokens
    return tokenizer.decode(result.tokens)


def scored(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], tokens: int, alternatives: int
) -> list[ScoredToken]:
    """The same with log-probabilities, greedy."""
    decoder, found = Decoder(engine), list[ScoredToken]()
    request = Request(prompt, tokens, eos_token_ids=tokenizer.eos_token_ids, tree=engine.default_tree)
    decoder.add(replace(request, log_probs=alternatives))
    while decoder.active:
        for event in decoder.step():
            found += event.scored
    return found


def _seed(sampling: dict[str, Any]) -> dict[str, int]:
    return {"seed": sampling["seed"] % 2**63} if "seed" in sampling else {}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_chat_streamed_equals_whole_equals_in_process(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    prompt = tokenizer.encode_chat(RENDERED)
    text = expected(engine, tokenizer, prompt, 40, sampling)
    whole = client.chat.completions.create(model="prism", messages=CONVERSATION, max_completion_tokens=40, **sampling)
    assert (whole.object, whole.model) == ("chat.completion", "prism")
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    counts = (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    assert counts == (len(prompt), 40, len(prompt) + 40)

    stream = client.chat.completions.create(
        model="prism",
        messages=CONVERSATION,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        **sampling,
    )
    *pieces, last, usage = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert len(pieces) > 5
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * len(pieces)
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    details = usage.usage.prompt_tokens_details
    assert details is not None and details.cached_tokens == len(prompt) - 1  # of the first request
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens, usage.usage.total_tokens) == counts
    assert len({chunk.id for chunk in [*pieces, last, usage]} | {whole.id}) == 2


def test_completions_and_stop(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    text = expected(engine, tokenizer, tokenizer.encode("The quick"), 40, {"temperature": 0})
    arguments: dict[str, Any] = {"model": "prism", "prompt": "The quick", "temperature": 0}
    assert client.completions.create(**arguments, max_tokens=40).choices[0].text == text
    short = client.completions.create(**arguments)
    assert short.usage is not None
    assert short.usage.completion_tokens == 16

    stop = text[10:14]
    stopped = client.completions.create(**arguments, max_tokens=40, stop=[stop, "never said"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    pieces = list(client.completions.create(**arguments, max_tokens=40, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == stopped.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert {piece.object for piece in pieces} == {"text_completion"}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer, stream: bool) -> None:
    expected = scored(engine, tokenizer, tokenizer.encode("The quick"), 20, 2)
    arguments: dict[str, Any] = {"model": "prism", "temperature": 0, "max_tokens": 20, "stream": stream}
    answer = client.completions.create(**arguments, prompt="The quick", logprobs=2)
    pieces = [choice.logprobs for part in (answer if stream else [answer]) for choice in part.choices]
    found = [piece for piece in pieces if piece is not None]
    assert (len(found) > 3) == stream
    assert [value for piece in found for value in piece.token_logprobs] == [token.log_prob for token in expected]
    words = [word for piece in found for word in piece.tokens]
    offsets = [offset for piece in found for offset in piece.text_offset]
    assert offsets == [len("".join(words[:i])) for i in range(len(words))]
    for tops, token in zip((tops for piece in found for tops in piece.top_logprobs), expected, strict=True):
        assert set(tops.values()) <= {log_prob for _, log_prob in token.alternatives}
        assert max(tops.values()) == token.log_prob

    expected = scored(engine, tokenizer, tokenizer.encode_chat(RENDERED), 20, 1)
    chat = client.chat.completions.create(**arguments, messages=CONVERSATION, logprobs=True, top_logprobs=1)
    parts = [choice.logprobs for part in (chat if stream else [chat]) for choice in part.choices]
    entries = [entry for part in parts if part is not None for entry in part.content]
    assert [entry.logprob for entry in entries] == [token.log_prob for token in expected]
    assert [bytes(entry.bytes) for entry in entries] == [tokenizer.token_bytes(token.token) for token in expected]
    assert [entry.top_logprobs[0].logprob for entry in entries] == [token.log_prob for token in expected]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["prism"]
    assert client.models.retrieve("prism").owned_by == "prism-trt"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4o' does not exist") as refused:
        client.models.retrieve("gpt-4o")
    assert refused.value.code == "model_not_found"


def test_the_stream_on_the_wire(frontend: Frontend) -> None:
    body = {"model": "prism", "prompt": "a dog", "max_tokens": 8, "stream": True}
    reply = httpx.post(f"{frontend.url}/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


GOOD: dict[str, Any] = {"model": "prism", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "prism", "prompt": "a", "max_tokens": 4}

REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({**GOOD, "model": "gpt-4o"}, 404, "the model 'gpt-4o' does not exist"),
    "no model": ({"messages": GOOD["messages"]}, 400, "model: Field required"),
    "no messages": ({"model": "prism"}, 400, "messages: Field required"),
    "empty messages": ({**GOOD, "messages": []}, 400, "messages: List should have at least 1 item"),
    "role tool": ({**GOOD, "messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role: Input should be"),
    "an image": (
        {**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content: only parts of type text",
    ),
    "half a character": ({**GOOD, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages.0.content: "),
    "half a name": ({**GOOD, "\ud800": 1}, 400, "the body is not a JSON object"),
    "half a stop word": ({**GOOD, "stop": "\ud800"}, 400, "stop.0: holds half"),
    "misspelt": ({**GOOD, "temprature": 1}, 400, "temprature is not a parameter of this server"),
    "n": ({**GOOD, "n": 2}, 400, "n: not supported here: leave it out or send 1"),
    "tools": ({**GOOD, "tools": [{"type": "function"}]}, 400, "tools: not supported here"),
    "json mode": ({**GOOD, "response_format": {"type": "json_object"}}, 400, "response_format: not supported here"),
    "logprobs": ({**GOOD, "logprobs": 1}, 400, "logprobs: Input should be a valid boolean"),
    "21 logprobs": ({**GOOD, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs: Input should be less than"),
    "top_logprobs alone": ({**GOOD, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
    "6 logprobs": ({**TEXT, "logprobs": 6}, 400, "logprobs: Input should be less than or equal to 5"),
    "penalty": ({**GOOD, "presence_penalty": 0.5}, 400, "presence_penalty: not supported here"),
    "hot": ({**GOOD, "temperature": 2.5}, 400, "temperature: Input should be less than or equal to 2"),
    "nan": ({**GOOD, "temperature": float("nan")}, 400, "temperature: Input should be a finite number"),
    "top_p": ({**GOOD, "top_p": 0}, 400, "top_p: Input should be greater than 0"),
    "text for a number": ({**GOOD, "max_tokens": "4"}, 400, "max_tokens: Input should be a valid integer"),
    "no tokens": ({**GOOD, "max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    "too many tokens": ({**GOOD, "max_completion_tokens": 5000}, 400, "this server allows at most 4096"),
    "far too many tokens": ({**GOOD, "max_tokens": 99999999999}, 400, "this server allows at most 4096"),
    "top_k": ({**GOOD, "top_k": 99999999999}, 400, "top_k: Input should be less than"),
    "seed": ({**GOOD, "seed": 2**64}, 400, "seed: Input should be less than"),
    "65 stop words": ({**GOOD, "stop": ["x"] * 65}, 400, "stop: List should have at most 64 items"),
    "long prompt": ({**GOOD, "messages": [{"role": "user", "content": "é" * 2100}]}, 400, "but the context is 4096"),
    "token ids": ({**TEXT, "prompt": [1, 2, 3]}, 400, "prompt: only one prompt, as text"),
    "two prompts": ({**TEXT, "prompt": ["a", "b"]}, 400, "prompt: only one prompt, as text"),
    "no prompt": ({**TEXT, "prompt": ""}, 400, "prompt: String should have at least 1 character"),
    "echo": ({**TEXT, "echo": True}, 400, "echo: not supported here"),
}


def post(frontend: Frontend, content: bytes | Iterator[bytes], path: str = "/chat/completions") -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    return httpx.post(frontend.url + path, content=content, headers=headers, timeout=60)


def assert_refused(reply: httpx.Response, status: int, sentence: str) -> dict[str, Any]:
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert sentence in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert not re.search(r"Traceback|\.py\b|/\w+/\w", error["message"])
    return error


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(frontend: Frontend, name: str) -> None:
    body, status, sentence = REFUSED[name]
    path = "/completions" if "prompt" in body else "/chat/completions"
    error = assert_refused(post(frontend, json.dumps(body).encode(), path), status, sentence)
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None or error["param"] in sentence or error["param"] in error["message"]


def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**GOOD, temperature=0)
    neutral = client.chat.completions.create(
        **GOOD,
        temperature=0,
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        logprobs=False,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        store=False,
        user="somebody",
        stop=None,
        extra_body={"top_k": 1},
    )
    assert neutral.choices == plain.choices


@pytest.mark.parametrize("sampling", [{"top_p": 1e-50}, {"temperature": 1e-40}, {"temperature": 1e-50}], ids=str)
def test_values_of_almost_0_are_greedy(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    greedy = client.completions.create(**{**TEXT, "max_tokens": 40}, temperature=0)
    almost = client.completions.create(**{**TEXT, "max_tokens": 40, "temperature": 2, **sampling})
    assert almost.choices == greedy.choices


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_take_longer_than_the_timeout(server: TritonServer, stream: bool) -> None:
    with running(server.grpc_url, "--timeout", "1", "--max-tokens", str(LONG)) as frontend:
        began = time.monotonic()
        body = {
            **TEXT,
            "prompt": "dog",
            "temperature": 0,
            "max_tokens": LONG,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
        reply = frontend.openai().completions.create(**body, stream=stream)
        usage = [part.usage for part in (reply if stream else [reply]) if part.usage]
        assert time.monotonic() - began > 1.0
    assert [found.completion_tokens for found in usage] == [LONG]


def test_bodies_that_are_no_request(frontend: Frontend) -> None:
    assert_refused(post(frontend, b"{"), 400, "not valid JSON")
    assert_refused(post(frontend, b"[" * 50_000), 400, "")
    assert_refused(post(frontend, b"7"), 400, "not a JSON object")
    assert_refused(post(frontend, b""), 400, "")
    assert_refused(post(frontend, b"{}", "/embeddings"), 404, "Not Found")
    assert_refused(post(frontend, b" " * 65_537), 413, "larger than 65536 bytes")
    chunks = (b" " * 1024 for _ in range(100))  # without a Content-Length
    assert_refused(post(frontend, chunks), 413, "larger than 65536 bytes")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY])
def test_without_a_key_nothing_opens(frontend: Frontend, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/models", "/chat/completions", "/nothing"):
        # Refused before the body is looked at.
        reply = httpx.request("POST" if path[1] == "c" else "GET", frontend.url + path, headers=headers, content=b"{")
        assert assert_refused(reply, 401, "the API key is missing or wrong")["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"


def test_keys_are_nowhere_to_be_read(server: TritonServer, key_file: Path) -> None:
    with running(server.grpc_url, "--api-key-file", str(key_file)) as frontend:
        assert frontend.openai("sk-another").models.list().data
        with pytest.raises(openai.AuthenticationError):
            frontend.openai("sk-wrong").models.list()
        frontend.openai().completions.create(**TEXT)
        process = Path(f"/proc/{frontend.process.pid}")
        visible = (process / "cmdline").read_text() + (process / "environ").read_text()
        assert str(key_file) in visible
        assert "sk-" not in visible + frontend.stop()


def test_health_needs_no_key(frontend: Frontend) -> None:
    assert (frontend.health("live"), frontend.health("ready")) == (200, 200)


def output_tokens(server: TritonServer) -> int:
    page = httpx.get(server.metrics_url).text
    found = re.search(r"^prism_output_tokens_total(?:{.*})? (\S+)$", page, re.MULTILINE)
    assert found
    return int(float(found[1]))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(frontend: Frontend, server: TritonServer, stream: bool) -> None:
    before = output_tokens(server)
    body = {**TEXT, "max_tokens": LONG, "stream": stream, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    if stream:
        with httpx.stream("POST", f"{frontend.url}/completions", json=body, headers=headers, timeout=60) as reply:
            next(reply.iter_raw())
    else:
        timeout = httpx.Timeout(60, read=0.05)
        with busy(server.grpc_url), pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{frontend.url}/completions", json=body, headers=headers, timeout=timeout)
    time.sleep(1.5)  # what still ran would finish meanwhile
    frontend.openai().completions.create(**TEXT)
    assert output_tokens(server) == before + 4


def test_overload_and_its_end(frontend: Frontend, server: TritonServer, key_file: Path) -> None:
    body = json.dumps({**TEXT, "max_tokens": 400, "temperature": 0}).encode()
    with ThreadPoolExecutor(24) as pool:  # 4 slots, 8 may wait
        replies = list(pool.map(lambda _: post(frontend, body, "/completions"), range(24)))
    refused = [reply for reply in replies if reply.status_code != 200]
    assert 1 <= len(refused) <= 12
    for reply in refused:
        assert_refused(reply, 429, "requests are running or waiting already: try again later")
        assert reply.headers["retry-after"] == "1"
    assert len({reply.json()["choices"][0]["text"] for reply in replies if reply.status_code == 200}) == 1

    with running(server.grpc_url, "--api-key-file", str(key_file), "--max-requests", "1") as narrow:
        stream = narrow.openai().completions.create(**{**TEXT, "max_tokens": LONG, "temperature": 0}, stream=True)
        next(stream)
        assert_refused(post(narrow, body, "/completions"), 429, "1 requests are open already")
        stream.close()


def test_without_a_model_server() -> None:
    with running(f"127.0.0.1:{free_port()}") as frontend:
        assert (frontend.health("live"), frontend.health("ready")) == (200, 503)
        reply = post(frontend, json.dumps(GOOD).encode())
        assert_refused(reply, 503, "the model server cannot be reached or is restarting: try again later")
        assert reply.headers["retry-after"] == "5"


def test_a_silent_model_server(server: TritonServer) -> None:
    with running(server.grpc_url, "--timeout", "0.1") as frontend, busy(server.grpc_url):
        reply = post(frontend, json.dumps(GOOD).encode())
    assert_refused(reply, 504, "the model server sends nothing")


@pytest.mark.parametrize("grace", [60, 0])
def test_sigterm_lets_streams_finish_within_the_grace_period(server: TritonServer, grace: int) -> None:
    with running(server.grpc_url, "--grace", str(grace)) as frontend:
        stream = frontend.openai().completions.create(**{**TEXT, "max_tokens": LONG, "temperature": 0}, stream=True)
        pieces = [next(stream)]
        frontend.process.send_signal(signal.SIGTERM)
        if grace:
            pieces += stream
            assert pieces[-1].choices[0].finish_reason in ("stop", "length")
        else:
            with pytest.raises(openai.APIError, match="the server is shutting down: try another"):
                list(stream)
        _, log = frontend.process.communicate(timeout=60)
        assert frontend.process.returncode == 0
        assert "Traceback" not in log
