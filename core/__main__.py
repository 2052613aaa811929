"""`python -m tamis` is `optimize-model`."""

from .runtime.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
