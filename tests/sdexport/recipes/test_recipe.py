"""Recipes: what they say, and every fault of one at once, each with its line and field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

from sdexport.errors import RecipeError
from sdexport.recipes import recipe as recipes
from sdexport.recipes.recipe import Recipe, read_recipe, recipe_file
from sdexport.recipes.run import options_of
from sdruntime.engines.building import BuildRequest
from sdruntime.errors import SettingError, UnknownName

FOLDER = ROOT / "engines"
GIVEN = {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}
HEAD = 'model = "owner/name"\n'


def read(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "mine.toml").write_text(text)
    return read_recipe(tmp_path / "mine.toml")


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert caught.value.exit_code == 2
    before = f"{tmp_path / 'mine.toml'}:"
    assert all(fault.startswith(before) for fault in caught.value.faults)
    return [fault.removeprefix(before) for fault in caught.value.faults]


@pytest.mark.parametrize("name", GIVEN)
def test_the_given_recipes_are_sound(name: str) -> None:
    recipe = read_recipe(GIVEN[name])
    assert recipe.name == name
    assert recipe.description
    assert all(asked.target == "current" for asked in recipe.engines if asked.backend == "tensorrt")


def test_there_is_a_recipe_for_each_model_and_setting() -> None:
    assert set(GIVEN) == {"shapes", "tiny", "sd15", "sd21", "sdxl", "sd-turbo", "sd15-server", "sd15-jetson"}
    shapes = read_recipe(GIVEN["shapes"])
    assert (Path(shapes.model) / "model_index.json").is_file()
    assert [(asked.backend, asked.target) for asked in shapes.engines] == [("tensorrt-rtx", "ampere+"), ("onnxruntime", None)]
    turbo, *_ = read_recipe(GIVEN["sd-turbo"]).engines
    assert (turbo.guidance, turbo.size) == ("off", "512x512")


def test_the_servers_unet_takes_2_4_8_and_16_rows() -> None:
    from bundles import MODEL, TENSORS

    from sdruntime.bundle.manifest import ComponentSpec, FileSpec, Manifest

    components = {
        name: ComponentSpec(files=("x.onnx",), config="x.onnx", inputs=inputs, outputs=outputs)
        for name, (inputs, outputs) in TENSORS.items()
    }
    files = {"x.onnx": FileSpec(size=0, sha256="0" * 64)}
    manifest = Manifest(model=MODEL, precision="fp16", components=components, files=files)
    asked, *_ = read_recipe(GIVEN["sd15-server"]).engines
    assert [profile["batch"] for profile in asked.shapes(MODEL).profiles("unet", manifest)] == [(n, n, n) for n in (2, 4, 8, 16)]


def test_a_recipe_is_data_that_the_build_takes_already(tmp_path: Path) -> None:
    text = """
    name = "other"
    model = "owner/name"
    revision = "v1"
    precision = "bf16"
    [[engines]]
    backend = "tensorrt-rtx"
    target = ["sm86", "ampere+"]
    size = ["512x512", "512x512:768x512:1024x1024"]
    batch = [1, "2:4"]
    guidance = "any"
    options = { optimization_level = 5, weight_streaming = true, workspace = "2G" }
    [engines.components]
    vae_encoder = false
    vae_decoder = { batch = 1, options = { workspace = "1G" } }
    [[engines]]
    backend = "onnxruntime"
    """
    sizes = "512x512,512x512:768x512:1024x1024"
    options = {"optimization_level": "5", "weight_streaming": "true", "workspace": "2G"}
    expected = []
    for target in ("sm86", "ampere+"):
        each = {"backend": "tensorrt-rtx", "target": target, "size": sizes, "guidance": "any"}
        expected += [
            BuildRequest(**each, batch="1,2:4", options=options, without=("vae_encoder", "vae_decoder")),  # type: ignore[arg-type]
            BuildRequest(**each, batch="1", options=options | {"workspace": "1G"}, components=("vae_decoder",)),  # type: ignore[arg-type]
        ]
    found = read(tmp_path, text)
    assert found == Recipe(
        name="other",
        model="owner/name",
        revision="v1",
        precision="bf16",
        engines=(*expected, BuildRequest(backend="onnxruntime")),
    )
    assert (found.of("path").model, found.of("path").revision) == ("path", None)


def test_what_is_not_said_has_the_defaults_of_the_command_line(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + '[[engines]]\nbackend = "tensorrt"')
    assert found == Recipe(name="mine", model="owner/name", engines=(BuildRequest(backend="tensorrt"),), precision="fp32")


def test_a_recipe_may_leave_the_audit_and_the_verification_out(tmp_path: Path) -> None:
    engines = '[[engines]]\nbackend = "fake"'
    found = read(tmp_path, HEAD + "audit = false\nverify = false\n" + engines)
    assert (found.audit, found.verify) == (False, False)
    options = options_of(found)
    assert (options.audit, options.verify) == (False, False)
    found = read(tmp_path, HEAD + "audit = true\n" + engines)
    assert (options_of(found).audit, options_of(found).verify) == (True, True)
    told = faults(tmp_path, 'model = "owner/name"\naudit = "no"\n' + engines)
    assert told == ['2: audit: expected true or false, got "no"']


def test_a_path_is_meant_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "sd" / "mine").mkdir(parents=True)
    engines = '\n[[engines]]\nbackend = "fake"'
    for model in ("sd/mine", "../nowhere", "./sd"):
        assert read(tmp_path, f'model = "{model}"{engines}').model == str(tmp_path / model)
    assert read(tmp_path, f'model = "owner/name"{engines}').model == "owner/name"
    assert read(tmp_path, f'model = "{tmp_path}"{engines}').model == str(tmp_path)
    assert faults(tmp_path, f'model = "sd/mine"\nrevision = "v1"{engines}') == [
        "2: revision: a folder has no revision: only a model of the hub"
    ]


def test_every_fault_is_told_at_once_with_its_line_and_field(tmp_path: Path) -> None:
    text = """\
