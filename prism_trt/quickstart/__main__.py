"""`python -m prism_trt.quickstart`."""

from prism_trt.cli import run
from prism_trt.quickstart.app import app

if __name__ == "__main__":
    run(app())
