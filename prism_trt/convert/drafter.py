"""The drafter's networks: `step` (one draft step, the module chosen at run time) and `round` (a whole draft tree).

Inputs and outputs are those of `prism_trt.engines.tensorrt.names`; B, T, R and L are dynamic. Shape legend as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prism_trt.config import DrafterConfig, TreeShape
from prism_trt.convert.graph import Emitted, Graph, Value
from prism_trt.convert.plugins import Plugins, SlotPool
from prism_trt.convert.target import FUSION
from prism_trt.convert.transformer import (
    Attention,
    FixedWeights,
    Pool,
    SelectedWeights,
    Weights,
    gathered_linear,
    layer_linears,
    layer_tensors,
    linear_tensors,
    native_attention,
    pick,
    rms_norm,
    rope_constants,
    transformer_layer,
)
from prism_trt.convert.tree import TreeGrowth
from prism_trt.drafter.model import Drafter, DrafterLayer, ProcessingModule
from prism_trt.engines.tensorrt.names import (
    CALL_TOKENS,
    FEATURES,
    HIDDEN,
    LOGITS,
    NEXT_HIDDEN,
    PICKED,
    PICKED_TOKENS,
    POSITIONS,
    ROWS,
    STEP,
    TOKENS,
    TREE_DEPTHS,
    TREE_LOG_PROBS,
    TREE_MASK,
    TREE_PARENTS,
    TREE_TOKENS,
)
from prism_trt.quantize.scales import UNQUANTIZED, LinearScales, Scales
from prism_trt.target.model import LlamaModel, RMSNorm

FC, NORM = "fc", "norm"

LayerAttention = Callable[[int], Attention]
"""The attention of the layer of a number."""


def drafter_linears(drafter: Drafter) -> dict[str, list[nn.Linear]]:
    """The linear layers by the names of their matrices in the networks, those that are fused together."""
    linears: dict[str, list[nn.Linear]] = {}
    for number, module in enumerate(drafter.modules_):
        assert isinstance(module, ProcessingModule)
        own = {} if module.fc is None else {FC: [module.fc]}
        parts = [*map(layer_linears, module.stack), own]
        for prefix, part in zip(_prefixes(drafter.config, f"modules.{number}"), parts, strict=True):
            linears |= {f"{prefix}.{name}": fused for name, fused in part.items()}
    return linears if drafter.fusion is None else {**linears, f"{FEATURES}.{FUSION}": [drafter.fusion]}


def emit_step(
    trt: Any,
    drafter: Drafter,
    model: LlamaModel,
    capacity: int,
    dtype: torch.dtype,
    scales: Scales = UNQUANTIZED,
    plugins: Plugins | None = None,
) -> Emitted:
    """The network of one draft step, which computes in `dtype`.

    Args:
        trt: a module with the network API of TensorRT 11.
        drafter: its modules are stacked, and the network input `STEP` selects one when there are several.
        model: the target, whose embedding and head are used.
        capacity: entries of a slot of the K/V pool.
        dtype: float16, bfloat16 or float32 (for the walker only).
        scales: of the matrices to quantise. Without plugins only a single module is: TensorRT selects from no stack of
            8-bit matrices. Plugins leave activations as they are.
        plugins: the form with plugins, in which each token has a draft step of its own; None is that without.
    """
    graph = Graph(trt, dtype)
    parts = _Parts(graph, drafter, model, capacity)
    config = drafter.config
    pool = SlotPool(graph, config, capacity, plugins) if plugins else Pool(graph, config, capacity, parts.tokens)
    picked = graph.input(PICKED, torch.int32, (ROWS, PICKED_TOKENS))
    module = _module_of_step(graph, config, plugins)
    with graph.scope("step"):
        x = parts.embed(parts.tokens)
        weights = _step_weights(graph, drafter, module, scales, plugins)
        hidden = parts.run(weights, x, parts.hidden, parts.positions, pool.attention)
        hidden = pick(graph, hidden, picked)
        graph.output(NEXT_HIDDEN, hidden)
        graph.output(LOGITS, parts.head(hidden))
    return graph.finish()


def emit_round(
    trt: Any,
    drafter: Drafter,
    model: LlamaModel,
    shape: TreeShape,
    capacity: int,
    dtype: torch.dtype,
    scales: Scales = UNQUANTIZED,
) -> Emitted:
    """The network that extends over newly committed tokens and grows a tree of `shape`, computing in `dtype`.

    It gives the tree that `prism_trt.speculative.tree` grows. Its steps are unrolled, so that each uses the weights of
    its module in place. The K/V pool receives the entries of step 0; those of the tree live inside the call only.
    `PICKED` [B, 1] names each row's last valid token, the tree's root. `scales` are of the matrices to quantise, in
    every module. Other arguments as for `emit_step`.
    """
    graph = Graph(trt, dtype)
    parts = _Parts(graph, drafter, model, capacity)
    pool = Pool(graph, drafter.config, capacity, parts.tokens)
    last = graph.input(PICKED, torch.int32, (ROWS, 1))
    modules = [_fixed_weights(graph, drafter, number, scales) for number in range(drafter.config.num_modules)]
    memory = _RoundMemory(graph, pool)
    rows, width = pool.rows, shape.width

    with graph.scope("round"):
        with graph.scope("steps.0"):
            x = parts.embed(parts.tokens)
            weights = modules[drafter.module_of_step(0)]
            attention = partial(native_attention, graph, pool.mask, memory.commit)
            hidden = parts.run(weights, x, parts.hidden, parts.positions, attention)
            hidden = pick(graph, hidden, last)
            logits = parts.head(hidden)
        with graph.scope("root"):
            root = graph.gather(parts.tokens, last, axis=1, batch_axes=1, name="token")
            position = graph.gather(parts.positions, last, axis=1, batch_axes=1, name="position")
            # The root's row of the causal mask admits exactly the committed entries.
            by_token = graph.reshape(pool.mask, (0, 0, 0, 0), (0, 2, 1, 3), "mask_by_token")
            committed = graph.gather(by_token, last, axis=1, batch_axes=1, name="mask")
            committed = graph.expand(committed, (rows, 1, width, pool.live), "mask_of_level")
            growth = TreeGrowth(graph, shape, rows, root, drafter.draft_vocab)
            tokens = growth.plant(logits)
            hidden = graph.expand(hidden, (rows, width, drafter.config.hidden_size), "hidden")
        for k in range(1, shape.depth):
            with graph.scope(f"steps.{k}"):
                positions = graph.expand(graph.add(position, graph.number(k, position)), (rows, width))
                mask = graph.concat((committed, growth.mask()), 3, "mask")
                weights = modules[drafter.module_of_step(k)]
                attention = partial(native_attention, graph, mask, memory.draft)
                output = parts.run(weights, parts.embed(tokens), hidden, positions, attention)
                logits = parts.head(output)
            with graph.scope(f"tree.{k}"):
                growth.grow(logits)
                if k + 1 < shape.depth:
                    tokens, parent = growth.choose()
                    hidden = graph.gather(output, parent, axis=1, batch_axes=1, name="hidden")
        with graph.scope("select"):
            tree = growth.select()
    names = (TREE_TOKENS, TREE_PARENTS, TREE_DEPTHS, TREE_MASK, TREE_LOG_PROBS)
    for name, value in zip(names, tree, strict=True):
        graph.output(name, value)
    return graph.finish()


class _RoundMemory:
    """Keys and values that the steps of a round read: the live ones of the pool, then those of the tree."""

    def __init__(self, graph: Graph, pool: Pool) -> None:
        self._graph = graph
        self._pool = pool
        self._entries: list[list[tuple[Value, Value]]] = []

    def commit(self, layer: int, keys: Value, values: Value) -> tuple[Value, Value]:
        """A `Remember` that writes to the pool: once per layer, for TensorRT allows no second update."""
        self._entries.append([self._pool.update(layer, keys, values)])
        return self._entries[layer][0]

    def draft(self, layer: int, keys: Value, values: Value) -> tuple[Value, Value]:
        """A `Remember` for the tree."""
        self._entries[layer].append((keys, values))
        every_key, every_value = zip(*self._entries[layer], strict=True)
        return self._graph.concat(every_key, 2, "all_keys"), self._graph.concat(every_value, 2, "all_values")


class _Parts:
    """What both networks are made of: common inputs, embedding, a module's pass, the head."""

    def __init__(self, graph: Graph, drafter: Drafter, model: LlamaModel, capacity: int) -> None:
        config = drafter.config
        self._graph, self._config = graph, config
        self.tokens = graph.input(TOKENS, torch.int32, (ROWS, CALL_TOKENS))
        self.positions = graph.input(POSITIONS, torch.int32, (ROWS, CALL_TOKENS))
        shape = (ROWS, CALL_TOKENS, config.hidden_size)
        self.hidden = None if config.features == "none" else graph.input(HIDDEN, graph.dtype, shape)
        self._rope = rope_constants(graph, config, capacity)
        table = drafter.embedding(model.model.embed_tokens.weight)
        head = drafter.head_rows(model.head_weight)
        self._embedding = graph.weight("embedding", table)
        self._head = self._embedding if head is table else graph.weight("head", head)

    def embed(self, tokens: Value) -> Value:
        """[B, T, H] of [B, T]."""
        return self._graph.gather(self._embedding, tokens, axis=0, name="embed")

    def run(
        self,
        weights: list[Weights],
        x: Value,
        hidden: Value | None,
        positions: Value,
        attention: LayerAttention,
    ) -> Value:
        """One module over embeddings x and hidden states [B, T, H] each: the next hidden states [B, T, H].

        Args:
            weights: of each layer, then of the module itself (fusion layer and final norm).
            x: embeddings.
            hidden: None for a module that reads none.
            positions: [B, T].
            attention: of each layer.
        """
        graph, (*layers, module) = self._graph, weights
        if module.has(FC):  # all but standard
            x = module.linear(graph.concat((x, hidden), 2, "embedding_and_hidden"), FC)
        for number, layer in enumerate(layers):
            with graph.scope(f"layers.{number}"):
                x = transformer_layer(graph, self._config, layer, x, positions, self._rope, attention(number))
        return module.scale(rms_norm(graph, x, self._config.rms_norm_eps), NORM) if module.has(NORM) else x

    def head(self, hidden: Value) -> Value:
        """float32 logits [B, T, D] of [B, T, H]."""
        words, width = self._head.shape
        matrix = self._graph.reshape(self._head, (1, words, width), name="head_matrix")
        return self._graph.cast(self._graph.matmul_transposed(hidden, matrix, "logits"), torch.float32)


