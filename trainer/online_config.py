"""command line -> [online_config] -> evaluate: how often a pretraining run asks what its features are worth."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OnlineEvalConfig:
    """kNN and a linear probe while pretraining goes on: what the features are worth so far."""

    every_epochs: float | None = None
    """how often; unset: never"""
    data_path: str = ""
    """labelled training data; unset: the pretraining data themselves"""
    test_path: str = ""
    """labelled test data"""
    crop_fraction: float = 0.875
    """of the centre crop; 1 for images that have their size already"""
    max_train_samples: int = 50_000
    """at most so many training images, always the same random ones"""
    neighbours: int = 20
    """of kNN"""

    def __post_init__(self) -> None:
        if self.every_epochs is not None and self.every_epochs <= 0:
            raise ValueError(f"eval.every_epochs is {self.every_epochs}; it must be positive (leave it out for never)")
        if self.every_epochs is not None and not self.test_path:
            raise ValueError("eval.every_epochs needs eval.test_path, a packed dataset with labels")
        for name in ("max_train_samples", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} is {getattr(self, name)}; it must be at least 1")
