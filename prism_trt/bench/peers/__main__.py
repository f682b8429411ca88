"""`python -m prism_trt.bench.peers`."""

from prism_trt.bench.peers.app import app
from prism_trt.cli import run

if __name__ == "__main__":
    run(app())
