"""The model that Triton's Python backend runs: a scheduler behind tensors.

Imported inside Triton's model process only, which provides `triton_python_backend_utils`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from prism_trt.config import TreeShape
from prism_trt.deploy.interface import INPUTS
from prism_trt.deploy.keeper import MODEL_PREFIX, RUNTIME_VARIABLE
from prism_trt.deploy.requests import parse_generation
from prism_trt.deploy.scheduler import Fault, Scheduler
from prism_trt.engines.cpu.engine import CpuEngine
from prism_trt.engines.loading import load_engine, load_engine_tokenizer
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Request, Statistics, generate
from prism_trt.speculative.stopping import FinishReason

_WARM_UP_TOKENS = 8
_FIRST_TOKEN_BUCKETS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
"""Seconds."""
_CODES: dict[Fault, str] = {"invalid": "INVALID_ARG", "unavailable": "UNAVAILABLE", "internal": "INTERNAL"}
"""Names of Triton's error codes: most of `pb_utils` is not there yet when Triton imports this module."""

log = logging.getLogger(__name__)


class TritonReply:
    """Sends one request's answer through Triton."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def text(self, text: str) -> None:
        self._sender.send(pb_utils.InferenceResponse([_string("text_output", text)]))

    def finish(self, text: str, reason: FinishReason, statistics: Statistics) -> None:
        numbers = {
            "num_input_tokens": statistics.num_input_tokens,
            "num_output_tokens": statistics.num_output_tokens,
            "num_target_passes": statistics.target_passes,
            "total_draft_tokens": statistics.drafted,
            "total_accepted_draft_tokens": statistics.accepted,
        }
        rate = statistics.accepted / statistics.drafted if statistics.drafted else 0.0
        outputs = [
            _string("text_output", text),
            _string("finish_reason", reason),
            *(pb_utils.Tensor(name, np.array([[number]], dtype=np.int32)) for name, number in numbers.items()),
            pb_utils.Tensor("acceptance_rate", np.array([[rate]], dtype=np.float32)),
        ]
        self._sender.send(pb_utils.InferenceResponse(outputs), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, fault: Fault, sentence: str) -> None:
        error = pb_utils.TritonError(sentence, getattr(pb_utils.TritonError, _CODES[fault]))
        self._sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class Metrics:
    """Counters on the server's Prometheus page, updated when a request finishes."""

    def __init__(self) -> None:
        self._families: list[Any] = []
        """Metrics stop working when their families are collected."""
        self._output_tokens = self._counter("prism_output_tokens_total", "Tokens generated")
        self._target_passes = self._counter("prism_target_passes_total", "Target passes after the prefill")
        self._accepted = self._counter("prism_accepted_draft_tokens_total", "Drafted tokens accepted")
        self._first_token = self._family(
            "prism_first_token_seconds", "Time to the first token", pb_utils.MetricFamily.HISTOGRAM
        ).Metric(labels={}, buckets=_FIRST_TOKEN_BUCKETS)

    def __call__(self, statistics: Statistics, first_token_seconds: float) -> None:
        self._output_tokens.increment(statistics.num_output_tokens)
        self._target_passes.increment(statistics.target_passes)
        self._accepted.increment(statistics.accepted)
        self._first_token.observe(first_token_seconds)

    def _counter(self, name: str, description: str) -> Any:
        return self._family(name, description, pb_utils.MetricFamily.COUNTER).Metric(labels={})

    def _family(self, name: str, description: str, kind: Any) -> Any:
        self._families.append(pb_utils.MetricFamily(name=name, description=description, kind=kind))
        return self._families[-1]


class TritonPythonModel:
    """Triton's interface to a served engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine and warm it up."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="prism_trt: %(message)s")
        _exit_with_parent()
        start = time.perf_counter()
        config = json.loads(args["model_config"])
        settings = {key: entry["string_value"] for key, entry in config["parameters"].items()}
        path = Path(args["model_repository"]) / args["model_version"] / settings["engine"]
        try:
            engine = load_engine(path, threads=_number(settings, "threads"), slots=_number(settings, "slots"))
            self._tokenizer = load_engine_tokenizer(path)
            self._tree = _tree(settings.get("tree"), engine.default_tree if engine.has_drafter else None)
            prompt = self._tokenizer.encode("Hello") or [0]
            generate(engine, [Request(prompt, _WARM_UP_TOKENS, tree=self._tree)])
        except PrismError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        if isinstance(engine, CpuEngine):
            torch.set_num_threads(1)  # the engine has threads of its own; torch's would wait for the same processors
        self._context = engine.limits.context
        self._scheduler = Scheduler(engine, self._tokenizer, int(settings["backlog"]), Metrics())
        log.info("loaded the engine in %.2f s, tree %s", time.perf_counter() - start, self._tree)
        _announce()

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; the scheduler's thread answers."""
        for request in requests:
            reply = TritonReply(request.get_response_sender())
            try:
                self._submit(request, reply)
            except PrismError as error:
                reply.fail("invalid", str(error))
            except Exception:
                log.exception("a request could not be read")
                reply.fail("internal", "the request could not be read: see the server's log")

    def _submit(self, request: Any, reply: TritonReply) -> None:
        inputs = {}
        for tensor in INPUTS:
            value = pb_utils.get_input_tensor_by_name(request, tensor.name)
            if value is not None:
                inputs[tensor.name] = value.as_numpy()
        parameters = json.loads(request.parameters() or "{}")
        generation = parse_generation(inputs, parameters, self._tokenizer, self._tree, self._context)
        microseconds = request.timeout()
        self._scheduler.submit(generation, reply, microseconds / 1e6 if microseconds else None)

    def finalize(self) -> None:
        """Stop; called when the server unloads the model."""
        self._scheduler.stop()


def _string(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode()]], dtype=np.object_))


def _number(settings: dict[str, str], name: str) -> int | None:
    return int(settings[name]) if name in settings else None


def _tree(setting: str | None, default: TreeShape | None) -> TreeShape | None:
    if setting is None:
        return default
    return None if setting == "none" else TreeShape.parse(setting)


def _announce() -> None:
    """Tell the keeper, if there is one, which process to watch."""
    if runtime := os.environ.get(RUNTIME_VARIABLE):
        with contextlib.suppress(OSError):
            (Path(runtime) / f"{MODEL_PREFIX}{os.getpid()}").touch()


def _exit_with_parent() -> None:
    """End this process when the server does; Triton leaves it behind when it is killed."""
    parent = os.pidfd_open(os.getppid())

    def watch() -> None:
        poller = select.poll()
        poller.register(parent, select.POLLIN)
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