precission = "fp16" # model = "x"
precision = "int8"
name = "../up"

[[engines]]
backend = "tensort"
targets = ["sm86"]
batch = [
  1,
  "four", # ] = no end
  true,
]

[[engines]]
backend = "tensorrt"
target = ["sm86", "ampere"]
size = ["512x512", "512", "512x512:256x256"]
options = { workspace = "lots", level = 3, optimization_level = 9, strip = 1.5 }
guidance = true
[engines.components]
unt = false
vae_encoder = true
[engines.components.vae_decoder]
batch = 0
target = "sm86"
"""
    told = faults(tmp_path, text)
    expected = """\
1: model: missing
1: precission: unknown key 'precission': did you mean precision
2: precision: expected 'fp32' or 'fp16' or 'bf16', got "int8"
3: name: '../up' names the bundle's folder
6: engines[0].backend: unknown backend 'tensort': did you mean tensorrt
7: engines[0].targets: unknown key 'targets': did you mean target?
10: engines[0].batch[1]: batch 'four': 4, 1:4 or 1:2:4 is the form
11: engines[0].batch[2]: expected a number or text such as '1:4', got true
16: engines[1].target[1]: unknown target 'ampere'
17: engines[1].size[1]: size '512': WIDTHxHEIGHT in pixels is the form
17: engines[1].size[2]: width 512:512:256: MIN, OPT and MAX must rise
18: engines[1].options.level: unknown key 'level': known: optimization_level
18: engines[1].options.optimization_level: 9: expected 0 (quickest build) to 5
18: engines[1].options.strip: expected text, a whole number, true or false, got 1.5
18: engines[1].options.workspace: "lots": expected bytes
19: engines[1].guidance: expected 'on' or 'off' or 'any', got true
21: engines[1].components.unt: unknown key 'unt': did you mean unet?
22: engines[1].components.vae_encoder: expected false (no engine of it) or a table, got true
24: engines[1].components.vae_decoder.batch: batch 0:0:0: MIN, OPT and MAX must rise from 1
25: engines[1].components.vae_decoder.target: unknown key 'target': known: batch, guidance, options, size
""".splitlines()
    assert len(told) == len(expected)
    for line, beginning in zip(told, expected, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["1: engines: missing", "1: model: missing"]),
        ('model = ""\n[[engines]]\nbackend = "fake"', ['1: model: expected text, got ""']),
        (HEAD + "engines = 3", ["2: engines: expected [[engines]] tables"]),
        (HEAD + "[engines]", ["2: engines: expected [[engines]] tables"]),
        (HEAD + "engines = [3]", ["2: engines[0]: expected a table, got 3"]),
        (HEAD + "[[engines]]\nsize = []", ["2: engines[0].backend: missing", "3: engines[0].size: the list is empty"]),
        (HEAD + '[[engines]]\nbackend = "fake"\noptions = 1', ["4: engines[0].options: expected a table, got 1"]),
        (HEAD + '[[engines]]\nbackend = "fake"\ncomponents = 1', ["4: engines[0].components: expected a table, got 1"]),
        (
            HEAD + '[[engines]]\nbackend = "onnxruntime"\noptions = { a = 1 }',
            ["4: engines[0].options.a: unknown key 'a': there is"],
        ),
        (HEAD + "[[engines]]\nbackend = 1979-05-27", ['3: engines[0].backend: expected text, got "1979-05-27"']),
    ],
)
def test_other_faults(text: str, told: list[str], tmp_path: Path) -> None:
    found = faults(tmp_path, text)
    assert len(found) == len(told)
    assert all(line.startswith(beginning) for line, beginning in zip(found, told, strict=True))


def test_a_recipe_is_found_by_its_name_or_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    assert recipe_file("sd15") == Path("engines/sd15.toml")
    assert recipe_file("elsewhere/sd15.toml") == Path("elsewhere/sd15.toml")
    with pytest.raises(UnknownName, match="unknown recipe 'sd-15': did you mean sd15"):
        recipe_file("sd-15")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"give the path of a file, such as sd15\.toml"):
        recipe_file("sd15")


def test_the_page_has_every_field_and_no_other() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    first, second = (set(re.findall(r"^\| `(\w+)`", part, flags=re.MULTILINE)) for part in page.split("## `[[engines]]`"))
    assert first == set(recipes.RECIPE)
    assert second == set(recipes.ENGINES)
    assert set(recipes.COMPONENT) < second
    assert all(f"`{component}`" in page for component in recipes.COMPONENTS)


def test_the_components_are_those_of_the_exporter(sd1_checkpoint: Path, sdxl_checkpoint: Path) -> None:
    from sdexport.checkpoint.folder import read_checkpoint
    from sdexport.families.components import components

    found = set()
    for folder in (sd1_checkpoint, sdxl_checkpoint):
        checkpoint = read_checkpoint(folder, name="x", precision="fp32", allow_pickle=False)
        found |= {component.name for component in components(checkpoint)}
    assert found | {"step"} == set(recipes.COMPONENTS)
