"""Slurm's accounting, as a site has it: slurmdbd in front of a MariaDB, both in the folder of a test's Slurm.

Needs Debian's mariadb-server and slurmdbd.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.slurm.machine import Slurm

PROGRAMS = ("mariadb-install-db", "mariadbd", "slurmdbd", "sacctmgr", "sacct")

CONF = """
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""

SLURM_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
"""


def missing() -> str:
    """Why there is no accounting here; empty when there can be."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if not absent:
        return ""
    return f"no accounting: {', '.join(absent)} not found (Debian: mariadb-server, slurmdbd)"


def start(slurm: Slurm, port: int) -> None:
    """Start mariadbd, which listens on a socket alone, and slurmdbd; to be called before slurmctld starts."""
    folder, data = slurm.folder, slurm.folder / "mariadb"
    installed = subprocess.run(
        [
            "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", "--user=root",
            "--auth-root-authentication-method=normal",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if installed.returncode:
        raise RuntimeError(f"mariadb-install-db failed: {installed.stdout}{installed.stderr}")
    slurm.environment["MYSQL_UNIX_PORT"] = f"{folder}/mariadb.socket"  # where slurmdbd looks for localhost's
    slurm.start(
        "mariadbd",
        "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={folder}/mariadb.socket",
        f"--pid-file={folder}/mariadb.pid", "--skip-networking", "--user=root",
        "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
    )  # fmt: skip
    slurm.wait("mariadbd", lambda: (folder / "mariadb.socket").exists())
    conf = folder / "slurmdbd.conf"  # beside slurm.conf, where it is looked for
    conf.touch(mode=0o600)
    conf.write_text(CONF.format(host=slurm.host, port=port, folder=folder))
    slurm.start("slurmdbd", "slurmdbd", "-D")
    add_cluster = ("sacctmgr", "--immediate", "add", "cluster", "test")
    slurm.wait("slurmdbd", lambda: "test" in slurm.run(*add_cluster, check=False))
