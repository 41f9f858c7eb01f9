"""Names there and back: every format, the published sizes, the spellings that exist in the wild."""

import re

import pytest
import torch

from patchmill.trainer.checkpoints.names import encoder_only, from_format, recognise, to_format
from tests.support.small_models import B16, H14, L16, TINY, random_checkpoint, same_bits, windows

FORMATS = ("mae", "timm", "hf", "detectron2", "mmseg")
# what a block of one layer is called on the hub (transformers 4), read off facebook/vit-mae-base's layout
HF_LAYER = [
    "attention.attention.key",
    "attention.attention.query",
    "attention.attention.value",
    "attention.output.dense",
    "intermediate.dense",
    "layernorm_after",
    "layernorm_before",
    "output.dense",
]


@pytest.mark.parametrize("decoder", [True, False], ids=["whole", "encoder"])
@pytest.mark.parametrize("config", [TINY, B16, L16, H14], ids=["tiny", "B", "L", "H"])
@pytest.mark.parametrize("target", FORMATS)
def test_there_and_back_gives_the_same_bits(target, config, decoder):
    tensors = windows(config, decoder=decoder)
    foreign = to_format(tensors, target)
    assert recognise(foreign) == ("mae" if target == "timm" else target)  # timm's names are the published ones
    back, unknown = from_format(foreign, recognise(foreign))
    assert unknown == []
    assert same_bits(back, tensors if target in ("mae", "hf") else encoder_only(tensors))


def test_published_sizes_have_the_published_number_of_tensors():
    assert len(windows(B16)) == 254
    assert len(windows(B16, decoder=False)) == 150
    assert sum(tensor.numel() for tensor in windows(B16).values()) == pytest.approx(111.9e6, rel=1e-3)
    assert len(to_format(windows(B16), "hf")) == 334


def test_hugging_face_names_are_those_on_the_hub():
    names = set(to_format(random_checkpoint(TINY).tensors, "hf"))
    parts = [f"{part}.{leaf}" for part in HF_LAYER for leaf in ("weight", "bias")]
    layers = [f"vit.encoder.layer.{i}.{part}" for i in (0, 1) for part in parts]
    layers += [f"decoder.decoder_layers.{i}.{part}" for i in (0, 1) for part in parts]
    stems = ["vit.embeddings.patch_embeddings.projection", "vit.layernorm"]
    stems += [f"decoder.decoder_{part}" for part in ("embed", "norm", "pred")]
    others = [f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")]
    others += ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]
    others += ["decoder.mask_token", "decoder.decoder_pos_embed"]
    assert names == {*layers, *others}


def test_query_key_and_value_are_the_thirds_of_qkv():
    tensors = random_checkpoint(TINY).tensors
    hf = to_format(tensors, "hf")
    stem = "vit.encoder.layer.1.attention.attention"
    thirds = [hf[f"{stem}.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(thirds), tensors["blocks.1.attn.qkv.weight"])


def in_memory(name):
    """A hub name as transformers 5 has it in memory."""
    name = re.sub(r"^vit\.encoder\.layer\.", "vit.layers.", name)
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    name = name.replace("attention.output.dense", "attention.o_proj").replace("intermediate.dense", "mlp.fc1")
    return re.sub(r"(\d)\.output\.dense", r"\1.mlp.fc2", name)


SPELLINGS = {
    "transformers 5 in memory": in_memory,
    "transformers 5.23 save_pretrained": lambda name: name.replace(".decoder_layers.", ".decoder_encoder.layer."),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_read(spelling):
    tensors = random_checkpoint(TINY).tensors
    foreign = {SPELLINGS[spelling](name): tensor for name, tensor in to_format(tensors, "hf").items()}
    assert recognise(foreign) == "hf"
    back, unknown = from_format(foreign, "hf")
    assert unknown == []
    assert same_bits(back, tensors)


def test_bare_encoder_of_transformers_is_read():
    tensors = random_checkpoint(TINY, decoder=False).tensors
    foreign = {name.removeprefix("vit."): tensor for name, tensor in to_format(tensors, "hf").items()}
    assert "encoder.layer.0.layernorm_before.weight" in foreign
    assert recognise(foreign) == "hf"
    assert same_bits(from_format(foreign, "hf")[0], tensors)


def test_mmseg_names_and_its_prefix():
    tensors = random_checkpoint(TINY, decoder=False).tensors
    foreign = to_format(tensors, "mmseg")
    assert {"patch_embed.projection.weight", "layers.1.ln2.bias", "layers.0.ffn.layers.0.0.weight"} <= foreign.keys()
    assert {"layers.0.ffn.layers.1.weight", "layers.0.attn.qkv.bias", "norm1.weight", "cls_token"} <= foreign.keys()
    segmenter = {f"backbone.{name}": tensor for name, tensor in foreign.items()}
    assert recognise(segmenter) == "mmseg"
    assert same_bits(from_format(segmenter, "mmseg")[0], tensors)


def test_mean_pooling_calls_the_last_norm_fc_norm():
    tensors = random_checkpoint(TINY, decoder=False).tensors
    foreign = to_format(tensors, "timm", mean_pool=True)
    assert {"fc_norm.weight", "fc_norm.bias"} <= foreign.keys()
    assert not {"norm.weight", "norm.bias"} & foreign.keys()
    assert recognise(foreign) == "timm"
    assert same_bits(from_format(foreign, "timm")[0], tensors)


def test_timm_is_given_no_mask_token():
    # timm takes any file with a top-level mask_token for DINOv2 and drops it
    assert "mask_token" not in to_format(random_checkpoint(TINY).tensors, "timm")


def test_a_lone_query_is_no_qkv():
    foreign = to_format(random_checkpoint(TINY).tensors, "hf")
    del foreign["vit.encoder.layer.0.attention.attention.key.weight"]
    back, unknown = from_format(foreign, "hf")
    assert "blocks.0.attn.qkv.weight" not in back
    assert sorted(unknown) == [f"vit.encoder.layer.0.attention.attention.{part}.weight" for part in ("query", "value")]


def test_unknown_names_are_shown():
    with pytest.raises(ValueError, match=r"its names are conv1\.weight, fc\.bias"):
        recognise({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
