"""Per-GPU build profiles, read from `build/*.toml`."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field, field_validator

from prism_trt.config import StrictModel, TreeShape, parse
from prism_trt.errors import PrismError
from prism_trt.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Profile(StrictModel):
    """Build settings of one kind of machine."""

    name: str
    runtime: Literal["cpp"]
    dtype: Literal["bfloat16"]
    default_tree: TreeShape
    context: int = Field(ge=16)
    slots: int = Field(ge=1)
    tokens_per_call: int = Field(ge=16)

    @field_validator("default_tree", mode="before")
    @classmethod
    def _parse_tree(cls, value: object) -> object:
        return TreeShape.parse(value) if isinstance(value, str) else value


def profile_names() -> list[str]:
    """Names of the profiles that exist."""
    return sorted(path.stem for path in resource("build").glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Read `build/<name>.toml`.

    Raises:
        PrismError: there is no such profile, or it is invalid.
    """
    if name not in profile_names():
        raise PrismError(f"there is no profile {name!r}: choose one of {', '.join(profile_names())}")
    path = resource("build") / f"{name}.toml"
    return parse(Profile, tomllib.loads(path.read_text()), str(path))
