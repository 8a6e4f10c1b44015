"""The API of AUTOMATIC1111's web UI, `/sdapi/v1`, as far as its clients use it.

Unknown fields are accepted. A setting that would give another image and is not supported (`restore_faces`, `tiling`, scripts) is
refused. Prompts, names of samplers, upscalers and metadata are the web UI's. The noise is that of a CPU, unless
`override_settings` has another `randn_source`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdruntime.errors import SettingError
from sdruntime.pipeline.images.imagefile import FITS, Fit, fitted, text_from_bytes
from sdruntime.pipeline.images.maps import CANNY, PREPROCESSORS
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.pipeline.metadata.read import AUTOMATIC_SCHEDULES, infotext
from sdruntime.pipeline.metadata.write import A1111_UPSCALERS, AUTOMATIC
from sdruntime.pipeline.requests.tags import files_of
from sdruntime.sampling.samplers import A1111_SCHEDULES, SAMPLERS
from sdruntime.serving.http.images import encoded, file_of, pixels_of, preview_png
from sdruntime.serving.http.jobs import document_of, owner_of, preview_of
from sdruntime.serving.http.openai import finished_or_left
from sdruntime.serving.http.problem import Problem
from sdruntime.serving.http.settings import Shared, shared
from sdruntime.serving.http.submission import jobs_of

_FILLS = ("fill", "original", "noise", "zeros")  # by the web UI's numbers
_RNGS = {"CPU": "cpu", "NV": "cuda", "GPU": "cuda"}
_REFUSED = ("restore_faces", "tiling", "script_name")
_SAMPLE_SIZE = 512  # of a request that names none, as in the web UI


async def txt2img(request: Request) -> Response:
    return await _answer(request, await document_of(request))


async def img2img(request: Request) -> Response:
    body = await document_of(request)
    if not isinstance(body, dict) or not body.get("init_images"):
        raise Problem(422, "init_images: expected a list with an image", "invalid_request")
    return await _answer(request, body)


async def _answer(request: Request, body: Any) -> Response:
    if not isinstance(body, dict):
        raise Problem(422, "expected a JSON object", "invalid_request")
    parts = shared(request)
    jobs = await asyncio.to_thread(lambda: jobs_of(parts, _document(parts, body), owner_of(request)))
    parts.jobs.submit(jobs)
    await finished_or_left(request, parts, jobs)
    done = [job.finished for job in jobs if job.finished is not None]
    images = await asyncio.to_thread(lambda: [base64.b64encode(encoded(image)).decode() for image in done])
    texts = infotext(done[0].parameters)
    info = {
        "prompt": texts.prompt,
        "all_prompts": [texts.prompt] * len(done),
        "negative_prompt": texts.negative,
        "all_negative_prompts": [texts.negative] * len(done),
        "seed": done[0].seed,
        "all_seeds": [image.seed for image in done],
        "width": done[0].pixels.shape[1],
        "height": done[0].pixels.shape[0],
        "sampler_name": texts.pairs.get("Sampler", ""),
        "cfg_scale": float(texts.pairs.get("CFG scale", "nan")) if "CFG scale" in texts.pairs else None,
        "steps": int(texts.pairs["Steps"]) if "Steps" in texts.pairs else None,
        "batch_size": len(done),
        "sd_model_name": jobs[0].model,
        "index_of_first_image": 0,
        "infotexts": [image.parameters for image in done],
    }
    shown = {key: value for key, value in body.items() if key not in ("init_images", "mask", "alwayson_scripts")}
    return JSONResponse({"images": images, "parameters": shown, "info": json.dumps(info)})


def _document(parts: Shared, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return our document of a request of the web UI. Raises Problem."""
    for name in _REFUSED:
        if body.get(name):
            raise Problem(422, f"{name}: not supported", "unsupported")
    override = body.get("override_settings") or {}
    if not isinstance(override, dict):
        raise Problem(422, "override_settings: expected an object", "invalid_request")
    source = override.get("randn_source", "CPU")
    if source not in _RNGS:
        raise Problem(422, f"randn_source {source!r}: expected one of {', '.join(_RNGS)}", "invalid_setting")
    document: dict[str, Any] = {
        "prompt": body.get("prompt") or "",
        "negative": body.get("negative_prompt") or None,
        "n": _whole(body, "batch_size", 1) * _whole(body, "n_iter", 1),
        "steps": body.get("steps"),
        "guidance": body.get("cfg_scale"),
        "model": _model(parts, override.get("sd_model_checkpoint")),
        "rng": _RNGS[source],
        "clip_skip": max(0, _whole(override, "CLIP_stop_at_last_layers", 1) - 1),
        "preview": True,
        **_seeds(body),
        **_sampler(body),
        **_controls(body),
    }
    size = (_whole(body, "width", _SAMPLE_SIZE), _whole(body, "height", _SAMPLE_SIZE))
    if body.get("init_images"):
        document |= _start(body, size, parts.settings.limits.pixels)
    else:
        document |= {"width": size[0], "height": size[1]} | _second_pass(body)
    return {key: value for key, value in document.items() if value is not None}


