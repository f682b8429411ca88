"""llama.cpp behind one JSON object per line on stdin and stdout.

Run by `llama_peer` as a script in an interpreter that has `llama_cpp`, so it imports nothing of this package. The
first line out is ``{"version": v}`` once the model is loaded, or ``{"error": text}``. Then requests and replies are

- ``{"prompt": [ids], "tokens": n}`` and ``{"tokens": [ids], "prefill_seconds": s, "decode_seconds": s}``,
- ``{"pass": [ids], "context": n}`` and ``{"seconds": s}``.
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
        if "pass" in request:
            reply: dict[str, object] = {"seconds": time_pass(model, request["pass"], request["context"])}
        else:
            reply = decode(model, request["prompt"], request["tokens"])
        print(json.dumps(reply), file=replies)


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


def time_pass(model: llama_cpp.Llama, tokens: list[int], context: int) -> float:
    """Seconds of one pass over the tokens after the first `context`: all logits, or the last ones without context."""
    model.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    if context:
        model.eval(tokens[:context])
    count = len(tokens) - context
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for i in range(count):
        batch.token[i], batch.pos[i] = tokens[context + i], context + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = bool(context) or i == count - 1
    start = time.perf_counter()
    code = llama_cpp.llama_decode(model.ctx, batch)
    llama_cpp.llama_synchronize(model.ctx)
    seconds = time.perf_counter() - start
    llama_cpp.llama_batch_free(batch)
    if code != 0:
        raise RuntimeError(f"llama_decode returned {code}")
    return seconds


def argmax(model: llama_cpp.Llama) -> int:
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
