"""Triton model repositories: one directory that holds the served model, its engine and a manifest."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from prism_trt import __version__
from prism_trt.config import TreeShape
from prism_trt.deploy.interface import INPUTS, OUTPUTS, REQUIRED, Tensor
from prism_trt.engines.manifest import ENGINE_KIND, ENGINE_MANIFEST, EngineManifest, read_engine_manifest
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_directory, has_any, read_manifest, write_manifest

MANIFEST = "repository.json"
KIND = "model repository"
ENGINE_DIRECTORY = "engine"
"""Name of the engine inside a model version."""

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_MODEL_PY = '''"""Triton's entry point; prism_trt must be installed where the server runs."""

try:
    from prism_trt.deploy.triton_model import TritonPythonModel
except ModuleNotFoundError as error:
    raise ImportError(f"{error}: install prism-trt for the Python that Triton's model processes run on") from None

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    engine: Path,
    out: Path,
    model_name: str = "prism",
    *,
    tree: str | None = None,
    slots: int | None = None,
    threads: int | None = None,
    backlog: int = 256,
    prefill_tokens: int | None = None,
    prefix_cache: bool = True,
    overwrite: bool = False,
    reuse: bool = False,
) -> Path:
    """Write a model repository that serves `engine` at `out`; nothing appears at `out` unless all of it does.

    Engine files are hard-linked where the file system allows it and copied otherwise; the result refers to no path
    outside itself.

    Args:
        engine: engine directory.
        out: new directory.
        model_name: name under which clients address the model.
        tree: draft tree as ``SIZE/WIDTH/DEPTH``, ``none`` to decode without drafting, or ``auto`` to choose for each
            round what is fastest; None: ``auto``.
        slots: requests decoded together; None: all slots of the engine.
        threads: CPU threads of the engine; None: the engine's default.
        backlog: requests that may wait for a slot before further ones are refused as UNAVAILABLE.
        prefill_tokens: prompt tokens computed between two rounds of running requests at most; None: a quarter of what
            the engine computes in one call.
        prefix_cache: keep the K/V of ended requests for prompts that begin like them. The time to the first token then
            tells a client whether somebody has lately sent the same beginning.
        overwrite: replace an existing `out`.
        reuse: leave `out` as it is when it is the intact repository that would be written.

    Returns:
        `out`.

    Raises:
        PrismError: `engine` is not an intact engine, an argument is invalid or not for this engine, or `out` exists.
    """
    engine = Path(engine)
    manifest = read_engine_manifest(engine)
    if not _MODEL_NAME.fullmatch(model_name):
        raise PrismError(f"{model_name!r} cannot name a model: use letters, digits, dots, dashes and underscores")
    if tree not in (None, "none", "auto"):
        TreeShape.parse(tree)
        if manifest.drafter is None:
            raise PrismError(f"{engine} has no drafter, so it cannot draft the tree {tree}: build it with a drafter")
    for name, value, least in (
        ("slots", slots, 1),
        ("threads", threads, 1),
        ("backlog", backlog, 0),
        ("prefill_tokens", prefill_tokens, 1),
    ):
        if value is not None and value < least:
            raise PrismError(f"{name} must be at least {least}, not {value}")
    _check_settings(engine, manifest, slots, threads)
    parameters = {
        "engine": ENGINE_DIRECTORY,
        "backlog": str(backlog),
        "prefix_cache": "on" if prefix_cache else "off",
        **{
            name: str(value)
            for name, value in (
                ("tree", tree),
                ("slots", slots),
                ("threads", threads),
                ("prefill_tokens", prefill_tokens),
            )
            if value is not None
        },
    }
    config = model_config(model_name, parameters)
    if reuse and not overwrite and _holds(Path(out), engine, model_name, config):
        return Path(out)
    with atomic_directory(out, overwrite, _is_repository) as temporary:
        version = temporary / model_name / "1"
        version.mkdir(parents=True)
        shutil.copytree(engine, version / ENGINE_DIRECTORY, copy_function=_link_or_copy)
        (version / "model.py").write_text(_MODEL_PY)
        (temporary / model_name / "config.pbtxt").write_text(config)
        fields = {
            "model": model_name,
            "created_by": f"prism_trt {__version__}",
            "engine": {"profile": manifest.profile, "runtime": manifest.runtime, "versions": manifest.versions},
            "parameters": parameters,
        }
        written = write_manifest(temporary, MANIFEST, KIND, fields)
        _check_hashes(engine, version.relative_to(temporary) / ENGINE_DIRECTORY, written)
    return Path(out)


