"""Describes the machine and the code for reports and benchmark pages: processor, commit, versions, date."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """Returns the processor's model name, and the vector units that we use."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    return ", ".join([model, *(name for flag, name in (("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in text)])


def commit() -> str:
    """Returns the checkout's commit, with `+` if files differ from it; outside a repository $COMMIT, or `unknown`."""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        if found := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return found
    return os.environ.get("COMMIT", "unknown")


def versions(*packages: str) -> str:
    """Returns the versions of Python and of the packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def today() -> str:
    """Returns the date (UTC), as in the names of result files."""
    return time.strftime("%Y-%m-%d", time.gmtime())
