"""Target and drafter as a checkpoint of TensorRT-LLM 1.2: see ``docs/tensorrt_llm.md``.

`layout` names and splits the tensors, `description` writes the config, `export` puts both on disk. `selection` and
`model_class` are for the GPU host: the latter is given to ``trtllm-build`` and is the only one to import TensorRT-LLM.
"""
