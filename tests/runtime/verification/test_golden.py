"""Reference outputs' format: what is written is read; inputs follow from seeds, and a damaged or missing document is named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from places import FIXTURE

from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import load_manifest, save_manifest
from sdruntime.errors import BundleError
from sdruntime.verification.golden import (
    DOCUMENT,
    NUMBERS,
    SAMPLE,
    Case,
    Golden,
    cases_of,
    digest_of,
    image_key,
    read_golden,
    reference_images,
    sample_of,
    write_golden,
)
from sdruntime.verification.tolerance import TOLERANCES


@pytest.fixture
def proved(bundle: Bundle) -> Bundle:
    """The bundle made by hand, with reference outputs made by hand."""
    random = np.random.default_rng(1)
    cases, numbers = [], {}
    for case in cases_of(bundle.manifest, {"text_encoder": 514}):
        digests = {}
        for spec in bundle.manifest.components[case.component].outputs:
            output = random.standard_normal((2, 4, 40, 40)).astype(np.float32)
            digests[spec.name], numbers[case.key(spec.name)] = digest_of(output), sample_of(output, case.seed)
        cases.append(dataclasses.replace(case, outputs=digests))
    drawings = reference_images(bundle.manifest)
    for index, drawing in enumerate(drawings):
        numbers[image_key(index)] = np.full((*drawing.size[::-1], 3), index, np.uint8)
    golden = Golden(checkpoint="0" * 64, reference={"torch": "2.9"}, cases=tuple(cases), drawings=drawings, tolerances=TOLERANCES)
    return write_golden(bundle, golden, numbers)


def test_what_is_written_is_read(proved: Bundle) -> None:
    opened = Bundle.open(proved.folder)
    assert opened.changed_files() == []
    golden, numbers = read_golden(opened)
    assert golden.tolerances == TOLERANCES
    assert [(case.component, case.name) for case in golden.cases] == [
        ("text_encoder", "small"),
        ("unet", "small"),
        ("unet", "own"),
        ("vae_decoder", "small"),
        ("vae_decoder", "own"),
        ("vae_encoder", "small"),
        ("vae_encoder", "own"),
    ]
    assert {numbers[case.key(output)].size for case in golden.cases for output in case.outputs} == {SAMPLE}
    assert golden.drawings[0].size == (256, 256), "of a model of 512"
    assert write_golden(opened, golden, numbers).manifest.files == opened.manifest.files, "the same bytes again"


def test_inputs_follow_from_the_seed_and_fit_the_component(bundle: Bundle) -> None:
    for case in cases_of(bundle.manifest, {"text_encoder": 514}):
        component = bundle.manifest.components[case.component]
        feeds, again = case.feeds(component), case.feeds(component)
        for spec in component.inputs:
            assert np.array_equal(feeds[spec.name], again[spec.name])
            assert (feeds[spec.name].dtype, feeds[spec.name].ndim) == (np.dtype(spec.dtype), len(spec.shape))
            assert np.isfinite(feeds[spec.name]).all()
    unet, encoder = (
        next(case for case in cases_of(bundle.manifest, {"text_encoder": 514}) if case.component == name)
        for name in ("unet", "text_encoder")
    )
    feeds = unet.feeds(bundle.manifest.components["unet"])
    assert feeds["sample"].shape == (2, 4, 16, 24)
    assert (feeds["timestep"] == np.rint(feeds["timestep"])).all()
    assert 0 <= feeds["timestep"].min() <= feeds["timestep"].max() < 1000
    ids = encoder.feeds(bundle.manifest.components["text_encoder"])["input_ids"]
    assert 0 <= ids.min() <= ids.max() < 514


def test_a_vae_is_not_run_at_a_size_that_takes_gigabytes(bundle: Bundle) -> None:
    large = dataclasses.replace(bundle.manifest, model=dataclasses.replace(bundle.manifest.model, default_size=(1024, 1024)))
    found = {(case.component, case.name) for case in cases_of(large, {"text_encoder": 514})}
    assert ("unet", "own") in found
    assert ("vae_decoder", "own") not in found


def test_the_fixture_has_none_and_opens(bundle: Bundle) -> None:
    for each in (Bundle.open(FIXTURE), bundle):
        with pytest.raises(
            BundleError, match=r"no reference outputs.*; export it again with sdexport build path/to/[\w-]+ --precision fp"
        ):
            read_golden(each)


def rewritten(bundle: Bundle, path: str, data: bytes) -> Bundle:
    """The bundle with other bytes in a file, and the hash of these in its manifest."""
    (bundle.folder / path).write_bytes(data)
    manifest = load_manifest(bundle.folder)
    files = dict(manifest.files) | {path: file_spec(bundle.folder / path)}
    save_manifest(bundle.folder, dataclasses.replace(manifest, files=files))
    return Bundle.open(bundle.folder)


def test_another_format_a_missing_number_and_nonsense_are_told(proved: Bundle) -> None:
    document = json.loads((proved.folder / DOCUMENT).read_text())
    golden, numbers = read_golden(proved)
    with pytest.raises(BundleError, match=r"expected .* of revision 1"):
        read_golden(rewritten(proved, DOCUMENT, json.dumps(document | {"revision": 2}).encode()))
    with pytest.raises(BundleError, match=r"cases\[0\]\.seed: expected a whole number"):
        read_golden(rewritten(proved, DOCUMENT, json.dumps(document).replace('"seed": 1000', '"seed": "x"').encode()))
    rewritten(proved, DOCUMENT, json.dumps(document).encode())
    with pytest.raises(BundleError, match=r"numbers\.npz: not readable"):
        read_golden(rewritten(proved, NUMBERS, b"PK nonsense"))
    del numbers["unet.small.out_sample"]
    fewer = write_golden(Bundle(proved.folder, load_manifest(proved.folder)), golden, numbers)
    with pytest.raises(BundleError, match=r"unet\.small\.out_sample is missing"):
        read_golden(fewer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"below": {"input_ids": 0}}, "below input_ids: 0 is outside 1 to 2,147,483,648"),
        ({"below": {"input_ids": 1 << 63}}, "below input_ids: 9223372036854775808 is outside"),
        ({"dims": {"batch": -1}}, "dims batch: -1 is outside 1 to 268,435,456"),
    ],
)
def test_a_number_out_of_range_is_named(changes: dict[str, dict[str, int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"case small: {message}"):
        Case(**{"component": "text_encoder", "name": "small", "seed": 0, "dims": {"batch": 1}, **changes})  # type: ignore[arg-type]
