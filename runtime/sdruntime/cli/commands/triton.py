"""The command `triton`: a model for NVIDIA Triton's model repository."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sdruntime.cli.terminal import document, pairs
from sdruntime.errors import SettingError


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `triton`, without BUNDLE."""
    where = "the model repository, which is created if it is missing"
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help=where)
    sub.add_argument("--name", default="", help="the name of the model (that of the bundle's folder)")
    sub.add_argument("--instances", type=int, default=1, metavar="N", help="instances of the model, on each GPU (1)")
    sub.add_argument("--backend", default="auto", help="tensorrt, tensorrt-rtx, onnxruntime or openvino (auto)")
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (0: the library decides)")
    sub.add_argument("--session", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine library")
    sub.add_argument("--queue", type=int, default=64, metavar="N", help="requests of an instance that may wait (64)")
    sub.add_argument(
        "--running", type=int, metavar="N", help="requests that run at a time (as many as one call of the UNet takes)"
    )
    sub.add_argument("--lora-dir", type=Path, metavar="DIR", help="the folder of the LoRAs that prompts name")


def triton(options: argparse.Namespace) -> None:
    """Run `sdruntime triton`."""
    from sdruntime.backends.registry import BACKENDS
    from sdruntime.engines.choose import AUTO
    from sdruntime.errors import UnknownName
    from sdruntime.serving.triton_server.repository import write_model

    if options.backend not in (AUTO, *BACKENDS):
        raise UnknownName("backend", options.backend, [AUTO, *BACKENDS])
    for name, least in (("queue", 1), ("running", 1), ("threads", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise SettingError(f"--{name} {value}: at least {least}")
    parameters = {"BACKEND": options.backend, "QUEUE": str(options.queue), "THREADS": str(options.threads)}
    if options.running is not None:
        parameters["RUNNING"] = str(options.running)
    if session := dict(pairs(options.session, "key=value", "--session")):
        parameters["SESSION"] = json.dumps(session)
    if options.lora_dir is not None:
        parameters["LORA_DIR"] = str(options.lora_dir.resolve())
    place = write_model(options.output, options.bundle, name=options.name, instances=options.instances, **parameters)
    if options.json:
        document(model=place.name, folder=str(place))
    else:
        print(place)
