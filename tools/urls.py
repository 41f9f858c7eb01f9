"""URLs of users -> [urls] -> local files, for the commands; what may be opened stands in pipeline/urls.py."""

from pathlib import Path
from urllib.parse import urlsplit

from patchmill.pipeline.urls import expand_braces as expand_braces
from patchmill.pipeline.urls import is_url as is_url
from patchmill.pipeline.urls import open_filesystem as open_filesystem
from patchmill.pipeline.urls import redact as redact


def download(url: str, folder: Path) -> Path:
    """Copies a remote file into `folder` unless it is there already with its size; returns the local path."""
    fs, path = open_filesystem(url)
    local = folder / Path(urlsplit(url).path).name
    try:
        size = fs.size(path)
        if local.is_file() and local.stat().st_size == size:
            return local
        folder.mkdir(parents=True, exist_ok=True)
        temporary = local.with_name(local.name + ".tmp")
        fs.get_file(path, str(temporary))
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing at {redact(url)}") from None
    temporary.replace(local)
    return local
