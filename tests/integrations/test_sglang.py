"""An environment variable switches the plugin for SGLang on. tests/with_sglang tests its hooks."""

from __future__ import annotations

import pytest

from stgridpool_kernels.integrations import sglang
from stgridpool_kernels.integrations.modes import mode_options
from stgridpool_kernels.integrations.sglang import switched_options


def test_mode_and_options_in_one_variable() -> None:
    assert switched_options("on") == mode_options("pool")
    given = "temperature=2,frame_strides=2:4,norm_type=inf,normalize_norm=False"
    meant = {"temperature": 2.0, "frame_strides": (2, 4), "norm_type": float("inf"), "normalize_norm": False}
    assert switched_options(given) == switched_options(f"mode=pool,{given}") == mode_options("pool", **meant)
    assert switched_options("output_size=14") == mode_options("pool", output_size=14)
    assert switched_options("frame_strides=none") == mode_options("pool", frame_strides=())
    for text in ("frame_strides=2:4,mode=grid", '{"mode": "grid", "frame_strides": [2, 4]}'):
        assert switched_options(text) == mode_options("grid", frame_strides=(2, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes", "got 'yes'"),
        ("temprature=2", "temprature='2'"),
        ("temperature=hot", "temperature must be a number, got 'hot'"),
        ("sampling=middle", "sampling"),
        ("mode=pol", "mode must be 'grid' or 'pool', got 'pol'"),
        ("mode=grid,temperature=2", "temperature must not be given in mode 'grid'"),
        ("mode=grid,mode=pool", "mode must be given once"),
    ],
)
def test_wrong_options_end_the_process_and_are_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "require", lambda *arguments, **named: None)
    monkeypatch.setenv("STGP_SGLANG", text)
    with pytest.raises(SystemExit) as raised:
        sglang.register()
    assert message in str(raised.value)
    assert f"STGP_SGLANG={text}" in str(raised.value)


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, ""):
        if text is None:
            monkeypatch.delenv("STGP_SGLANG", raising=False)
        else:
            monkeypatch.setenv("STGP_SGLANG", text)
        sglang.register()
