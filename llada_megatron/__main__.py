"""`python -m llada_megatron VERB`: `llada VERB` for launchers that take a module, such as torchrun."""

import sys

from llada_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
