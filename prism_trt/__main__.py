"""`python -m prism_trt` is `prism-trt`."""

from prism_trt.cli import main

if __name__ == "__main__":
    main()
