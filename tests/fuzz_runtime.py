"""What is fuzzed of sdruntime: every document of a bundle, and all that a host says to the service. Loads NumPy only."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bundles import SCHEDULER, make_bundle, with_fake_engines
from fuzzing import VALUES, Once, damaged, mutated

from sdruntime.backends.base.building import Library
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import NAME, save_manifest
from sdruntime.bundle.records import json_from_record, json_from_text
from sdruntime.cli.describe import bundle_document, bundle_lines
from sdruntime.engines.choose import Machine
from sdruntime.errors import SdruntimeError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.text.editing import schedule
from sdruntime.pipeline.text.segments import segments
from sdruntime.pipeline.text.tokenizer import FILES, Tokenizer
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.samplers import SAMPLERS
from sdruntime.sampling.table import Table
from sdruntime.serving.channel import HEADER, Channel
from sdruntime.serving.service import Service
from sdruntime.system.cuda import Device
from sdruntime.verification.golden import (
    DOCUMENT,
    NUMBERS,
    Golden,
    cases_of,
    digest_of,
    image_key,
    read_golden,
    reference_images,
    sample_of,
    write_golden,
)
from sdruntime.verification.npz import read_npz
from sdruntime.verification.tolerance import TOLERANCES

MACHINE = Machine(
    libraries={"fake": Library(version="1", targets=("cpu",)), "tensorrt": Library(version="11.4.0", targets=("sm89",))},
    devices=(Device(name="a GPU", capability=(8, 9), memory=1 << 34, integrated=False, driver="13.0"),),
)

# values that some key of a scheduler's config may have
CONFIG_VALUES: tuple[Any, ...] = (
    *("epsilon", "v_prediction", "sample", "flow_prediction", "linear", "scaled_linear", "squaredcos_cap_v2", "trailing", "zero"),
    *("sigma_min", "dpmsolver", "sde-dpmsolver++", "heun", "bh1", "karras", 500, 4, 0.001, 0.02, 0.3, 14.6, 0.029, 10.0, -5.1),
)


def refused(act: Callable[[], object], *kinds: type[Exception]) -> bool:
    """Whether it raised an error of the package's."""
    try:
        act()
    except (SdruntimeError, *kinds):
        return True
    return False


def text_of(document: Any) -> str:
    return json.dumps(document)


def manifest(folder: Path) -> Once:
    """What a mutated manifest says is described, and if it may be opened one image is generated."""
    bundle = with_fake_engines(make_bundle(folder / "bundle"))
    document = json.loads((bundle.folder / NAME).read_text())

    def use() -> None:
        opened = Bundle.open(bundle.folder)
        list(bundle_lines(opened, MACHINE))
        json.dumps(bundle_document(opened, MACHINE))
        save_manifest(folder, opened.manifest)
        with Pipeline.open(opened, backend="fake") as pipe:
            pipe("a cat", steps=2, seed=1)

    def once(chance: random.Random) -> bool:
        (bundle.folder / NAME).write_text(text_of(mutated(document, chance)))
        return refused(use)

    return once


def scheduler(folder: Path) -> Once:
    """A mutated config, a sampler, a schedule and options by chance."""
    config = SCHEDULER | {"trained_betas": None, "solver_order": 2, "timestep_spacing": "leading", "use_karras_sigmas": False}
    keys = sorted({key for sampler in SAMPLERS.values() for key in sampler.reads} - {"schedule"})

    def once(chance: random.Random) -> bool:
        given: Any = config | {"_class_name": chance.choice(list(SAMPLERS))}
        if chance.random() < 0.7:
            given = mutated(given, chance, most=2)
        if isinstance(given, dict):
            given |= {chance.choice(keys): chance.choice([*VALUES, *CONFIG_VALUES]) for _ in range(chance.choice([0, 0, 1, 2]))}
        options = {chance.choice(keys): chance.choice([*VALUES, *CONFIG_VALUES]) for _ in range(chance.choice([0, 0, 0, 1]))}
        steps = chance.choice([1, 2, 3, 4, 5, 20, 50, 999])
        asked: dict[str, Any] = {
            "steps": steps if chance.random() < 0.9 else chance.choice(VALUES),
            "sampler": chance.choice([None, *SAMPLERS]),
            "schedule": chance.choice([None, None, None, None, "karras", "beta", "simple", "lu", "sgm_uniform", "x"]),
            "strength": chance.choice([None, None, None, 0.5, 1.0, 0.01]),
        }

        def use() -> None:
            made = compile_table(json_from_text(text_of(given)), **asked, **options)
            Table.from_json(made.to_json())

        return refused(use, ValueError) if not _parses(given) else refused(use)

    return once


