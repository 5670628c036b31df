from __future__ import annotations

import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from setpoint import data
from setpoint.cli import app
from setpoint.data import shelf as room
from setpoint.data.origins import Debian, Download, Package, fingerprint
from setpoint.errors import InputError


def test_every_set_says_licence_source_and_origin() -> None:
    for entry in data.sets():
        assert entry.license
        assert entry.source
        assert entry.origins
        assert all(origin.how for origin in entry.origins)


def test_list_shows_licence_and_how_to_get(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["data", "list"])
    assert shown.exit_code == 0
    for word in ("python-stdlib", "PSF-2.0", "setpoint data get mnist", "scikit-learn"):
        assert word in shown.output
    rows = json.loads(CliRunner().invoke(app, ["data", "list", "--json"]).output)
    assert {row["name"] for row in rows} == {entry.name for entry in data.sets()}
    assert next(row for row in rows if row["name"] == "digits")["where"].endswith("digits.csv.gz")


def test_listing_costs_no_torch() -> None:
    code = "import sys, setpoint.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_is_here_is_not_fetched() -> None:
    assert data.get("digits").name == "digits.csv.gz"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest: digits"):
        data.get("digit")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"content")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def entry_from(*origins: object) -> room.DataSet:
    return room.DataSet("a", "text", "a file", "none", "a test", 1, origins)  # type: ignore[arg-type]


def test_a_download_is_held_to_its_checksum(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pooch")
    right = Download(server, (("a.bin", fingerprint(tmp_path / "served" / "a.bin")),))
    wrong = Download(server, (("a.bin", "0" * 64),))
    monkeypatch.setattr(room, "_SETS", (entry_from(wrong),))
    with pytest.raises(InputError, match="checksum differs"):
        data.get("a")
    assert not data.sets()[0].kept.exists()
    monkeypatch.setattr(room, "_SETS", (entry_from(wrong, right),))
    assert (data.get("a") / "a.bin").read_bytes() == b"content"


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explodes"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "a.csv").write_text("1")
    monkeypatch.syspath_prepend(tmp_path)
    assert Package("explodes==1", "explodes", "a.csv").find(tmp_path / "none") == package / "a.csv"


def test_a_wheel_gives_only_the_file_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], tool: str, cwd: Path | None = None) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a-1.whl", "w") as wheel:
            wheel.writestr("a/data.csv", "1")
            wheel.writestr("a/__init__.py", "raise SystemExit")

    monkeypatch.setattr("setpoint.data.origins._run", download)
    Package("a==1", "a", "data.csv").get(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["data.csv"]
    with pytest.raises(InputError, match="does not hold a/other"):
        Package("a==1", "a", "other").get(tmp_path)


def test_every_origin_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(
        room, "_SETS", (entry_from(Debian("a", "usr/a"), Download("http://127.0.0.1:9", (("a", "0"),))),)
    )
    with pytest.raises(InputError, match=r"Debian package a: apt-get is not on this machine.*; download from 127"):
        data.get("a")


@pytest.mark.slow
def test_a_debian_package_is_unpacked_without_root() -> None:
    pytest.importorskip("apt", reason="needs package lists") if not Path("/var/lib/apt/lists").is_dir() else None
    try:
        data.get("bibles/en")
    except InputError as error:
        pytest.skip(f"no package source here: {error}")
    verses = data.verses("bibles/en")
    assert len(verses) == 31_102
    assert verses["Gen.1.1"] == "In the beginning God created the heaven and the earth."
