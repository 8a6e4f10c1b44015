"""Pixels and PNG files against diffusers' image processor, to the bit, and against Pillow, both ways."""

import io

import numpy as np
import pytest

from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.images.pixels import from_uint8, to_uint8
from sdruntime.pipeline.images.png import image_from_png, png_from_image, write_png
from sdruntime.pipeline.metadata.write import png_text

torch = pytest.importorskip("torch")
pillow = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def processor():
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=8)


@pytest.fixture
def image():
    """Noise over a gradient, so that every filter and both ends of the range have work."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([4 * x, 5 * y, 2 * (x + y)], axis=-1) + rng.normal(size=(48, 64, 3)) * 20
    return smooth.clip(0, 255).astype(np.uint8)


def test_to_uint8_rounds_as_diffusers_does(processor):
    halves = (np.arange(0, 255, dtype=np.float64) + 0.5) / 127.5 - 1  # where rounding is decided
    near = np.concatenate([halves, np.nextafter(halves, 2), np.nextafter(halves, -2)]).astype(np.float32)
    rest = np.random.default_rng(1).normal(size=3 * 64 * 64 - near.size).astype(np.float32)
    decoded = np.concatenate([near, rest]).reshape(1, 3, 64, 64)
    expected = processor.postprocess(torch.from_numpy(decoded), output_type="pil")[0]
    assert np.array_equal(to_uint8(decoded)[0], np.asarray(expected))


def test_from_uint8_is_what_diffusers_feeds_the_encoder(processor, image):
    expected = processor.preprocess(pillow.fromarray(image)).numpy()
    assert np.array_equal(from_uint8(image)[None], expected)


def test_pillow_reads_what_is_written(image, tmp_path):
    write_png(tmp_path / "a.png", image, png_text("a café, 赤い丸\nSteps: 20") | {"plain": "café"})
    with pillow.open(tmp_path / "a.png") as opened:
        opened.verify()
    with pillow.open(tmp_path / "a.png") as opened:
        assert (opened.mode, opened.size) == ("RGB", (64, 48))
        assert np.array_equal(np.asarray(opened), image)
        assert opened.text["parameters"] == opened.info["parameters"] == "a café, 赤い丸\nSteps: 20"
        assert opened.text["plain"] == "café"
        assert "trainedAlgorithmicMedia" in opened.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_what_pillow_writes_is_read(mode, image, tmp_path):
    picture = pillow.fromarray(image).quantize(200) if mode == "P" else pillow.fromarray(image).convert(mode)
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.asarray(picture.convert("RGB")))


def test_a_picture_is_no_larger_than_pillow_s_by_much():
    """Run lengths for a search: on noise over a gradient the file must stay within a tenth of Pillow's."""
    rng = np.random.default_rng(9)
    y, x = np.mgrid[:256, :256]
    smooth = np.stack([x / 2 + 60, y / 2 + 60, (x + y) / 3], axis=-1) + rng.normal(size=(256, 256, 3)) * 3
    image = smooth.clip(0, 255).astype(np.uint8)
    with io.BytesIO() as file:
        pillow.fromarray(image).save(file, "png")
        theirs = len(file.getvalue())
    ours = png_from_image(image)
    assert len(ours) < 1.1 * theirs
    assert np.array_equal(image_from_png(ours), image)
