"""`patchmill profile` as a user meets it: all modes, the report and its page, plans, differences, refusals."""

import gzip
import json
import re

import pytest
import torch
from PIL import Image

from patchmill.tools import cli
from patchmill.tools.profiler import report as profile_report
from patchmill.tools.profiler.bottleneck import CORES, DEVICE, FRONT, STEP, THREADS, Model, Stage
from patchmill.tools.profiler.diff import compare
from patchmill.tools.profiler.loader import measure_loader
from patchmill.tools.profiler.loader_bound import DECODER, loader_model
from patchmill.tools.profiler.parts import count_forward, part_of, take_apart
from patchmill.tools.profiler.remedies import Trial, measure_trials, remedies, scaled
from patchmill.tools.profiler.step import fitting_batch, synthetic_batch
from patchmill.tools.profiler.timing import measured
from patchmill.tools.profiler.what_if import PlanConfig, predict
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import World
from patchmill.trainer.pretrain import build_trainee
from patchmill.trainer.recipes.pretrain import get_recipe, with_options
from tests.support.photos import make_dataset

CPU = torch.device("cpu")
SMALL = """
--recipe mae-tiny --device cpu --model.image-size 32 --model.embed-dim 32 --model.depth 1 --model.num-heads 2
--model.decoder-embed-dim 16 --model.decoder-num-heads 2 --data.workers 2 --batch 4 --seconds 0.2
""".split()  # noqa: SIM905 (a command line reads better so)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=24, sides=(150, 260))


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The folder of `patchmill profile all`."""
    folder = tmp_path_factory.mktemp("profile")
    assert run("all", *SMALL, "--data.path", dataset, "--out", folder, "--plan.gpus", 2, "--plan.price", 2) == 0
    return folder


def run(*argv):
    """The exit code of `patchmill profile`."""
    try:
        return cli.run("profile", [str(word) for word in argv])
    except SystemExit as ended:  # tyro's way out
        return ended.code


def test_all_modes_leave_a_report(whole):
    report = profile_report.read(whole)
    assert report["mode"] == "all"
    assert {stage["name"] for stage in report["loader"]["stages"]} >= {"plan", "storage", "decode", "resize", "masks"}
    assert 0 < report["loader"]["explained"] <= 1
    assert set(report["loader"]["storage"]) == {"cold", "warm"}
    assert {setting["name"] for setting in report["loader"]["sweep"]} == {"workers", "batch"}
    assert len(report["train"]["every_step"]) == report["train"]["steps"] >= 8
    assert report["step"]["mfu"] > 0
    assert len(report["kernels"]["operators"]) == 6
    assert report["verdict"]["stage"] in {stage["name"] for stage in report["model"]["stages"]}
    assert report["verdict"]["images_per_s"] == pytest.approx(min(report["model"]["supplies"].values()))


def test_the_page_needs_nothing_but_itself(whole):
    page = (whole / "report.html").read_text()
    report = profile_report.read(whole)
    assert report["verdict"]["sentence"].split(":")[0] in page
    assert page.count("<svg") == page.count("<figure>") == len(list(whole.glob("*.png"))) >= 8
    fetched = re.findall(r"(?:src|href)=[\"']([^\"'#]+)", page)
    assert fetched == []
    for path in whole.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_the_trace_has_the_parts_of_the_model_forward_and_backward(whole):
    with gzip.open(whole / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"encoder attention", "encoder attention, backward", "decoder MLP", "decoder MLP, backward"} <= names


def test_a_plan_says_what_was_measured_and_what_assumed(whole, capsys):
    report = profile_report.read(whole)
    assert any(line["basis"].startswith("assumed: MFU") for line in report["plan"]["lines"])
    assert any(line["basis"].startswith("measured:") for line in report["plan"]["lines"])
    assert report["plan"]["cost"] == pytest.approx(2 * report["plan"]["gpu_hours"])
    assert run("plan", whole, "--gpus", 8, "--images", 1000000, "--epochs", 10) == 0
    assert "1,000,000 x 10" in capsys.readouterr().out


def test_a_plan_is_the_slowest_of_step_cores_and_disk():
    report = {
        "device": "cpu",
        "flops_per_image": 58.5e9,
        "config": {"train": {"total_epochs": 800}},
        "machine": {"hardware": "a CPU"},
        "loader": {
            "decoder": "cpu",
            "images": 1_281_167,
            "image_bytes": 100e3,
            "stages": [{"name": "decode", "cpu": {"median": 1e-3}}],
        },
    }
    step = predict(report, PlanConfig(gpus=1, mfu=0.4, cores=64, disk_mb_per_s=5000))
    assert step["binds"] == "step"
    assert step["images_per_s"] == pytest.approx(0.4 * 989e12 / 58.5e9)
    assert step["hours"] == pytest.approx(1_281_167 * 800 / step["images_per_s"] / 3600)
    cores = predict(report, PlanConfig(gpus=8, cores=32, disk_mb_per_s=50_000))
    assert (cores["binds"], round(cores["images_per_s"])) == ("decode", 32_000)
    disk = predict(report, PlanConfig(gpus=8, cores=640, disk_mb_per_s=1000))
    assert (disk["binds"], round(disk["images_per_s"])) == ("reading", 10_000)


def test_a_report_differs_from_itself_in_nothing(whole, capsys):
    report = profile_report.read(whole)
    assert {change.verdict for change in compare(report, report)} == {"within noise"}
    assert run("diff", whole, whole) == 0
    assert "the same within noise" in capsys.readouterr().out


def test_a_difference_beyond_the_spread_is_told(whole):
    before = profile_report.read(whole)
    after = json.loads(json.dumps(before))
    for name in ("median", "low", "high"):
        after["step"]["seconds"][name] *= 100
    found = {change.name: change for change in compare(before, after)}
    assert found["step, an image"].verdict == "worse"
    assert found["step, an image"].ratio == pytest.approx(100)
    assert found["stage decode"].verdict == "within noise"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["loader", "--recipe", "mae-tiny"], "--data.path"),
        (["loader", "--recipe", "mae-tiny", "--data.path", "nowhere"], "nowhere"),
        (["nothing"], "profile what?"),
        (["step"], "say what to profile"),
        (["step", "--recipe", "mae-tiny", "--seconds", "0"], "--seconds"),
        (["step", "--recipe", "mae-tiny", "--out", "run"], "--out run holds a run"),
        (["step", "--recipe", "mae-tiny", "--out", "run/status.json"], "--out run/status.json is a file"),
        (["diff", "nowhere", "nowhere"], "no report at nowhere"),
        (["plan", "nowhere", "--gpus", "1"], "no report at nowhere"),
        (["plan", "nowhere", "--gpu", "H999"], "H999"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    assert run(*argv) == 2
    heard = capsys.readouterr()
    assert said in " ".join(heard.err.replace("│", " ").split())
    assert "Traceback" not in heard.err


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        profile_report.read(tmp_path)


def test_every_part_of_the_update_is_found_and_no_hook_stays():
    config = with_options(fitting_batch(get_recipe("mae-tiny"), CPU, 2), train__precision="fp32")
    trainee = build_trainee(config, World(0, 1, CPU))
    batch = synthetic_batch(config, CPU)
    trainee.update(batch)
    found = take_apart(trainee.model, lambda: trainee.update(batch), CPU, None, steps=1)
    parts = {part["name"]: part for part in found["parts"]}
    assert set(parts) >= {
        "patch gather", "patch embed", "encoder attention", "encoder MLP", "encoder norms, residuals", "decoder embed",
        "unshuffle", "decoder attention", "decoder MLP", "decoder norms, residuals", "head", "loss", "guard",
        "optimizer",
    }  # fmt: skip
    with_backward = {name for name, part in parts.items() if part["backward"] > 0}
    assert with_backward >= {"encoder attention", "decoder MLP", "head", "loss", "unshuffle", "patch embed"}
    assert not with_backward & {"guard", "optimizer", "patch gather"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainee.model.modules())


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("", "rest of the model"),
        ("blocks.3.mlp", "encoder MLP"),
        ("blocks.3.mlp.fc1", None),
        ("blocks", None),
        ("norm", "encoder norms, residuals"),
        ("decoder_blocks.0.attn", "decoder attention"),
        ("decoder_pred", "head"),
    ],
)
def test_modules_and_their_parts(module, part):
    assert part_of(module) == part


def test_flops_of_a_part_are_counted():
    config = fitting_batch(PretrainConfig(model=ModelConfig(depth=1, decoder_depth=1)), CPU, 2)
    model = build_trainee(config, World(0, 1, CPU)).model
    batch = synthetic_batch(config, CPU)
    counts = count_forward(model, lambda: model(batch.images, batch.plan))
    assert counts["encoder MLP"][0] == 2 * (2 * 50) * 768 * 4 * 768 * 2
    assert counts["patch embed"][0] == 2 * (2 * 49) * 768 * 768
    weights = 4 * 2 * 768 * 4 * 768
    assert counts["encoder MLP"][1] > weights
    assert counts["loss"] == [0, counts["loss"][1]]


def test_smaller_shards_cost_less_and_remedies_are_ranked(dataset, tmp_path):
    config = with_options(
        get_recipe("mae-tiny"), model__image_size=32, data__path=str(dataset), train__global_batch=4, out=str(tmp_path)
    )
    trials = {trial.how: trial for trial in measure_trials(config, CPU, 0.2)}
    smaller = trials["patchmill shard --resize shorter-side --size 37"]
    assert smaller.factors["decode"] < 1
    assert smaller.factors["storage"] < 0.5
    assert "resize" in trials["--data.interpolation bilinear"].factors


def test_gains_are_ratios_of_bounds():
    model = Model([Stage("decode", {THREADS: 3e-3, CORES: 1e-3}), Stage(STEP, {DEVICE: 1e-3})],
                  {THREADS: 1, CORES: 4, DEVICE: 1})  # fmt: skip
    trial = Trial("half the pixels", "--size 1", {"decode": 0.5})
    found = {remedy.how: remedy for remedy in remedies(model, [trial], repeats=1)}
    assert found["--size 1"].gain == pytest.approx(2)
    assert found["--data.workers 2"].gain == pytest.approx(2)
    assert found["--data.workers 4"].gain == pytest.approx(3)  # then the step binds
    assert [remedy.gain for remedy in remedies(model, [trial], 1)] == sorted(
        (remedy.gain for remedy in found.values()), reverse=True
    )
    on_cores = scaled(model, {"decode": 0.5}, {"decode": 1.0})
    assert on_cores.held(THREADS) == pytest.approx(1.5e-3)
    assert on_cores.held(CORES) == pytest.approx(1e-3)


def test_medians_and_quartiles():
    assert measured([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0, "repeats": 1}
    found = measured([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found["median"], found["repeats"]) == (3.0, 5)
    assert 1.0 <= found["low"] <= 2.0 <= 4.0 <= found["high"] <= 100.0


def loader_profile(path, out, decoder):
    config = with_options(
        get_recipe("mae-tiny"), model__image_size=32, data__path=str(path), data__decoder=decoder, data__workers=2,
        train__global_batch=4, out=str(out),
    )  # fmt: skip
    return measure_loader(config, CPU, 0.2)


def test_dali_is_measured_as_one_graph(dataset, tmp_path):
    profile = loader_profile(dataset, tmp_path, "dali")
    assert profile["explained"] is None
    holds = {stage.name: stage.holds for stage in loader_model(profile).stages}
    assert DECODER in holds["decode"]
    assert THREADS in holds["checks"]


def test_a_resident_dataset_is_cut_by_the_loaders_thread(tmp_path):
    profile = loader_profile(make_dataset(tmp_path, count=12, sides=(48, 48)), tmp_path, "resident")
    model = loader_model(profile)
    assert model.held(THREADS) == 0
    assert next(stage for stage in model.stages if stage.name == "decode").holds[FRONT] > 0


def test_plain_tars_have_no_storage_of_their_own_to_measure(tmp_path):
    (shard,) = make_dataset(tmp_path, count=24, shard_size_mb=10).glob("*.tar")
    profile = loader_profile(shard, tmp_path, "cpu")
    assert profile["storage"] == {}
    assert {"decode", "resize"} <= {stage["name"] for stage in profile["stages"]}
