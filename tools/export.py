"""Exports checkpoints for facebookresearch/mae, timm, transformers, detectron2, mmseg and ONNX, with a model card.

trainer/checkpoints/export.py writes the files of each format; this file parses options and writes README.md, whose
front matter huggingface_hub reads. The card gives no paths, host names or addresses of the run: of the data it names
only the folder and the manifest's hash. The folder appears when all its files are written.
"""

import json
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w

from patchmill import __version__
from patchmill.pipeline.atomic import whole_folder
from patchmill.pipeline.read.manifest import MANIFEST_NAME, Manifest
from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.reshape import CheckpointPath, Reshape, read_reshaped
from patchmill.trainer.checkpoints.export import Pool, write_files
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import build_encoder
from patchmill.trainer.checkpoints.onnx_export import export_onnx
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.toml import from_toml, to_toml
from patchmill.trainer.metrics import read_metrics

LIBRARIES = {"hf": "transformers", "timm": "timm", "onnx": "onnx"}
USAGE = {
    "patchmill": "from patchmill.trainer.checkpoints.interop import load_encoder\n\n"
    'encoder = load_encoder("THIS_FOLDER")\ncls_token, patches = encoder(images)  # uint8 [B, H, W, C]',
    "mae": 'checkpoint = torch.load("model.pth", map_location="cpu")["model"]\n'
    "model.load_state_dict(checkpoint, strict=False)  # models_mae or models_vit of facebookresearch/mae",
    "timm": 'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)\nfeatures = model(images)',
    "hf": 'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("THIS_FOLDER")',
    "detectron2": '# projects/ViTDet\ntrain.init_checkpoint = "THIS_FOLDER/model.pth"',
    "mmseg": 'backbone = dict(type="MAE", init_values=1.0, '
    'init_cfg=dict(type="Pretrained", checkpoint="THIS_FOLDER/model.pth"))',
    "onnx": 'session = onnxruntime.InferenceSession("THIS_FOLDER/encoder.onnx")\n'
    'class_token, patch_tokens = session.run(None, {{"images": images}})  # uint8 [B, H, W, C], any B',
}


@dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint in another project's format, into a folder with a model card, ready to upload to a hub.

    Example:
        patchmill export runs/b16 --format hf --out exported/
        patchmill export runs/b16 --format timm --to.image-size 448 --out exported448/
    """

    checkpoint: CheckpointPath
    """run folder (newest checkpoint), checkpoints/step-XXXXXXXX, or a file or folder of any known format"""
    format: Literal["mae", "timm", "hf", "detectron2", "mmseg", "onnx", "patchmill"]
    """timm, detectron2, mmseg and onnx hold the encoder alone"""
    out: str
    """folder to make"""
    encoder_only: bool = False
    """leave the decoder out of mae, hf or patchmill"""
    pool: Pool = "token"
    """timm only: avg names the last norm fc_norm, for models that average the patches"""
    to: Reshape = field(default_factory=Reshape)
    source: Hints = field(default_factory=Hints)


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(ExportConfig, "patchmill export", argv)
    if config.pool != "token" and config.format != "timm":
        raise ValueError(f"--pool {config.pool} is for --format timm; {config.format} has no choice of pooling")
    checkpoint = read_reshaped(config.checkpoint, config.source, config.to, encoder_only=config.encoder_only)
    provenance = find_provenance(checkpoint.file)
    with whole_folder(Path(config.out)) as folder:
        if config.format == "onnx":
            error = export_onnx(build_encoder(checkpoint), folder)
            print(f"onnxruntime agrees with PyTorch within {error:.1e} (relative, batches of 1 and 3)")
            has_decoder = False
        else:
            write_files(folder, config.format, checkpoint, pool=config.pool)
            has_decoder = checkpoint.has_decoder and config.format in ("mae", "hf", "patchmill")
        write_card(folder, config.format, checkpoint.config, has_decoder, provenance)
    files = ", ".join(sorted(path.name for path in Path(config.out).iterdir()))
    print(f"wrote {config.out} ({config.format}, {'whole model' if has_decoder else 'encoder'}): {files}")
    return 0


class Provenance(NamedTuple):
    """Where a model comes from, as far as its run folder tells."""

    step: int | None = None
    recipe: str | None = None
    """config.toml without paths"""
    data: str | None = None
    """dataset and its manifest's hash, in words"""
    metrics: dict[str, float] | None = None
    """the line of metrics.jsonl at this step"""


