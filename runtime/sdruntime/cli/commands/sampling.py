"""The commands `table` and `samplers`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sdruntime.cli.commands.generate import sampler_options
from sdruntime.cli.terminal import document
from sdruntime.errors import SettingError, plain


def table(options: argparse.Namespace) -> None:
    """Run `sdruntime table`."""
    import numpy as np

    from sdruntime.bundle.bundle import Bundle
    from sdruntime.bundle.model import NO_DEFAULTS
    from sdruntime.bundle.records import read_json
    from sdruntime.pipeline.requests.ranges import sigmas_of, steps_beside
    from sdruntime.sampling.compile import compile_table
    from sdruntime.sampling.grids import FAMILY
    from sdruntime.sampling.samplers import meaning
    from sdruntime.sampling.samplers.keys import check_options

    if (options.bundle is None) == (options.config is None):
        raise SettingError("table: give BUNDLE or --config scheduler_config.json, not both")
    defaults = NO_DEFAULTS
    if options.config is not None:
        try:
            config = read_json(options.config)
        except (OSError, ValueError) as error:
            raise SettingError(f"--config {options.config}: {plain(error)}") from error
    else:
        bundle = Bundle.open(options.bundle)
        config = {**bundle.read_json("scheduler/scheduler_config.json"), FAMILY: bundle.manifest.model.family}
        defaults = bundle.manifest.model.defaults
    settings = sampler_options(options)
    check_options(settings)
    named = {"sampler": options.sampler or defaults.sampler, "schedule": options.schedule, **settings}
    sigmas = None if options.sigmas is None else sigmas_of(options.sigmas)
    own = defaults.steps if sigmas is None else None
    steps = steps_beside(sigmas, own if options.steps is None else options.steps)
    compiled = compile_table(config, steps=steps, sigmas=sigmas, strength=options.strength, **named)
    if line := meaning(config, **named):
        options.progress.note(line)
    if options.json:
        document(table=json.loads(compiled.to_json()))
        return
    print("step        t      scale   coefficients of x | model outputs | noises, each from the newest back")
    for row in range(compiled.steps):
        parts = [
            " ".join(f"{value:+.6g}" for value in np.trim_zeros(part[row], "b")) for part in (compiled.X, compiled.M, compiled.N)
        ]
        coefficients = " | ".join(parts)
        print(f"{row:4d} {compiled.t[row]:8.2f} {compiled.scale[row]:10.6f}   {coefficients}")


def samplers(options: argparse.Namespace) -> None:
    """Run `sdruntime samplers`."""
    from sdruntime.sampling.samplers import SAMPLERS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "diffusers": sampler.diffusers,
            "settings": dict(sampler.implied),
            "a1111": list(sampler.a1111),
            "about": sampler.about,
        }
        for name, sampler in SAMPLERS.items()
    ]
    if options.json:
        document(samplers=rows)
        return
    width = max(map(len, SAMPLERS)) + 2
    for row in rows:
        print(f"{row['name']:<{width}}{row['about']}")
        if row["a1111"]:
            print(f"{'':{width}}also {', '.join(row['a1111'])}")
        if row["diffusers"]:
            fixed = ", ".join(f"{key} {json.dumps(value)}" for key, value in row["settings"].items())
            print(f"{'':{width}}diffusers: {row['diffusers']}{' with ' + fixed if fixed else ''}")
