"""Targets: the LLaMA-family models whose output is reproduced."""
