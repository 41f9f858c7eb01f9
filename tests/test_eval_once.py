"""Every test image counts exactly once: short last batches, bad images, ranks; and classes of other names."""

import json

import numpy as np
import pytest
import torch

from patchmill.pipeline.config import DataConfig
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.tools import evaluate
from patchmill.trainer.config.evaluate import TestConfig
from patchmill.trainer.engine.world import World
from patchmill.trainer.evaluate.classifier import Classifier
from patchmill.trainer.evaluate.classify import classify
from patchmill.trainer.evaluate.labelled import class_columns, each_once, open_labelled, to_test_classes
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.mae import MaskedAutoencoder
from tests.support.eval_setup import make_setup
from tests.support.photos import make_dataset
from tests.support.small_models import TINY

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return make_setup(tmp_path_factory.mktemp("setup"))


def seen(path, world=ALONE, batch=8, most=None):
    """Sample ids and labels of the rows that count."""
    found = list(each_once(DataConfig(), str(path), 0.9, TINY, world, batch, most=most))
    ids = torch.cat([each.sample_ids[counts] for each, counts in found]).tolist()
    labels = torch.cat([each.labels[counts] for each, counts in found]).tolist()
    return ids, labels, len(found)


@pytest.mark.parametrize("batch", [1, 8, 21, 64])
def test_each_sample_counts_once_in_order(setup, batch):
    ids, labels, _ = seen(setup / "test" / "dataset", batch=batch)
    assert ids == list(range(21))
    assert labels == open_dataset(setup / "test" / "dataset").samples["label"].tolist()


def test_two_ranks_share_the_samples(setup):
    parts = [seen(setup / "test" / "dataset", World(rank, 2, torch.device("cpu"), 2), batch=7) for rank in (0, 1)]
    assert parts[0][2] == parts[1][2] == 3  # batches of 8: 7 is rounded up to a multiple of the ranks
    assert sorted(parts[0][0] + parts[1][0]) == list(range(21))


def test_a_part_is_always_the_same_random_one(setup):
    ids, _, steps = seen(setup / "train" / "dataset", batch=8, most=20)
    assert (len(set(ids)), steps) == (24, 3)
    assert ids == seen(setup / "train" / "dataset", batch=8, most=20)[0]
    assert sorted(ids) != list(range(24))
    assert sorted(seen(setup / "train" / "dataset", batch=20, most=500)[0]) == list(range(48))


def test_a_bad_image_is_not_counted_and_its_replacement_neither(tmp_path):
    root = make_dataset(tmp_path, count=21, seed=5, sides=(40, 64))
    dataset = open_dataset(root)
    row = dataset.samples[4]
    path = dataset.shard_path(int(row["shard"]))
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 0xFF
    path.write_bytes(data)
    plain = DataConfig(max_bad_fraction=0.2)
    found = list(each_once(plain, str(root), 0.9, TINY, ALONE, 8))
    assert torch.cat([each.sample_ids[counts] for each, counts in found]).tolist() == [*range(4), *range(5, 21)]
    model = Classifier(Encoder(MaskedAutoencoder(TINY)), 6, "mean", "linear").eval()
    scores = classify(model, plain, TestConfig(str(root), batch=8), None, 6, ALONE, None)
    assert scores.confusion is not None
    assert scores.samples == scores.confusion.sum() == 20


def test_scores_are_the_counted_ones(setup):
    path = str(setup / "test" / "dataset")
    torch.manual_seed(0)
    model = Classifier(Encoder(MaskedAutoencoder(TINY)), 6, "mean", "linear").eval()
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=5.0)
    scores = classify(model, DataConfig(), TestConfig(path, batch=8), None, 6, ALONE, None)
    found, truth = [], []
    for batch, _ in each_once(DataConfig(), path, 0.875, TINY, ALONE, 21):
        found.append(model(model.normalise(batch.images.permute(0, 3, 1, 2) / 255)).detach())
        truth.append(batch.labels)
    logits, labels = torch.cat(found), torch.cat(truth)
    order = logits.argsort(1, descending=True)
    assert len(order[:, 0].unique()) > 1
    assert scores.top1 == pytest.approx((order[:, 0] == labels).double().mean().item(), rel=1e-12)
    assert scores.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean().item(), rel=1e-12)
    assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    expected = np.zeros((6, 6), int)
    np.add.at(expected, (labels.numpy(), order[:, 0].numpy()), 1)
    assert scores.confusion is not None
    assert np.array_equal(scores.confusion.numpy(), expected)


def test_classes_are_matched_by_name_or_map(tmp_path):
    learnt = ["cat", "dog", "fox", "owl"]
    assert class_columns(TestConfig("x"), learnt, learnt) is None
    assert class_columns(TestConfig("x"), ["owl", "cat"], learnt) == [[3], [0]]
    with pytest.raises(ValueError, match=r"'wolf'.*--test.class-map"):
        class_columns(TestConfig("x"), ["wolf"], learnt)
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"bird": "owl", "canine": ["dog", "fox"]}))
    columns = class_columns(TestConfig("x", str(file)), ["canine", "bird"], learnt)
    assert columns == [[1, 2], [3]]
    # the best of the classes that are meant; cat does not compete
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0]])
    assert to_test_classes(logits, columns).tolist() == [[3.0, 2.0]]
    with pytest.raises(OSError, match=r"cannot read class map .*none.json: No such file"):
        class_columns(TestConfig("x", str(tmp_path / "none.json")), ["canine"], learnt)
    for text, message in (
        ('{"bird": "eagle", "canine": "dog"}', "'eagle'"),
        ('{"bird": "owl"}', "has nothing for class 'canine'"),
        ("[1]", "must be an object"),
        ("{", "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            class_columns(TestConfig("x", str(file)), ["canine", "bird"], learnt)


def test_data_without_classes_are_refused(setup, tmp_path):
    with pytest.raises(ValueError, match=r"no data.*--test.path"):
        open_labelled("", "test.path")
    flat = make_dataset(tmp_path, count=6, names=("coffee.png",), sides=(40, 64))
    with pytest.raises(ValueError, match="1 classes"):
        open_labelled(str(flat), "data.path")


def test_evaluate_without_test_data_is_refused():
    with pytest.raises(ValueError, match="--tests names no dataset"):
        evaluate.main(["--classifier", "x", "--tests"])
