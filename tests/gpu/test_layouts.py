"""The comparison of layouts on CUDA devices: `make test-gpu` runs it with as many as the machine has."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


def test_every_layout_that_this_machine_can_hold_equals_one_process():
    import torch

    from llada_megatron.verify.layouts import MATRIX

    devices = torch.cuda.device_count()
    names = [name for name, layout in MATRIX.items() if layout["processes"] <= devices]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    command = [sys.executable, "-m", "llada_megatron", "verify", "layouts", *names]
    subprocess.run(command, env=environment, check=True)
