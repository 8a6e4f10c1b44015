"""Strengths by block: the lists, the blocks of weights, and what a set of them makes of weights."""

from __future__ import annotations

from pathlib import Path

import loras
import numpy as np
import pytest
from runtime.adapters.test_sets import BLOCK, SD1, TEXT, UNET, opened

from sdruntime.adapters.blocks import block_of, by_block, weights_from
from sdruntime.adapters.lora import Lora, lora_from
from sdruntime.adapters.sets import AdapterSet, fit
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.tags import tag_of, with_tagged

SEVENTEEN = "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11".split()
TWELVE = "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split()


def test_the_lists() -> None:
    """The order of the extension's own page, where 26 and 20 have all blocks."""
    assert list(by_block(range(17), xl=False)) == SEVENTEEN
    assert list(by_block(range(12), xl=True)) == TWELVE
    every = [*(f"IN{k:02}" for k in range(12)), "MID", *(f"OUT{k:02}" for k in range(12))]
    assert list(by_block(range(26), xl=False)) == ["BASE", *every]
    assert list(by_block(range(20), xl=True)) == ["BASE", *every[:9], "MID", *every[13:22]]
    assert by_block([0, 0.5, *range(15)], xl=False)["IN01"] == 0.5


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("input_blocks.4.1.proj_in", "IN04"),
        ("input_blocks.0.0", "IN00"),
        ("middle_block.1.proj_in", "MID"),
        ("output_blocks.11.0.in_layers.2", "OUT11"),
        ("time_embed.0", "BASE"),
        (None, "BASE"),
    ],
)
def test_the_block_of_a_module(name: str | None, block: str) -> None:
    assert block_of(name) == block


def test_weights_by_block(tmp_path: Path) -> None:
    """The model's only attention is in IN01; its first convolution, IN00, is in the list of 26 alone."""
    file = opened(tmp_path, loras.full(SD1, wanted=loras.everything))
    fitted = fit(file, SD1, "model")
    plain = AdapterSet.of([(fitted, 0.5, 0.25)])
    blocks = (0.5, 2.0, *[1.0] * 15)
    weighted = AdapterSet.of([(fitted.weighted(blocks, SD1), 0.5, 0.25)])
    attention, text = f"{BLOCK}.attn1.to_k.weight", next(iter(TEXT))
    for component, name, factor in (("unet", attention, 2.0), ("text_encoder", text, 0.5)):
        weight = np.ones({**UNET, **TEXT}[name], np.float32)
        changes = (adapters.merged(component, name, weight) - weight for adapters in (weighted, plain))
        np.testing.assert_allclose(next(changes), factor * next(changes), rtol=1e-5, atol=1e-6)
    assert "conv_in.weight" in plain.weights("unet")
    assert "conv_in.weight" not in weighted.weights("unet")
    assert "conv_in.weight" in AdapterSet.of([(fitted.weighted((1.0,) * 26, SD1), 1.0, 1.0)]).weights("unet")
    assert weighted != plain
    assert weighted.digest_of("unet") != plain.digest_of("unet")
    assert fitted.weighted((0.0,) * 17, SD1).layers == {}


def test_texts_and_tags(tmp_path: Path) -> None:
    blocks = (1.0, 0.0, -0.25, *[1.0] * 14)
    listed = "1,0,-0.25," + ",".join("1" * 14)
    for text, scales in ((f"a.safetensors:lbw={listed}", (1.0, 1.0)), (f"a.safetensors:0.5:0.8:lbw={listed}", (0.5, 0.8))):
        lora = lora_from(text)
        assert (lora.path, lora.scales, lora.blocks) == ("a.safetensors", scales, blocks)
    loras.write(tmp_path / "style.safetensors", loras.kohya(SD1))
    lora = Lora(tmp_path / "style.safetensors", 0.8, 0.5, blocks)
    assert tag_of(lora) == f"<lora:style:0.5:0.8:lbw={listed}>"
    assert with_tagged(Request(prompt=tag_of(lora), prompt_syntax="a1111"), tmp_path).loras == (lora,)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="lbw=OUTD: expected numbers, such as 1,0,0,…: named lists are not supported"):
        weights_from("OUTD")
    with pytest.raises(SettingError, match="lora a: lbw: 3 numbers: expected 12, 17, 20 or 26"):
        Lora("a", blocks=(1.0, 2.0, 3.0))
    with pytest.raises(SettingError, match=r"lbw: 200\.0: expected a number from -100 to 100"):
        weights_from("200," + ",".join("1" * 16))
    fitted = fit(opened(tmp_path, loras.kohya(SD1)), SD1, "model")
    with pytest.raises(SettingError, match="12 numbers: the model is one of Stable Diffusion 1 and 2, whose lists have 17 or"):
        fitted.weighted((1.0,) * 12, SD1)
    with pytest.raises(SettingError, match=r"17 numbers: the model is one of SDXL, whose lists have 12 or 20"):
        fitted.weighted((1.0,) * 17, {**SD1, "text_encoder_2": TEXT})
