"""Train, compile and serve PRISM draft models."""

__version__ = "0.1.0"
