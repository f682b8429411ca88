"""Compiled networks on a GPU. Nothing else of the project calls TensorRT at run time.

No GPU was at hand when this was written: see docs/verification.md. What feeds and reads the networks
(`prism_trt.engines.tensorrt.engine`, `.binding`, `.recorded`) is tested over the CPU walker.
"""

from __future__ import annotations

import importlib
import mmap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_trt.engines.manifest import EngineManifest
from prism_trt.engines.recordings import CudaGraphs
from prism_trt.engines.tensorrt.engine import FusedNetworkEngine, NetworkEngine
from prism_trt.engines.tensorrt.files import BINDINGS, DRAFT_VOCAB, ROUND, STEP, TARGET, before_update, plan_file
from prism_trt.engines.tensorrt.recorded import RecordedNetwork
from prism_trt.errors import PrismError

if TYPE_CHECKING:
    from tensorrt_rtx_bindings import tensorrt_rtx as api


class CompiledPlan:
    """A plan in TensorRT on one CUDA device, and memory that its networks share, because they run one after another."""

    def __init__(self, trt: Any, runtime: api.Runtime, plan: Path, device: torch.device) -> None:
        """Deserialize `plan`.

        Raises:
            PrismError: TensorRT refuses it, because it is damaged or was built for another GPU or version.
        """
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self.engine: api.ICudaEngine | None = runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise PrismError(
                f"TensorRT cannot load {plan}: build the engine again for this GPU and version of TensorRT"
            )
        self.trt = trt
        self.device = device
        self._scratch = torch.empty(self.engine.device_memory_size_v2, dtype=torch.uint8, device=device)

    def network(self, for_recording: bool = False) -> CompiledNetwork:
        """A network with a context of its own: a captured graph must be the only user of the context it came from.

        Args:
            for_recording: compile the kernels for the first call's sizes before it runs, not beside later ones;
                TensorRT-RTX has such kernels.
        """
        assert self.engine is not None
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if for_recording and hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):
            strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = strategy
        context = self.engine.create_execution_context(config)
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return CompiledNetwork(self, context)


class CompiledNetwork:
    """A context of a plan, bound to torch tensors."""

    def __init__(self, plan: CompiledPlan, context: api.IExecutionContext) -> None:
        """Read names and types of inputs and outputs; `plan` is kept, as it owns what `context` uses."""
        engine, trt = plan.engine, plan.trt
        assert engine is not None
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self._plan = plan
        self._context = context
        self._outputs = [name for name in names if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT]
        self._types = {name: torch_type(trt, engine.get_tensor_dtype(name)) for name in names}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `prism_trt.engines.tensorrt.engine.Executable.run`; asynchronous on the current stream."""
        bound = {name: tensor.to(self._types[name]).contiguous() for name, tensor in inputs.items()}
        for name, tensor in bound.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name in self._outputs:
            if before_update(name) in bound:  # K/V is updated in place: one memory for both tensors
                self._context.set_tensor_address(name, bound[before_update(name)].data_ptr())
                continue
            shape: Any = self._context.get_tensor_shape(name)  # can be iterated, which its type does not say
            outputs[name] = torch.empty(tuple(shape), dtype=self._types[name], device=self._plan.device)
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._plan.device).cuda_stream):
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

    record = CudaGraphs()

    def network(name: str) -> RecordedNetwork:
        plan = CompiledPlan(trt, runtime, path / plan_file(name), device)
        return RecordedNetwork(plan.network(), partial(plan.network, for_recording=True), gpu.limits, record)

    if manifest.drafter is None:
        return NetworkEngine(manifest.target, None, None, gpu.limits, network(TARGET), None, device, dtype)
    draft_vocab = None
    if manifest.drafter.draft_vocab_size is not None:
        draft_vocab = load_file(path / DRAFT_VOCAB)["draft_vocab"].long()
    models = (manifest.target, manifest.drafter, draft_vocab, gpu.limits)
    target, step, draft_round = network(TARGET), network(STEP), network(ROUND)
    plugins = manifest.runtime == "tensorrt"
    return FusedNetworkEngine(*models, target, step, draft_round, manifest.default_tree, device, dtype, plugins)


def torch_type(trt: Any, dtype: api.DataType) -> torch.dtype:
    """The torch type of a network's input or output."""
    names = {
        "HALF": "float16",
        "BF16": "bfloat16",
        "FLOAT": "float32",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
    }
    return {getattr(trt.DataType, name): getattr(torch, known) for name, known in names.items()}[dtype]
