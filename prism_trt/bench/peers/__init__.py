"""Compare an engine with transformers and llama.cpp on the same weights, prompts and number of tokens."""
