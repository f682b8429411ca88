"""Measure acceptance length and decoding speed of drafting methods against vanilla decoding and against peers."""
