"""`python -m prism_trt.bench`."""

from prism_trt.bench.app import app
from prism_trt.cli import run

if __name__ == "__main__":
    run(app())
