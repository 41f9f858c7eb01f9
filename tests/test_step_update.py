"""One update: nothing waits for the device, what is not finite or spikes is left out, parts add up to the whole."""

import importlib.util
import sys
import types

import pytest
import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.pipeline.waits import Waits
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.engine import step as step_module
from patchmill.trainer.engine.optim import build_optimizer, find_apex
from patchmill.trainer.engine.step import Guard, set_learning_rate, update
from patchmill.trainer.loop import _check_skipped
from patchmill.trainer.metrics import Metrics, mask_token_norm, read_lines
from patchmill.trainer.model.mae import MAEOutput, MaskedAutoencoder
from tests.support.devices import ALONE, CPU, no_host_sync
from tests.support.small_models import SMALLEST


def make(seed=0, clip_grad=None):
    torch.manual_seed(seed)
    model = MaskedAutoencoder(SMALLEST)
    optimizer = build_optimizer(model, OptimConfig(clip_grad=clip_grad))
    set_learning_rate(optimizer, 1e-3)
    return model, optimizer


def batch_of(epoch=0, count=8):
    generator = torch.Generator().manual_seed(epoch)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(count)
    plan = MaskPlan.draw(MaskConfig(), seed=0, epoch=epoch, sample_ids_B=ids, grid_hw=SMALLEST.grid_hw)
    return Batch(images, plan, ids, ids, epoch, 0)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def scaled_loss(model, factor):
    """The same model, whose loss and gradient are multiplied by `factor`."""

    def forward(images, plan):
        output = model(images, plan)
        return MAEOutput(output.loss * factor, output.pred, output.latent)

    return forward


def test_the_check_itself_sees_a_value_that_leaves(monkeypatch):
    with no_host_sync(monkeypatch), pytest.raises(AssertionError, match="wait for the device"):
        torch.ones(()).item()
    with no_host_sync(monkeypatch), pytest.raises(AssertionError, match="wait for the device"):
        torch.ones(2).nonzero()


@pytest.mark.parametrize(
    ("precision", "options"),
    [(None, {}), (torch.bfloat16, {"clip_grad": 0.1}), (torch.bfloat16, {"accum_steps": 2})],
)
def test_nothing_waits_for_the_device_between_log_steps(precision, options, monkeypatch, tmp_path):
    """The whole of what the loop does with device tensors in a step; the flush then takes all values over at once."""
    model, optimizer = make()
    guard = Guard(CPU, spike_factor=2.0, named_parameters=model.named_parameters())
    metrics = Metrics(tmp_path, ALONE, global_batch=8, flops_per_image=1.0, tensorboard=False, wandb=None)
    metrics.start(Waits(CPU))
    # Adam's first step makes its state, and the host reads constants for it
    update(model, optimizer, batch_of(), world=ALONE, guard=guard, autocast=precision, **options)
    batches = [batch_of(epoch) for epoch in range(3)]
    with no_host_sync(monkeypatch):
        for number, batch in enumerate(batches, 1):
            set_learning_rate(optimizer, 1e-3 * number)
            values = update(model, optimizer, batch, world=ALONE, guard=guard, autocast=precision, **options)
            metrics.add(number, 0.1, 1e-3, values, batch.sample_ids)
    metrics.flush(Waits(CPU), guard.names, **mask_token_norm(model))
    metrics.close()
    assert metrics.latest["step"] == 3
    assert metrics.latest["mask_token_norm"] == pytest.approx(model.mask_token.norm().item())


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_what_is_not_finite_changes_nothing(factor, clip_grad):
    model, optimizer = make()
    guard = Guard(CPU)
    update(model, optimizer, batch_of(0), world=ALONE, guard=guard)
    before, moments = weights(model), optimizer.state[model.mask_token]["exp_avg"].clone()
    values = update(scaled_loss(model, factor), optimizer, batch_of(1), world=ALONE, guard=guard, clip_grad=clip_grad)
    assert values.skipped == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(moments, optimizer.state[model.mask_token]["exp_avg"])
    assert optimizer.state[model.mask_token]["step"] == 1
    assert update(model, optimizer, batch_of(2), world=ALONE, guard=guard).skipped == 0
    assert not torch.equal(before["mask_token"], model.mask_token)


def test_accumulated_parts_are_the_whole_batch():
    (one, one_optimizer), (parts, parts_optimizer) = make(), make()
    for epoch in range(3):
        a = update(one, one_optimizer, batch_of(epoch), world=ALONE, guard=Guard(CPU))
        b = update(parts, parts_optimizer, batch_of(epoch), world=ALONE, guard=Guard(CPU), accum_steps=4)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-6)
        assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-5)


def test_clipping_bounds_the_gradient_but_reports_the_norm_before(monkeypatch):
    model, optimizer = make()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        step_module,
        "_apply",
        lambda optimizer, skipped: seen.extend(p.grad for p in model.parameters() if p.requires_grad),
    )
    values = update(model, optimizer, batch_of(), world=ALONE, guard=Guard(CPU), clip_grad=0.01)
    assert values.grad_norm > 0.01
    assert torch.nn.utils.get_total_norm(seen).item() == pytest.approx(0.01, rel=1e-4)


