#!/usr/bin/env bash
# Installs this project into NVIDIA's PyTorch image; docker/Dockerfile.gpu and docker/llada.def run it.
# torch, TransformerEngine, apex, cuDNN and NCCL stay as the image ships them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The image pins every package it was made with, by PIP_CONSTRAINT. It is lifted for this list alone, which
# resolves nothing: it holds exact versions with hashes, and torch is not among them. Again until it is empty,
# because only an installed package tells what it asks of those that the image has.
for _ in 1 2 3; do
    python docker/additions.py > additions.txt
    [[ -s additions.txt ]] || break
    PIP_CONSTRAINT='' python -m pip install --no-cache-dir --break-system-packages --no-deps --require-hashes \
        --no-build-isolation -r additions.txt
done
python -m pip install --no-cache-dir --break-system-packages --no-deps --no-build-isolation -e .

llada doctor --runs "${TMPDIR:-/tmp}"
