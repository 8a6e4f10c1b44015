"""The images of a request for ControlNets: their settings, when they act, and what the command line reads."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

from sdruntime.cli.arguments import control
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.requests.control import MOST_CONTROLS, Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.unused import unused_lines

IMAGE = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1}, "control: scale -1 is outside 0 to 10"),
        ({"scale": float("nan")}, "control: scale nan is outside"),
        ({"scale": "1"}, "control: scale '1': expected a number"),
        ({"start": 0.5, "end": 0.5}, "control: start 0.5 is not below end 0.5"),
        ({"end": 1.5}, "control: end 1.5 is outside 0 to 1"),
        ({"type": 1.5}, "control: type 1.5: expected a whole number from 0 to 63"),
        ({"net": 3}, "control: net 3: expected the name"),
        ({"low": 50}, "control: low 50 and high 200 are thresholds of canny; preprocess is none"),
        ({"low": 201, "preprocess": "canny"}, "control: low 201 is above high 200"),
        ({"high": 3000, "preprocess": "canny"}, "control: high 3000 is outside 0 to 2,040"),
        ({"preprocess": "inpaint"}, "control: preprocess inpaint needs a mask, which marks what to paint"),
        ({"mask": IMAGE}, "control: preprocess none takes no mask, which is for inpaint"),
        (
            {"mask": IMAGE[:2], "preprocess": "inpaint"},
            "control: the mask and the image are 6x2 and 6x4: they must be of one size",
        ),
        ({"mask": "missing.png", "preprocess": "inpaint"}, "control: missing.png: cannot be read"),
        ({"image": "missing.png"}, "control: missing.png: cannot be read"),
        ({"image": np.zeros((4, 6), np.uint8)}, r"control: image: expected uint8 \[height, width, 3\]"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Control(**{"image": IMAGE, **settings})


def test_a_fit_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownName, match="crop"):
        Control(image=IMAGE, fit="cropp")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="canny"):
        Control(image=IMAGE, preprocess="cany")  # type: ignore[arg-type]


def test_a_request_takes_one_or_several() -> None:
    one = Control(image=IMAGE, net="canny", scale=0.5, end=0.8)
    assert Request(prompt="", control=one).controls == Request(prompt="", control=[one]).controls == (one,)
    assert repr(one) == "<Control canny 6x4, scale 0.5, 0 to 0.8>"
    with pytest.raises(SettingError, match=r"control 'edges.png': expected Control\(image=…\)"):
        Request(prompt="", control="edges.png")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=f"got {MOST_CONTROLS + 1}; at most {MOST_CONTROLS}"):
        Request(prompt="", control=[one] * (MOST_CONTROLS + 1))
    with pytest.raises(SettingError, match="guess_mode 1: expected True or False"):
        Request(prompt="", guess_mode=1)  # type: ignore[arg-type]


def test_guess_mode_without_control_has_no_effect() -> None:
    assert unused_lines([Request(prompt="", guess_mode=True)]) == ["guess_mode has no effect without control"]
    assert unused_lines([Request(prompt="", guess_mode=True, control=Control(image=IMAGE))]) == []


def test_it_acts_in_the_calls_that_diffusers_keeps() -> None:
    acts = [Control(image=IMAGE, start=0.2, end=0.7).acts(call, 6) for call in range(6)]
    assert acts == [not (i / 6 < 0.2 or (i + 1) / 6 > 0.7) for i in range(6)] == [False, False, True, True, False, False]


def test_the_command_line_reads_a_file_and_settings() -> None:
    assert control("edges.png") == {"image": "edges.png"}
    assert control("a,b.png,net=canny,scale=0.5,end=.8") == {"image": "a,b.png", "net": "canny", "scale": "0.5", "end": ".8"}
    assert control("canny:a.png,net=canny") == {"image": "a.png", "preprocess": "canny", "net": "canny"}
    thresholds = {"low": "50", "high": "150"}
    assert control("canny:a.png,low=50,high=150") == {"image": "a.png", "preprocess": "canny", **thresholds}
    assert control("inpaint:a.png,mask=m.png") == {"image": "a.png", "preprocess": "inpaint", "mask": "m.png"}
    assert control("c:a.png") == {"image": "c:a.png"}
    assert control("a.png,type=3") == {"image": "a.png", "type": "3"}
    for wrong in ("", "a.png,type=x", ",net=canny", "e.png,scale=x", "e.png,scale=1,scale=2", "e.png,weight=1"):
        with pytest.raises(argparse.ArgumentTypeError):
            control(wrong)
