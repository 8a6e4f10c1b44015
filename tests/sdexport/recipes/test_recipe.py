"""Recipes: what they say, and every fault of one at once, each with its field."""

from __future__ import annotations

import dataclasses
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
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    return list(caught.value.faults)


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
            BuildRequest(**each, batch="1,2:4", options=options, without=("vae_decoder", "vae_encoder")),  # type: ignore[arg-type]
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
    listed = faults(tmp_path, 'model = "owner/name"\naudit = "no"\n' + engines)
    assert listed == ['audit: expected true or false, got "no"']


def test_a_path_is_meant_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "sd" / "mine").mkdir(parents=True)
    engines = '\n[[engines]]\nbackend = "fake"'
    for model in ("sd/mine", "../nowhere", "./sd"):
        assert read(tmp_path, f'model = "{model}"{engines}').model == str(tmp_path / model)
    assert read(tmp_path, f'model = "owner/name"{engines}').model == "owner/name"
    assert read(tmp_path, f'model = "{tmp_path}"{engines}').model == str(tmp_path)
    assert faults(tmp_path, f'model = "sd/mine"\nrevision = "v1"{engines}') == [
        "revision: a folder has no revision: only a model of the hub"
    ]


def test_loras_and_embeddings(tmp_path: Path) -> None:
    engines = '\n[[engines]]\nbackend = "fake"'
    (tmp_path / "a=b.safetensors").write_bytes(b"")
    text = """\
loras = ["style.safetensors:0.8:0.5", "/other/two.safetensors"]
embeddings = ["cat.safetensors", "dog=old/d.safetensors", "a=b.safetensors"]
"""
    recipe = read(tmp_path, HEAD + text + engines)
    loras = (f"{tmp_path}/style.safetensors:0.8:0.5", "/other/two.safetensors")
    embeddings = (f"{tmp_path}/cat.safetensors", f"dog={tmp_path}/old/d.safetensors", f"{tmp_path}/a=b.safetensors")
    assert (options_of(recipe).loras, options_of(recipe).embeddings) == (loras, embeddings)
    assert (recipe.of("path").loras, recipe.of("path").embeddings) == ((), ())
    [fault] = faults(tmp_path, f'{HEAD}loras = ["style.safetensors:200"]{engines}')
    assert fault == "loras: lora style.safetensors: scale 200.0: expected a number from -100 to 100"


def test_every_fault_is_told_at_once_with_its_field(tmp_path: Path) -> None:
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
    listed = faults(tmp_path, text)
    expected = """\
precission: unknown key; did you mean precision,
model: missing
precision: 'int8' is not one of fp32, fp16, bf16
name: '../up' names the bundle's folder
engines[0].targets: unknown key; did you mean target?
engines[0].batch[1]: batch 'four': expected 4, 1:4 or 1:2:4
engines[0].batch[2]: expected a whole number or text, got true
engines[0].backend: unknown backend 'tensort': did you mean tensorrt
engines[1].size[1]: size '512': expected WIDTHxHEIGHT in pixels
engines[1].size[2]: width 512:512:256: MIN, OPT and MAX must rise
engines[1].guidance: True is not one of on, off, any
engines[1].options.strip: expected true or false or a whole number or text, got 1.5
engines[1].target[1]: unknown target 'ampere'
engines[1].components.unt: unknown key; did you mean unet?
engines[1].components.vae_decoder.target: unknown key
engines[1].components.vae_decoder.batch: batch 0:0:0: MIN, OPT and MAX must rise from 1
engines[1].components.vae_encoder: expected false or an object, got true
engines[1].options.workspace: got 'lots'; expected bytes
engines[1].options.level: unknown option 'level': known: lora, optimization_level
engines[1].options.optimization_level: got 9; expected 0 (fastest build) to 5
""".splitlines()
    assert len(listed) == len(expected), listed
    for line, beginning in zip(listed, expected, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["model: missing", "engines: missing"]),
        ('model = ""\n[[engines]]\nbackend = "fake"', ["model: empty: expected a folder or a hub id"]),
        (f'model = "{"a/" * 9000}"\n[[engines]]\nbackend = "fake"', ["model: 'a/a/"]),
        (HEAD + "engines = 3", ["engines: expected a list, got 3"]),
        (HEAD + "engines = []", ["engines: empty: give at least one"]),
        (HEAD + "[engines]", ["engines: expected a list, got {}"]),
        (HEAD + "engines = [3]", ["engines[0]: expected an object, got 3"]),
        (HEAD + "[[engines]]\nsize = []", ["engines[0].size: empty", "engines[0].backend: missing"]),
        (HEAD + '[[engines]]\nbackend = "fake"\noptions = 1', ["engines[0].options: expected an object, got 1"]),
        (HEAD + '[[engines]]\nbackend = "fake"\ncomponents = 1', ["engines[0].components: expected an object, got 1"]),
        (
            HEAD + '[[engines]]\nbackend = "onnxruntime"\noptions = { a = 1 }',
            ["engines[0].options.a: unknown option 'a': known: "],
        ),
        (
            HEAD + '[[engines]]\nbackend = "tensorrt"\n[engines.components.unet]\noptions = { workspace = "lots" }',
            ["engines[0].components.unet.options.workspace: got 'lots'; expected bytes"],
        ),
        (HEAD + "[[engines]]\nbackend = 1979-05-27", ['engines[0].backend: expected text, got "1979-05-27"']),
        (HEAD + "[[engines]]\nbackend = 0x" + "f" * 5000, ["engines[0].backend: expected text, got a number of 20,000 bits"]),
        (HEAD + "[[engines]]\nbackend = {}", ["engines[0].backend: expected text, got {}"]),
        (HEAD + "precision = 0x" + "f" * 5000, ["precision: a number of 20,000 bits is not one of ", "engines: missing"]),
    ],
)
def test_other_faults(text: str, expected: list[str], tmp_path: Path) -> None:
    found = faults(tmp_path, text)
    assert len(found) == len(expected), found
    assert all(line.startswith(beginning) for line, beginning in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = 1\nb = = 2\n", r"not TOML: .*\(at line 2, column 5\)"),
        (b"a = 1\na = 2\n", r"not TOML: Cannot overwrite a value \(at line 2"),
        (b"a = '\xff'", "not readable: not text in UTF-8: byte 0xff at position 5"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "not readable: nested too deeply"),
        (b"a = " + b"3" * 5000, "not readable: "),
        (None, "not readable: no such file"),
    ],
)
def test_what_is_no_toml_is_reported_with_line_and_column(data: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}: 1 fault")


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
    assert first == names(recipes.RecipeText)
    assert second == names(recipes.EnginesTable)
    assert names(recipes.ComponentTable) < second
    assert all(f"`{component}`" in page for component in names(recipes.ComponentsTable))


def names(kind: type) -> set[str]:
    return {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]


def test_the_components_are_those_of_the_exporter(sd1_checkpoint: Path, sdxl_checkpoint: Path) -> None:
    from sdexport.checkpoint.checkpoint import read_checkpoint
    from sdexport.families.components import components
    from sdruntime.bundle.roles import PREVIEW

    found = set()
    for folder in (sd1_checkpoint, sdxl_checkpoint):
        checkpoint = read_checkpoint(folder, name="x", precision="fp32", allow_pickle=False)
        found |= {component.name for component in components(checkpoint)}
    assert found | {PREVIEW, "step"} == names(recipes.ComponentsTable)