def _parses(document: Any) -> bool:
    try:
        json_from_text(text_of(document))
    except ValueError:
        return False
    return True


def table(folder: Path) -> Once:
    """A table in JSON, as `Table.to_json` writes it."""
    document = json.loads(compile_table(SCHEDULER, steps=4, sampler="dpmpp_sde").to_json())
    return lambda chance: refused(lambda: Table.from_json(text_of(mutated(document, chance))))


def tokenizer(folder: Path) -> Once:
    """Mutated files of a small tokenizer, and a text."""
    files = {path.name: path.read_bytes() for path in (make_bundle(folder / "bundle").folder / "tokenizer").iterdir()}
    vocabulary = dict(list(json.loads(files["vocab.json"]).items())[:600])
    vocabulary |= {"ab": 600, "abc</w>": 601}
    config = json.loads(files["tokenizer_config.json"]) | {
        "added_tokens_decoder": {"512": {"content": "<x>", "normalized": True}}
    }
    documents = {
        "vocab.json": vocabulary,
        "tokenizer_config.json": config,
        "special_tokens_map.json": json.loads(files["special_tokens_map.json"]),
    }
    merges = b"#version: 0.2\na b\nab c</w>\n"

    def once(chance: random.Random) -> bool:
        made = {name: text_of(document).encode() for name, document in documents.items()} | {"merges.txt": merges}
        name = chance.choice(FILES)
        if name == "merges.txt" or chance.random() < 0.1:
            made[name] = damaged(made[name], chance)
        else:
            made[name] = text_of(mutated(documents[name], chance, most=2)).encode()

        def use() -> None:
            opened = Tokenizer.from_files(made, where=folder)
            ids = np.array(opened.encode("A cat abc <x> \U0001f600 don't 12"), np.int32)
            opened.decode(ids.tolist())

        return refused(use)

    return once


def prompt(folder: Path) -> Once:
    """A text of marks by chance, sometimes a long one: it is parsed for each of its steps, or refused."""
    marks = [*"()[]:|\\ ,ab3", ":3]", ":0.5]", ":1.2)", "|b]", "[a:", "((", "]]", "BREAK", " BREAK ", "\n", "\u3000", "é", "1e9"]

    def once(chance: random.Random) -> bool:
        few = chance.sample(marks, chance.randint(1, 6))
        text = "".join(chance.choices(few, k=chance.choice([3, 8, 20, 60, 60, 5000, 30000])))

        def use() -> None:
            steps = chance.choice([1, 2, 20, 1000])
            texts = schedule(text, steps)
            assert [step for step, _ in texts] == sorted({step for step, _ in texts})
            assert 0 == texts[0][0] <= texts[-1][0] < steps
            for _, edited in texts[:2]:
                assert all(isinstance(segment.text, str) for segment in segments(edited))

        return refused(use)

    return once


def golden(folder: Path) -> Once:
    """A mutated document of reference outputs, or a damaged file of their numbers, and the inputs that follow from it."""
    bundle = make_bundle(folder / "bundle")
    chosen = np.random.default_rng(1)
    cases, numbers = [], {}
    for case in cases_of(bundle.manifest, {"text_encoder": 514}):
        output = chosen.standard_normal((2, 4, 8, 8)).astype(np.float32)
        outputs = {spec.name: digest_of(output) for spec in bundle.manifest.components[case.component].outputs}
        numbers |= {case.key(name): sample_of(output, case.seed) for name in outputs}
        cases.append(json_from_record(case) | {"outputs": json_from_record(outputs)})
    drawings = reference_images(bundle.manifest)
    numbers |= {image_key(index): np.zeros((*each.size[::-1], 3), np.uint8) for index, each in enumerate(drawings)}
    made = Golden(checkpoint="0" * 64, reference={"torch": "2.9"}, cases=(), drawings=drawings, tolerances=TOLERANCES)
    bundle = write_golden(bundle, made, numbers)
    document = json.loads((bundle.folder / DOCUMENT).read_text()) | {"cases": cases}
    packed = (bundle.folder / NUMBERS).read_bytes()

    def use() -> None:
        opened = Bundle.open(bundle.folder)
        found, _ = read_golden(opened)
        for case in found.cases[:1]:
            case.feeds(opened.manifest.components[case.component])
        for drawing in found.drawings:
            assert drawing.request

    def once(chance: random.Random) -> bool:
        whole = chance.random() < 0.8
        (bundle.folder / DOCUMENT).write_text(text_of(mutated(document, chance, most=2) if whole else document))
        (bundle.folder / NUMBERS).write_bytes(packed if whole else damaged(packed, chance))
        listed = json.loads((bundle.folder / NAME).read_text())
        listed["files"] |= {name: json_from_record(file_spec(bundle.folder / name)) for name in (DOCUMENT, NUMBERS)}
        (bundle.folder / NAME).write_text(json.dumps(listed))
        return refused(use)

    return once


