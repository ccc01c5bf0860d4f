"""Prints the part of requirements.txt that this Python lacks, with versions and hashes as they are locked.

For an image that brings a torch of its own: what is there stays, and torch with its CUDA libraries is never
in the list. A package that is there in a version that pyproject.toml excludes is in the list too. Ends with
an error when the image's torch is excluded.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OF_THE_IMAGE = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def additions(lock: str, wanted: list[Requirement], there: dict[str, str]) -> list[str]:
    """Entries of the lock for packages that are not `there` (versions by name), or not as `wanted`.

    Raises ValueError when the torch that is there is not as wanted.
    """
    unfit = {
        canonicalize_name(requirement.name)
        for requirement in wanted
        if not requirement.specifier.contains(there.get(requirement.name, "0"), prereleases=True)
    }
    if "torch" in unfit:
        raise ValueError(
            f"this image has torch {there.get('torch', '(none)')}, pyproject.toml asks for another"
        )
    chosen = []
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        requirement = Requirement(entry.partition("\\")[0])
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate()
        if applies and not OF_THE_IMAGE.match(name) and (name not in there or name in unfit):
            chosen.append(entry)
    return chosen


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {
        canonicalize_name(part.name): part.version for part in importlib.metadata.distributions() if part.name
    }
    try:
        entries = additions(
            (ROOT / "requirements.txt").read_text(),
            [Requirement(line) for line in project["dependencies"]],
            found,
        )
    except ValueError as error:
        sys.exit(f"additions: error: {error}")
    print("\n".join(entries))
