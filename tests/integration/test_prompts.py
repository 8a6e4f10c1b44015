"""Long, weighted and edited prompts: the embeddings against transformers' encoders and AUTOMATIC1111's rules written out here,
and the image against diffusers' pipeline given these embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import Array, Reference, assert_same_picture, ours

from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

Segments = Sequence[tuple[str, float]]
SETTINGS: dict[str, Any] = {"seed": 7, "steps": 6, "guidance": 7.5, "sampler": "euler", "size": (64, 64)}
THEIR_SETTINGS: dict[str, Any] = {"seed": 7, "num_inference_steps": 6, "guidance_scale": 7.5, "height": 64, "width": 64}
THEIR_SETTINGS["scheduler"] = "EulerDiscreteScheduler"
# most tokens are one byte: two chunks, the first of which ends at a comma
LONG = (
    "the (red cat:1.4) in the sea, and [a dog] of sand, with (((many (small:0.5) birds))) above the hills, "
    "with a tree and a house on it, (big stones:1.2) and a ship"
)
LONG_SEGMENTS = (
    *(("the ", 1.0), ("red cat", 1.4), (" in the sea, and ", 1.0), ("a dog", 1 / 1.1), (" of sand, with ", 1.0)),
    *(("many ", 1.1**3), ("small", 0.5 * 1.1**3), (" birds", 1.1**3)),
    *((" above the hills, with a tree and a house on it, ", 1.0), ("big stones", 1.2), (" and a ship", 1.0)),
)


@pytest.fixture(scope="module", params=["sd1", "sd2_v", "sdxl"])
def both(request: pytest.FixtureRequest, ready: Callable[[Path], Path]) -> Iterator[tuple[Reference, Pipeline]]:
    checkpoint: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    bundle: Path = request.getfixturevalue(f"{request.param}_bundle")
    with Pipeline.open(ready(bundle)) as pipe:
        yield Reference(checkpoint), pipe


def chunked(tokenizer: Any, segments: Segments) -> list[tuple[list[int], list[float]]]:
    """The rule of the web UI: 75 tokens each; at 75, what follows a comma at most 20 tokens before moves on."""
    comma = tokenizer.get_vocab()[",</w>"]
    tokens = [(token, weight) for text, weight in segments for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    chunks: list[list[tuple[int, float]]] = [[]]
    for token, weight in tokens:
        chunk = chunks[-1]
        if len(chunk) == 75:
            commas = [k for k, (other, _) in enumerate(chunk) if other == comma]
            cut = commas[-1] + 1 if commas and 75 - commas[-1] <= 20 and token != comma else 75
            chunks.append(chunk[cut:])
            del chunk[cut:]
        chunks[-1].append((token, weight))
    rows = []
    for chunk in chunks:
        pad = 75 - len(chunk)
        ids = [tokenizer.bos_token_id, *(t for t, _ in chunk), tokenizer.eos_token_id, *[tokenizer.pad_token_id] * pad]
        rows.append((ids, [1.0, *(w for _, w in chunk), *[1.0] * (pad + 1)]))
    return rows


def embedded(
    reference: Reference, segments: Segments, count: int = 1, *, norm: bool = True, skip: int = 0
) -> tuple[Array, Array | None]:
    """(embeddings [1, 77·chunks, D], pooled), filled with empty chunks up to `count`."""
    import torch

    pipe, parts, pooled = reference.pipe, [], None
    for name in ("", "_2") if reference.xl else ("",):
        tokenizer, encoder = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
        rows = chunked(tokenizer, segments)
        rows += chunked(tokenizer, [("", 1.0)]) * (count - len(rows))
        hidden = []
        for index, (ids, weights) in enumerate(rows):
            with torch.no_grad():
                out = encoder(torch.tensor([ids]), output_hidden_states=True)
                state = out.hidden_states[-(skip + (2 if reference.xl else 1))]
                if not reference.xl:
                    state = getattr(encoder, "text_model", encoder).final_layer_norm(state)
            z = state[0].numpy()
            weighted = z * np.array(weights, np.float32)[:, None]
            hidden.append(weighted * (z.mean() / weighted.mean()) if norm else weighted)
            pooled = out.text_embeds.numpy() if index == 0 and hasattr(out, "text_embeds") else pooled
        parts.append(np.concatenate(hidden))
    return np.concatenate(parts, axis=-1)[None], pooled


def rows(pipe: Pipeline, prompt: str, **settings: Any) -> list[Array]:
    jobs = pipe.jobs([Request(prompt=prompt, prompt_syntax="a1111", size=(64, 64), **settings)])
    return [row["encoder_hidden_states"] for row in reversed(jobs[0].rows)]


def close(ours: Array, theirs: Array) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 3e-5 * np.abs(theirs).max()


def test_long_weighted_prompts_are_embedded_as_in_the_web_ui(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    assert [len(ids) for ids, _ in chunked(reference.pipe.tokenizer, LONG_SEGMENTS)] == [77, 77]
    prompt, negative = rows(pipe, LONG, negative="(green:0.7)")
    hidden, pooled = embedded(reference, LONG_SEGMENTS)
    assert prompt.shape[0] == 2 * 77
    close(prompt, hidden[0])
    close(negative, embedded(reference, [("green", 0.7)], 2)[0][0])  # filled with an empty chunk
    plain_norm, _ = embedded(reference, LONG_SEGMENTS, norm=False)
    close(rows(pipe, LONG, emphasis="no-norm", guidance=1.0)[0], plain_norm[0])
    unweighted, _ = embedded(reference, [(text, 1.0) for text, _ in LONG_SEGMENTS])
    close(rows(pipe, LONG, emphasis="ignore", guidance=1.0)[0], unweighted[0])
    if pooled is not None:
        close(pipe.jobs([Request(prompt=LONG, prompt_syntax="a1111", size=(64, 64))])[0].rows[-1]["text_embeds"], pooled[0])


def test_a_short_prompt_without_marks_is_the_same_in_both_syntaxes(both: tuple[Reference, Pipeline]) -> None:
    _, pipe = both
    plain, a1111 = (
        pipe.jobs([Request(prompt="a red cat", negative="x", prompt_syntax=syntax, size=(64, 64))])[0].rows
        for syntax in ("plain", "a1111")
    )
    for one, other in zip(plain, a1111, strict=True):
        assert all((one[name] == other[name]).all() for name in one)


def embeddings(reference: Reference, prompt: Segments, negative: Segments, count: int) -> dict[str, Any]:
    import torch

    given: dict[str, Any] = {}
    for name, segments in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative)):
        hidden, pooled = embedded(reference, segments, count)
        given[name] = torch.from_numpy(hidden)
        if pooled is not None:
            given[name.replace("prompt", "pooled_prompt")] = torch.from_numpy(pooled)
    return given


def test_the_image_is_that_of_diffusers_with_these_embeddings(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    picture, decoded = ours(pipe, LONG, negative="green", prompt_syntax="a1111", **SETTINGS)
    theirs = reference.draw(
        None,  # type: ignore[arg-type]
        **THEIR_SETTINGS,
        **embeddings(reference, LONG_SEGMENTS, [("green", 1.0)], 2),
    )
    assert_same_picture(picture, theirs[0], decoded, theirs[1])


def test_prompt_editing_is_that_of_diffusers_with_embeddings_that_change(both: tuple[Reference, Pipeline]) -> None:
    """`[red:(green:1.3):0.5]` of 6 steps: three of each; the second text is of two chunks, so the first has an empty one."""
    import torch

    reference, pipe = both
    more = "sea and the rest of it is sand, and an old ship that no one has ever seen before, with a big flag in the sky, and a"
    prompt = f"a [red:(green:1.3) {more}:0.5] cat"
    before, after = [("a red cat", 1.0)], [("a ", 1.0), ("green", 1.3), (f" {more} cat", 1.0)]
    picture, decoded = ours(pipe, prompt, negative="x", prompt_syntax="a1111", **SETTINGS)
    first, second = (embeddings(reference, segments, [("x", 1.0)], 2) for segments in (before, after))

    def change(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            tensors["prompt_embeds"] = torch.cat([second["negative_prompt_embeds"], second["prompt_embeds"]])
            if "add_text_embeds" in tensors:
                pooled = [second["negative_pooled_prompt_embeds"], second["pooled_prompt_embeds"]]
                tensors["add_text_embeds"] = torch.cat(pooled)
        return tensors

    theirs = reference.draw(
        None,  # type: ignore[arg-type]
        **THEIR_SETTINGS,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds", *(["add_text_embeds"] if reference.xl else [])],
        **first,
    )
    assert_same_picture(picture, theirs[0], decoded, theirs[1])


def test_a_mixed_batch_gives_the_image_that_each_gives_alone(both: tuple[Reference, Pipeline]) -> None:
    _, pipe = both
    requests = [
        Request(prompt="a red cat", **SETTINGS),
        Request(prompt=LONG, prompt_syntax="a1111", **SETTINGS),
        Request(prompt="[a|the (red)] cat", negative="[x:y:2]", prompt_syntax="a1111", **SETTINGS),
        Request(prompt="a [cat:dog:4]", prompt_syntax="a1111", **{**SETTINGS, "steps": 9, "guidance": 1.0}),
    ]
    together = pipe(requests).pixels
    alone = [pipe(request).pixels[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert len({image.tobytes() for image in alone}) == 4


def test_clip_skip(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    names = ("", "_2") if reference.xl else ("",)
    layers = min(getattr(reference.pipe, f"text_encoder{name}").config.num_hidden_layers for name in names)
    most = layers - 1 if reference.xl else layers
    for skip in sorted({0, 1, most}):
        prompt, negative = rows(pipe, LONG, negative="x", clip_skip=skip)
        close(prompt, embedded(reference, LONG_SEGMENTS, skip=skip)[0][0])
        close(negative, embedded(reference, [("x", 1.0)], 2, skip=skip)[0][0])
    with pytest.raises(SettingError, match=f"clip_skip {most + 1}: the model's text encoders allow 0 to {most}"):
        pipe(LONG, clip_skip=most + 1)
    if not reference.xl:  # diffusers' own clip_skip of SD1 and SD2 fails with transformers 5
        return
    picture, decoded = ours(pipe, "a red cat", negative="x", clip_skip=1, **SETTINGS)
    theirs = reference.draw(
        "a red cat",
        **THEIR_SETTINGS,
        negative_prompt="x",
        clip_skip=1,
    )
    assert_same_picture(picture, theirs[0], decoded, theirs[1])


def test_the_second_encoder_has_its_own_texts(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    request = Request(prompt="a cat", prompt_2="a red sea", negative="x", negative_2="the sand", **SETTINGS)
    if not reference.xl:
        with pytest.raises(SettingError, match="prompt_2: the model has one text encoder: omit it, and write all in prompt"):
            pipe(request)
        return
    picture, decoded = ours(pipe, request)
    theirs = reference.draw(
        "a cat",
        **THEIR_SETTINGS,
        prompt_2="a red sea",
        negative_prompt="x",
        negative_prompt_2="the sand",
    )
    assert_same_picture(picture, theirs[0], decoded, theirs[1])
    (job,) = pipe.jobs([Request(prompt="a cat", prompt_2=LONG, prompt_syntax="a1111", **SETTINGS)])
    width = reference.pipe.text_encoder.config.hidden_size
    hidden = job.rows[-1]["encoder_hidden_states"]
    close(hidden[:, :width], embedded(reference, [("a cat", 1.0)], 2)[0][0, :, :width])
    close(hidden[:, width:], embedded(reference, LONG_SEGMENTS)[0][0, :, width:])
