"""The target's network: every layer over the K/V pool, with tree attention.

Inputs and outputs are those of `prism_trt.engines.tensorrt.names`; B, T, R and L are dynamic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prism_trt.convert.graph import Emitted, Graph, Value
from prism_trt.convert.scratch import Place, as_it_is
from prism_trt.convert.transformer import (
    FixedWeights,
    Pool,
    layer_linears,
    layer_tensors,
    linear_tensors,
    pick,
    rms_norm,
    rope_constants,
    transformer_layer,
)
from prism_trt.drafter.features import fed_layers
from prism_trt.drafter.model import Drafter
from prism_trt.engines.tensorrt.names import (
    CALL_TOKENS,
    FEATURES,
    GREEDY,
    LOGITS,
    PICKED,
    PICKED_TOKENS,
    POSITIONS,
    ROWS,
    TOKENS,
)
from prism_trt.progress import Reporter
from prism_trt.quantize.scales import UNQUANTIZED, Scales
from prism_trt.target.model import DecoderLayer, LlamaModel

FUSION = "fusion"
"""The matrix that fuses several hidden states; a part of the drafter."""


def target_linears(model: LlamaModel) -> dict[str, list[nn.Linear]]:
    """The linear layers by the names of their matrices in the network, those that are fused together."""
    return {
        f"{_layer(number)}.{name}": parts
        for number, layer in enumerate(model.model.layers)
        if isinstance(layer, DecoderLayer)
        for name, parts in layer_linears(layer).items()
    }


def emit_target(
    trt: Any,
    model: LlamaModel,
    drafter: Drafter | None,
    capacity: int,
    dtype: torch.dtype,
    scales: Scales = UNQUANTIZED,
    place: Place = as_it_is,
    progress: Reporter | None = None,
) -> Emitted:
    """The network of `model`, which computes in `dtype` (float32 is for the walker: TensorRT does not build it).

    Args:
        trt: a module with the network API of TensorRT 11.
        model: the target's weights, of any dtype.
        drafter: whose features to give; when it fuses several hidden states, the fused ones.
        capacity: entries of a slot of the K/V pool.
        dtype: float16, bfloat16 or float32.
        scales: of the matrices to quantise.
        place: where constants live until the network is built.
        progress: is told of every layer.
    """
    config = model.config
    graph = Graph(trt, dtype, place)
    tokens = graph.input(TOKENS, torch.int32, (ROWS, CALL_TOKENS))
    positions = graph.input(POSITIONS, torch.int32, (ROWS, CALL_TOKENS))
    picked = graph.input(PICKED, torch.int32, (ROWS, PICKED_TOKENS))
    pool = Pool(graph, config, capacity, tokens)
    rope = rope_constants(graph, config, capacity)
    embedding = graph.weight("embedding", model.model.embed_tokens.weight)

    with graph.scope("target"):
        x = graph.gather(embedding, tokens, axis=0, name="embed")
        states = [x]
        for number, layer in enumerate(model.model.layers):
            assert isinstance(layer, DecoderLayer)
            with graph.scope(f"layers.{number}"):
                weights = FixedWeights(graph, _layer(number), layer_tensors(layer), scales)
                x = transformer_layer(graph, config, weights, x, positions, rope, pool.attention(number))
            states.append(x)
            if progress is not None:
                progress.advance()
        with graph.scope("norm"):
            norm = FixedWeights(graph, "final", {"norm": model.model.norm.weight})
            states[-1] = final = norm.scale(rms_norm(graph, x, config.rms_norm_eps), "norm")
        with graph.scope("features"):
            graph.output(FEATURES, _features(graph, model, drafter, states, scales))
        with graph.scope("head"):
            name = "embedding" if config.tie_word_embeddings else "head"
            matrix = graph.weight(name, model.head_weight)
            matrix = graph.reshape(matrix, (1, config.vocab_size, config.hidden_size), name="matrix")
            logits = graph.matmul_transposed(pick(graph, final, picked), matrix, "logits")
            logits = graph.cast(logits, torch.float32)
            graph.output(LOGITS, logits)
            _, greedy = graph.top(logits, 1, "argmax")
            graph.output(GREEDY, graph.reshape(greedy, (0, 0), name="greedy"))
    return graph.finish()


def _layer(number: int) -> str:
    """The name that the constants of a layer begin with."""
    return f"layers.{number}"


def _features(graph: Graph, model: LlamaModel, drafter: Drafter | None, states: list[Value], scales: Scales) -> Value:
    """[B, T, H]: the hidden state that the drafter is fed, or the fusion of several."""
    fed = [states[i] for i in fed_layers(model.config, drafter.config if drafter else None)]
    if drafter is not None and drafter.config.normalize_features:
        fed = [rms_norm(graph, state, drafter.config.rms_norm_eps) for state in fed]
    joined = graph.concat(fed, 2)
    if drafter is None or drafter.fusion is None:
        return graph.identity(joined, "features")
    return FixedWeights(graph, FEATURES, linear_tensors(drafter.fusion, FUSION), scales).linear(joined, FUSION)
