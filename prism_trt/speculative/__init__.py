"""Speculative decoding on any `Engine`: trees, verification, sampling, the decoding loop."""
