"""Lists the images of whatever the user named: a folder, an archive, a table, an array or a URL."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.read.manifest import MANIFEST_NAME, Manifest
from patchmill.pipeline.read.remote import with_retries
from patchmill.pipeline.read.urls import expand_braces, is_url, open_filesystem, redact
from patchmill.tools.packing.beton import list_beton
from patchmill.tools.packing.list_archives import COMPRESSED_TARS, decompressed, list_tars, list_zip
from patchmill.tools.packing.list_tables import Columns, list_array, list_parquet, list_table
from patchmill.tools.packing.listing import Listing, list_folder

TABLES = (".csv", ".jsonl", ".parquet")
ARRAYS = (".npy", ".npz")
KINDS = "a folder, .zip, .tar, .tar.gz, .csv, .jsonl, .parquet, .npy, .npz or .beton"


def list_source(source: str, columns: Columns, staging: Path) -> Listing:
    """Lists the images of any source.

    Args:
        source: a path, a pattern of tars (`train-{000..146}.tar`, `shards/*.tar`) or a URL.
        staging: folder for copies of what cannot be read in place (remote files, Parquet).
    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: it is of another kind, or damaged.
    """
    paths = _local_paths(source, staging)
    if len(paths) > 1:
        return _list_several(source, paths, columns, staging)
    path = paths[0]
    if not path.exists():
        raise FileNotFoundError(f"no {path}: give {KINDS}")
    if path.is_dir():
        return _list_folder(path, columns, staging)
    if path.suffix == ".zip":
        return list_zip(path)
    if path.suffix == ".tar" or path.suffix in COMPRESSED_TARS:
        return list_tars([decompressed(path, staging) if path.suffix in COMPRESSED_TARS else path])
    if path.suffix in TABLES:
        return list_table(path, columns, staging)
    if path.suffix == ".beton":
        return list_beton(path, staging)
    if path.suffix in ARRAYS:
        return list_array(path, staging)
    if path.suffix in (".pkl", ".pickle", ".pt") or path.name.startswith("data_batch"):
        raise ValueError(f"{path} is a pickle, and reading one can run code: save its arrays as .npy or .npz")
    raise ValueError(f"{path} is not of a known kind: give {KINDS}")


def staging_folder(out: str) -> Path:
    """Where copies of remote and Parquet sources stay until the dataset `out` is finished."""
    if is_url(out):
        return Path(tempfile.gettempdir()) / f"patchmill-{hashlib.sha256(out.encode()).hexdigest()[:16]}"
    path = Path(out).absolute()
    return path.with_name(path.name + ".sources")


def _local_paths(source: str, staging: Path) -> list[Path]:
    """The local files of a source; remote ones are copied into `staging` first."""
    if not is_url(source):
        if Path(source).exists():
            return [Path(source)]
        expanded = [Path(name) for name in expand_braces(source)]
        if "*" in source:
            expanded = sorted(path for name in expanded for path in name.parent.glob(name.name))
        if not expanded:
            raise FileNotFoundError(f"no file matches {source}")
        return expanded
    urls = expand_braces(source)
    if Path(source).suffix not in (".zip", ".tar", *COMPRESSED_TARS, *TABLES, *ARRAYS):
        urls = _remote_folder(source)
    elif "*" in source:
        urls = _remote_matches(source)
    return [download(url, staging / f"{i:06d}") for i, url in enumerate(urls)]


def _remote_folder(url: str) -> list[str]:
    """The tars, or else the Parquet files, below a remote folder, such as a Hugging Face dataset repository."""
    for pattern in ("**/*.tar", "**/*.parquet"):
        if found := _remote_matches(f"{url.rstrip('/')}/{pattern}"):
            return found
    raise FileNotFoundError(f"no .tar and no .parquet below {redact(url)}")


def _remote_matches(url: str) -> list[str]:
    fs, path = open_filesystem(url)
    return with_retries(lambda: sorted(fs.unstrip_protocol(match) for match in fs.glob(path)), redact(url))


def download(url: str, folder: Path) -> Path:
    """Copies a remote file into `folder`, unless a file of its size is there already; returns the local path."""
    fs, path = open_filesystem(url)
    local = folder / Path(urlsplit(url).path).name

    def fetch() -> None:
        if not local.is_file() or local.stat().st_size != fs.size(path):
            with whole_file(local, shared=True) as unfinished:
                fs.get_file(path, str(unfinished))

    folder.mkdir(parents=True, exist_ok=True)
    with_retries(fetch, redact(url))
    return local


def _list_several(source: str, paths: list[Path], columns: Columns, staging: Path) -> Listing:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} files of {redact(source)} are missing, such as {missing[0]}"
        )
    suffixes = {path.suffix for path in paths}
    if suffixes == {".tar"}:
        return list_tars(paths)
    if suffixes == {".parquet"}:
        return list_parquet(paths, columns, staging)
    raise ValueError(f"{redact(source)} matches files of several kinds; several files must all be .tar or all .parquet")


def with_class_names(listing: Listing, manifest: Path) -> Listing:
    """Restores a dataset's class names from its manifest: its tars hold only numbers."""
    if not manifest.is_file():
        return listing
    classes = Manifest.from_json(manifest.read_text("utf-8"), str(manifest)).classes
    return replace(listing, classes=classes) if len(classes) >= len(listing.classes) else listing


def _list_folder(path: Path, columns: Columns, staging: Path) -> Listing:
    """Lists a folder of images, or of tars or Parquet files when it has no images."""
    listing = list_folder(path)
    if len(listing):
        return listing
    if tars := sorted(path.glob("*.tar")):
        return with_class_names(list_tars(tars), path / MANIFEST_NAME)
    if tables := sorted(path.rglob("*.parquet")):
        return list_parquet(tables, columns, staging)
    return listing
