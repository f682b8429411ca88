"""From a target and its drafter to TensorRT networks, and from networks to plans."""
