"""TensorRT plugins of the draft step, compiled ahead of time: see ``docs/plugins.md``.

`step_linear` and `pool_attention` hold one Triton kernel each, with its tile sizes and a launcher for torch tensors;
`compilation` turns a kernel into PTX without a GPU; `qdp` registers both with ``tensorrt.plugin`` and adds them to
networks. Only `qdp` imports TensorRT.
"""
