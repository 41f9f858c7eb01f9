"""The commands of evaluation, and the table of their results."""

import json

import pytest
from PIL import Image

from patchmill.tools import cli
from patchmill.tools.results import gather, to_markdown
from patchmill.trainer.recipes.evaluate import FINETUNE_RECIPES, PROBE_RECIPES
from tests.support.eval_setup import files_of, make_setup


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return make_setup(tmp_path_factory.mktemp("setup"))


def command(setup, name, *options, capsys):
    data = ["--data.path", setup / "train" / "dataset", "--test.path", setup / "test" / "dataset"]
    line = [*data, "--subject.checkpoint", setup / "encoder.safetensors", "--device", "cpu", *options]
    code = cli.run(name, [str(option) for option in line])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def write_result(folder, protocol, top1, run, start="pretrained", test="val", seed=0):
    folder.mkdir(parents=True)
    results = {"protocol": protocol, "top1": top1, "start": start, "checkpoint": f"x/{run}.pth", "test": test}
    results |= {"seed": seed} | ({"pretrained": {"run": run, "seed": run[-1]}} if start != "scratch" else {})
    (folder / "results.json").write_text(json.dumps(results))


def test_one_command_each_and_one_table(setup, capsys):
    short = ["--fit.global-batch", 16, "--fit.epochs", 1]
    printed = command(setup, "knn", "--neighbours", 3, 5, capsys=capsys)
    assert "knn, pretrained weights" in printed
    assert "k 5:" in printed
    command(setup, "knn", "--subject.random-init", "--neighbours", 3, capsys=capsys)
    command(setup, "probe", "--recipe", "probe-cifar-nano", *short, capsys=capsys)
    command(setup, "finetune", "--recipe", "finetune-cifar-nano", *short, "--partial", 2, 0, capsys=capsys)
    runs = {"knn": 0, "knn-random": 0, "probe": 2, "partial/blocks-0": 2, "partial/blocks-2": 2}
    for name, more in runs.items():
        run = setup / f"encoder-{name}"
        results = json.loads((run / "results.json").read_text())
        assert results["test_samples"] == 21
        assert len(files_of(run)) == 4 + more
        with Image.open(run / "confusion.png") as picture:
            assert picture.size == (780, 660)
        matrix = json.loads((run / "confusion.json").read_text())
        assert len(matrix["classes"]) == len(matrix["matrix"]) == 6
        right = sum(matrix["matrix"][i][i] for i in range(6))
        assert results["top1"] == right / 21
    assert (setup / "encoder-partial" / "sweep.png").is_file()
    (setup / "other").symlink_to(setup / "train" / "dataset")
    tests = ["--tests", setup / "test" / "dataset", setup / "other", "--crop-fraction", 1.0]
    assert cli.run("evaluate", [str(o) for o in ["--classifier", setup / "encoder-probe", *tests]]) == 0
    first, again = (
        json.loads((setup / "encoder-probe" / part / "results.json").read_text()) for part in (".", "on-dataset")
    )
    for name in ("protocol", "seed", "start", "checkpoint", "top1"):
        assert again[name] == first[name], name
    assert (setup / "encoder-probe" / "on-other" / "confusion.png").is_file()
    assert cli.run("results", [str(setup), "--figure", str(setup / "figure.png")]) == 0
    table = capsys.readouterr().out
    for column in ("knn on dataset", "probe on dataset (encoder-probe)", "probe on other", "partial-2 on dataset"):
        assert f"| {column} |" in table
    assert "| encoder, random weights |" in table
    assert (setup / "figure.png").is_file()


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    for seed, top1 in enumerate((0.5, 0.6, 0.7)):
        write_result(tmp_path / f"mae-s{seed}" / "knn", "knn", top1, f"mae-s{seed}")
    write_result(tmp_path / "mae-s0" / "floor", "knn", 0.25, "mae-s0", start="random")
    write_result(tmp_path / "mae-s0" / "p", "partial-0.5", 0.55, "mae-s0")
    write_result(tmp_path / "scratch", "finetune", 0.4, "", start="scratch")
    assert to_markdown(gather(tmp_path)).splitlines() == [
        "| top-1 (%) | knn | finetune | partial-0.5 |",
        "|---|---|---|---|",
        "| from scratch | - | 40.00 | - |",
        "| mae | 60.00 ± 10.00 (3) | - | 55.00 |",
        "| mae, random weights | 25.00 | - | - |",
    ]


