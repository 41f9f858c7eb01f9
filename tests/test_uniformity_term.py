"""U-MAE's term: the published numbers, one value on any number of ranks, and what its two forms do to gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.model_file import parse_model_config
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.world import join_world
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.uniformity import Form, uniformity_loss
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks
from tests.support.small_runs import twenty_steps

GOLDEN = Path(__file__).parent / "golden" / "uniformity.safetensors"
FORMS: tuple[Form, ...] = ("as-published", "global-gradient")
SMALL = ModelConfig(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16)


@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_equal_the_published_ones(form):
    golden = load_file(GOLDEN)
    features = golden["features"].requires_grad_()
    loss = uniformity_loss(features, form)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-6)
    assert (gradient - golden["grad"]).norm() < 1e-6 * golden["grad"].norm()


def test_the_term_is_the_mean_squared_cosine_of_all_pairs():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])  # squared cosines: 1 each alone, 0, 1/2, 1/2
    assert uniformity_loss(features).item() == pytest.approx((3 + 2 * (0 + 0.5 + 0.5)) / 9)
    assert uniformity_loss(torch.eye(5)).item() == pytest.approx(1 / 5)
    assert uniformity_loss(torch.ones(4, 3)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    features = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = uniformity_loss(features)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(uniformity_loss(features.double()).item(), rel=1e-6)
    assert uniformity_loss(features.double()).dtype == torch.float64


def features_of(rank):
    """Features [6, 16] in fp64, others on each rank."""
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def on_two_ranks(rank, dataset, folder):
    """Value and gradient of both forms, eager and compiled; then short runs."""
    next_world()
    join_world("cpu")
    found: dict[str, torch.Tensor] = {}
    compiled = torch.compile(uniformity_loss, fullgraph=True, backend="aot_eager")
    for form in FORMS:
        for name, call in (("eager", uniformity_loss), ("compiled", compiled)):
            features = features_of(rank).requires_grad_()
            loss = call(features, form)
            (gradient,) = torch.autograd.grad(loss, features)
            found |= {f"{name}.{form}.loss": loss.detach(), f"{name}.{form}.grad": gradient}
    save_file(found, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()
    for name, changes in RUNS.items():
        next_world()
        pretrain(twenty_steps(dataset, folder / name, **changes))


GLOBAL = {"model__uniformity_weight": 0.5, "model__uniformity_form": "global-gradient"}
RUNS: dict[str, dict[str, Any]] = {
    "global-ddp": GLOBAL,
    "global-fsdp": GLOBAL | {"train__parallel": "fsdp"},
    "published-ddp": {"model__uniformity_weight": 0.5},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of what two ranks found, and of runs by one and two."""
    folder = tmp_path_factory.mktemp("uniformity")
    dataset = make_dataset(tmp_path_factory.mktemp("data"), count=40)
    pretrain(twenty_steps(dataset, folder / "global-one", **GLOBAL))
    run_ranks(2, 1 + len(RUNS), on_two_ranks, dataset, folder)
    return folder


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_the_forms_differ_by_the_number_of_ranks_in_the_gradient_alone(how, runs):
    every = torch.cat([features_of(0), features_of(1)]).requires_grad_()
    whole = (F.normalize(every, dim=-1) @ F.normalize(every, dim=-1).T).square().mean()
    whole.backward()
    assert every.grad is not None
    found = [load_file(runs / f"rank{rank}.safetensors") for rank in range(2)]
    for form, ranks in zip(FORMS, (1, 2), strict=True):
        losses = [each[f"{how}.{form}.loss"].item() for each in found]
        assert losses == pytest.approx([whole.item()] * 2, rel=1e-12)
        # DDP will divide by the two ranks: only the global form then has the gradient of the whole
        gradient = torch.cat([each[f"{how}.{form}.grad"] for each in found])
        torch.testing.assert_close(gradient, ranks * every.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["global-ddp", "global-fsdp"])
def test_in_the_global_form_a_run_is_the_same_on_any_number_of_ranks(name, runs):
    one, two = read_metrics(runs / "global-one"), read_metrics(runs / name)
    assert len(one) == len(two) > 0
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "uniformity", "reconstruction", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (key, ours["step"])


def test_the_published_form_gives_the_term_less_weight_on_more_ranks(runs):
    published, whole = (read_metrics(runs / name) for name in ("published-ddp", "global-ddp"))
    assert published[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-3)  # but for the second norm
    assert published[0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-3)


def test_the_metrics_tell_the_term_from_the_reconstruction(runs):
    for line in read_metrics(runs / "global-one"):
        assert line["loss"] == pytest.approx(line["reconstruction"] + 0.5 * line["uniformity"])
        assert 0 < line["uniformity"] <= 1
    assert checkpoint.load_model(runs / "global-one")[0].config.uniformity_weight == 0.5


def outputs(**changes):
    """Outputs of models with the same weights, by the options of the term."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    plan = MaskPlan.draw(MaskConfig(), seed=0, epoch=0, sample_ids_B=torch.arange(4), grid_hw=SMALL.grid_hw)
    model = build_model(ModelConfig(**(vars(SMALL) | changes)))
    torch.nn.init.uniform_(model.norm.weight)
    torch.nn.init.normal_(model.norm.bias)
    return model, model(images, plan)


def test_the_model_adds_the_weighted_term_of_its_class_tokens():
    _, plain = outputs()
    assert plain.uniformity is None
    for form in FORMS:
        model, output = outputs(uniformity_weight=0.1, uniformity_form=form)
        cls = output.latent[:, 0]
        term = uniformity_loss(model.norm(cls) if form == "as-published" else cls)
        torch.testing.assert_close(output.uniformity, term)
        torch.testing.assert_close(output.loss, plain.loss + 0.1 * term)


def test_the_whole_model_stays_one_graph():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**(vars(SMALL) | {"uniformity_weight": 0.1})))
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    plan = MaskPlan.draw(MaskConfig(), seed=0, epoch=0, sample_ids_B=torch.arange(4), grid_hw=SMALL.grid_hw)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, plan)
    assert torch.equal(compiled.loss, model(images, plan).loss)


def test_recipes_hold_the_published_setting():
    for name in ("umae-vit-b16", "umae-vit-l16"):
        config = get_recipe(name)
        assert (config.model.uniformity_weight, config.model.uniformity_form) == (0.01, "as-published")
        assert (config.train.global_batch, config.train.total_epochs, config.mask.ratio) == (1024, 200, 0.75)
    ours, plain = get_recipe("umae-cifar-nano-p4"), get_recipe("mae-cifar-nano-p4")
    assert (ours.train, ours.optim, ours.data) == (plain.train, plain.optim, plain.data)


def test_illegal_options_are_named():
    with pytest.raises(ValueError, match="uniformity_weight is -1; it must not be negative"):
        ModelConfig(uniformity_weight=-1)
    with pytest.raises(ValueError, match="uniformity_form must be one of as-published, global-gradient"):
        parse_model_config(json.dumps({"uniformity_form": "none"}), Path("file"))