def _whole(body: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = body.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int):
        raise Problem(422, f"{name} {value!r}: expected a whole number", "invalid_setting")
    return value


def _model(parts: Shared, name: Any) -> str | None:
    """Return the model of a name, with or without the hash and the ending that the web UI shows with it."""
    if not name:
        return None
    short = str(name).partition(" [")[0].removesuffix(".safetensors")
    if short not in parts.room.models:
        raise Problem(404, f"model {name!r}: this server has {', '.join(parts.room.models)}", "model_not_found")
    return short


def _seeds(body: Mapping[str, Any]) -> dict[str, Any]:
    seeds: dict[str, Any] = {}
    for theirs, ours in (("seed", "seed"), ("subseed", "variation_seed")):
        number = _whole(body, theirs, -1)
        seeds[ours] = None if number < 0 else number  # -1 is a random one
    if body.get("subseed_strength"):
        seeds["variation_strength"] = body["subseed_strength"]
    sides = [_whole(body, f"seed_resize_from_{side}", 0) for side in ("w", "h")]
    return seeds | ({"seed_resize": sides} if min(sides) > 0 else {})


def _sampler(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return sampler, schedule and eta. The web UI's own eta, 1, is each sampler's own here."""
    name = body.get("sampler_name") or body.get("sampler_index")
    schedule = body.get("scheduler") or AUTOMATIC
    settings: dict[str, Any] = {"sampler": name}
    if str(schedule).lower() == AUTOMATIC.lower():
        schedule = AUTOMATIC_SCHEDULES.get(str(name))
    if schedule:
        settings["schedule"] = schedule
    if body.get("eta") not in (None, 1, 0):
        settings["options"] = {"eta": body["eta"]}
    return settings


def _start(body: Mapping[str, Any], size: tuple[int, int], most: int) -> dict[str, Any]:
    """Return the start image and its mask, in the size of the request."""
    pixels = pixels_of("init_images[0]", body["init_images"][0], most)
    mode = _whole(body, "resize_mode", 0)
    if mode >= len(FITS):
        raise Problem(422, f"resize_mode {mode}: expected 0 (resize) or 1 (crop)", "unsupported")
    start: dict[str, Any] = {"strength": body.get("denoising_strength", 0.75), "image_guidance": body.get("image_cfg_scale")}
    if not body.get("mask"):
        return start | {"image": _file(pixels, size, FITS[mode])}
    mask = pixels_of("mask", body["mask"], most)
    if body.get("inpainting_mask_invert"):
        mask = 255 - mask
    fill = _whole(body, "inpainting_fill", 0)
    if not 0 <= fill < len(_FILLS):
        raise Problem(422, f"inpainting_fill {fill}: expected 0 to {len(_FILLS) - 1}", "invalid_setting")
    start |= {"mask_blur": body.get("mask_blur", 4), "mask_fill": _FILLS[fill], "overlay": True}
    if body.get("inpaint_full_res", True):
        whole = (pixels.shape[1], pixels.shape[0])
        padding = _whole(body, "inpaint_full_res_padding", 0)
        start |= {"mask_padding": padding, "width": size[0], "height": size[1], "overlay": None}
        return start | {"image": png_from_image(pixels), "mask": _file(mask, whole, "resize")}
    return start | {"image": _file(pixels, size, FITS[mode]), "mask": _file(mask, size, FITS[mode])}


def _file(pixels: Pixels, size: tuple[int, int], fit: Fit) -> bytes:
    return png_from_image(fitted(pixels, size, fit))


def _second_pass(body: Mapping[str, Any]) -> dict[str, Any]:
    if not body.get("enable_hr"):
        return {}
    ours = {theirs: name for name, theirs in A1111_UPSCALERS.items()}
    upscaler = body.get("hr_upscaler") or "Latent"
    if upscaler not in ours:
        raise Problem(422, f"hr_upscaler {upscaler!r}: expected one of {', '.join(ours)}", "unsupported")
    return {
        "hires": body.get("hr_scale", 2.0),
        "hires_resize": ours[upscaler],
        "hires_steps": body.get("hr_second_pass_steps") or None,
        "hires_strength": body.get("denoising_strength", 0.75),
    }


def _controls(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images of the ControlNet extension."""
    scripts = body.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict):
        raise Problem(422, "alwayson_scripts: expected an object", "invalid_request")
    by_name = {str(name).lower(): value for name, value in scripts.items()}
    controlnet = by_name.pop("controlnet", None) or {}
    unknown = [name for name, value in by_name.items() if value]
    if unknown:
        raise Problem(422, f"alwayson_scripts: {', '.join(unknown)}: not supported", "unsupported")
    units = controlnet.get("args", [])
    return {"controls": [_control(unit) for unit in units if isinstance(unit, dict) and unit.get("enabled", True)] or None}


