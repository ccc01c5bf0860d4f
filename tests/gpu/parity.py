"""20 steps of `parity` whose losses on a CPU are stored, so that a machine with a GPU need not compute them.

    python -m tests.gpu.parity     # stores them anew, after a change of arithmetic that is meant

Documents are made of numbers, since Python's manual differs by its version; no noise on embeddings, whose
generator differs by device (model/normal.py).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STORED = Path(__file__).parent / "parity_losses.json"
STEPS = 20
SETTINGS = [
    "experiment=parity",
    "schedule.stages=[{name: bdlm_4, block_size: '4', tokens: 7168},"
    " {name: bdlm_32, block_size: '32', tokens: 7168}, {name: mdlm, block_size: full, tokens: 6144}]",
    "diffusion.embedding_noise.sigma_over_rms=0",
    "data.split='8,2'",
    "evaluation.block_sizes=[]",
]


def llada(*arguments: str, cuda: bool = True) -> None:
    """A verb in a process of its own, in fp32 without TF32."""
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-m", "llada_megatron", *arguments], env=environment, check=True)


def corpus(folder: Path) -> Path:
    """Documents of 20 to 210 numbers each; returns the prefix of their corpus."""
    documents = [" ".join(str((n * n + 31 * k) % 997) for n in range(20 + 10 * (k % 20))) for k in range(200)]
    (folder / "numbers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    files = ["--input", str(folder / "numbers.jsonl"), "--output", str(folder / "numbers")]
    llada("data", "prepare", *files, cuda=False)
    return folder / "numbers"


def losses(data: Path, run: Path, *settings: str, cuda: bool = True) -> list[float]:
    """Of the steps of a run."""
    llada("train", *SETTINGS, f"data.path=[{data}]", f"run.dir={run}", *settings, cuda=cuda)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    with tempfile.TemporaryDirectory() as aside:
        found = losses(corpus(Path(aside)), Path(aside) / "run", "model.layer_spec=local", cuda=False)
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    print(*found)


if __name__ == "__main__":
    main()
