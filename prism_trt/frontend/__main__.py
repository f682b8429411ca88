"""`python -m prism_trt.frontend`."""

from prism_trt.cli import run
from prism_trt.frontend.app import app

if __name__ == "__main__":
    run(app())
