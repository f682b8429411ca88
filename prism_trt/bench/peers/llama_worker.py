"""llama.cpp behind one JSON object per line on stdin and stdout.

Run by `llama_peer` as a script in an interpreter that has `llama_cpp`, so it imports nothing of this package. Requests
are ``{"prompt": [ids], "tokens": n}``; replies ``{"tokens": [ids], "prefill_seconds": s, "decode_seconds": s}``.
The first line out is ``{"version": v}`` once the model is loaded, or ``{"error": text}``.
"""

from __future__ import annotations

import json
import os
import sys
import time

import llama_cpp
import numpy as np


def main(path: str, threads: int, context: int, flash_attention: bool) -> None:
    # Libraries may print to file descriptor 1; keep the protocol's pipe private and send them to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        model = llama_cpp.Llama(
            model_path=path,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            flash_attn=flash_attention,
            verbose=False,
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(json.dumps({"error": str(error)}), file=replies)
        return
    print(json.dumps({"version": llama_cpp.__version__}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(decode(model, request["prompt"], request["tokens"])), file=replies)


def decode(model: llama_cpp.Llama, prompt: list[int], count: int) -> dict[str, object]:
    """Greedy decoding of exactly `count` tokens, whatever they are."""
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    tokens = [argmax(model)]
    first = time.perf_counter()
    while len(tokens) < count:
        model.eval(tokens[-1:])
        tokens.append(argmax(model))
    return {"tokens": tokens, "prefill_seconds": first - start, "decode_seconds": time.perf_counter() - first}


def argmax(model: llama_cpp.Llama) -> int:
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