def _control(unit: Mapping[str, Any]) -> dict[str, Any]:
    image = unit.get("image") or unit.get("input_image")
    module = str(unit.get("module") or "none").lower()
    if module != "none" and module not in PREPROCESSORS:
        raise Problem(422, f"controlnet: module {module!r}: expected none or one of {', '.join(PREPROCESSORS)}", "unsupported")
    model = unit.get("model")
    control = {
        "image": image["image"] if isinstance(image, dict) else image,
        "net": None if model in (None, "", "None") else str(model).partition(" [")[0],
        "preprocess": None if module == "none" else module,
        "scale": unit.get("weight", 1.0),
        "start": unit.get("guidance_start", 0.0),
        "end": unit.get("guidance_end", 1.0),
        "fit": "resize" if unit.get("resize_mode") in (0, "Just Resize") else "crop",
    }
    if module == CANNY:
        control |= {name: unit[key] for name, key in (("low", "threshold_a"), ("high", "threshold_b")) if unit.get(key, -1) >= 0}
    return control


async def progress(request: Request) -> Response:
    """The progress of all unfinished images together, and how the first of them is coming along."""
    parts = shared(request)
    jobs = [*parts.room.running, *parts.room.waiting]
    done = sum(job.step / job.steps for job in jobs if job.steps)
    first = jobs[0] if jobs else None
    image = None
    if first is not None and first.clean is not None and request.query_params.get("skip_current_image") != "true":
        data = await asyncio.to_thread(preview_png, first.clean, preview_of(parts, first))
        image = None if data is None else base64.b64encode(data).decode()
    state = {
        "skipped": False,
        "interrupted": False,
        "job": first.id if first else "",
        "job_count": len(jobs),
        "job_no": 0,
        "sampling_step": first.step if first else 0,
        "sampling_steps": first.steps if first else 0,
    }
    share = done / len(jobs) if jobs else 0.0
    return JSONResponse({"progress": share, "eta_relative": 0.0, "state": state, "current_image": image, "textinfo": None})


async def interrupt(request: Request) -> Response:
    """End all running images with what they are so far, as the web UI does, and cancel those that wait."""
    room = shared(request).room
    for job in [*room.running, *room.waiting]:
        room.finish(job)
    return JSONResponse({})


async def png_info(request: Request) -> Response:
    data = file_of("image", (await _object_of(request)).get("image"))
    try:
        texts = await asyncio.to_thread(text_from_bytes, data)
    except SettingError as error:
        raise Problem(422, f"image: {error}", "invalid_image") from error
    parts = infotext(texts.get("parameters", ""))
    settings = {"Prompt": parts.prompt, "Negative prompt": parts.negative, **parts.pairs} if "parameters" in texts else {}
    return JSONResponse({"info": texts.get("parameters", ""), "items": texts, "parameters": settings})


