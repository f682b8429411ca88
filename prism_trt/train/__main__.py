"""``python -m prism_trt.train``."""

from prism_trt.cli import run
from prism_trt.train.app import app

if __name__ == "__main__":
    run(app(), name="python -m prism_trt.train")
