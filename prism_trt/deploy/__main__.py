"""`python -m prism_trt.deploy`."""

from prism_trt.cli import run
from prism_trt.deploy.app import app

if __name__ == "__main__":
    run(app())
