"""Prints the part of requirements.txt that this Python lacks, with versions and hashes as they are locked.

For an image that brings a torch of its own: what is there stays, and torch with its CUDA libraries is never
in the list. A package that is there in a version that pyproject.toml excludes is in the list too, and so is
one that a package installed for us excludes. Empty when nothing is left to do. Ends with an error when the
image's torch is excluded.
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


def wanted(dependencies: list[str], requires: dict[str, list[str]]) -> list[Requirement]:
    """`dependencies`, and what those of them that are there ask for in turn (`requires`, by name), and so on.

    Extras are left out, and what the image's torch asks for: it came with that.
    """
    found = [Requirement(line) for line in dependencies]
    seen = set()
    for requirement in found:  # grows meanwhile
        name = canonicalize_name(requirement.name)
        if name in seen or OF_THE_IMAGE.match(name):
            continue
        seen.add(name)
        needed = [Requirement(line) for line in requires.get(name, [])]
        found += [part for part in needed if part.marker is None or part.marker.evaluate({"extra": ""})]
    return found


def additions(lock: str, wanted: list[Requirement], there: dict[str, str]) -> list[str]:
    """Entries of the lock for packages that are not `there` (versions by name), or not as `wanted`.

    Raises ValueError when the torch that is there is not as wanted.
    """
    unfit = {
        canonicalize_name(requirement.name)
        for requirement in wanted
        if not requirement.specifier.contains(
            there.get(canonicalize_name(requirement.name), "0"), prereleases=True
        )
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
        # At the locked version there is nothing better to install, whatever asks for another.
        is_locked = name in there and requirement.specifier.contains(there[name], prereleases=True)
        stays = name in there and (name not in unfit or is_locked)
        if applies and not stays and not OF_THE_IMAGE.match(name):
            chosen.append(entry)
    return chosen


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # The tests are in the image too.
    direct = project["dependencies"] + project["optional-dependencies"]["test"]
    installed: dict[str, importlib.metadata.Distribution] = {}
    for part in importlib.metadata.distributions():
        if part.name:
            installed.setdefault(canonicalize_name(part.name), part)  # the first is the one that is imported
    requires = {name: part.requires or [] for name, part in installed.items()}
    versions = {name: part.version for name, part in installed.items()}
    try:
        entries = additions((ROOT / "requirements.txt").read_text(), wanted(direct, requires), versions)
    except ValueError as error:
        sys.exit(f"additions: error: {error}")
    for entry in entries:
        print(entry)
