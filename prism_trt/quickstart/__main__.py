"""`python -m prism_trt.quickstart`."""

import sys

from prism_trt.cli import app, run

if __name__ == "__main__":
    # Through the main command, which imports the quickstart only when an interruption already ends it cleanly.
    run(app(), ["quickstart", *sys.argv[1:]], "prism-trt")
