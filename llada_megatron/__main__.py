"""`llada VERB`, also as `python -m llada_megatron VERB`, for launchers that take a module."""

import sys

from llada_megatron.config.errors import INTERRUPTED, Interrupted
from llada_megatron.runtime import interrupts


def main() -> int:
    """Run the command line; signals are heard before anything slow is imported."""
    interrupts.handle(interrupts.remember if sys.argv[1:2] == ["train"] else interrupts.interrupt)
    try:
        from llada_megatron import cli

        return cli.main()
    except KeyboardInterrupt as interrupted:  # before the verb began
        return interrupted.exit_code if isinstance(interrupted, Interrupted) else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
