"""`hf-gradacc` and `python -m hf_gradacc`, which torchrun and accelerate start a recipe by, too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback, while it is being loaded too."""
    try:
        from hf_gradacc import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