async def extra_single_image(request: Request) -> Response:
    """Resize an image by Lanczos or to the nearest pixels."""
    body, limits = await _object_of(request), shared(request).settings.limits
    upscaler = body.get("upscaler_1") or "Lanczos"
    if upscaler not in ("Lanczos", "Nearest", "None"):
        raise Problem(422, f"upscaler_1 {upscaler!r}: expected Lanczos, Nearest or None", "unsupported")
    pixels = await asyncio.to_thread(pixels_of, "image", body.get("image"), limits.pixels)
    height, width = pixels.shape[:2]
    factor = body.get("upscaling_resize", 2)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 16:
        raise Problem(422, f"upscaling_resize {factor!r}: expected a number up to 16", "invalid_setting")
    size = (round(width * factor), round(height * factor))
    if body.get("resize_mode", 0) == 1:
        size = (_whole(body, "upscaling_resize_w", width), _whole(body, "upscaling_resize_h", height))
    if min(size) < 1 or math.prod(size) > limits.pixels:
        raise Problem(422, f"{size[0]}x{size[1]}: at most {limits.pixels:,} pixels", "image_too_large")
    if upscaler == "None":
        larger = pixels
    elif upscaler == "Nearest":
        larger = pixels[[k * height // size[1] for k in range(size[1])]][:, [k * width // size[0] for k in range(size[0])]]
    else:
        larger = await asyncio.to_thread(fitted, pixels, size, "resize")
    data = await asyncio.to_thread(png_from_image, larger)
    return JSONResponse({"image": base64.b64encode(data).decode(), "html_info": ""})


async def _object_of(request: Request) -> dict[str, Any]:
    body = await document_of(request)
    if not isinstance(body, dict):
        raise Problem(422, "expected a JSON object", "invalid_request")
    return body


async def options(request: Request) -> Response:
    first = next(iter(shared(request).room.models))
    return JSONResponse(
        {"sd_model_checkpoint": first, "CLIP_stop_at_last_layers": 1, "randn_source": "CPU", "samples_format": "png"}
    )


async def set_options(request: Request) -> Response:
    """Accept the document that `GET` answers. The model is chosen by each request: another default is refused."""
    body, parts = await _object_of(request), shared(request)
    name = _model(parts, body.get("sd_model_checkpoint"))
    first = next(iter(parts.room.models))
    if name not in (None, first):
        raise Problem(422, f"sd_model_checkpoint {name!r}: name it in override_settings of each request", "unsupported")
    return JSONResponse(None)


def _listing(path: str, rows: Any) -> Route:
    async def listing(request: Request) -> Response:
        return JSONResponse(rows(shared(request)))

    return Route(f"/sdapi/v1/{path}", listing, methods=["GET"], name=path)


def _samplers(parts: Shared) -> list[dict[str, Any]]:
    rows = [row for row in SAMPLERS.values() if row.a1111]
    return [{"name": row.a1111[0], "aliases": [row.name, *row.a1111[1:]], "options": {}} for row in rows]


def _models(parts: Shared) -> list[dict[str, Any]]:
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": f"{name}.safetensors", "config": None}
        for name in parts.room.models
    ]


def _loras(parts: Shared) -> list[dict[str, Any]]:
    files = {} if parts.settings.lora_dir is None else files_of(parts.settings.lora_dir)
    return [{"name": name, "alias": name, "path": path.name, "metadata": {}} for name, path in files.items()]


def _schedulers(parts: Shared) -> list[dict[str, Any]]:
    known = {label: name for name, label in A1111_SCHEDULES.items() if name}
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
        for label, name in known.items()
    ]


def _upscalers(parts: Shared) -> list[dict[str, Any]]:
    return [{"name": name, "model_name": None, "scale": 4} for name in ("None", *A1111_UPSCALERS.values())]


ROUTES = [
    Route("/sdapi/v1/txt2img", txt2img, methods=["POST"]),
    Route("/sdapi/v1/img2img", img2img, methods=["POST"]),
    Route("/sdapi/v1/extra-single-image", extra_single_image, methods=["POST"]),
    Route("/sdapi/v1/png-info", png_info, methods=["POST"]),
    Route("/sdapi/v1/progress", progress, methods=["GET"]),
    Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
    Route("/sdapi/v1/skip", interrupt, methods=["POST"], name="skip"),
    Route("/sdapi/v1/options", options, methods=["GET"]),
    Route("/sdapi/v1/options", set_options, methods=["POST"]),
    _listing("samplers", _samplers),
    _listing("schedulers", _schedulers),
    _listing("sd-models", _models),
    _listing("sd-vae", lambda parts: []),
    _listing("loras", _loras),
    _listing("embeddings", lambda parts: {"loaded": {}, "skipped": {}}),
    _listing("upscalers", _upscalers),
    _listing("cmd-flags", lambda parts: {"api": True}),
    _listing("scripts", lambda parts: {"txt2img": ["controlnet"], "img2img": ["controlnet"]}),
    *(_listing(path, lambda parts: []) for path in ("hypernetworks", "face-restorers", "prompt-styles")),
]
