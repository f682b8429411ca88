"""`python -m prism_trt.inspect`."""

from prism_trt.cli import run
from prism_trt.inspect.app import app

if __name__ == "__main__":
    run(app())
