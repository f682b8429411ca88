"""`python -m prism_trt.drafter`."""

from prism_trt.cli import run
from prism_trt.drafter.app import app

if __name__ == "__main__":
    run(app())
