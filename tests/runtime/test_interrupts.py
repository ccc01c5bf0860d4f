"""Signals at moments at which Python swallows what a handler raises."""

import os
import subprocess
import sys

DELETED = """
import os, signal, time
from llada_megatron.config.errors import Interrupted
from llada_megatron.runtime import interrupts

class Struck:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)  # the handler runs here at the latest

interrupts.handle(interrupts.interrupt)
try:
    Struck()
    time.sleep(50)
except Interrupted as heard:
    print("heard", heard.args[0])
"""


def test_a_signal_that_meets_a_deletion_is_heard_a_moment_later():
    done = subprocess.run([sys.executable, "-c", DELETED], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("heard 1\n", "")


IMPORTED = """
import os, signal, sys
from llada_megatron.config.errors import Interrupted
from llada_megatron.runtime import interrupts

interrupts.handle(interrupts.interrupt)
try:
    import struck
    import time
    time.sleep(50)
except Interrupted as heard:
    print("heard", heard.args[0], sys.modules["struck"].is_whole)
"""


def test_a_signal_during_an_import_is_heard_behind_it(tmp_path):
    struck = (
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGHUP)\ntime.sleep(0.1)\nis_whole = True\n"
    )
    (tmp_path / "struck.py").write_text(struck)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.stdout, done.stderr) == ("heard 1 True\n", "")
