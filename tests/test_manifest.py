"""Manifests: atomic writes, and every kind of damage is found."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest

from prism_trt.errors import PrismError
from prism_trt.manifest import (
    atomic_directory,
    atomic_file,
    has_any,
    has_only,
    read_manifest,
    sha256_file,
    sha256_json,
    verify_files,
    write_manifest,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    (directory / "sub").mkdir(parents=True)
    (directory / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (directory / "sub" / "vocab.txt").write_text("a b c")
    write_manifest(directory, "thing.json", "thing", {"colour": "blue"})
    return directory


def test_sha256_of_files_and_json(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than one piece
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert sha256_json({"b": [1, 2], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,2]}').hexdigest()
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})


def test_manifest_records_fields_and_files(artifact: Path) -> None:
    manifest = read_manifest(artifact, "thing.json", "thing")
    assert manifest["colour"] == "blue"
    assert manifest["files"] == {
        "sub/vocab.txt": {"sha256": hashlib.sha256(b"a b c").hexdigest(), "bytes": 5},
        "weights.bin": {"sha256": sha256_file(artifact / "weights.bin"), "bytes": 10_240},
    }
    verify_files(artifact, manifest)


def test_one_changed_byte_is_found(artifact: Path) -> None:
    data = bytearray((artifact / "weights.bin").read_bytes())
    data[5000] ^= 1
    (artifact / "weights.bin").write_bytes(data)
    manifest = read_manifest(artifact, "thing.json", "thing")
    with pytest.raises(PrismError, match=r"weights\.bin is corrupted"):
        verify_files(artifact, manifest)


def test_truncated_file_is_refused_without_hashing(artifact: Path) -> None:
    (artifact / "weights.bin").write_bytes(b"short")
    with pytest.raises(PrismError, match="has 5 bytes instead of 10240"):
        read_manifest(artifact, "thing.json", "thing")


def test_missing_file_is_refused(artifact: Path) -> None:
    (artifact / "sub" / "vocab.txt").unlink()
    with pytest.raises(PrismError, match=r"vocab\.txt is missing"):
        read_manifest(artifact, "thing.json", "thing")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"format": 1, "kind": "thing"}',
        '{"format": 1, "kind": "thing", "files": ["weights.bin"]}',
        '{"format": 1, "kind": "thing", "files": {"weights.bin": {}}}',
        '{"format": 1, "kind": "thing", "files": {"weights.bin": {"bytes": "many"}}}',
        '{"format": 1, "kind": "thing", "files": {"weights.bin": 7}}',
    ],
)
def test_damaged_manifest_is_refused(artifact: Path, text: str) -> None:
    (artifact / "thing.json").write_text(text)
    with pytest.raises(PrismError, match=r"thing\.json is damaged .*build the thing again"):
        read_manifest(artifact, "thing.json", "thing")


def test_other_kind_and_other_format_are_refused(artifact: Path) -> None:
    with pytest.raises(PrismError, match="describes a thing of format 1, but a pot of format 1 is needed"):
        read_manifest(artifact, "thing.json", "pot")
    manifest = json.loads((artifact / "thing.json").read_text())
    (artifact / "thing.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(PrismError, match="of format 2, but a thing of format 1 is needed"):
        read_manifest(artifact, "thing.json", "thing")


def test_absent_directory_and_absent_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="nowhere is not a directory"):
        read_manifest(tmp_path / "nowhere", "thing.json", "thing")
    with pytest.raises(PrismError, match=r"has no thing\.json, so it is not a thing"):
        read_manifest(tmp_path, "thing.json", "thing")


OURS = has_only("old", "new")


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match="boom"), atomic_directory(out) as temporary:
        (temporary / "half").write_text("x")
        raise ValueError("boom")
    assert not out.exists()
    with atomic_directory(out) as temporary:
        (temporary / "file").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "1"
    assert out.stat().st_mode & 0o777 == 0o755


def test_atomic_directory_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(PrismError, match="already exists"), atomic_directory(out):
        raise AssertionError("must not run")
    with atomic_directory(out, True, OURS) as temporary:
        (temporary / "new").write_text("new")
        assert (out / "old").read_text() == "old"
    assert [path.name for path in out.iterdir()] == ["new"]


def test_atomic_directory_replaces_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (out / "precious").write_text("kept")
    with pytest.raises(PrismError, match="out holds something else"), atomic_directory(out, True, OURS):
        raise AssertionError("must not run")
    with atomic_directory(out, True, has_any("absent", "old")):
        pass
    assert not any(out.iterdir())
    monkeypatch.chdir(out)
    for here in (Path(), out, tmp_path):
        with (
            pytest.raises(PrismError, match="is the current directory or holds it"),
            atomic_directory(here, True, lambda _: True),
        ):
            raise AssertionError("must not run")


def test_everybody_may_read_an_atomic_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as temporary:
        (temporary / "inner").mkdir(mode=0o700)
        (temporary / "inner" / "weights").touch(mode=0o600)
    assert [(out / name).stat().st_mode & 0o777 for name in (".", "inner", "inner/weights")] == [0o755, 0o755, 0o644]


def test_atomic_directory_keeps_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(KeyError), atomic_directory(out, True, OURS):
        raise KeyError("boom")
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_atomic_file_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_file(path) as temporary:
        temporary.write_text("two")
        raise KeyError("boom")
    assert path.read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_keeps_the_manifest_that_was_there(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (artifact / "thing.json").read_text()

    def full(path: Path, text: str) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PrismError, match=r"cannot write .*thing\.json \(No space left on device\): free space"):
        write_manifest(artifact, "thing.json", "thing", {"colour": "red"})
    assert (artifact / "thing.json").read_text() == before
    out = artifact.parent / "out"
    with (
        pytest.raises(PrismError, match=r"^cannot write \S+/out/thing\.json "),
        atomic_directory(out) as temporary,
    ):
        write_manifest(temporary, "thing.json", "thing", {})
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_a_file_above_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(PrismError, match=r"file is a file, so \S+out cannot be written"), atomic_file(path):
            raise AssertionError("must not run")
        with (
            pytest.raises(PrismError, match=r"file is a file, so \S+out cannot be written"),
            atomic_directory(path, False, OURS),
        ):
            raise AssertionError("must not run")
