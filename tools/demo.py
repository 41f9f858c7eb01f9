"""Runs the whole way on a CPU, in minutes: photographs, shards, a tiny pretrained model, pictures.

It downloads nothing: scikit-image brings the photographs. Each step is the command a user would type.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from patchmill.tools import cli
from patchmill.tools.console.options import parse

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "motorcycle",
    "retina",
    "rocket",
)
ONE_OF_EACH = 553
"""seed of the picture whose eight images are of eight photographs (with the default crops and seed)"""


@dataclass(frozen=True)
class DemoConfig:
    """Cuts crops out of scikit-image's photographs, packs them, pretrains mae-tiny and draws what it learnt.

    Example:
        python -m patchmill.tools.demo --out demo
    """

    out: str = "demo"
    """folder for everything; emptied first"""
    crops: int = 1000
    """JPEGs to cut"""
    steps: int = 1200
    """updates of the model"""
    seed: int = 0


def cut_crops(folder: Path, count: int, seed: int) -> None:
    """Writes `count` square JPEG crops, 60 to 100 % of their photograph's shorter side, one class folder each."""
    from skimage import data

    rng = np.random.default_rng(seed)
    arrays = [data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)() for name in PHOTOGRAPHS]
    sources = [Image.fromarray(array) for array in arrays]
    for number in range(count):
        which = number % len(sources)
        source = sources[which]
        side = int(rng.uniform(0.6, 1.0) * min(source.size))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in source.size)
        place = folder / PHOTOGRAPHS[which] / f"{number:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        source.crop((left, top, left + side, top + side)).save(place, quality=92)


def main(argv: list[str]) -> int:
    """Runs the demo."""
    config = parse(DemoConfig, "python -m patchmill.tools.demo", argv)
    out, console = Path(config.out), Console()
    if out.exists() and not (out / "photographs").is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by the demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    photographs, shards, run = out / "photographs", out / "shards", out / "run"
    console.rule(f"1  {config.crops} JPEG crops of scikit-image's photographs")
    cut_crops(photographs, config.crops, config.seed)
    train = ["--recipe", "mae-tiny", "--data.path", shards, "--out", run]
    train += ["--data.scale", 0.5, 1.0, "--train.total-steps", config.steps, "--seed", config.seed]
    draw = ["--checkpoint", run, "--data.path", shards, "--data.scale", 0.5, 1.0, "--out", out / "reconstructions.png"]
    draw += ["--images", 8, "--across", 4, "--seed", ONE_OF_EACH]
    for title, command, options in (
        ("2  pack them into shards", "shard", [photographs, shards]),
        ("3  pretrain a tiny masked autoencoder", "pretrain", train),
        ("4  draw masked | reconstruction | original", "reconstruct", draw),
    ):
        argv = [str(option) for option in options]
        console.rule(title)
        console.print(f"patchmill {command} {' '.join(argv)}", style="dim", soft_wrap=True)
        code = cli.run(command, argv)
        if code:
            return code
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    console.rule("done")
    console.print(f"{last['images_per_s']:.0f} images/s, data wait {last['data_wait']:.1%}, loss {last['loss']:.4f}")
    console.print(f"look at {out / 'reconstructions.png'} and {run / 'loss.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
