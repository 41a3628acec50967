#!/usr/bin/env python3
"""Make this machine ready: the system programs, and the virtual environment in .venv. Quick and harmless to run again.

Standard library only: it runs before anything is installed. What it installs is listed in `PROGRAMS` and in pyproject.toml,
in the versions of tests/constraints.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "tests" / "constraints.txt"

PROGRAMS = {
    # program looked for: Debian/Ubuntu package that brings it
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mount": "mount",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ss": "iproute2",
}
PLUGINS = {
    # files that a package brings without a program of its own
    "slurm-wlm/accounting_storage_mysql.so": "slurm-wlm-mysql-plugin",
}
APT_TIMEOUT_S = 900
PIP_TIMEOUT_S = 3600


def main() -> int:
    """Install what is missing, say what that was, and return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only list the system packages that are missing")
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):
        return fail(
            f"Python {sys.version.split()[0]} is too old; Muster needs 3.10 or newer (PYTHON=/path/to/python3.12 make ...)"
        )
    missing = missing_packages()
    if arguments.list:
        say(" ".join(missing) or "no system package is missing")
        return 0
    if missing and (problem := install_packages(missing)) is not None:
        return fail(problem)
    if (problem := make_environment()) is not None:
        return fail(problem)
    return 0


def missing_packages() -> list[str]:
    """Return the Debian packages whose programs or plugins are not here, each once."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    missing += [package for plugin, package in PLUGINS.items() if not any(Path("/usr/lib").glob(f"*/{plugin}"))]
    return list(dict.fromkeys(missing))


def install_packages(packages: list[str]) -> str | None:
    """Install Debian packages, with sudo where that needs no password or a person is there to type it. Return a problem."""
    wanted = f"apt-get install -y --no-install-recommends {' '.join(packages)}"
    if shutil.which("apt-get") is None:
        return f"this machine has no apt-get. Install what these Debian packages hold, then run again: {' '.join(packages)}"
    prefix: list[str] = []
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            return f"not root, and no sudo here. Ask an administrator to run: {wanted}"
        prefix = ["sudo"] if sys.stdin.isatty() else ["sudo", "-n"]
    say(f"installing system packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    keep = ["env", "DEBIAN_FRONTEND=noninteractive"] if prefix else []
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", *packages],
    ):
        problem = run([*prefix, *keep, *command], timeout_s=APT_TIMEOUT_S, env=environment)
        if problem is not None and command[1] == "install":
            return f"{problem}\nInstall by hand, then run again: {wanted}"
    left = missing_packages()
    return f"apt-get reported success, yet these are still missing: {' '.join(left)}" if left else None


def make_environment() -> str | None:
    """Make .venv and install Muster in it with all extras, unless that was done for these very files. Return a problem."""
    stamp = VENV / "muster-installed"
    state = hashlib.sha256(
        b"\0".join(
            [
                (ROOT / "pyproject.toml").read_bytes(),
                CONSTRAINTS.read_bytes(),
                sys.version.encode(),
                str(ROOT).encode(),
            ]
        )
    ).hexdigest()
    if stamp.exists() and stamp.read_text() == state and (VENV / "bin" / "muster").exists():
        return None
    say("making the Python environment in .venv (some minutes the first time: torch is large)")
    if not (VENV / "bin" / "python").exists():
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except (subprocess.CalledProcessError, OSError) as error:
            shutil.rmtree(VENV, ignore_errors=True)
            return f"cannot make a virtual environment: {error}. On Debian and Ubuntu: apt-get install python3-venv"
    stamp.unlink(missing_ok=True)
    python = str(VENV / "bin" / "python")
    problem = run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            str(CONSTRAINTS),
            "-e",
            f"{ROOT}[train,dev]",
        ],
        timeout_s=PIP_TIMEOUT_S,
    )
    if problem is not None:
        return f"{problem}\nThe packages come from the index that pip is set up with (pip config list)."
    stamp.write_text(state)
    return None


def run(command: list[str], *, timeout_s: int, env: dict[str, str] | None = None) -> str | None:
    """Run a command with its output shown. Return None, or what went wrong."""
    try:
        status = subprocess.run(
            command,
            check=False,
            timeout=timeout_s,
            env=env,
            stdin=None if sys.stdin.isatty() else subprocess.DEVNULL,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)}: not done after {timeout_s} s"
    return None if status == 0 else f"{' '.join(command)}: exit status {status}"


def say(text: str) -> None:
    """Print one line of progress at once, in order with what the installers print."""
    print(f"muster setup: {text}", flush=True)


def fail(problem: str) -> int:
    """Print a problem and return the exit status for it."""
    print(f"muster setup: {problem}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
