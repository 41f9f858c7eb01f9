"""Targets beside pixels: fitted as scikit-learn fits them, carried by files and checkpoints, predicted as defined."""

import dataclasses
import math
import shutil
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools import cli
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.engine.optim import build_optimizer
from patchmill.trainer.engine.step import Guard, set_learning_rate, update
from patchmill.trainer.evaluate.reconstruct import reconstruct
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.dvae import DVAETokenizer
from patchmill.trainer.model.target_files import load_target, write_target
from patchmill.trainer.model.target_fit import Covariance, first_codes, k_means, principal_components
from patchmill.trainer.model.targets import PCATarget, target_patches
from patchmill.trainer.pretrain import pretrain
from tests.support.devices import ALONE, CPU
from tests.support.photos import make_dataset
from tests.support.small_models import TINY
from tests.support.small_runs import twenty_steps

WIDTHS = {"pca": 96, "kmeans": 8, "dvae": 0}


def images_and_plan(count=8):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    ids = torch.arange(count)
    return images, MaskPlan.draw(MaskConfig(), seed=0, epoch=0, sample_ids_B=ids, grid_hw=TINY.grid_hw)


def patches_of(count, size=30, seed=0):
    """Correlated vectors with an offset, so that means and directions matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator) + 5


def model_of(target, seed=0, **changes):
    """A model whose target is filled with what random patches gave."""
    torch.manual_seed(seed)
    config = dataclasses.replace(TINY, target=target, target_width=WIDTHS[target], **changes)
    model = build_model(config)
    for name, buffer in model.target.named_buffers():
        fan_in = math.prod(buffer.shape[1:])
        buffer.copy_(torch.randn(buffer.shape) / fan_in**0.5 if target == "dvae" else torch.rand(buffer.shape))
        assert not name.startswith("target")
    return model


# what is fitted


def test_pca_is_orthonormal_and_scikit_learn_s_up_to_sign():
    patches = patches_of(500)
    covariance = Covariance()
    for batch in patches.split(64):
        covariance.add(batch)
    ours, theirs = principal_components(covariance, 12), PCA(12, svd_solver="full").fit(patches.double().numpy())
    torch.testing.assert_close(ours.basis.T @ ours.basis, torch.eye(12), rtol=0, atol=1e-6)
    components = torch.from_numpy(theirs.components_.T).float()
    signs = (components * ours.basis).sum(0).sign()
    torch.testing.assert_close(ours.basis, components * signs, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.mean, torch.from_numpy(theirs.mean_).float())
    torch.testing.assert_close(ours.explained, torch.from_numpy(theirs.explained_variance_ratio_))
    assert (ours.basis.gather(0, ours.basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_covariance_does_not_depend_on_batches_or_offset():
    patches = patches_of(200) + 1e4
    covariance = Covariance()
    for batch in patches.split([1, 7, 92, 100]):
        covariance.add(batch)
    torch.testing.assert_close(covariance.scatter_PP / 199, patches.double().T.cov())


def test_k_means_is_scikit_learn_s_from_the_same_start():
    patches = patches_of(400, size=6)
    start = first_codes(patches, 10, seed=1)
    rounds = []
    ours = k_means(patches, start, 100, lambda number, error: rounds.append(error))
    theirs = KMeans(10, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(patches.numpy())
    torch.testing.assert_close(ours.codes, torch.from_numpy(theirs.cluster_centers_), rtol=1e-4, atol=1e-4)
    assert ours.error == pytest.approx(theirs.inertia_ / 400, rel=1e-5)
    assert ours.used == 10
    assert rounds == sorted(rounds, reverse=True)
    assert len(rounds) == ours.rounds < 100


def test_a_code_without_patches_takes_the_farthest_patch():
    patches = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0]])
    found = k_means(patches, torch.tensor([[0.5], [10.5], [-500.0]]), 10)
    assert sorted(found.codes.flatten().tolist()) == [0.5, 10.5, 100.0]
    assert found.error == pytest.approx(4 * 0.25 / 5)


def test_too_few_patches_are_called_so():
    covariance = Covariance()
    covariance.add(patches_of(5))
    with pytest.raises(ValueError, match="5 patches cannot give 10 components"):
        principal_components(covariance, 10)
    with pytest.raises(ValueError, match="1 distinct patches cannot make 2 codes"):
        first_codes(torch.ones(5, 3), 2, seed=0)


# what is predicted


@pytest.mark.parametrize("norm_pix", [False, True])
def test_pca_loss_by_hand(norm_pix):
    model, (images, plan) = model_of("pca", norm_pix_loss=norm_pix), images_and_plan()
    output = model(images, plan)
    assert output.pred.shape == (8, 12, 96)
    patches = target_patches(images, plan.ids_mask, model.config)
    expected = (output.pred - (patches - model.target.mean) @ model.target.basis).square().mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    if norm_pix:
        assert patches.mean(-1).abs().max() < 1e-5


def test_tokens_and_their_cross_entropy_by_hand():
    model, (images, plan) = model_of("kmeans"), images_and_plan()
    output = model(images, plan)
    assert output.pred.shape == (8, 12, 8)
    patches, total = target_patches(images, plan.ids_mask, model.config), 0.0
    for b in range(8):
        for m in range(12):
            token = min(range(8), key=lambda v: (patches[b, m] - model.target.tokenizer.codebook[v]).norm().item())
            logits = output.pred[b, m].tolist()
            total += math.log(sum(math.exp(logit) for logit in logits)) - logits[token]
    assert output.loss.item() == pytest.approx(total / 96, rel=1e-5)


def test_the_dvae_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = DVAETokenizer(ModelConfig()).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert shapes["blocks.output.conv.b"] == (8192,)
    assert "blocks.group_1.block_1.id_path.w" not in shapes  # the width stays: no convolution
    assert len(shapes) == 2 * (1 + 8 * 4 + 3 + 1)


def test_dvae_tokens_are_those_of_the_published_formula():
    """Written again with functions: conv 7, groups of x + conv path / 64, max pooling between, ReLU, conv 1."""
    torch.manual_seed(0)
    tokenizer = DVAETokenizer(dataclasses.replace(TINY, patch_size=16), width=8)
    for buffer in tokenizer.buffers():
        buffer.copy_(torch.randn(buffer.shape) / math.prod(buffer.shape[1:]) ** 0.5)
    w = OrderedDict(tokenizer.named_buffers())

    def conv(x, name):
        return F.conv2d(x, w[f"{name}.w"], w[f"{name}.b"], padding=w[f"{name}.w"].shape[-1] // 2)

    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    small = F.interpolate(images.permute(0, 3, 1, 2) / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    x = conv(0.8 * small + 0.1, "blocks.input")
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            path = x
            for number in range(1, 5):
                path = conv(path.relu(), f"{name}.res_path.conv_{number}")
            x = (conv(x, f"{name}.id_path") if f"{name}.id_path.w" in w else x) + path / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    expected = conv(x.relu(), "blocks.output.conv").argmax(1).flatten(1)
    assert expected.shape == (2, 4)
    ids = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    assert torch.equal(tokenizer(images, ids), expected.gather(1, ids.long()))
    assert len(expected.unique()) > 1


@pytest.mark.parametrize("target", WIDTHS)
def test_three_steps_train_and_leave_the_target_as_it_is(target):
    model, (images, plan) = model_of(target), images_and_plan()
    optimizer = build_optimizer(model, OptimConfig())
    set_learning_rate(optimizer, 1e-3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids = torch.arange(8)
    batches = [Batch(images, plan, ids, ids, 0, number) for number in range(3)]
    losses = [update(model, optimizer, batch, world=ALONE, guard=Guard(CPU)).loss for batch in batches]
    assert losses[2] < losses[0]
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("target", ["pca", "kmeans"])
def test_the_model_is_one_graph(target):
    model, (images, plan) = model_of(target), images_and_plan()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, plan)
    assert torch.equal(compiled.loss, model(images, plan).loss)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("target", ["pca", "kmeans"])
def test_a_perfect_prediction_is_drawn_as_the_target_has_it(target, norm_pix):
    model, (images, plan) = model_of(target, norm_pix_loss=norm_pix), images_and_plan()
    patches = target_patches(images, plan.ids_mask, model.config)
    if target == "pca":  # a whole basis loses nothing
        model = build_model(dataclasses.replace(model.config, target_width=192))
        assert isinstance(model.target, PCATarget)
        model.target.basis.copy_(torch.linalg.qr(torch.randn(192, 192)).Q)
        pred = model.target.coefficients(patches)
    else:
        model = build_model(dataclasses.replace(model.config, target_width=96))
        dict(model.named_buffers())["target.tokenizer.codebook"].copy_(patches.flatten(0, 1))
        pred = F.one_hot(torch.arange(96), 96).float().view(8, 12, 96)
    true = target_patches(images, plan.ids_mask, dataclasses.replace(model.config, norm_pix_loss=False))
    torch.testing.assert_close(model.target.patches(pred, images, plan.ids_mask), true, rtol=1e-4, atol=1e-4)
    assert reconstruct(model, images, plan)[1].shape == images.shape


# files, runs and the command


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=40)


def run_cli(*options):
    return cli.run("target", [str(option) for option in options])


RUN = {"model__target": "pca", "model__target_width": 16, "model__norm_pix_loss": False}


def fit(dataset, out, kind="pca", width=16, *more):
    """Runs `patchmill target` for the model of `twenty_steps`."""
    size = ("--model.image-size", 32, "--model.patch-size", 8, "--model.no-norm-pix-loss")
    return run_cli(kind, "--data.path", dataset, "--out", out, *size, "--width", width, "--device", "cpu", *more)


def test_the_command_fits_what_training_sees_and_pretraining_takes_it(dataset, tmp_path, capsys):
    assert fit(dataset, tmp_path / "pca.safetensors") == 0
    said = capsys.readouterr().out
    assert "16 components of 1,024 patches explain" in said  # 64 crops of 16 patches: 40 images, filled up
    tensors = load_file(tmp_path / "pca.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"mean": (192,), "basis": (192, 16)}
    config = twenty_steps(dataset, tmp_path / "run", target_path=str(tmp_path / "pca.safetensors"), **RUN)
    pretrain(config)
    assert len(read_metrics(tmp_path / "run")) == 20
    # the checkpoint is whole without the file, for loading and for going on
    (tmp_path / "pca.safetensors").unlink()
    model, _ = checkpoint.load_model(tmp_path / "run")
    assert torch.equal(model.state_dict()["target.basis"], tensors["basis"])
    shutil.rmtree(checkpoint.folder(tmp_path / "run", 20))
    assert pretrain(config).resumed_from == checkpoint.folder(tmp_path / "run", 10)


def test_k_means_by_command(dataset, tmp_path, capsys):
    assert fit(dataset, tmp_path / "k.safetensors", "kmeans", 12, "--patches", 300, "--images", 40) == 0
    assert "12 codes (12 used) of 300 patches" in capsys.readouterr().out
    first = load_file(tmp_path / "k.safetensors")["tokenizer.codebook"]
    # as many patches of each image as it takes, where there are fewer images than may be looked at
    assert fit(dataset, tmp_path / "again.safetensors", "kmeans", 12, "--patches", 300) == 0
    assert torch.equal(first, load_file(tmp_path / "again.safetensors")["tokenizer.codebook"])
    run = {"model__target": "kmeans", "model__target_width": 12, "model__norm_pix_loss": False}
    summary = pretrain(twenty_steps(dataset, tmp_path / "run", target_path=str(tmp_path / "k.safetensors"), **run))
    assert summary.latest["loss"] < math.log(12) + 0.1


def test_the_dvae_goes_through_safetensors_alone(tmp_path, capsys):
    tensors = {name: tensor.contiguous() for name, tensor in model_of("dvae").target.tokenizer.state_dict().items()}
    save_file(tensors, tmp_path / "encoder.safetensors")
    assert run_cli("dvae", "--weights", tmp_path / "encoder.safetensors", "--out", tmp_path / "d.safetensors") == 0
    assert "DALL-E's encoder, 53,786,240 values" in capsys.readouterr().out
    model = model_of("dvae", seed=1)
    load_target(model, str(tmp_path / "d.safetensors"))
    assert all(torch.equal(tensors[name], t) for name, t in model.target.tokenizer.state_dict().items())
    torch.save(tensors["blocks.input.b"], tmp_path / "encoder.pkl")
    assert run_cli("dvae", "--weights", tmp_path / "encoder.pkl", "--out", tmp_path / "e.safetensors") == 2
    assert "pickles are never opened" in capsys.readouterr().err
    save_file({"blocks.input.b": torch.zeros(256)}, tmp_path / "part.safetensors")
    assert run_cli("dvae", "--weights", tmp_path / "part.safetensors", "--out", tmp_path / "e.safetensors") == 2
    assert "is not DALL-E's encoder: 73 of its 74 tensors are missing" in capsys.readouterr().err


def test_what_cannot_be_is_named_with_a_remedy(dataset, tmp_path):
    def refused(match, path="", **changes):
        with pytest.raises(ValueError, match=match):
            pretrain(twenty_steps(dataset, tmp_path / "run", target_path=str(path), **(RUN | changes)))

    file = tmp_path / "pca.safetensors"
    write_target({"mean": torch.zeros(192), "basis": torch.zeros(192, 16)}, twenty_steps("", "", **RUN).model, file)
    refused(r"model\.target pca comes from a file: give --target-path; `patchmill target pca --help`")
    refused(r"target_width 16 there, 8 here", file, model__target_width=8)
    refused(r"norm_pix_loss False there, True here", file, model__norm_pix_loss=True)
    refused(r"model\.target pixels needs no file", file, model__target="pixels", model__target_width=0)
    refused("is not a readable safetensors file", tmp_path / "none.safetensors")
    save_file({"mean": torch.zeros(192)}, tmp_path / "other.safetensors")
    refused("is not a target file of patchmill", tmp_path / "other.safetensors")
    refused(r"give at most 192", model__target_width=500)
    refused(r"model\.target dvae takes 3 channels, not 1", model__target="dvae", model__target_width=0, **GREY)
    refused(r"tokens cannot be drawn", model__target="dvae", model__target_width=0, train__picture_every_epochs=1.0)
    assert fit(dataset, tmp_path / "pca.pt") == 2
    assert run_cli("dvae", "--out", tmp_path / "d.safetensors") == 2


GREY = {"model__channels": 1, "model__mean": (0.5,), "model__std": (0.2,)}
