"""`rng="cuda"` against torch on the GPU of this machine."""

from __future__ import annotations

import numpy as np
import pytest

from sdruntime.sampling.noise.cuda import CudaNoiseStream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
def test_cuda_noise_is_that_of_torch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    gpu = torch.cuda.get_device_properties(0)
    threads = gpu.multi_processor_count * gpu.max_threads_per_multi_processor
    generator = torch.Generator("cuda").manual_seed(seed - 2**64 if seed >= 2**63 else seed)
    ours = CudaNoiseStream(seed, threads)
    for shape in ((4, 8, 8), (4, 64, 64), (3,), (1, threads + 1), (4, 8, 8), (9, threads)):
        expected = torch.randn(shape, device="cuda", generator=generator).cpu().numpy()
        assert np.abs(ours.normal(shape) - expected).max() <= 6e-6
    half = torch.randn((4, 64, 64), device="cuda", dtype=torch.float16, generator=generator).cpu().numpy()
    rounded = ours.normal((4, 64, 64)).astype(np.float16).astype(np.float32)
    assert np.abs(half.astype(np.float32) - rounded).max() <= 2.0**-9  # one unit in the last place of numbers up to 4
