"""Exports an encoder to ONNX and compares the result with the PyTorch module.

The graph takes uint8 [B, H, W, C] images of any B and normalises them itself: its users cannot get the constants wrong
and copy a quarter of the bytes. Outputs: class_token [B, D] and patch_tokens [B, L, D], fp32.
"""

import importlib.util
import logging
from pathlib import Path

import torch

from patchmill.trainer.model.encoder import Encoder

FILE = "encoder.onnx"
OUTPUTS = ["class_token", "patch_tokens"]
"""must differ from parameter names, which the graph uses too"""
TOLERANCE = 1e-4
"""largest accepted difference from PyTorch, relative to the largest feature: fp32 sums in another order"""
PROTOBUF_LIMIT = 2**31 - 2**24
"""bytes of weights from which on they go to a separate file; an ONNX file cannot exceed 2 GB"""
INSTALL = "pip install 'patchmill[onnx]' (onnx, onnxscript, onnxruntime)"


def export_onnx(encoder: Encoder, folder: Path) -> float:
    """Writes encoder.onnx (weights of 2 GB and more go to a second file) and returns `compare_onnx`.

    Raises:
        ValueError: a package is missing, or the graph's results differ from the encoder's.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {', '.join(missing)}: {INSTALL}")
    c = encoder.config
    example = torch.zeros(2, *c.image_hw, c.channels, dtype=torch.uint8)
    # without torchvision the exporter warns about each of its operators
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    program = torch.onnx.export(
        encoder,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=OUTPUTS,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None  # the dynamo exporter always returns one
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it would reveal paths of this machine
    bytes_in_all = sum(p.numel() * p.element_size() for p in encoder.parameters())
    program.save(str(folder / FILE), external_data=bytes_in_all >= PROTOBUF_LIMIT)
    error = compare_onnx(encoder, folder / FILE)
    if not error <= TOLERANCE:
        raise ValueError(
            f"{folder / FILE} differs from the encoder by {error:.1e}, more than {TOLERANCE}; nothing was written"
        )
    return error


def compare_onnx(encoder: Encoder, path: Path) -> float:
    """Returns the largest difference between onnxruntime and PyTorch over batches of 1 and 3 random images.

    The difference is relative to the largest feature of the batch.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    c = encoder.config
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (1, 3):
        images = torch.randint(0, 256, (batch, *c.image_hw, c.channels), dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            expected = encoder(images)
        found = session.run(OUTPUTS, {"images": images.numpy()})
        for ours, theirs in zip(expected, found, strict=True):
            difference = (ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max()
            worst = max(worst, difference.item())
    return worst
