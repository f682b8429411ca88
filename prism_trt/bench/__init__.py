"""Measure acceptance length and decoding speed of an engine against its own vanilla decoding and against peers."""
