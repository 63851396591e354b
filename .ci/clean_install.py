"""Install a wheel in an environment that has its requirements and nothing else, and try it there.

    python .ci/clean_install.py dist/flexnsa-*.whl

The requirements are linked from the environment that runs this, since torch alone takes minutes to install; that they
are all that the wheel asks for is checked by pip.
"""

import email
import os
import subprocess
import sys
import tempfile
import textwrap
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = {"docs", "flash", "hf", "test", "viz"}
IMPORT_SECONDS = 0.1

USE = """
    import time
    import torch
    begin = time.process_time()
    import flexnsa
    seconds = time.process_time() - begin

    import sys
    assert not {"triton", "transformers", "matplotlib"} & sys.modules.keys()
    assert "site-packages" in flexnsa.__file__, flexnsa.__file__

    import flexnsa_masks
    layer = flexnsa.NativeSparseAttention(dim=32, num_heads=4, num_kv_heads=2, head_dim=8, config=flexnsa.NSAConfig())
    assert layer(torch.randn(1, 70, 32)).shape == (1, 70, 32)
    print(seconds)
"""


def main(wheel: Path) -> None:
    """Check the wheel's contents, install it, use it."""
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        python = install(wheel, Path(folder))
        seconds = min(float(run(python, "-c", textwrap.dedent(USE), cwd=folder)) for _ in range(3))
    assert seconds < IMPORT_SECONDS, f"import flexnsa takes {seconds:.3f} s beyond import torch"
    print(f"{wheel.name}: installed and used; import flexnsa takes {seconds:.3f} s beyond import torch")


def check_contents(wheel: Path) -> None:
    """Pure Python, both packages with their type marker, no tests, and the extras that the documentation names."""
    assert wheel.name.endswith("-py3-none-any.whl"), wheel
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        extras = set(email.message_from_bytes(archive.read(metadata)).get_all("Provides-Extra", []))
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"flexnsa", "flexnsa_masks"}, packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert extras >= EXTRAS, EXTRAS - extras


def install(wheel: Path, folder: Path) -> str:
    """The Python of a new environment with the wheel in it."""
    venv.create(folder / "env", with_pip=False)
    python = str(folder / "env/bin/python")
    pip(python, "install", "--no-deps", "--no-index", "--compile", str(wheel))
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for found in required(["einops", "jaxtyping", "torch"]).values():
        link(found, packages)
    pip(python, "check")
    return python


def required(names: list[str]) -> dict[str, Distribution]:
    """The distributions of those names and all that they require, as installed here."""
    found: dict[str, Distribution] = {}
    while names:
        name = names.pop()
        if name not in found:
            found[name] = distribution(name)
            needs = [Requirement(need) for need in found[name].requires or []]
            names += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def link(found: Distribution, packages: Path) -> None:
    """Link a distribution's top-level files and folders."""
    for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        target = packages / top
        if not target.exists():
            target.symlink_to(found.locate_file(top))


def pip(python: str, *arguments: str) -> None:
    """This environment's pip at work in the other one."""
    run(sys.executable, "-m", "pip", "--quiet", "--python", python, *arguments)


def run(*command: str, cwd: str | None = None) -> str:
    """What the command prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command[:4])} ...\n{done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
