"""The plugin for vLLM works where vLLM is not installed, or a stand-in for it is. tests/with_vllm has the rest."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stgridpool_kernels.integrations import base
from stgridpool_kernels.integrations import vllm as plugin
from stgridpool_kernels.integrations.modes import mode_options

ROOT = Path(__file__).parents[2]
SETTINGS = {"Qwen3_5ForConditionalGeneration": object(), "LlamaForCausalLM": object()}
"""This is vLLM's table of settings of architectures."""


@pytest.fixture(autouse=True)
def no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.OPTIONS_VARIABLE, raising=False)


class Registry:
    """This registry is as much of vLLM's ModelRegistry as a plugin needs."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, architecture: str, model: str) -> None:
        self.models[architecture] = model


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str, **attributes: Any) -> None:
    def not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    engine, config = ModuleType("vllm"), ModuleType("vllm.model_executor.models.config")
    vars(engine).update(__version__=version, **attributes)
    vars(config).update(MODELS_CONFIG_MAP=SETTINGS.copy())
    for module in (engine, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(base.metadata, "version", not_found)


# ---- the plugin ----


def test_the_entry_point_is_the_function() -> None:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest needs the latter
    declared = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert list(declared) == ["stgridpool_kernels"]
    module, name = declared["stgridpool_kernels"].split(":")
    assert getattr(importlib.import_module(module), name) is plugin.register


def test_without_vllm_nothing_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.INFO):
        plugin.register()
    assert not caplog.records


def test_architectures_are_registered_by_name_and_as_often_as_one_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    stand_in(monkeypatch, "0.32.0+cpu", ModelRegistry=registry)
    plugin.register()
    plugin.register()
    assert registry.models == {name: f"{plugin.__name__}:{name}__vllm_0.32.0+cpu" for name in plugin.ARCHITECTURES}
    assert all(name.startswith("Stgp") for name in registry.models)
    settings = sys.modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP
    assert settings == {
        **SETTINGS,
        "StgpQwen3_5ForConditionalGeneration": SETTINGS["Qwen3_5ForConditionalGeneration"],
    }


@pytest.mark.parametrize("case", ["no registry", "another registry", "no settings"])
def test_a_registry_of_another_kind_is_survived(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry()
    registries = {"no registry": {}, "another registry": {"ModelRegistry": object()}}
    stand_in(monkeypatch, "9.0", **registries.get(case, {"ModelRegistry": registry}))
    if case == "no settings":
        monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)
    with caplog.at_level(logging.WARNING, logger=plugin.logger.name):
        plugin.register()
    assert [record.getMessage() for record in caplog.records] == [
        "the architectures of ST-GridPool could not be registered"
    ]
    assert not registry.models


def test_an_older_version_registers_and_refuses_to_be_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    stand_in(monkeypatch, "0.31.1", ModelRegistry=registry)
    plugin.register()
    for selected in registry.models.values():
        module, name = selected.split(":")
        with pytest.raises(
            RuntimeError, match=r"^vllm 0\.31\.1 is installed; .* tested with vllm from 0\.32 to before"
        ):
            getattr(importlib.import_module(module), name)


def test_selecting_needs_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"^vllm is not installed"):
        plugin.StgpLlavaOnevisionForConditionalGeneration  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'LlavaOnevisionForConditionalGeneration'"):
        plugin.LlavaOnevisionForConditionalGeneration  # noqa: B018


# ---- options ----


def test_without_options_the_size_is_that_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.engine_options(SimpleNamespace()) == mode_options("pool", ceil_mode=True)
    monkeypatch.setenv(plugin.OPTIONS_VARIABLE, "")
    assert plugin.engine_options(SimpleNamespace()) == mode_options("pool", ceil_mode=True)


def test_options_of_the_engine_come_before_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.OPTIONS_VARIABLE, '{"temperature": 3, "frame_strides": [2, 4]}')
    expected = mode_options("pool", temperature=3, frame_strides=(2, 4), ceil_mode=True)
    assert plugin.engine_options(SimpleNamespace()) == expected
    assert plugin.engine_options(SimpleNamespace(stgp_options=None)) == expected
    assert plugin.engine_options(SimpleNamespace(stgp_options={})) == mode_options("pool", ceil_mode=True)
    given = SimpleNamespace(stgp_options={"output_size": [3, 3]})
    assert plugin.engine_options(given) == mode_options("pool", output_size=(3, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "^STGP_VLLM_OPTIONS: options must be a JSON object, got '{': Expecting property name"),
        ("[2, 4]", r"^STGP_VLLM_OPTIONS: options must be like temperature=2.*, or a JSON object, got '\[2, 4\]'$"),
        ('{"strides": [2]}', r"^STGP_VLLM_OPTIONS: there must be an option strides, .*, got strides=\[2\]$"),
        ('{"frame_counts": [2]}', "^STGP_VLLM_OPTIONS: options must be among"),
        ('{"temperature": "hot"}', "^STGP_VLLM_OPTIONS: temperature must be a number, got 'hot'"),
        ('{"sampling": "middle"}', "^STGP_VLLM_OPTIONS: sampling"),
        ('{"backend": "abacus"}', "^STGP_VLLM_OPTIONS: backend"),
    ],
)
def test_bad_options_are_named_with_where_they_come_from(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin.OPTIONS_VARIABLE, text)
    with pytest.raises(ValueError, match=message):
        plugin.engine_options(SimpleNamespace())
    monkeypatch.delenv(plugin.OPTIONS_VARIABLE)
    if text.startswith('{"'):
        with pytest.raises(ValueError, match=message.replace("STGP_VLLM_OPTIONS", "stgp_options")):
            plugin.engine_options(SimpleNamespace(stgp_options=json.loads(text)))


def test_options_of_the_engine_are_by_name() -> None:
    with pytest.raises(ValueError, match=r"^stgp_options must be options by name, got \[2, 4\]$"):
        plugin.engine_options(SimpleNamespace(stgp_options=[2, 4]))
