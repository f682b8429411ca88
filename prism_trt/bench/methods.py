"""The engines of a comparison: drafting methods of one target, each with one engine per training seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_trt.bench.results import VANILLA, EngineInfo, MethodInfo
from prism_trt.config import DrafterConfig, TreeShape
from prism_trt.engines.loading import default_threads, load_engine
from prism_trt.engines.manifest import EngineManifest, read_engine_manifest
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError


@dataclass(frozen=True)
class Method:
    """A way to decode: a name and the loaded engines of its training seeds."""

    name: str
    engines: tuple[Engine, ...]
    infos: tuple[EngineInfo, ...]

    @property
    def info(self) -> MethodInfo:
        """What the result says of it."""
        return MethodInfo(name=self.name, engines=self.infos)


def engine_info(engine: Path, threads: int | None) -> EngineInfo:
    """Identify an engine directory by its manifest, loaded with `threads` (None: the default)."""
    manifest = read_engine_manifest(engine)
    return EngineInfo(
        profile=manifest.profile,
        runtime=manifest.runtime,
        dtype=manifest.dtype,
        isa=manifest.isa,
        target_fingerprint=manifest.target_fingerprint,
        drafter_sha256=manifest.drafter_sha256,
        threads=threads or default_threads(),
    )


def default_tree(methods: Sequence[Method]) -> TreeShape:
    """The tree that the engines of all drafting methods were planned for.

    Raises:
        PrismError: they were planned for different ones.
    """
    drafting = [engine for method in methods if method.name != VANILLA for engine in method.engines]
    trees = list(dict.fromkeys(engine.default_tree for engine in drafting))
    if len(trees) > 1:
        raise PrismError(
            f"the engines were planned for different trees ({', '.join(map(str, trees))}): name one with --tree"
        )
    return trees[0]


def method_name(drafter: DrafterConfig | None) -> str:
    """Default name of an engine with this drafter: its kind, or `prism*` when it fuses several features."""
    if drafter is None:
        return VANILLA
    return f"{drafter.kind}*" if drafter.kind == "prism" and drafter.features == "multi" else drafter.kind


def read_methods(options: Sequence[str]) -> dict[str, list[Path]]:
    """Engine directories by method, in order of appearance, from options of the form ``[NAME=]DIRECTORY``.

    Raises:
        PrismError: an engine cannot be read, has another target than the first or no drafter under a method's name;
            vanilla has several engines; a drafter appears twice in a method; or no engine drafts.
    """
    methods: dict[str, list[Path]] = {}
    first: tuple[Path, EngineManifest] | None = None
    drafters: dict[tuple[str, str | None], Path] = {}
    for option in options:
        given, path = _split(option)
        manifest = read_engine_manifest(path)
        first = first or (path, manifest)
        if manifest.target_fingerprint != first[1].target_fingerprint:
            raise PrismError(f"{first[0]} and {path} are engines of different targets: build them from the same one")
        name = given or method_name(manifest.drafter)
        if name != VANILLA and manifest.drafter is None:
            raise PrismError(f"{path} was built without a drafter: build it with one or call it {VANILLA}={path}")
        twin = drafters.setdefault((name, manifest.drafter_sha256), path)
        if twin is not path:
            raise PrismError(
                f"{twin} and {path} hold the same drafter, so they are not two training seeds of {name}: "
                "leave one out or name them differently"
            )
        methods.setdefault(name, []).append(path)
    if len(methods.get(VANILLA, ())) > 1:
        raise PrismError(f"{VANILLA} has several engines: name one, and the others by their drafting method")
    if not set(methods) - {VANILLA}:
        raise PrismError("no engine drafts, so there is nothing to compare: pass one that was built with a drafter")
    return methods


def load_methods(paths: dict[str, list[Path]], threads: int | None, slots: int | None = None) -> list[Method]:
    """Load what `read_methods` found, for `slots` requests at once (None: as built).

    Raises:
        PrismError: as `load_engine`.
    """
    return [
        Method(
            name,
            tuple(load_engine(path, threads=threads, slots=slots) for path in directories),
            tuple(engine_info(path, threads) for path in directories),
        )
        for name, directories in paths.items()
    ]


def _split(option: str) -> tuple[str | None, Path]:
    name, separator, directory = option.partition("=")
    if not separator or "/" in name:
        return None, Path(option)
    if not name.strip() or not directory:
        raise PrismError(f"--engine {option!r} is not of the form NAME=DIRECTORY: give both parts")
    return name.strip(), Path(directory)
