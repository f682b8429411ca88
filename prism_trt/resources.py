"""Find the files outside the package that it needs at run time: build profiles and deployment templates.

A wheel carries them in ``prism_trt/_resources``; a checkout keeps them beside the package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource(name: str) -> Path:
    """Path of the top-level source directory `name` (for example ``build``).

    Raises:
        FileNotFoundError: neither the installed package nor the checkout has it.
    """
    installed = _PACKAGE / "_resources"
    # Beside an installed package lies site-packages, whose `build` would be somebody else's.
    path = (installed if installed.is_dir() else _PACKAGE.parent) / name
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing from this installation of prism_trt")
    return path
