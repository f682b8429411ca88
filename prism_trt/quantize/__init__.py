"""Quantised engines: scales from calibration prompts, and what they cost, before anything is compiled."""
