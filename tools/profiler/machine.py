"""where numbers are taken -> [machine] -> reports, benchmark pages: processor, commit, versions, date."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """The processor's model name, and the vector units that these programs use."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    return ", ".join([model, *(name for flag, name in (("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in text)])


def commit() -> str:
    """The commit of the checkout, with `+` if files differ from it; outside a repository $COMMIT, or `unknown`."""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        if found := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return found
    return os.environ.get("COMMIT", "unknown")


def versions(*packages: str) -> str:
    """Python and those of the packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def today() -> str:
    """The date (UTC), as in the names of result files."""
    return time.strftime("%Y-%m-%d", time.gmtime())
