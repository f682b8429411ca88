"""What clients of a real server get."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from prism_trt.client.generate import Chunk, Options, stream_generate
from prism_trt.deploy.server import TritonServer, free_port
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Decoder, Result, generate
from prism_trt.speculative.request import Request
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.speculative.stopping import TextStream
from prism_trt.target.detokenize import DetokenizerStream
from prism_trt.target.tokenizer import Tokenizer
from tests.deploy.conftest import CONTEXT, SLOTS
from tests.deploy.grpc import ask, input_tensors
from tests.deploy.load import LONG, busy

ROOT = Path(__file__).parents[2]


def in_process(engine: Engine, tokenizer: Tokenizer, prompt: str, options: Options) -> tuple[str, Result]:
    """What the server must answer, from the decoder."""
    messages = [{"role": "user", "content": prompt}]
    sampling = SamplingParams(
        temperature=options.temperature or 0.0, top_k=options.top_k or 0, top_p=options.top_p or 1.0, seed=options.seed
    )
    request = Request(
        prompt=tokenizer.encode_chat(messages) if options.chat else tokenizer.encode(prompt),
        max_tokens=options.max_tokens,
        sampling=sampling,
        stop_words=options.stop,
        eos_token_ids=tokenizer.eos_token_ids,
        tree=engine.default_tree,
    )
    (result,) = generate(engine, [request], tokenizer)
    text = TextStream(DetokenizerStream(tokenizer), options.stop, tokenizer.eos_token_ids)
    return text.push(result.tokens) + text.flush(), result


def answer(server: TritonServer, prompt: str, options: Options) -> list[Chunk]:
    return list(stream_generate(server.grpc_url, prompt, options))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def metric(server: TritonServer, name: str) -> float:
    page = urllib.request.urlopen(server.metrics_url, timeout=5).read().decode()
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert found, page
    return float(found[1])


def post(server: TritonServer, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(server.http_url + path, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


SETTINGS = [
    Options(max_tokens=60),
    Options(max_tokens=60, chat=False),
    Options(max_tokens=60, chat=False, temperature=0.7, top_p=0.9, seed=5),
    Options(max_tokens=60, temperature=1.5, top_k=20, seed=6),
    Options(max_tokens=1),
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_streamed_equals_whole_equals_in_process(
    server: TritonServer, engine: Engine, tokenizer: Tokenizer, options: Options
) -> None:
    text, result = in_process(engine, tokenizer, "The quick Größe 東京", options)
    streamed = answer(server, "The quick Größe 東京", options)
    (whole,) = answer(server, "The quick Größe 東京", Options(**{**vars(options), "stream": False}))
    assert text_of(streamed) == whole.text == text
    assert len(text) > 0
    assert len(streamed) > 10 or options.max_tokens == 1
    for chunk in (streamed[-1], whole):
        assert chunk.statistics is not None
        assert chunk.statistics.finish_reason == result.finish_reason
        assert chunk.statistics.num_input_tokens == result.statistics.num_input_tokens
        assert chunk.statistics.num_output_tokens == len(result.tokens)
        assert chunk.statistics.target_passes == result.statistics.target_passes
        assert chunk.statistics.drafted == result.statistics.drafted
        assert chunk.statistics.accepted == result.statistics.accepted
    assert not any(chunk.statistics for chunk in streamed[:-1])


def test_a_stop_word_over_token_boundaries_ends_the_text(
    server: TritonServer, engine: Engine, tokenizer: Tokenizer
) -> None:
    whole, result = in_process(engine, tokenizer, "dog", Options(max_tokens=40))
    boundary = len(tokenizer.decode(result.tokens[:20]))
    stop = (whole[boundary - 2 : boundary + 2], "never said")
    options = Options(max_tokens=40, stop=stop)
    text, stopped = in_process(engine, tokenizer, "dog", options)
    assert stopped.finish_reason == "stop"
    assert len(stopped.tokens) < 40
    chunks = answer(server, "dog", options)
    assert text_of(chunks) == text == whole[: whole.index(stop[0])]
    assert chunks[-1].statistics is not None
    assert chunks[-1].statistics.finish_reason == "stop"


def test_concurrent_streams_do_not_disturb_each_other(
    server: TritonServer, engine: Engine, tokenizer: Tokenizer
) -> None:
    cases = [(f"{i} dogs sleep", SETTINGS[i % 4]) for i in range(2 * SLOTS)]
    expected = [in_process(engine, tokenizer, *case)[0] for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: text_of(answer(server, *case)), cases))
    assert answers == expected


def test_without_a_seed_samples_differ(server: TritonServer) -> None:
    options = Options(max_tokens=30, temperature=2.0)
    assert text_of(answer(server, "fox", options)) != text_of(answer(server, "fox", options))


GOOD = {"text_input": "The quick", "max_tokens": 4}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"max_tokens": 4, "stream": True}, "the input text_input is missing"),
    "no max_tokens": ({"text_input": "a", "stream": True}, "the input max_tokens is missing"),
    "nothing but options": ({"stream": True}, "missing required input"),
    "empty prompt": ({**GOOD, "text_input": ""}, "text_input is empty"),
    "prompt not UTF-8": ({**GOOD, "text_input": b"\xff\xfe\x80"}, "text_input is not valid UTF-8"),
    "stop word not UTF-8": ({**GOOD, "stop_words": [b"\xc3"]}, "stop_words is not valid UTF-8"),
    "prompt of 4200 tokens": ({**GOOD, "text_input": "é" * 2100}, "the prompt has 4200 tokens but the context is 4096"),
    "prompt of a megabyte": ({**GOOD, "text_input": "a" * 10**6}, "the prompt has 1000000 bytes"),
    "max_tokens 0": ({**GOOD, "max_tokens": 0}, "max_tokens is 0: ask for at least 1"),
    "max_tokens negative": ({**GOOD, "max_tokens": -5}, "max_tokens is -5"),
    "max_tokens text": ({**GOOD, "max_tokens": "four"}, "data-type"),
    "max_tokens float": ({**GOOD, "max_tokens": 4.0}, "data-type"),
    "two values": ({**GOOD, "max_tokens": [4, 5]}, "unexpected shape"),
    "two prompts": (
        {
            "text_input": np.array([[b"a"], [b"b"]], dtype=np.object_),
            "max_tokens": np.array([[4], [4]], dtype=np.int32),
        },
        "batch-size must be <= 1",
    ),
    "unknown input": ({**GOOD, "temprature": 0.5}, "temprature"),
    "temperature negative": ({**GOOD, "temperature": -1.0}, "temperature: .*greater than or equal to 0"),
    "temperature nan": ({**GOOD, "temperature": float("nan")}, "temperature: .*finite"),
    "temperature infinite": ({**GOOD, "temperature": float("inf")}, "temperature: .*finite"),
    "top_p 2": ({**GOOD, "top_p": 2.0}, "top_p: .*less than or equal to 1"),
    "top_p nan": ({**GOOD, "top_p": float("nan")}, "top_p"),
    "top_k negative": ({**GOOD, "top_k": -1}, "top_k: .*greater than or equal to 0"),
    "bad_words": ({**GOOD, "bad_words": ["dog"]}, "bad_words are not supported"),
    "beam search": ({**GOOD, "beam_width": 4}, "beam_width=4 is not supported"),
    "two sequences": ({**GOOD, "num_return_sequences": 2}, "num_return_sequences=2 is not supported"),
    "repetition penalty": ({**GOOD, "repetition_penalty": 1.1}, "repetition_penalty=1.1 is not supported"),
    "logits": ({**GOOD, "return_generation_logits": True}, "return_generation_logits=True is not supported"),
    "21 log probs": ({**GOOD, "top_log_probs": 21}, "21 alternatives per token are asked for: ask for 0 to 20"),
    "long user": ({**GOOD, "user": "u" * 1025}, "user has 1025 bytes"),
    "end_id outside": ({**GOOD, "end_id": 100000}, "end_id=100000 is no token"),
    "100 stop words": ({**GOOD, "stop_words": [f"w{i}" for i in range(100)]}, "100 stop words"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_the_server_goes_on(server: TritonServer, name: str) -> None:
    inputs, sentence = BAD[name]
    (response,) = ask(server.grpc_url, inputs)
    assert re.search(sentence, response["error"]), response
    assert "Traceback" not in response["error"]
    assert not re.search(r"\.py\b|/\w+/", response["error"])
    assert ask(server.grpc_url, GOOD)[-1]["num_output_tokens"] == 4


def test_unknown_parameter(server: TritonServer) -> None:
    (response,) = ask(server.grpc_url, GOOD, {"temprature": 1})
    assert response["error"].startswith("[INVALID_ARG] 'temprature' is neither an input nor a parameter of this model")


def test_inputs_that_ask_for_nothing_are_accepted(server: TritonServer) -> None:
    neutral = {
        "bad_words": [""],
        "stop_words": [""],
        "beam_width": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "length_penalty": 1.0,
        "min_tokens": 0,
        "pad_id": 2,
        "return_log_probs": False,
        "return_num_input_tokens": True,
        "top_k": 1,
        "top_p": 0.0,
        "temperature": 1.0,
        "seed": np.array([[2**64 - 1]], dtype=np.uint64),
    }
    responses = [ask(server.grpc_url, inputs) for inputs in ({**GOOD, **neutral}, GOOD)]
    for (response,) in responses:
        del response["num_reused_tokens"]
    assert responses[0] == responses[1]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": np.array([[3]], dtype=np.uint64)}], ids=str)
def test_log_probabilities(
    server: TritonServer, engine: Engine, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    inputs = {"text_input": "Größe 東京", "max_tokens": 24, "end_id": -1, **sampling}
    params = SamplingParams(temperature=0.7, seed=3) if sampling else SamplingParams()
    request = Request(tokenizer.encode("Größe 東京"), 24, params, tree=engine.default_tree, log_probs=3)
    decoder, expected = Decoder(engine), []
    decoder.add(request)
    while decoder.active:
        for event in decoder.step():
            expected += event.scored

    responses = ask(server.grpc_url, {**inputs, "top_log_probs": 3, "stream": True})
    assert len(responses) > 3
    entries = [entry for response in responses for entry in json.loads(response.get("log_probs", b"[]"))]
    assert [entry["logprob"] for entry in entries] == [token.log_prob for token in expected]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in entries] == [
        [log_prob for _, log_prob in token.alternatives] for token in expected
    ]
    said = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    text = b"".join(response["text_output"] for response in responses).decode()
    assert re.sub(r"<\|\w+\|>", "", said) == text
    # What clients of TensorRT-LLM ask for, and get.
    (whole,) = ask(server.grpc_url, {**inputs, "return_log_probs": True}, scalars=False)
    assert whole["output_log_probs"].tolist() == [pytest.approx([token.log_prob for token in expected])]
    (plain,) = ask(server.grpc_url, inputs)
    assert not {"log_probs", "output_log_probs"} & plain.keys()
    assert text in plain["text_output"].decode()


def test_a_conversation_goes_on_where_it_was(server: TritonServer, engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = "The quick brown fox jumps over the lazy dog; the dog sleeps. "
    request = Request(tokenizer.encode(prompt), 12, tree=engine.default_tree, eos_token_ids=tokenizer.eos_token_ids)
    (result,) = generate(engine, [request])
    before = metric(server, "prism_prefix_hit_tokens_total")
    for _ in range(2):
        (response,) = ask(server.grpc_url, {"text_input": prompt, "max_tokens": 12, "exclude_input_in_output": True})
        assert response["text_output"].decode() == tokenizer.decode(result.tokens)
    assert response["num_reused_tokens"] == len(request.prompt) - 1
    assert metric(server, "prism_prefix_hit_tokens_total") >= before + len(request.prompt) - 1


def test_the_prompt_comes_back_unless_excluded_or_streamed(server: TritonServer) -> None:
    (plain,) = ask(server.grpc_url, {**GOOD, "exclude_input_in_output": True})
    (whole,) = ask(server.grpc_url, GOOD)
    streamed = ask(server.grpc_url, {**GOOD, "stream": True})
    assert whole["text_output"] == b"The quick" + plain["text_output"]
    assert b"".join(response["text_output"] for response in streamed) == plain["text_output"]
    rate = whole["total_accepted_draft_tokens"] / whole["total_draft_tokens"]
    assert whole["acceptance_rate"] == pytest.approx(rate)


def test_end_id_replaces_the_end_of_sequence(server: TritonServer, engine: Engine, tokenizer: Tokenizer) -> None:
    _, result = in_process(engine, tokenizer, "The quick", Options(max_tokens=20, chat=False))
    end = result.tokens[7]
    (response,) = ask(server.grpc_url, {"text_input": "The quick", "max_tokens": 20, "end_id": end})
    assert response["finish_reason"] == b"stop"
    assert response["num_output_tokens"] == result.tokens.index(end) + 1


def test_generation_ends_where_the_context_does(server: TritonServer) -> None:
    (response,) = ask(server.grpc_url, {"text_input": "é" * (CONTEXT // 2 - 6), "max_tokens": 10**6, "end_id": -1})
    assert response["finish_reason"] == b"length"
    assert response["num_input_tokens"] == CONTEXT - 12
    assert 1 <= response["num_output_tokens"] <= 13


def test_http_generate(server: TritonServer) -> None:
    status, reply = post(server, "/v2/models/prism/generate", {**GOOD, "exclude_input_in_output": True})
    assert status == 200
    (same,) = ask(server.grpc_url, {**GOOD, "exclude_input_in_output": True})
    assert reply["text_output"].encode() == same["text_output"]
    status, reply = post(server, "/v2/models/prism/generate", {**GOOD, "temprature": 1})
    assert status == 400
    assert "temprature" in reply["error"]


def test_administration_is_closed_without_the_key(server: TritonServer) -> None:
    paths = ["/v2/systemsharedmemory/status", "/v2/repository/index", "/v2/models/prism/config", "/v2/logging"]
    for path in paths:
        method = "POST" if "index" in path else "GET"
        request = urllib.request.Request(server.http_url + path, method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == 403
        request.add_header("admin-key", server.admin_key)
        assert urllib.request.urlopen(request, timeout=20).status == 200


def assert_slots_are_free(server: TritonServer, tokens_before: float) -> None:
    """New requests run, and nothing of the abandoned ones was counted as finished."""
    with ThreadPoolExecutor(SLOTS) as pool:
        answers = list(pool.map(lambda _: answer(server, "dog", Options(max_tokens=5)), range(SLOTS)))
    assert all(chunks[-1].statistics for chunks in answers)
    time.sleep(1.5)  # an abandoned request that still ran would finish meanwhile
    assert metric(server, "prism_output_tokens_total") == tokens_before + 5 * SLOTS


def test_cancelled_requests_free_their_slots(server: TritonServer) -> None:
    before = metric(server, "prism_output_tokens_total")
    streams = [stream_generate(server.grpc_url, "fox", Options(max_tokens=LONG)) for _ in range(SLOTS + 2)]
    for stream in streams[:SLOTS]:
        assert list(islice(stream, 2))
    for stream in streams:
        stream.close()
    assert_slots_are_free(server, before)


def test_requests_are_stopped_by_another_with_their_id(server: TritonServer) -> None:
    before = metric(server, "prism_output_tokens_total")
    ended: queue.Queue[tuple[Any, Any]] = queue.Queue()
    stop = {"text_input": "", "max_tokens": 1, "stop": True}
    with grpcclient.InferenceServerClient(server.grpc_url) as raw:
        raw.start_stream(lambda result, error: ended.put((result, error)))
        # The last ones wait for a slot.
        for number in range(SLOTS + 2):
            wanted = {"text_input": "fox", "max_tokens": LONG, "end_id": -1}
            raw.async_stream_infer("prism", input_tensors(wanted), request_id=str(number))
        raw.async_stream_infer("prism", input_tensors(stop), request_id="unknown")
        for number in (SLOTS + 1, 0, 1):
            raw.async_stream_infer("prism", input_tensors(stop), request_id=str(number))
        for _ in range(3):
            result, error = ended.get(timeout=60)
            assert error is None
            assert result.get_response().id in (str(SLOTS + 1), "0", "1")
            assert result.as_numpy("finish_reason").item() == b"cancelled"
            assert result.as_numpy("num_input_tokens").item() == 2
            assert result.as_numpy("num_output_tokens").item() < LONG
        raw.async_stream_infer("prism", input_tensors(stop))
        _, error = ended.get(timeout=60)
        assert "stop is set in a request without an id" in error.message()
        for _ in range(SLOTS - 1):
            result, _ = ended.get(timeout=60)
            assert result.as_numpy("finish_reason").item() == b"length"
        raw.stop_stream()
    assert ended.empty()
    assert metric(server, "prism_output_tokens_total") == before + (SLOTS - 1) * LONG


def test_a_stop_does_not_reach_the_request_of_another_client(server: TritonServer) -> None:
    """Both clients number their requests from 1."""
    ended: list[queue.Queue[tuple[Any, Any]]] = [queue.Queue(), queue.Queue()]
    stop = {"text_input": "", "max_tokens": 1, "stop": True}
    with (
        grpcclient.InferenceServerClient(server.grpc_url) as one,
        grpcclient.InferenceServerClient(server.grpc_url) as other,
    ):
        for raw, answers, user in ((one, ended[0], "one"), (other, ended[1], "other")):
            raw.start_stream(lambda result, error, answers=answers: answers.put((result, error)))
            wanted = {"text_input": "fox", "max_tokens": LONG, "end_id": -1, "user": user}
            raw.async_stream_infer("prism", input_tensors(wanted), request_id="1")
            raw.async_stream_infer("prism", input_tensors({**wanted, "max_tokens": 1}), request_id="begun")
            result, error = answers.get(timeout=60)  # so the first has come as well
            assert error is None
            assert result.get_response().id == "begun"
        one.async_stream_infer("prism", input_tensors(stop), request_id="1")
        _, error = ended[0].get(timeout=60)
        assert "[INVALID_ARG] 2 open requests have the id of the one to stop: use ids that no" in error.message()
        one.async_stream_infer("prism", input_tensors({**stop, "user": "one"}), request_id="1")
        result, error = ended[0].get(timeout=60)
        assert error is None
        assert result.as_numpy("finish_reason").item() == b"cancelled"
        # Somebody who names another user stops nothing; who names none means whoever has the id.
        one.async_stream_infer("prism", input_tensors({**stop, "user": "one"}), request_id="1")
        time.sleep(0.3)
        assert ended[1].empty()
        other.async_stream_infer("prism", input_tensors(stop), request_id="1")
        result, error = ended[1].get(timeout=60)
        assert error is None
        assert result.as_numpy("finish_reason").item() == b"cancelled"
        one.stop_stream()
        other.stop_stream()


def test_a_client_that_leaves_a_stream_over_http_is_noticed(server: TritonServer) -> None:
    before = metric(server, "prism_output_tokens_total")
    body = json.dumps({"text_input": "fox", "max_tokens": LONG, "stream": True, "end_id": -1}).encode()
    for _ in range(SLOTS):
        url = server.http_url + "/v2/models/prism/generate_stream"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
            assert response.readline().startswith(b"data: ")
    assert_slots_are_free(server, before)


def client(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prism_trt.client", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_client(server: TritonServer, number: int) -> None:
    before = metric(server, "prism_output_tokens_total")
    process = client("fox", "--url", server.grpc_url, "--stream", "--max-tokens", str(LONG))
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert_slots_are_free(server, before)


def test_requests_beyond_the_backlog_are_refused(server: TritonServer) -> None:
    def attempt(_: int) -> str:
        try:
            return answer(server, "fox", Options(max_tokens=400, chat=False))[-1].text
        except PrismError as error:
            return str(error)

    with ThreadPoolExecutor(24) as pool:
        outcomes = list(pool.map(attempt, range(24)))
    refused = [outcome for outcome in outcomes if "12 requests are running or waiting already" in outcome]
    assert 1 <= len(refused) <= 12
    assert len({outcome for outcome in outcomes if outcome not in refused}) == 1
    server.probe()


def test_a_request_that_waits_too_long_is_dropped(server: TritonServer) -> None:
    with busy(server.grpc_url):
        (response,) = ask(server.grpc_url, GOOD, timeout_us=1000)
    assert "timed out before its first token" in response["error"]
    assert ask(server.grpc_url, GOOD, timeout_us=20_000_000)[-1]["num_output_tokens"] == 4


def test_client_command(server: TritonServer, engine: Engine, tokenizer: Tokenizer) -> None:
    expected, result = in_process(engine, tokenizer, "a dog", Options(max_tokens=12))
    options = ["--url", server.grpc_url, "--max-tokens", "12", "--stats"]
    for extra in ([], ["--stream"]):
        output, errors = client("a dog", *options, *extra).communicate(timeout=60)
        assert output.decode() == expected + "\n"
        assert errors.decode().startswith(f"{result.statistics.num_input_tokens} tokens in, 12 out (length) in ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-tokens", "0"], "error: the server answered: max_tokens is 0: ask for at least 1 token\n"),
        (["--temperature", "-1"], "error: the server answered: sampling: temperature: "),
        (["--model", "absent"], "error: the server answered: .*'absent'"),
        (["--url", f"127.0.0.1:{free_port()}"], "error: no server answers at 127.0.0.1:"),
        (["--url", "nonsense::1::2"], "error: "),
    ],
)
def test_client_mistakes_are_one_sentence(server: TritonServer, arguments: list[str], sentence: str) -> None:
    process = client("a dog", "--url", server.grpc_url, *arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == b""
    assert re.match(sentence, errors.decode())
    assert errors.count(b"\n") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_take_longer_than_the_timeout(server: TritonServer, stream: bool) -> None:
    began = time.monotonic()
    chunks = answer(server, "dog", Options(max_tokens=LONG, timeout=1.0, stream=stream))
    assert time.monotonic() - began > 1.0
    assert chunks[-1].statistics is not None
    assert chunks[-1].statistics.num_output_tokens == LONG


def test_a_silent_server_is_noticed(server: TritonServer) -> None:
    with busy(server.grpc_url), pytest.raises(PrismError, match=r"the server sent nothing for 0\.01 s"):
        answer(server, "dog", Options(timeout=0.01))
    server.probe()
