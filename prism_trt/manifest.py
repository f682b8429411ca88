"""Manifests: what an artifact directory is, which files belong to it, and whether they are intact.

Every directory this project writes (engine, feature cache, model repository) carries one JSON manifest. It is written
last, inside a temporary sibling directory that is renamed into place, so a directory with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_trt.errors import PrismError
from prism_trt.storage import writing

FORMAT_VERSION = 1
_CHUNK = 1 << 22


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def has_any(*names: str) -> Callable[[Path], bool]:
    """Tells of a directory whether it has a file of one of these names, such as a manifest's."""
    return lambda directory: any((directory / name).is_file() for name in names)


def has_only(*names: str) -> Callable[[Path], bool]:
    """Tells of a directory whether all that it holds has one of these names."""
    return lambda directory: {entry.name for entry in directory.iterdir()} <= set(names)


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends well and is deleted when it does not.

    Args:
        ours: tells of an existing directory whether `overwrite` may replace it, because an earlier call wrote it; None:
            never.

    Raises:
        PrismError: `path` exists and is not empty, and `overwrite` is false or it is not `ours`; it is the current
            directory or holds it; it lies below a file; or the disk does not take the files.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise PrismError(f"{path} already exists: choose another output path or pass --overwrite")
        if ours is None or not path.is_dir() or not ours(path):
            raise PrismError(
                f"{path} holds something else than what --overwrite replaces: choose another output path, or delete "
                "it yourself"
            )
    if path.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise PrismError(f"{path} is the current directory or holds it: choose another output path")
    with writing(path):
        _make_parent(path)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        new, old = scratch / path.name, scratch / "replaced"
        new.mkdir()
        try:
            with _errors_about(new, path):
                yield new
            for entry in (new, *new.rglob("*")):
                _let_everybody_read(entry)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _let_everybody_read(path: Path) -> None:
    """safetensors keeps its files to their owner, but servers often run as somebody else."""
    mode = path.stat().st_mode
    wanted = mode | (0o055 if path.is_dir() else 0o044)
    if mode != wanted:
        path.chmod(wanted)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling path whose file replaces `path` when the block ends well.

    Raises:
        PrismError: `path` lies below a file, or the disk does not take it.
    """
    path = Path(path)
    with writing(path):
        _make_parent(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """`path`, or else the nearest of its parents that exists."""
    return next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())


def _make_parent(path: Path) -> None:
    place = nearest_existing(path.parent)
    if not place.is_dir():
        raise PrismError(f"{place} is a file, so {path} cannot be written: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _errors_about(temporary: Path, path: Path) -> Iterator[None]:
    """Let errors name the final place of what is written below `temporary`."""
    try:
        yield
    except PrismError as error:
        raise PrismError(str(error).replace(str(temporary), str(path))) from None


def own_fields(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest that its kind defines: those given to `write_manifest`."""
    return {key: value for key, value in manifest.items() if key not in ("format", "kind", "files")}


def write_manifest(directory: Path, name: str, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Write `directory/name` recording `kind`, `fields` and the SHA-256 and size of every other file below it.

    Returns:
        What was written.

    Raises:
        PrismError: the disk does not take it; a manifest that was there before stays.
    """
    files = {
        str(file.relative_to(directory)): {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != name
    }
    manifest = {"format": FORMAT_VERSION, "kind": kind, **fields, "files": files}
    with atomic_file(directory / name) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(directory: Path, name: str, kind: str, again: str | None = None) -> dict[str, Any]:
    """Read and check `directory/name`: format, kind, and that every file it lists exists with the recorded size.

    Hashes are not computed here because engines are hundreds of megabytes; `verify_files` does that.

    Args:
        again: what to do about a damaged one; None: build it again.

    Raises:
        PrismError: the directory or the manifest is missing, is not JSON, is of another kind or format, or a file is
            missing or truncated.
    """
    directory = Path(directory)
    path = directory / name
    again = again or f"build the {kind} again"
    if not directory.is_dir():
        raise PrismError(f"{directory} is not a directory: pass the path of a {kind}")
    if not path.is_file():
        raise PrismError(f"{directory} has no {name}, so it is not a {kind}: pass the directory that was built as one")
    try:
        manifest = json.loads(path.read_text())
        found = (manifest["format"], manifest["kind"])
        files = {str(file): int(entry["bytes"]) for file, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrismError(f"{path} is damaged ({type(error).__name__}: {error}): {again}") from None
    if found != (FORMAT_VERSION, kind):
        raise PrismError(
            f"{path} describes a {found[1]} of format {found[0]}, but a {kind} of format {FORMAT_VERSION} is needed: "
            "build it with this version"
        )
    for file, size in files.items():
        actual = (directory / file).stat().st_size if (directory / file).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise PrismError(f"{directory / file} {state}: {again}")
    return manifest


def verify_files(directory: Path, manifest: dict[str, Any]) -> None:
    """Recompute the SHA-256 of every file in `manifest`.

    Raises:
        PrismError: a file differs from what was recorded.
    """
    for file, entry in manifest["files"].items():
        if sha256_file(Path(directory) / file) != entry["sha256"]:
            raise PrismError(f"{Path(directory) / file} is corrupted (its SHA-256 differs): build it again")
