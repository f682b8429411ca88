"""Serving: the model repository, the Triton model and the server's launcher."""
