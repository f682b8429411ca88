"""Typed, validated configurations. Unknown keys are rejected everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prism_trt.errors import PrismError


class StrictModel(BaseModel):
    """Base of all configs: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Config = TypeVar("Config", bound=StrictModel)


def parse(model: type[Config], values: dict[str, Any], source: str) -> Config:
    """Validate `values` as `model`.

    Raises:
        PrismError: naming `source`, the first offending key and the reason.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise PrismError(f"{source}: {key}: {first['msg']}") from None


def parse_json_file(model: type[Config], path: Path) -> Config:
    """Read `path` as JSON and validate it as `model`.

    Raises:
        PrismError: the file is missing, not a JSON object, or invalid.
    """
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise PrismError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise PrismError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise PrismError(f"{path} must hold a JSON object")
    return parse(model, values, str(path))


class TreeShape(StrictModel):
    """Shape of an EAGLE-2 dynamic draft tree.

    `width=1` gives a chain. The best `size - 1` drafted nodes are verified together with the root.
    """

    depth: int = Field(6, ge=1, le=16, description="draft steps per round")
    width: int = Field(10, ge=1, le=32, description="nodes expanded per step and children drafted per node")
    size: int = Field(60, ge=2, le=128, description="nodes verified, root included")

    @model_validator(mode="after")
    def _size_is_reachable(self) -> TreeShape:
        drafted = self.width + (self.depth - 1) * self.width**2
        if self.size - 1 > drafted:
            raise ValueError(f"size {self.size} needs {self.size - 1} drafted nodes but this tree drafts only {drafted}")
        return self

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Parse `SIZE/WIDTH/DEPTH`, the notation of the paper (for example ``60/10/6``)."""
        try:
            size, width, depth = (int(part) for part in text.split("/"))
        except ValueError:
            raise PrismError(f"tree {text!r} is not of the form SIZE/WIDTH/DEPTH, for example 60/10/6") from None
        return parse(cls, {"depth": depth, "width": width, "size": size}, f"tree {text}")

    def __str__(self) -> str:
        return f"{self.size}/{self.width}/{self.depth}"
