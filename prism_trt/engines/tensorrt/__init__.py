"""The engine protocol over networks that `prism_trt.convert` emits."""