def find_provenance(model_file: Path) -> Provenance:
    """What the run folder around RUN/checkpoints/step-XXXXXXXX/model.safetensors says; nothing for any other file."""
    run, state_file = model_file.parent.parent.parent, model_file.with_name("state.json")
    if not (state_file.is_file() and (run / "config.toml").is_file()):
        return Provenance()
    state = json.loads(state_file.read_text(encoding="utf-8"))
    config = from_toml(run / "config.toml")
    recipe = _without_places(tomllib.loads(to_toml(config)))
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return Provenance(
        step=state["step"],
        recipe=tomli_w.dumps({name: value for name, value in recipe.items() if name not in ("out", "resume")}),
        data=_describe_data(Path(config.data.path), state.get("loader", {}).get("fingerprint", {})),
        metrics=next((line for line in reversed(lines) if line["step"] == state["step"]), None),
    )


def write_card(folder: Path, target: str, config: ModelConfig, has_decoder: bool, provenance: Provenance) -> None:
    """Writes README.md into an exported folder."""
    (folder / "README.md").write_text(card(target, config, has_decoder, provenance), encoding="utf-8")


def card(target: str, config: ModelConfig, has_decoder: bool, provenance: Provenance) -> str:
    """The text of README.md."""
    c = config
    height, width = c.image_hw
    shape = {
        "encoder": f"{c.depth} blocks of width {c.embed_dim}, {c.num_heads} heads, patches of {c.patch_size} px",
        "images": f"{height} x {width} px, {c.channels} channels",
        "normalisation": f"(value / 255 - mean) / std, mean {_numbers(c.mean)}, std {_numbers(c.std)}",
    }
    if has_decoder:
        kind = "normalised pixels" if c.norm_pix_loss else "pixels"
        shape["decoder"] = (
            f"{c.decoder_depth} blocks of width {c.decoder_embed_dim}, {c.decoder_num_heads} heads, predicts {kind}"
        )
    usage = USAGE[target].format(architecture="ViTMAEForPreTraining" if has_decoder else "ViTMAEModel")
    parts = [
        "---",
        f"library_name: {LIBRARIES.get(target, 'patchmill')}",
        "pipeline_tag: image-feature-extraction",
        "tags:\n- masked-autoencoder\n- vit\n- patchmill",
        "---\n",
        f"# {_title(c, has_decoder)}\n",
        "Pretrained as a masked autoencoder ([He et al. 2021](https://arxiv.org/abs/2111.06377)) with Patchmill, "
        f"exported by Patchmill {__version__} in the format `{target}`.\n",
        "| part | |\n|---|---|",
        *(f"| {name} | {text} |" for name, text in shape.items()),
        f"\n## Use\n\n```python\n{usage}\n```\n",
        "## Training\n",
    ]
    if provenance.step is None:
        parts.append("The exported file came without its run folder: nothing is known of data and recipe.\n")
    else:
        parts += [f"Step {provenance.step} of the run. Data: {provenance.data}.\n"]
        if provenance.metrics:
            parts += ["| metric | value |\n|---|---|", *(f"| {k} | {v} |" for k, v in provenance.metrics.items()), ""]
        parts += [f"Recipe (`patchmill pretrain --config`):\n\n```toml\n{provenance.recipe}```\n"]
    parts.append("## Licence\n\nNot stated: add `license:` to the head of this file before publishing.\n")
    return "\n".join(parts)


def _title(config: ModelConfig, has_decoder: bool) -> str:
    name = {768: "B", 1024: "L", 1280: "H"}.get(config.embed_dim, f"{config.embed_dim}x{config.depth}")
    return f"ViT-{name}/{config.patch_size} masked autoencoder" + ("" if has_decoder else ", encoder")


def _describe_data(folder: Path, fingerprint: dict[str, object]) -> str:
    name = _bare_name(str(folder))
    try:
        manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        count, digest = f", {manifest.num_samples} images", manifest.fingerprint()
        if digest != fingerprint.get("dataset", digest):
            count, digest = "", str(fingerprint["dataset"])  # packed anew since: the run's own hash is the true one
    except (OSError, ValueError):
        count, digest = "", str(fingerprint.get("dataset", "unknown"))
    return f"`{name}`{count}, manifest sha256 `{digest}`"


def _without_places(value: Any) -> Any:
    """Config values with every path and address cut down to its last part."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return _bare_name(value) if isinstance(value, str) else value


def _bare_name(path: str) -> str:
    """The last part of a path or address, without the query that may hold a key."""
    return path.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    sys.exit(cli.run("export", sys.argv[1:]))