def test_a_spike_is_left_out_once_and_training_goes_on(monkeypatch):
    monkeypatch.setattr(step_module, "SPIKE_WARMUP_STEPS", 5.0)
    model, optimizer = make()
    guard = Guard(CPU, spike_factor=3.0)
    skipped = []
    for epoch in range(12):
        factor = 1e4 if epoch in (2, 8) else 1.0  # the first comes before the usual loss is known
        before = weights(model)
        values = update(scaled_loss(model, factor), optimizer, batch_of(epoch), world=ALONE, guard=guard)
        skipped.append(int(values.skipped))
        changed = not torch.equal(before["mask_token"], model.mask_token)
        assert changed == (not values.skipped)
        if epoch == 2:
            guard.state["usual_loss"].fill_(1.0)  # forget that first spike
    assert skipped == [0] * 8 + [1] + [0] * 3


def test_fp16_scales_the_loss_and_backs_off_from_overflow(monkeypatch):
    monkeypatch.setattr(step_module, "FP16_GROWTH_STEPS", 2.0)
    (half, half_optimizer), (full, full_optimizer) = make(), make()
    guard, plain = Guard(CPU, fp16=True), Guard(CPU)
    a = update(half, half_optimizer, batch_of(0), world=ALONE, guard=guard, autocast=torch.float16)
    b = update(full, full_optimizer, batch_of(0), world=ALONE, guard=plain)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=2e-3)  # fp16 has 11 bits
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-2)
    update(half, half_optimizer, batch_of(1), world=ALONE, guard=guard, autocast=torch.float16)
    assert guard.state["loss_scale"] == 2.0**17
    before = weights(half)
    values = update(
        scaled_loss(half, 1e30), half_optimizer, batch_of(2), world=ALONE, guard=guard, autocast=torch.float16
    )
    assert values.skipped == 1
    assert guard.state["loss_scale"] == 2.0**16
    assert torch.equal(before["mask_token"], half.mask_token)


def run_with_bad_gradients(run, poison, losses=(1.0,), **guard_options):
    """Trains one step per factor of the loss; `poison` maps a parameter's name to a value put into its gradient."""
    model, optimizer = make()
    guard = Guard(CPU, named_parameters=model.named_parameters(), **guard_options)
    for name, value in poison.items():

        def put(grad, value=value):
            changed = grad.clone()
            changed.view(-1)[-1] = value
            return changed

        model.get_parameter(name).register_hook(put)
    metrics = Metrics(run, ALONE, global_batch=8, flops_per_image=1.0, tensorboard=False, wandb=None)
    for number, factor in enumerate(losses, 1):
        batch = batch_of(number)
        values = update(scaled_loss(model, factor), optimizer, batch, world=ALONE, guard=guard)
        metrics.add(number, 0.1, 1e-3, values, batch.sample_ids)
    metrics.flush(Waits(CPU), guard.names)
    metrics.close()
    return metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["blocks.0.attn.qkv.weight"], "blocks.0.attn.qkv.weight"),
        (["blocks.0.norm1.bias", "decoder_blocks.0.mlp.fc1.bias", "cls_token"], "decoder_blocks.0.mlp.fc1.bias"),
        (["cls_token"], "cls_token"),
    ],
)
def test_the_first_gradient_that_is_not_finite_is_named(names, first, value, tmp_path):
    """First in the order of the backward pass: from there it spreads to the layers below."""
    metrics = run_with_bad_gradients(tmp_path, dict.fromkeys(names, value))
    (entry,) = read_lines(tmp_path / "skipped.jsonl")
    assert entry["not_finite"] == f"gradient of {first}"
    assert metrics.why_skipped == f"gradient of {first} not finite"
    assert len(entry["samples"]) == 8
    with pytest.raises(FloatingPointError, match=rf"1 updates in a row .*\(last: gradient of {first} not finite\)"):
        _check_skipped(metrics, 1)


def test_a_loss_a_norm_and_a_spike_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "SPIKE_WARMUP_STEPS", 2.0)
    run_with_bad_gradients(tmp_path, {}, [1.0, 1.0, 1e4, float("nan")], spike_factor=3.0)
    assert [entry["not_finite"] for entry in read_lines(tmp_path / "skipped.jsonl")] == [None, "loss"]
    half = 2.0**63  # its square is finite in fp32, four of them are not
    names = ["blocks.0.norm1.bias", "blocks.0.norm2.bias", "decoder_pred.bias", "norm.bias"]
    run_with_bad_gradients(tmp_path, dict.fromkeys(names, half))
    entry = read_lines(tmp_path / "skipped.jsonl")[-1]
    assert entry["not_finite"] == "gradient norm"


def test_the_norm_is_that_of_torch():
    model, optimizer = make()
    batch = batch_of()
    model(batch.images, batch.plan).loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    expected = torch.nn.utils.get_total_norm(gradients)
    optimizer.zero_grad()
    assert torch.equal(update(model, optimizer, batch, world=ALONE, guard=Guard(CPU)).grad_norm, expected)


def test_an_apex_that_is_not_nvidia_s_is_called_so(monkeypatch):
    """PyPI's apex is another project: it has no `apex.optimizers`."""
    other = types.ModuleType("apex")
    other.__path__, other.__spec__ = [], importlib.util.spec_from_loader("apex", loader=None, is_package=True)
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(ValueError, match=r"not NVIDIA's.*pip uninstall apex"):
        find_apex()


def test_an_apex_without_its_cuda_code_is_called_so(monkeypatch):
    for name in ("apex", "apex.optimizers"):
        module = types.ModuleType(name)
        module.__path__, module.__spec__ = [], importlib.util.spec_from_loader(name, loader=None, is_package=True)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match="amp_C is missing"):
        find_apex()
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    assert find_apex() is sys.modules["apex.optimizers"]
