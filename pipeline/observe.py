"""Reports what the loader and the training loop do to an observer; costs nothing measurable without one.

`build_loader(..., observer=o)` and `pretrain(config, observer=o)` call `o.span(name, images)` around each stage and
`o.queue(length)` for each batch. An observer must not change what it sees: results are the same bit for bit.

| span | where | around |
| --- | --- | --- |
| plan | loader's thread | order, sample table, windows and flips of a batch |
| chunk | a reader thread of the CPU decoder | reading, decoding and resizing a few samples of a batch |
| read | a reader thread | the bytes of a chunk; contains check |
| check | a reader thread | size, checksum and markers of one sample of a packed dataset |
| decode | a reader thread; DALI, resident: the loader's thread | one sample; DALI, resident: a batch |
| resize | a reader thread of the CPU decoder | one crop, resized and flipped |
| copy | loader's thread | moving a batch to the device |
| masks | loader's thread | drawing a batch's masks |
| colour | loader's thread | colour jitter of a batch, where it is on |
| wait | consumer's thread | waiting for the next batch |
| update | training loop | one update; contains forward |
| forward | training loop | one forward pass |
| metrics | training loop | fetching values from the device and writing them |
| evaluate | training loop | evaluation, spectrum and picture, where they are due |
| save | training loop | starting or writing a checkpoint |
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

Span = Literal[
    "plan", "chunk", "read", "check", "decode", "resize", "copy", "masks", "colour", "wait", "update", "forward",
    "metrics", "evaluate", "save",
]  # fmt: skip


class Observer(Protocol):
    """Sees the stages of a loader or a training loop. Its methods are called from several threads at the same time."""

    def span(self, name: Span, images: int) -> AbstractContextManager[object]:
        """Returns the context in which a stage works on that many images."""
        ...

    def queue(self, length: int) -> None:
        """Receives the number of batches that are ready when the consumer asks for the next."""
        ...


class Nobody:
    """The observer that does nothing."""

    _nothing = nullcontext()

    def span(self, name: Span, images: int) -> AbstractContextManager[object]:
        """Returns one shared empty context."""
        return self._nothing

    def queue(self, length: int) -> None:
        """Ignores the length."""


NOBODY = Nobody()