def _tensors(module: ProcessingModule) -> list[dict[str, Tensor]]:
    """Tensors of each layer, then of the module itself."""
    own = {} if module.fc is None else linear_tensors(module.fc, FC)
    if isinstance(module.norm, RMSNorm):
        own[NORM] = module.norm.weight
    layers = [layer for layer in module.layers if isinstance(layer, DrafterLayer)]
    return [*map(layer_tensors, layers), own]


def _prefixes(config: DrafterConfig, module: str) -> list[str]:
    return [*(f"{module}.layers.{number}" for number in range(config.num_layers)), module]


def _fixed_weights(graph: Graph, drafter: Drafter, number: int, scales: Scales) -> list[Weights]:
    """Weights of one module, for `_Parts.run`."""
    module = drafter.modules_[number]
    assert isinstance(module, ProcessingModule)
    prefixes = _prefixes(drafter.config, f"modules.{number}")
    return [FixedWeights(graph, prefix, part, scales) for prefix, part in zip(prefixes, _tensors(module), strict=True)]


def _module_of_step(graph: Graph, config: DrafterConfig, plugins: Plugins | None) -> Value | None:
    """The modules of the input `STEP` as `SelectedWeights` takes them; None when there is only one."""
    if config.num_modules == 1:
        return None
    with graph.scope("module"):
        step = graph.input(STEP, torch.int32, (ROWS, CALL_TOKENS) if plugins else (1,))
        step = step if plugins else graph.reshape(step, (1, 1))
        known = graph.elementwise("MIN", step, graph.number(len(config.step_map) - 1, step), "known_step")
        step_map = graph.weight("step_map", torch.tensor(config.step_map), torch.int32)
        return graph.gather(step_map, known, axis=0, name="of_step")


