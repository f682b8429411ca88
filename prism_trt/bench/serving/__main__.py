"""`python -m prism_trt.bench.serving`."""

from prism_trt.bench.serving.app import app
from prism_trt.cli import run

if __name__ == "__main__":
    run(app())
