"""A request that tells a model which works, or is merely busy, from one that hangs."""

from __future__ import annotations

import queue

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from prism_trt.client.generate import Options, request_inputs
from prism_trt.deploy.interface import TRY_AGAIN, parse_error
from prism_trt.errors import PrismError


def ask_for_a_token(url: str, model: str, patience: float) -> None:
    """Have `model` generate one token.

    A model without a free slot says so after half of `patience`, in the thread that decodes; that passes as well.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
        model: name of the served model.
        patience: seconds until there must be an answer.

    Raises:
        PrismError: there was none, or another refusal.
    """
    answers: queue.SimpleQueue[InferenceServerException | None] = queue.SimpleQueue()
    inputs = request_inputs("Hello", Options(max_tokens=1, chat=False))
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put(error), stream_timeout=2 * patience)
        try:
            client.async_stream_infer(model, inputs, timeout=max(1, round(patience / 2 * 1e6)))
            error = answers.get(timeout=patience)
            client.stop_stream()  # not cancelled: see `prism_trt.client.streams`
        except InferenceServerException as broken:  # the connection was refused already
            error = broken
        except queue.Empty:
            raise PrismError(f"the model has not answered within {patience:g} s: see the server's log") from None
        finally:
            client.stop_stream(cancel_requests=True)
    if error is not None:
        _, sentence = parse_error(error.message())
        if not sentence.endswith(TRY_AGAIN):
            raise PrismError(f"the model does not work: {sentence}")
