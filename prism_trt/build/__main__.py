"""`python -m prism_trt.build`."""

from prism_trt.build.app import app
from prism_trt.cli import run

if __name__ == "__main__":
    run(app())
