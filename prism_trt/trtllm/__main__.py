"""`python -m prism_trt.trtllm`."""

from prism_trt.cli import run
from prism_trt.trtllm.app import app

if __name__ == "__main__":
    run(app())
