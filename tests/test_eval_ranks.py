"""One rank or two: the same images, the same statistics, the same accuracy, with a last batch that is not full."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from patchmill.pipeline.config import DataConfig
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.trainer.checkpoints.files import config_json
from patchmill.trainer.config.evaluate import KnnConfig, TestConfig
from patchmill.trainer.config.pretrain import OnlineEvalConfig
from patchmill.trainer.engine.world import joined_world
from patchmill.trainer.evaluate.classifier import Classifier, RankBatchNorm
from patchmill.trainer.evaluate.classify import evaluate_classifier
from patchmill.trainer.evaluate.encoder_source import open_subject
from patchmill.trainer.evaluate.finetune import run_finetune
from patchmill.trainer.evaluate.knn import run_knn
from patchmill.trainer.evaluate.online import OnlineEvaluation
from patchmill.trainer.evaluate.probe import run_probe
from patchmill.trainer.evaluate.state import FINISHED, save_classifier
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.mae import MaskedAutoencoder
from tests.support.eval_setup import finetune_config, make_setup, probe_config, where
from tests.support.ranks import next_world, run_ranks
from tests.support.small_models import TINY

PARTS = 10
"""batches of ten on two ranks: 21 images leave nine places of the last batch empty"""


def evaluate_all(rank, root, name):
    """Everything that is counted over ranks, written by the first."""
    if name == "two":
        next_world()
    with joined_world("cpu") as world:
        check_statistics(rank, world.size)
        found = {}
        config = probe_config(root, root / f"probe-{name}")
        config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, precision="fp32"))
        found["probe"] = run_probe(config, world, [], lambda progress: None).results["top1"]
        config = finetune_config(root, root / f"finetune-{name}", average=None)
        quiet = dataclasses.replace(config.augment, mixup=0.0, cutmix=0.0)  # mixing pairs the images of one rank
        config = dataclasses.replace(
            config, augment=quiet, fit=dataclasses.replace(config.fit, accum_steps=2 // world.size, precision="fp32")
        )
        found["finetune"] = run_finetune(config, world, [], lambda progress: None).results["history"][-1]["loss"]
        tests = [TestConfig(str(root / part / "dataset"), batch=PARTS) for part in ("test", "train")]
        for part, tested in zip(
            ("test", "train"),
            evaluate_classifier(root / "spread", DataConfig(), tests, "fp32", world),
            strict=True,
        ):
            found[part] = [tested.scores.plain(), matrix(tested.scores)]
        knn = KnnConfig(**where(root), neighbours=(3, 7), precision="fp32")
        for k, scores in run_knn(knn, open_subject(knn.subject, 0), world).items():
            found[f"knn {k}"] = [scores.top1, matrix(scores)]
        online = OnlineEvalConfig(every_epochs=1, test_path=tests[0].path, neighbours=5)
        torch.manual_seed(0)
        model = MaskedAutoencoder(TINY)
        found["online"] = OnlineEvaluation(online, DataConfig(path=tests[1].path), world)(model, None)
        if rank == 0:
            (root / f"{name}.json").write_text(json.dumps(found))


def matrix(scores):
    assert scores.confusion is not None
    return scores.confusion.tolist()


def check_statistics(rank, size):
    """Statistics of a batch that lies on all ranks are those of the whole."""
    whole = 3 + 2 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    norm, expected = RankBatchNorm(5), torch.nn.BatchNorm1d(5, eps=1e-6, affine=False)
    torch.testing.assert_close(norm(whole.chunk(size)[rank]), expected(whole).chunk(size)[rank])
    torch.testing.assert_close(dict(norm.named_buffers()), dict(expected.named_buffers()))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The setup's folder after one rank and two have gone through everything."""
    root = make_setup(tmp_path_factory.mktemp("setup"))
    (root / "spread").mkdir()
    torch.manual_seed(0)
    model = Classifier(Encoder(MaskedAutoencoder(TINY)), 6, "mean", "linear")
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=5.0)  # a head that finds several classes
    classes = open_dataset(root / "train" / "dataset").manifest.classes
    about = {"model": config_json(TINY), "classes": classes, "pool": "mean", "head": "linear"}
    save_classifier(root / "spread", model, {}, about)
    evaluate_all(0, root, "one")
    run_ranks(2, 1, evaluate_all, root, "two")
    return root


def test_two_ranks_count_what_one_counts(both):
    one, two = (json.loads((both / f"{name}.json").read_text()) for name in ("one", "two"))
    for part, images in (("test", 21), ("train", 48)):
        assert one[part][0]["test_samples"] == two[part][0]["test_samples"] == images
        assert one[part][0]["top1"] == two[part][0]["top1"]
        assert one[part][0]["top5"] == two[part][0]["top5"]
        assert one[part][0]["test_loss"] == pytest.approx(two[part][0]["test_loss"], rel=1e-6)
        assert one[part][1] == two[part][1]
        assert len({row.index(max(row)) for row in one[part][1]}) > 1
    for key in ("probe", "knn 3", "knn 7", "online"):
        assert one[key] == two[key], key


def test_two_ranks_learn_what_one_learns(both):
    one, two = (json.loads((both / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["finetune"] == pytest.approx(two["finetune"], rel=1e-5)
    for protocol in ("probe", "finetune"):
        first, second = (load_file(both / f"{protocol}-{name}" / FINISHED) for name in ("one", "two"))
        for name, value in first.items():
            if "qkv.bias" in name:
                continue  # the third of the keys has no true gradient: Adam amplifies rounding there
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4, msg=f"{protocol} {name}")


def test_online_evaluation_leaves_the_run_as_it_was(both):
    with joined_world("cpu") as world:
        config = OnlineEvalConfig(every_epochs=0.5, test_path=str(both / "test" / "dataset"), max_train_samples=20)
        evaluation = OnlineEvaluation(config, DataConfig(path=str(both / "train" / "dataset")), world)
        model = MaskedAutoencoder(TINY).train()
        before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
        found = evaluation(model, None)
    assert found.keys() == {"knn_top1", "probe_top1"}
    assert all(0 <= value <= 1 for value in found.values())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [step for step in range(13) if evaluation.is_due(step, 8)] == [4, 8, 12]
    with pytest.raises(ValueError, match=r"eval\.test_path"):
        OnlineEvalConfig(every_epochs=1)
