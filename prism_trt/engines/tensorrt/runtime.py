"""Compiled networks on a GPU. Nothing else of the project calls TensorRT at run time.

No GPU was at hand when this was written: see docs/verification.md. What feeds and reads the networks
(`prism_trt.engines.tensorrt.engine` and `.binding`) is tested over the CPU walker.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_trt.engines.manifest import EngineManifest
from prism_trt.engines.tensorrt.engine import FusedNetworkEngine, NetworkEngine
from prism_trt.engines.tensorrt.files import BINDINGS, DRAFT_VOCAB, ROUND, STEP, TARGET, plan_file
from prism_trt.errors import PrismError


class CompiledNetwork:
    """A plan in TensorRT, bound to torch tensors of one CUDA device."""

    def __init__(self, trt: Any, runtime: Any, plan: Path, device: torch.device) -> None:
        """Deserialize `plan`.

        Raises:
            PrismError: TensorRT refuses it, because it is damaged or was built for another GPU or version.
        """
        self._engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise PrismError(
                f"TensorRT cannot load {plan}: build the engine again for this GPU and version of TensorRT"
            )
        self._context = self._engine.create_execution_context()
        self._device = device
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._outputs = [name for name in names if not is_input[name]]
        self._types = {name: _torch_type(trt, self._engine.get_tensor_dtype(name)) for name in names}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `prism_trt.engines.tensorrt.engine.Executable.run`; asynchronous on the current stream."""
        bound = {name: tensor.to(self._types[name]).contiguous() for name, tensor in inputs.items()}
        for name, tensor in bound.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name in self._outputs:
            before = name.removesuffix(".updated")
            if before != name:  # K/V is updated in place: one memory for both tensors
                self._context.set_tensor_address(name, bound[before].data_ptr())
                continue
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._types[name], device=self._device)
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise PrismError("TensorRT could not run the network: its log above says why")
        return outputs


def open_engine(path: Path, manifest: EngineManifest) -> NetworkEngine:
    """Load the compiled networks of the engine directory `path` on the current CUDA device.

    Raises:
        PrismError: there is no GPU of the right kind, the bindings are not installed, or a plan does not load.
    """
    gpu = manifest.gpu
    assert gpu is not None
    if not torch.cuda.is_available():
        raise PrismError(
            f"{path} was built for {manifest.profile}, but there is no CUDA device here: run it on that GPU"
        )
    found = "{}.{}".format(*torch.cuda.get_device_capability())
    if found != gpu.compute_capability:
        raise PrismError(
            f"{path} was built for compute capability {gpu.compute_capability}, but this GPU has {found}: build it for "
            "this GPU"
        )
    try:
        trt = importlib.import_module(BINDINGS[manifest.runtime])
    except ModuleNotFoundError:
        raise PrismError(f"{path} needs {manifest.runtime}: pip install 'prism-trt[{manifest.runtime}]'") from None
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, manifest.dtype)
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))

    def network(name: str) -> CompiledNetwork:
        return CompiledNetwork(trt, runtime, path / plan_file(name), device)

    if manifest.drafter is None:
        return NetworkEngine(manifest.target, None, None, gpu.limits, network(TARGET), None, device, dtype)
    draft_vocab = None
    if manifest.drafter.draft_vocab_size is not None:
        draft_vocab = load_file(path / DRAFT_VOCAB)["draft_vocab"].long()
    models = (manifest.target, manifest.drafter, draft_vocab, gpu.limits)
    target, step, draft_round = network(TARGET), network(STEP), network(ROUND)
    return FusedNetworkEngine(*models, target, step, draft_round, manifest.default_tree, device, dtype)


def _torch_type(trt: Any, dtype: Any) -> torch.dtype:
    names = {
        "HALF": "float16",
        "BF16": "bfloat16",
        "FLOAT": "float32",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
    }
    return {getattr(trt.DataType, name): getattr(torch, known) for name, known in names.items()}[dtype]
