"""MAE and U-MAE on CIFAR-10 within minutes: `python -m benchmarks.train_cifar DATA` (`make gpu-train DATA=...`).

DATA holds train/ and test/, packed by `patchmill shard` or as class folders of images; a .zip of such folders will do.
All images lie decoded on the device (--data.decoder resident) and the whole update is one CUDA graph, so that neither
decoding nor launching binds. A short run finds the speed; from it follows how many epochs every run gets, the same for
both methods and all seeds. After each run the features are judged by 20 nearest neighbours and by a linear probe
(logistic regression on class tokens), beside those of random weights, and the page is written anew.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import markdown_table, results_folder, write_page
from patchmill.pipeline.config import DataConfig
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.profiler import machine, timing
from patchmill.trainer.checkpoints.checkpoint import load_model
from patchmill.trainer.config.pretrain import OnlineEvalConfig, PretrainConfig
from patchmill.trainer.engine.world import World, autocast_dtype
from patchmill.trainer.evaluate.online import OnlineEvaluation
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.vit import VisionTransformer
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe, with_options

METHODS = {"MAE": 0.0, "U-MAE": 0.01}
"""weight of the uniformity term (Zhang et al. 2022)"""
TRIAL_STEPS = 200
EVALUATION_SECONDS = 8.0
"""of a run, beside its updates: start, checkpoint, evaluation (a guess; a run that ends late shortens nothing else)"""
WARM_UP_SHARE = 0.05


def packed(source: str, folder: Path) -> tuple[Path, Path]:
    """The two datasets, packed if they are not."""
    if source.endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder / "unpacked")
        source = str(folder / "unpacked")
    found = []
    for name in ("train", "test"):
        path = Path(source) / name
        if not path.is_dir():
            raise SystemExit(f"no folder {path}: DATA holds train/ and test/, shards or class folders of images")
        if not (path / "manifest.json").is_file():
            pack_dataset(list_folder(path), folder / name, PackOptions())
            path = folder / name
        found.append(path)
    return found[0], found[1]


class Trial:
    """What all runs share."""

    def __init__(self, options: argparse.Namespace, train: Path, test: Path, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device)
        self.data = DataConfig(path=str(train), decoder="resident")
        self.evaluate = OnlineEvaluation(
            OnlineEvalConfig(test_path=str(test), crop_fraction=1.0), self.data, World(0, 1, self.device)
        )
        self.steps_per_epoch = open_dataset(train).manifest.num_samples // options.batch
        if self.steps_per_epoch == 0:
            raise SystemExit(f"{train} does not fill one batch of {options.batch}; give a smaller --batch")

    def config(self, name: str, weight: float, seed: int, epochs: float, **more: Any) -> PretrainConfig:
        """The recipe on these data for so many epochs."""
        options = {
            "data": self.data,
            "seed": seed,
            "device": self.device.type,
            "out": str(self.folder / name),
            "model__uniformity_weight": weight,
            "optim__warmup_epochs": WARM_UP_SHARE * epochs,
            "train__global_batch": self.options.batch,
            "train__total_epochs": epochs,
            "train__cuda_graph": self.device.type == "cuda",
            "train__compile": self.options.compile,
            "train__tensorboard": False,
            "train__save_every_steps": 1 << 30,
            "train__log_every_steps": 50,
        }
        return with_options(get_recipe(self.options.recipe), **options, **more)

    def speed(self) -> float:
        """Images/s of a short run, once it has settled."""
        epochs = TRIAL_STEPS / self.steps_per_epoch
        pretrain(self.config("trial", METHODS["U-MAE"], 0, epochs))
        return max(line["images_per_s"] for line in read_metrics(self.folder / "trial"))

    def judge(self, model: VisionTransformer) -> dict[str, float]:
        """knn_top1 and probe_top1."""
        with torch.random.fork_rng(devices=[]):
            return self.evaluate(model.to(self.device), autocast_dtype("auto", self.device))

    def run(self, method: str, seed: int, epochs: float) -> dict[str, Any]:
        """One run: trained, judged, its reconstructions kept."""
        name = f"{method.lower()}-s{seed}"
        summary = pretrain(self.config(name, METHODS[method], seed, epochs, train__picture_every_epochs=epochs))
        lines = read_metrics(self.folder / name)
        pictures = sorted((self.folder / name / "pictures").glob("*.png"))
        if pictures and seed == self.options.seeds[0]:
            shutil.copy(pictures[-1], results_folder() / f"cifar_{name}_{machine.today()}.png")
        return {
            "method": method,
            "seed": seed,
            "epochs": epochs,
            "updates": summary.step,
            "images_per_s": statistics.median(line["images_per_s"] for line in lines),
            "data_wait": statistics.fmean(line["data_wait"] for line in lines),
            "loss": statistics.fmean(line["loss"] for line in lines[-50:]),
            **self.judge(load_model(self.folder / name)[0]),
        }


def table(found: list[dict[str, Any]], random: dict[str, float]) -> list[str]:
    """One row a run, then the means over seeds."""
    rows = [["random weights", "", "", "", f"{random['knn_top1']:.2%}", f"{random['probe_top1']:.2%}"]]
    for each in found:
        rows.append(
            [
                f"{each['method']}, seed {each['seed']}",
                f"{each['images_per_s']:.0f}",
                f"{each['data_wait']:.2%}",
                f"{each['loss']:.4f}",
                f"{each['knn_top1']:.2%}",
                f"{each['probe_top1']:.2%}",
            ]
        )
    for method in METHODS:
        same = [each for each in found if each["method"] == method]
        if len(same) > 1:
            means = [_spread([each[score] for each in same]) for score in ("knn_top1", "probe_top1")]
            rows.append([f"{method}, {len(same)} seeds", "", "", "", *means])
    return markdown_table(["run", "images/s", "data wait", "loss at the end", "20 neighbours", "linear probe"], rows)


def _spread(scores: list[float]) -> str:
    return f"{statistics.fmean(scores):.2%} ± {statistics.stdev(scores):.2%}"


def main(argv: list[str]) -> int:
    """Trains method after method, seed after seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder or .zip with train/ and test/")
    parser.add_argument("--recipe", default="mae-cifar-tiny-p4", help="of a MAE; U-MAE is the same with its term")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="of each run, instead of what --seconds allow")
    parser.add_argument("--compile", action="store_true", help="compile the model (half a minute more a run)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options, *packed(options.data, Path(folder)), Path(folder))
        epochs = options.epochs
        if epochs is None:
            rate = trial.speed()
            share = (options.seconds - (time.perf_counter() - began)) / (len(METHODS) * len(options.seeds))
            updates = max(TRIAL_STEPS, rate * (share - EVALUATION_SECONDS) / options.batch)
            epochs = max(1.0, updates // trial.steps_per_epoch)
            print(f"{rate:.0f} images/s: {epochs:.0f} epochs of {trial.steps_per_epoch} updates a run", flush=True)
        torch.manual_seed(0)
        random = trial.judge(build_model(get_recipe(options.recipe).model))
        facts = {"command": f"python -m benchmarks.train_cifar {' '.join(argv)}", **timing.environment(options.device)}
        facts["run"] = f"{options.recipe}, batch {options.batch}, {epochs:g} epochs of {trial.steps_per_epoch} updates"
        facts["data"] = f"{trial.evaluate.train.num_samples} training and {trial.evaluate.test.num_samples} test images"
        found: list[dict[str, Any]] = []
        page = ""
        for seed in options.seeds:
            for method in METHODS:
                found.append(trial.run(method, seed, epochs))
                print(found[-1], flush=True)
                data = {"options": vars(options), "random": random, "runs": found}
                name = f"cifar_{trial.device.type}_{machine.today()}"
                page = write_page(name, "MAE and U-MAE on CIFAR-10", facts, table(found, random), data)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