def _step_weights(
    graph: Graph, drafter: Drafter, module: Value | None, scales: Scales, plugins: Plugins | None
) -> list[Weights]:
    """Weights of the module that the step selects, for `_Parts.run`."""
    if module is None:
        return _fixed_weights(graph, drafter, 0, scales)
    modules = [_tensors(each) for each in drafter.modules_ if isinstance(each, ProcessingModule)]
    own_prefixes = [_prefixes(drafter.config, f"modules.{number}") for number in range(len(modules))]
    weights: list[Weights] = []
    for number, prefix in enumerate(_prefixes(drafter.config, "modules")):
        tensors = [parts[number] for parts in modules]
        if plugins is None:
            weights.append(SelectedWeights(graph, prefix, tensors, module, gathered_linear))
        else:
            stacked = _stacked_scales(scales, [own[number] for own in own_prefixes], tensors[0])
            weights.append(SelectedWeights(graph, prefix, tensors, module, plugins.linear, stacked))
    return weights


def _stacked_scales(scales: Scales, prefixes: Sequence[str], names: Iterable[str]) -> Scales:
    """Of the matrices `names`, each under all of `prefixes`: one scale per module for those that are quantised."""
    found = {name: [scales[full] for prefix in prefixes if (full := f"{prefix}.{name}") in scales] for name in names}
    return {
        name: LinearScales(each[0].dtype, torch.stack([one.weight for one in each]), None)
        for name, each in found.items()
        if len(each) == len(prefixes)
    }
