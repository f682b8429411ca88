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
import triton_python_backend_utils as pb_utils

from prism_trt.config import TreeShape
from prism_trt.deploy.interface import CODES, INPUTS, Fault, error_text
from prism_trt.deploy.keeper import MODEL_PREFIX, RUNTIME_VARIABLE
from prism_trt.deploy.log_probs import describe
from prism_trt.deploy.metrics import TritonMonitor
from prism_trt.deploy.requests import parse_generation, parse_user
from prism_trt.deploy.scheduler import Scheduler
from prism_trt.engines.loading import load_engine, load_engine_tokenizer, load_planner
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import generate
from prism_trt.speculative.log_probs import ScoredToken
from prism_trt.speculative.request import AUTO, Request, RequestTree, Statistics
from prism_trt.speculative.stopping import FinishReason
from prism_trt.target.tokenizer import Tokenizer

_WARM_UP_TOKENS = 8
_PREFILL_SHARE = 4
"""Part of a call that prompts may fill between two rounds."""

log = logging.getLogger(__name__)


class TritonReply:
    """Sends one request's answer through Triton.

    Args:
        request: Triton's.
        tokenizer: the target's.
        open_replies: what has not ended yet; this takes itself out of it.
    """

    def __init__(self, request: Any, tokenizer: Tokenizer, open_replies: set[TritonReply]) -> None:
        self.request_id: str = request.request_id()
        self.user = ""
        self._sender = request.get_response_sender()
        self._tokenizer = tokenizer
        self._open = open_replies
        self._stopped = False

    def stop(self) -> None:
        """Have the request end before its next round; what it has so far is its answer."""
        self._stopped = True

    def text(self, text: str, scored: list[ScoredToken]) -> None:
        self._sender.send(pb_utils.InferenceResponse(self._piece(text, scored)))

    def finish(self, text: str, scored: list[ScoredToken], reason: FinishReason, statistics: Statistics) -> None:
        numbers = {
            "num_input_tokens": statistics.num_input_tokens,
            "num_reused_tokens": statistics.reused_tokens,
            "num_output_tokens": statistics.num_output_tokens,
            "num_target_passes": statistics.target_passes,
            "total_draft_tokens": statistics.drafted,
            "total_accepted_draft_tokens": statistics.accepted,
        }
        rate = statistics.accepted / statistics.drafted if statistics.drafted else 0.0
        outputs = [
            *self._piece(text, scored),
            _string("finish_reason", reason),
            *(pb_utils.Tensor(name, np.array([[number]], dtype=np.int32)) for name, number in numbers.items()),
            pb_utils.Tensor("acceptance_rate", np.array([[rate]], dtype=np.float32)),
        ]
        self._end(pb_utils.InferenceResponse(outputs))

    def fail(self, fault: Fault, sentence: str) -> None:
        error = pb_utils.TritonError(error_text(fault, sentence), getattr(pb_utils.TritonError, CODES[fault]))
        self._end(pb_utils.InferenceResponse(error=error))

    def cancelled(self) -> bool:
        return self._stopped or bool(self._sender.is_cancelled())

    def end_without_response(self) -> None:
        """Send nothing."""
        self._end()

    def _end(self, *response: Any) -> None:
        self._open.discard(self)
        self._sender.send(*response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _piece(self, text: str, scored: list[ScoredToken]) -> list[Any]:
        outputs = [_string("text_output", text)]
        if scored:
            log_probs = np.array([[token.log_prob for token in scored]], dtype=np.float32)
            outputs.append(pb_utils.Tensor("output_log_probs", log_probs))
            outputs.append(_string("log_probs", json.dumps(describe(scored, self._tokenizer))))
        return outputs


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
            self._tree = _tree(settings.get("tree", AUTO))
            planner = load_planner(path, engine)
            prompt = self._tokenizer.encode("Hello") or [0]
            generate(engine, [Request(prompt, _WARM_UP_TOKENS, tree=self._tree)], planner=planner)
        except PrismError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._context = engine.limits.context
        self._open: set[TritonReply] = set()
        self._scheduler = Scheduler(
            engine,
            self._tokenizer,
            int(settings["backlog"]),
            prefill_tokens=_number(settings, "prefill_tokens") or -(-engine.limits.tokens_per_call // _PREFILL_SHARE),
            reuse_prefixes=settings["prefix_cache"] == "on",
            monitor=TritonMonitor(),
            planner=planner,
        )
        log.info("loaded the engine in %.2f s, tree %s", time.perf_counter() - start, self._tree)
        _announce()

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; the scheduler's thread answers."""
        for request in requests:
            reply = TritonReply(request, self._tokenizer, self._open)
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
        if "stop" in inputs and inputs["stop"].any():
            self._stop(reply, parse_user(inputs))
            return
        parameters = json.loads(request.parameters() or "{}")
        generation = parse_generation(inputs, parameters, self._tokenizer, self._tree, self._context)
        reply.user = generation.user
        microseconds = request.timeout()
        self._open.add(reply)
        self._scheduler.submit(generation, reply, microseconds / 1e6 if microseconds else None)

    def _stop(self, request: TritonReply, user: str) -> None:
        """End the request with the id of `request`, which asks for that, in the way of TensorRT-LLM's backend.

        Clients that know nothing of each other may use the same ids: only `user`'s request is meant if one is named,
        and where several are meant none is ended.
        """
        if not request.request_id:
            raise PrismError("stop is set in a request without an id: send the id of the request to stop")
        meant = [
            reply for reply in tuple(self._open) if reply.request_id == request.request_id and user in ("", reply.user)
        ]
        if len(meant) > 1:
            raise PrismError(
                f"{len(meant)} open requests have the id of the one to stop: use ids that no other client uses, and "
                "send user"
            )
        for reply in meant:
            reply.stop()
        request.end_without_response()

    def finalize(self) -> None:
        """Stop; called when the server unloads the model, which waits for the open requests as long as it may."""
        self._scheduler.stop()
        _withdraw()


def _string(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode()]], dtype=np.object_))


def _number(settings: dict[str, str], name: str) -> int | None:
    return int(settings[name]) if name in settings else None


def _tree(setting: str) -> RequestTree:
    if setting == AUTO:
        return AUTO
    return None if setting == "none" else TreeShape.parse(setting)


def _announce() -> None:
    """Tell the keeper, if there is one, which process to watch."""
    if announcement := _announcement():
        with contextlib.suppress(OSError):
            announcement.touch()


def _withdraw() -> None:
    """Tell the keeper that this process is going to end as it should."""
    if announcement := _announcement():
        with contextlib.suppress(OSError):
            announcement.unlink()


def _announcement() -> Path | None:
    """The file by which a keeper knows this process; None without a keeper."""
    runtime = os.environ.get(RUNTIME_VARIABLE)
    return Path(runtime) / f"{MODEL_PREFIX}{os.getpid()}" if runtime else None


def _exit_with_parent() -> None:
    """End this process when the server does; Triton leaves it behind when it is killed."""
    parent = os.pidfd_open(os.getppid())

    def watch() -> None:
        poller = select.poll()
        poller.register(parent, select.POLLIN)
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
