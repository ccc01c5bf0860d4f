"""What a model is asked, for `llada eval`: tasks of lm-eval as YAML files, and the Python that they name.

A YAML file here names Python by its full dotted name (`!function llada_megatron.tasks.gsm8k.documents`), so
that one of yours, anywhere, can name the same. docs/tasks.md has the table of tasks.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""For lm-eval's `include_path`."""