def npz(folder: Path) -> Once:
    """A damaged file of arrays: ValueError, which `read_golden` turns into a BundleError."""
    import io

    file = io.BytesIO()
    np.savez_compressed(file, a=np.arange(40, dtype=np.float32), b=np.zeros((2, 3, 3), np.uint8))
    stored = io.BytesIO()
    np.savez(stored, a=np.arange(40, dtype=np.float32), b=np.zeros((2, 3, 3), np.uint8))
    seeds = file.getvalue(), stored.getvalue()
    return lambda chance: refused(lambda: read_npz(damaged(chance.choice(seeds), chance)), ValueError)


def message(folder: Path) -> Once:
    """A mutated message of a host: whatever it is, the service answers by an event and shows no traceback."""
    bundle = with_fake_engines(make_bundle(folder / "bundle"))
    events: list[dict[str, Any]] = []
    service = Service(lambda message, blob: events.append(json.loads(message)))
    service.handle(json.dumps({"op": "open", "bundle": str(bundle.folder), "options": {"backend": "fake"}}).encode())
    assert events[-1]["event"] == "ready", events
    asked = {"prompt": "a cat", "negative": "", "seed": 7, "steps": 2, "sampler": "ddim", "schedule": None, "guidance": 5.0}
    asked |= {"prompt_syntax": "a1111", "emphasis": "no-norm", "prompt_2": None, "negative_2": None}
    asked |= {"rescale": 0.0, "width": 512, "height": 512, "strength": 0.8, "options": {"eta": 0.5}}
    submit = {"op": "submit", "job": 1, "request": asked, "preview": False, "png": False}
    submit |= {"image": None, "device_buffer": None, "device_buffer_size": None}
    options = {"backend": "fake", "device": 0, "threads": 0, "queue": 8, "running": 2, "measure": True, "session": {"a": "b"}}
    messages = [submit, submit, submit, {"op": "cancel", "job": 1}, {"op": "open", "bundle": "no such", "options": options}]

    def once(chance: random.Random) -> bool:
        document = mutated(chance.choice(messages), chance, most=3)
        if isinstance(document, dict) and document.get("op") == "close":
            return True
        events.clear()
        data = text_of(document).encode()
        service.handle(damaged(data, chance) if chance.random() < 0.05 else data, chance.choice([None, None, None, b"", b"abc"]))
        for drawing in list(service._jobs.values()):
            drawing.wait()
        for event in events:
            assert "Traceback" not in event.get("message", ""), event["message"]
            assert "code" not in event or event["code"] != 1 or "closed" in event["message"], event
        return not any(event["event"] == "done" for event in events)

    return once


def frame(folder: Path) -> Once:
    """A damaged stream of frames: messages come out until the stream ends or is found to be none."""
    ours, theirs = socket.socketpair()
    sender, whole = Channel(theirs), b""
    for text, blob in (('{"op": "cancel", "job": 1}', None), ('{"op": "submit"}', bytes(300)), ("{}", b"x")):
        sender.send(text.encode(), blob)
        whole += ours.recv(1 << 16)

    def once(chance: random.Random) -> bool:
        data = damaged(whole, chance)
        if chance.random() < 0.3:
            lengths = [0, 1, 100, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
            data = HEADER.pack(chance.choice(lengths) % 2**32, chance.choice([0, 1, 2, 7]), chance.choice(lengths)) + data
        near, far = socket.socketpair()
        with near, far:
            far.sendall(data)
            far.shutdown(socket.SHUT_WR)
            channel = Channel(near)
            try:
                while channel.receive() is not None:
                    pass
            except SdruntimeError:
                return True
        return False

    assert struct.calcsize("<IIQ") == HEADER.size
    return once


def leaky(folder: Path) -> Once:
    """What the fuzzer must see, and errors and answers in between."""

    def endless() -> None:
        while True:
            pass

    def deep() -> None:
        deep()

    def once(chance: random.Random) -> bool:
        kind = chance.randrange(12)
        leaks: list[Callable[[], object]] = [lambda: bytearray(1 << 40), deep, lambda: None + 1]  # type: ignore[operator]
        if kind < len(leaks):
            leaks[kind]()
        if kind == 3 and not list(folder.iterdir()):
            (folder / "hung").touch()  # once, since it takes its time
            endless()
        return kind % 2 == 0

    return once
