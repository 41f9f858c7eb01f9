"""What every test gets: NaN where nothing was written, and only the tests this process can run.

Triton's interpreter is switched on when a kernel is decorated, so that its tests need a process of their own:
`TRITON_INTERPRET=1 pytest -m interpreter`.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.compare import poisoned_empty


@pytest.fixture(autouse=True)
def _poison_empty_tensors() -> Iterator[None]:
    with poisoned_empty():
        yield


@pytest.fixture
def ffcv() -> None:
    """Skips the test where the extra `ffcv` is not installed; imports it without its effect on torch's threads."""
    from patchmill.tools.packing.beton import import_ffcv

    try:
        import_ffcv()
    except ValueError as error:
        pytest.skip(str(error))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect interpreter tests outside the interpreter, all others inside it, and GPU tests without a GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    def runs_here(item: pytest.Item) -> bool:
        if (item.get_closest_marker("interpreter") is not None) != interpreted:
            return False
        return item.get_closest_marker("gpu") is None or torch.cuda.is_available()

    deselected = [item for item in items if not runs_here(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if runs_here(item)]