def test_other_test_data_and_other_options_are_columns_of_their_own(tmp_path):
    write_result(tmp_path / "a" / "finetune", "finetune", 0.5, "mae-s0")
    write_result(tmp_path / "b" / "finetune", "finetune", 0.6, "mae-s1")
    assert gather(tmp_path) == {"mae": {"finetune": [0.5, 0.6]}}
    write_result(tmp_path / "a" / "long", "finetune", 0.7, "mae-s0")
    assert gather(tmp_path) == {"mae": {"finetune (finetune)": [0.5, 0.6], "finetune (long)": [0.7]}}
    write_result(tmp_path / "a" / "flowers", "knn", 0.1, "mae-s0", test="flowers")
    assert set(gather(tmp_path)["mae"]) == {
        "finetune on val (finetune)",
        "finetune on val (long)",
        "knn on flowers",
    }
    (tmp_path / "a" / "other").mkdir()
    (tmp_path / "a" / "other" / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a results file of Patchmill"):
        gather(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("results", ["."], "no results.json below"),
        ("probe", ["--test.path", "x"], "--data.path DIR"),
        ("finetune", ["--recipe", "finetune-vit"], "no recipe 'finetune-vit'; did you mean finetune-vit-"),
        ("finetune", ["--partial", "half"], "give numbers of blocks"),
        ("evaluate", ["--classifier", "nowhere", "--tests", "x"], "no classifier nowhere"),
    ],
)
def test_mistakes_are_one_line(name, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(name, options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_published_recipes():
    """The values of Tables 9 to 11 and of the published commands."""
    for name, rate, decay, drop, epochs in (
        ("b16", 5e-4, 0.65, 0.1, 100),
        ("l16", 1e-3, 0.75, 0.2, 50),
        ("h14", 1e-3, 0.75, 0.3, 50),
    ):
        config = FINETUNE_RECIPES[f"finetune-vit-{name}"]()
        assert (config.optim.blr, config.layer_decay, config.drop_path, config.fit.epochs) == (
            rate,
            decay,
            drop,
            epochs,
        )
        assert (config.fit.global_batch, config.optim.weight_decay, config.optim.betas) == (1024, 0.05, (0.9, 0.999))
        assert (config.augment.mixup, config.augment.cutmix, config.augment.smoothing) == (0.8, 1.0, 0.1)
        assert (config.augment.ops, config.augment.magnitude, config.augment.erase) == (2, 9.0, 0.25)
        assert (config.optim.min_lr, config.optim.warmup_epochs, config.pool) == (1e-6, 5, "mean")
    for name, epochs in (("b16", 90), ("l16", 50), ("h14", 50)):
        probe = PROBE_RECIPES[f"probe-vit-{name}"]()
        assert (probe.optim.blr, probe.fit.global_batch, probe.fit.epochs) == (0.1, 16384, epochs)
        assert (probe.optim.weight_decay, probe.optim.warmup_epochs, probe.pool) == (0.0, 10, "cls")
        assert (probe.data.crop_rule, probe.data.scale) == ("tf", (0.08, 1.0))
    config = FINETUNE_RECIPES["scratch-vit-b16"]()
    assert (config.optim.blr, config.optim.weight_decay, config.fit.global_batch) == (1e-4, 0.3, 4096)
    assert (config.fit.epochs, config.average, config.layer_decay) == (300, 0.9999, 1.0)