def _check_settings(engine: Path, manifest: EngineManifest, slots: int | None, threads: int | None) -> None:
    """Refuse what the engine could not do, or would ignore."""
    built = manifest.limits.slots
    if slots is not None and slots > built:
        raise PrismError(f"{engine} has {built} slots, not {slots}: ask for fewer or build it with --slots {slots}")
    if slots is not None and slots != built and manifest.gpu is not None:
        raise PrismError(f"{engine} always has its {built} slots: leave out --slots or build it with --slots {slots}")
    if threads is not None and (manifest.gpu is not None or manifest.runtime == "torch-cuda"):
        raise PrismError(f"{engine} computes on a GPU, not with threads of the processor: leave out --threads")


def _holds(out: Path, engine: Path, model_name: str, config: str) -> bool:
    """Whether `out` is an intact repository of `engine` with just this configuration.

    As at every start, sizes show what is intact; an engine's manifest holds the hashes of its files.
    """
    model, version = out / model_name, out / model_name / "1"
    try:
        return (
            read_repository(out)["model"] == model_name
            and (model / "config.pbtxt").read_text() == config
            and (version / "model.py").read_text() == _MODEL_PY
            and (version / ENGINE_DIRECTORY / ENGINE_MANIFEST).read_bytes() == (engine / ENGINE_MANIFEST).read_bytes()
        )
    except (PrismError, OSError, UnicodeDecodeError):
        return False


def _check_hashes(engine: Path, place: Path, repository: dict[str, Any]) -> None:
    """Compare what a repository's manifest says of the files of `engine`, below `place`, with what the engine's says.

    Raises:
        PrismError: a file is not what was built.
    """
    for file, built in read_manifest(engine, ENGINE_MANIFEST, ENGINE_KIND)["files"].items():
        if repository["files"][str(place / file)]["sha256"] != built["sha256"]:
            raise PrismError(f"{engine / file} is corrupted (its SHA-256 differs): build the {ENGINE_KIND} again")


def read_repository(repository: Path) -> dict[str, Any]:
    """Read and check the manifest of a model repository.

    Raises:
        PrismError: as `prism_trt.manifest.read_manifest`, or the manifest names no model.
    """
    manifest = read_manifest(repository, MANIFEST, KIND)
    if not isinstance(manifest.get("model"), str):
        raise PrismError(f"{Path(repository) / MANIFEST} is damaged (it names no model): build the {KIND} again")
    return manifest


def model_config(model_name: str, parameters: dict[str, str]) -> str:
    """The text of ``config.pbtxt``; complete, so that Triton need not run the model to complete it.

    Requests are handed over one by one, because all of a batch fail when a string of one of them is broken. It is the
    scheduler behind them that runs them together. There is one instance, which chooses its device itself: with
    KIND_AUTO Triton would make one for each GPU it sees, and all would compute on the first.
    """
    quote = json.dumps
    entries = "\n".join(
        f"parameters {{ key: {quote(key)} value: {{ string_value: {quote(value)} }} }}"
        for key, value in parameters.items()
    )
    return f"""name: {quote(model_name)}
backend: "python"
max_batch_size: 1
model_transaction_policy {{ decoupled: true }}
instance_group [ {{ kind: KIND_MODEL count: 1 }} ]
{entries}
input [
{_tensors(INPUTS, REQUIRED)}
]
output [
{_tensors(OUTPUTS, tuple(tensor.name for tensor in OUTPUTS))}
]
"""


def _tensors(tensors: tuple[Tensor, ...], required: tuple[str, ...]) -> str:
    return ",\n".join(
        f'  {{ name: "{tensor.name}" data_type: TYPE_{tensor.type} dims: [ {tensor.size} ]'
        f"{'' if tensor.name in required else ' optional: true'} }}"
        for tensor in tensors
    )


def _is_repository(directory: Path) -> bool:
    """Whether `directory` was one, even if its manifest was lost."""
    return has_any(MANIFEST)(directory) or any(directory.glob("*/config.pbtxt"))


def _link_or_copy(source: str, destination: str) -> str:
    try:
        # A copy can be opened to the server's user without a change to the engine.
        if not os.stat(source).st_mode & stat.S_IROTH:
            raise PermissionError
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
    return destination
