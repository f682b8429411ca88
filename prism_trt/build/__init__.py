"""Build engines from profiles."""

from prism_trt.build.builder import build_engine

__all__ = ["build_engine"]
