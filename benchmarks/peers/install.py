"""Create the environments of the peers in `.peers/`, unless they are up to date. Run by `make bench-peers`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = ROOT / ".peers"


def python_of(environment: str) -> Path:
    """Return the path of the interpreter of one environment; ``"library"`` is the running one."""
    if environment == "library":
        return Path(sys.executable)
    return PEERS / environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def failure(requirement: str) -> str | None:
    """Return why a package could not be installed, if that happened."""
    path = PEERS / "failed" / requirement.partition("==")[0]
    return path.read_text().strip() if path.exists() else None


def requirements(environment: str) -> list[str]:
    """Return the pinned packages of one environment."""
    lines = (HERE / f"requirements-{environment}.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pip_install(environment: str, *arguments: str) -> str | None:
    """Install with the running pip; return the reason if it failed."""
    command = [sys.executable, "-m", "pip", "--python", str(python_of(environment)), "install", "--quiet"]
    result = subprocess.run(
        [*command, "--disable-pip-version-check", *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return None
    errors = [line for line in (result.stdout + result.stderr).splitlines() if line.upper().startswith("ERROR")]
    return (errors or result.stderr.splitlines() or [f"pip ended with code {result.returncode}"])[-1]


def make_torch() -> list[str]:
    """Create the environment of the peers on PyTorch, which borrows torch from the running one."""
    venv.create(PEERS / "torch", with_pip=False)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python_of("torch"), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    # A second torch would take several GB, and another build of it would be another benchmark. A folder named in a
    # .pth file comes after the environment's own packages, and its own .pth files are not read: what is installed here
    # stays out of .venv, and the editable install of this project stays out of here.
    Path(site, "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    failed = []
    for requirement in requirements("torch"):
        # Without dependencies: they would bring their own torch, torchvision and numpy.
        reason = pip_install("torch", "--no-deps", requirement)
        if reason is not None:
            failed.append(requirement)
            _record(requirement, reason)
    return failed


def make_jax() -> list[str]:
    """Create the environment of neural-tangents, without torch."""
    venv.create(PEERS / "jax", with_pip=False)
    reason = pip_install("jax", "-r", str(HERE / "requirements-jax.txt"))
    if reason is None:
        return []
    _record("neural-tangents", reason)
    return ["neural-tangents"]


def _record(requirement: str, reason: str) -> None:
    (PEERS / "failed").mkdir(exist_ok=True)
    (PEERS / "failed" / requirement.partition("==")[0]).write_text(reason + "\n")
    print(f"not installed: {requirement}: {reason}", file=sys.stderr)


def main() -> None:
    """Create the environments that are missing or have other pins."""
    for environment, make in {"torch": make_torch, "jax": make_jax}.items():
        stamp = PEERS / environment / ".installed"
        wanted = (
            HERE / f"requirements-{environment}.txt"
        ).read_text() + f"# {sys.version}, {sysconfig.get_path('purelib')}\n"
        if stamp.exists() and stamp.read_text() == wanted:
            print(f".peers/{environment} is up to date")
            continue
        print(f"Making .peers/{environment} (the first time takes a few minutes)")
        shutil.rmtree(PEERS / environment, ignore_errors=True)
        for requirement in requirements(environment):
            (PEERS / "failed" / requirement.partition("==")[0]).unlink(missing_ok=True)
        failed = make()
        # With something missing there is no stamp, so the next call tries again.
        if not failed:
            stamp.write_text(wanted)


if __name__ == "__main__":
    main()
