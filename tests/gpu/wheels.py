"""What `launch/gpu_day.sh --wheels` installs, fetched on a connected machine: python -m tests.gpu.wheels DIR

All that the package and its tests import, in the versions and by the hashes of requirements.txt, but for
torch and what torch brings, which the machine with the GPU has; cuDNN's frontend with its compiler; and this
package, whose version a run records, while its code is that of the checkout there. TransformerEngine is not
among them: a part of it is compiled where the GPU's toolkit is.
"""

import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOR_TESTS = ("pytest", "pytest-xdist", "hypothesis")
ON_THE_MACHINE = ("torch",)
CUDNN = ROOT / "tests" / "cudnn-requirements.txt"


def wanted() -> set[str]:
    """Names of the packages that the project needs to run its tests, torch and what torch brings left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting = [Requirement(line) for line in (*project["dependencies"], *FOR_TESTS)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in {*found, *ON_THE_MACHINE}:
            found.add(name)
            waiting += map(Requirement, metadata.requires(name) or [])
    return found


def locked(lines: list[str], names: set[str]) -> str:
    """Those of a lock's entries, each with its hashes, that have these names."""
    kept, keeps = [], False
    for line in lines:
        if line[:1].isalnum():
            keeps = canonicalize_name(line.split("==")[0].split("[")[0]) in names
        if keeps and not line.lstrip().startswith("#"):
            kept.append(line)
    return "\n".join(kept) + "\n"


def main(folder: str) -> int:
    with tempfile.TemporaryDirectory() as aside:
        lock = Path(aside) / "requirements.txt"
        lock.write_text(locked((ROOT / "requirements.txt").read_text().splitlines(), wanted()))
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--wheel-dir", folder]  # one package of the lock has no wheel and is built here
        for what in (
            ["--require-hashes", "--requirement", str(lock)],
            ["--require-hashes", "--requirement", str(CUDNN)],
            ["--no-build-isolation", str(ROOT)],
        ):
            if code := subprocess.run([*pip, *what]).returncode:
                return code
    files = sorted(Path(folder).glob("*.whl"))
    print(f"{len(files)} wheels, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
