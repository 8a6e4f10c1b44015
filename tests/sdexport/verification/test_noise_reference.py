"""noise/cpu.py and guidance.py against torch and diffusers themselves, on the machine that runs this."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdruntime.sampling.guidance import combine, rescale
from sdruntime.sampling.noise.cpu import NoiseStream

torch = pytest.importorskip("torch")


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**64 - 1), sizes=st.lists(st.integers(0, 40) | st.integers(41, 5000), min_size=1, max_size=8))
def test_any_row_of_draws_is_that_of_torch(seed, sizes):
    generator, stream = torch.Generator().manual_seed(seed), NoiseStream(seed)
    for size in sizes:
        expected = torch.randn(size, generator=generator).numpy()
        assert np.abs(stream.normal((size,)) - expected).max(initial=0) <= 4e-6


def test_the_images_of_a_batch_are_those_of_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    seed, shape = 41, (4, 12, 20)
    generators = [torch.Generator().manual_seed(seed + k) for k in range(3)]
    expected = randn_tensor((3, *shape), generator=generators).numpy()
    ours = np.stack([NoiseStream(seed + k).normal(shape) for k in range(3)])
    assert np.abs(ours - expected).max() <= 4e-6


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_guidance_is_that_of_diffusers(phi):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    uncond, cond = (NoiseStream(seed).normal((2, 4, 16, 16)) for seed in (1, 2))
    tensors = [torch.from_numpy(array.copy()) for array in (uncond, cond)]
    expected = rescale_noise_cfg(tensors[0] + 7.5 * (tensors[1] - tensors[0]), tensors[1], guidance_rescale=phi)
    ours = rescale(combine(uncond, cond, 7.5), cond, phi)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=2e-5)
