"""`python -m prism_trt.client`."""

from prism_trt.cli import run
from prism_trt.client.app import app

if __name__ == "__main__":
    run(app())
