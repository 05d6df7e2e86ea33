"""The plugin tells vLLM settings, budgets, hashes and graphs of its architectures, and refuses what does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import questions
import tiny
import torch
from torch import nn

from stgridpool_kernels.integrations import vllm as plugin
from stgridpool_kernels.integrations.modes import mode_options

KINDS = {
    **{architecture: kind for kind, architecture in questions.KINDS.items()},
    "LlavaOnevisionForConditionalGeneration": "onevision",
    "LlavaNextVideoForConditionalGeneration": "next_video",
}
"""These are kinds of checkpoints, by the architecture of vLLM that each is for."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Register classes of models, which spares a process for each of them."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vLLM does this once in a process
    for name, (_, base) in plugin.ARCHITECTURES.items():
        ModelRegistry.register_model(base, ModelRegistry.models[base].load_model_cls())
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: questions.save(kind, tmp_path_factory.mktemp(kind)) for kind in questions.KINDS}
    made["onevision"] = tiny.make_onevision(tmp_path_factory.mktemp("onevision"))
    made["next_video"] = tiny.make_next_video(tmp_path_factory.mktemp("next_video"))
    return made


@pytest.fixture
def configured(folders: dict[str, Path]) -> Any:
    """Return a function that returns vLLM's resolved configuration for an architecture of its own, or one of ours."""
    from vllm.engine.arg_utils import EngineArgs

    def configured(base: str, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
        kind = KINDS[base]
        chosen = {"architectures": [base if options is None else f"Stgp{base}"], "stgp_options": options}
        return EngineArgs(
            model=str(folders[kind]),
            max_model_len=1024,
            hf_overrides=chosen if options is not None else {"architectures": [base]},
            trust_remote_code=kind == "internvl_chat",
            **arguments,
        ).create_engine_config()

    return configured


def test_registering_imports_no_model_and_touches_no_device() -> None:
    """A process as one of vLLM's has vLLM imported, before a device is chosen."""
    done = subprocess.run([sys.executable, "-c", REGISTER], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REGISTER = f"""
import sys
from vllm import ModelRegistry
before = dict(ModelRegistry.models)
from vllm.plugins import load_general_plugins
load_general_plugins()
added = ModelRegistry.models.keys() - before.keys()
assert added == {set(plugin.ARCHITECTURES)!r}, added
assert all(ModelRegistry.models[name] is model for name, model in before.items())
vllms = tuple(f"vllm.model_executor.models.{{name}}" for name in ("llava", "qwen", "intern"))
assert not [name for name in sys.modules if name.startswith(("stgridpool_kernels.integrations.vllm_", *vllms))]
import torch
assert not torch.cuda.is_initialized()
from stgridpool_kernels.integrations.vllm import register
register()  # again: vLLM says that it may call a plugin several times
"""


def test_every_architecture_is_tested() -> None:
    assert {f"Stgp{base}" for base in KINDS} == set(plugin.ARCHITECTURES)


@pytest.mark.parametrize("base", KINDS)
def test_the_resolved_configuration_is_that_of_the_base(configured: Any, base: str) -> None:
    """Configurations differ in the names of architectures, and in what selects them, alone."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    stock, ours = (fields(configured(base, options)) for options in (None, {}))
    differing = {name for name in stock if repr(stock[name]) != repr(ours[name])}
    assert differing <= {"model_config.hf_overrides", "model_config.hf_config", "instance_id"}
    settings = [settings_of(config["model_config.hf_config"]) for config in (stock, ours)]
    assert settings[0].pop("architectures") == [base]
    assert settings[1].pop("architectures") == [f"Stgp{base}"]
    assert settings[1].pop("stgp_options") == {}
    assert settings[0] == settings[1]
    assert ModelRegistry.models[base].interfaces == ModelRegistry.models[f"Stgp{base}"].interfaces
    assert MODELS_CONFIG_MAP.get(base) is MODELS_CONFIG_MAP.get(f"Stgp{base}")
    assert (base in MODELS_CONFIG_MAP) == ("Qwen3_5" in base)


def fields(config: Any) -> dict[str, Any]:
    """Return the settings in a configuration of vLLM, with the name of the part that they are in."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if dataclasses.is_dataclass(value):
            found |= {
                f"{field.name}.{part.name}": getattr(value, part.name, None) for part in dataclasses.fields(value)
            }
        else:
            found[field.name] = value
    return found


def settings_of(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not name.startswith("_")}


# ---- hashes ----


@pytest.fixture
def hashes(configured: Any) -> Any:
    """Return a function that returns the hashes of two videos and an image, given options or None for vLLM's own."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.inputs import ProcessorInputs

    def hashes(base: str, options: dict[str, Any] | None, brought: bool = False) -> tuple[list[str], list[str]]:
        processor = MULTIMODAL_REGISTRY.create_processor(configured(base, options).model_config)
        kind = KINDS[base]
        if kind in questions.KINDS:
            media, names = questions.media(kind), ("odd", "small", "image")
        else:
            media, names = {"a": tiny.video(1, 6), "b": tiny.video(2, 9), "image": tiny.image(3)}, ("a", "b", "image")
        *videos, image = (media[name] for name in names)
        metadata = [questions.metadata(len(video)) for video in videos]
        with_metadata = kind.startswith("qwen") and kind != "qwen2_vl"
        shown = list(zip(videos, metadata, strict=True)) if with_metadata else videos
        items = processor.info.parse_mm_data({"video": shown, "image": [image]}, validate=False)
        given = {"video": ["first", "second"], "image": ["third"]} if brought else None
        made = processor._get_mm_hashes(ProcessorInputs([], items, given))
        return made["video"], made["image"]

    return hashes


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("brought", [False, True], ids=["made", "brought along"])
def test_hashes_of_videos_tell_options_and_modes_apart(hashes: Any, base: str, brought: bool) -> None:
    """Hashes that a request brings along ("UUIDs") do so too. Those of images are vLLM's."""
    chosen = [None, {}, {"temperature": 2.0}, {"norm_type": 1.0}]
    if "Llava" not in base:
        chosen += [{"mode": "grid"}, {"mode": "grid", "frame_strides": [2]}]
    found = [hashes(base, options, brought) for options in chosen]
    videos = [video for made, _ in found for video in made]
    assert len(set(videos)) == len(videos) == 2 * len(chosen)
    assert {tuple(image) for _, image in found} == {tuple(found[0][1])}
    assert (videos[:2] == ["first", "second"]) == brought
    assert hashes(base, {"temperature": 2.0}, brought) == found[2]


# ---- budgets ----


@pytest.mark.parametrize("base", KINDS)
def test_budgets_are_those_of_the_base(configured: Any, base: str) -> None:
    """The engine chooses videos of a step, and makes room for what is left of them, by these budgets."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    kept = [
        {name: value for name, value in vars(budget).items() if isinstance(value, int | dict)}
        for options in (None, {})
        for budget in [MultiModalBudget(configured(base, options), MULTIMODAL_REGISTRY)]
    ]
    assert kept[0]["mm_max_toks_per_item"]["video"] > 0
    assert kept[0] == kept[1]


def test_what_is_encoded_together_is_little_or_one() -> None:
    from stgridpool_kernels.integrations.vllm_models import encoder_batches

    tokens = [5, 3, 2, 11, 1, 9, 1, 4]
    found = [tokens[some] for some in encoder_batches(tokens, 10)]
    assert found == [[5, 3, 2], [11], [1, 9], [1, 4]]
    assert list(encoder_batches([], 10)) == []
    assert list(encoder_batches([11], 10)) == [slice(0, 1)]


class Encoder(nn.Module):
    """This encoder merges 2 × 2 patches, each frame from its patches alone, and notes how many it is given."""

    spatial_merge_size = 2
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, patches: torch.Tensor, grid_thw: Any) -> torch.Tensor:
        self.seen.append(len(patches))
        return patches.unflatten(0, (-1, 4)).flatten(1)


QWEN = [base for base in KINDS if "Qwen" in base]


@pytest.mark.parametrize("kind", ["pixel_values_videos", "video_embeds"])
@pytest.mark.parametrize("base", QWEN)
def test_the_encoder_is_given_no_more_at_once_than_it_was_profiled_with(base: str, kind: str) -> None:
    """A step may have more tokens than that, since the engine counts those that are left; so may one long video."""
    model = bare(base)
    grids = torch.tensor([[17, 6, 10], [3, 4, 6], [2, 6, 4], [20, 2, 4]])
    patches = torch.randn(int(grids.prod(-1).sum()), 4)
    if kind == "video_embeds":
        patches = patches.unflatten(0, (-1, 4)).flatten(1)
    results, seen = [], []
    for limit in (325, 40, 1):
        model.stgp_encoder_limit, model.visual.seen = limit, []
        given = {"type": kind, kind: patches, "video_grid_thw": grids}
        results.append(model._process_video_input(given))
        seen.append(model.visual.seen)
    assert [video.shape for video in results[0]] == [(17 * 6, 16), (3 * 2, 16), (2 * 2, 16), (20, 16)]
    assert all(torch.equal(one, other) for some in results[1:] for one, other in zip(results[0], some, strict=True))
    if kind == "video_embeds":
        assert seen == [[], [], []]
        return
    in_pieces = [2 * 15 * 4] * 8 + [(15 + 18) * 4, 12 * 4, 40 * 4]
    one_by_one = [15 * 4] * 17 + [6 * 4] * 3 + [6 * 4] * 2 + [2 * 4] * 20
    assert seen == [[1300], in_pieces, one_by_one]


@pytest.mark.parametrize(
    ("base", "module", "kind", "name"),
    [
        ("InternVLChatModel", "internvl", "InternVLVideoPixelInputs", "pixel_values_flat"),
        ("InternVLForConditionalGeneration", "interns1", "InternS1VideoPixelInputs", "pixel_values"),
    ],
)
def test_the_projector_of_internvl_is_given_no_more_at_once_either(
    base: str, module: str, kind: str, name: str
) -> None:
    model, seen = bare(base), []
    model.num_image_token = 25

    def extract_feature(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.flatten(1).unflatten(1, (25, 12))

    model.extract_feature = extract_feature
    frames = [17, 1, 3, 9]
    given = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), kind)(
        type="pixel_values_videos",
        **{name: torch.randn(sum(frames), 3, 10, 10)},
        num_patches=torch.tensor(frames),
        resolve_bindings={"h": 10, "w": 10},
    )
    results = []
    for limit in (750, 125, 24):
        model.stgp_encoder_limit = limit
        results.append(model._process_vision_input(given))
    assert seen == [30, 5, 5, 5, 5, 5, 5, *[1] * 30]
    assert [video.shape for video in results[0]] == [(9 * count, 12) for count in frames]
    assert all(torch.equal(one, other) for some in results[1:] for one, other in zip(results[0], some, strict=True))
    alone = given[name][-9:].flatten(1).unflatten(1, (5, 5, 12))
    assert torch.equal(results[0][-1], mode_options("pool").apply(alone).flatten(0, 2))


def bare(base: str, **options: Any) -> Any:
    """Return a model of ours without what needs an engine."""
    kind = getattr(plugin, f"Stgp{base}")
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    model.visual, model.use_data_parallel = Encoder(), False
    model.stgp_options, model.stgp_channels = mode_options("pool", **options), 16
    return model


# ---- refused ----

QWEN3 = "Qwen3VLForConditionalGeneration"


@pytest.mark.parametrize(
    ("base", "options", "arguments", "message"),
    [
        (
            QWEN3,
            {},
            {"video_pruning_rate": 0.5},
            "video_pruning_rate must be 0 or left out beside ST-GridPool, got 0.5",
        ),
        (
            "InternVLChatModel",
            {"mode": "grid"},
            {"video_pruning_rate": 0.5},
            "video_pruning_rate must be 0 or left out beside ST-GridPool, got 0.5",
        ),
        (QWEN3, {"mode": "both"}, {}, "stgp_options: mode must be 'grid' or 'pool', got 'both'"),
        (QWEN3, {"mode": "grid", "output_size": 3}, {}, "stgp_options: output_size must not be given in mode 'grid'"),
        (QWEN3, {"mode": 1}, {}, "stgp_options: mode must be a word, got 1"),
        (QWEN3, {"strides": [2]}, {}, "stgp_options: there must be an option strides"),
        *(
            (base, {"norm_channels": 65}, {}, "the 64 channels of a token, got 65")
            for base in KINDS
            if "Next" not in base
        ),
        ("LlavaNextVideoForConditionalGeneration", {"norm_channels": 33}, {}, "the 32 channels of a token, got 33"),
        (
            "InternVLForConditionalGeneration",
            {"kernel_size": 19, "ceil_mode": False},
            {},
            "leaves no window on a 8 × 8 frame",
        ),
        (
            "LlavaOnevisionForConditionalGeneration",
            {"mode": "grid"},
            {},
            "stgp_options: mode must be 'pool' for a model whose own pooling is replaced, got 'grid'",
        ),
    ],
)
def test_what_an_engine_cannot_have_is_refused_before_weights_are_loaded(
    configured: Any, base: str, options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    with pytest.raises(RuntimeError, match=re.escape(message)):
        MULTIMODAL_REGISTRY.create_processor(configured(base, options, **arguments).model_config)


def test_options_of_the_environment_have_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STGP_VLLM_OPTIONS", "mode=grid,frame_strides=2:4")
    assert plugin.engine_options(SimpleNamespace()) == mode_options("grid", frame_strides=[2, 4])
    given = SimpleNamespace(stgp_options={"temperature": 2.0})
    assert plugin.engine_options(given) == mode_options("pool", temperature=2.0)
    monkeypatch.setenv("STGP_VLLM_OPTIONS", "mode=both")
    with pytest.raises(ValueError, match="STGP_VLLM_OPTIONS: mode must be 'grid' or 'pool', got 'both'"):
        plugin.engine_options(SimpleNamespace())


@pytest.mark.parametrize(("grid", "fits"), [([2, 4, 6], True), ([1, 3, 4], False), ([1, 4, 5], False)])
def test_tokens_of_half_a_place_are_refused_by_the_processor(configured: Any, grid: list[int], fits: bool) -> None:
    """vLLM's own processor takes them; here the model would fail, and with it the engine."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    config = configured(QWEN3, {}, enable_mm_embeds=True).model_config
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    brought = {
        "video_embeds": torch.zeros(grid[0] * grid[1] * grid[2] // 4, 192),
        "video_grid_thw": torch.tensor([grid]),
        "timestamps": [[0.0] * grid[0]],
    }
    items = processor.info.parse_mm_data({"video": brought}, validate=False)
    ids = processor.info.get_tokenizer().encode(questions.prompt_text("qwen3_vl", "{long}"))
    refused = pytest.raises(ValueError, match=r"video_grid_thw must have rows and columns .* multiples of 2, got \[")
    with contextlib.nullcontext() if fits else refused:
        processor.apply(ProcessorInputs(ids, items), TimingContext(enabled=False))


@pytest.mark.parametrize(
    ("base", "mode", "takes"),
    [
        (QWEN3, "pool", False),
        (QWEN3, "grid", True),
        ("InternVLChatModel", "pool", False),
        ("LlavaNextVideoForConditionalGeneration", "pool", True),
    ],
)
def test_models_whose_prompts_are_shorter_have_a_limit_and_no_lora_of_the_encoder(
    base: str, mode: str, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM counts the tokens of an encoder by the places in the prompt, of which these models have fewer."""
    kind = getattr(plugin, f"Stgp{base}")
    stock = next(cls for cls in kind.__mro__ if cls.__module__.startswith("vllm.") and issubclass(cls, nn.Module))
    monkeypatch.setattr(stock, "__init__", lambda self, **_: nn.Module.__init__(self))
    monkeypatch.setattr(kind, "stgp_grid", lambda self: None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(stgp_options={"mode": mode}), hf_text_config=SimpleNamespace(hidden_size=64)
        ),
        scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=77),
    )
    assert stock.supports_tower_connector_lora
    model = kind(vllm_config=config)
    assert model.supports_tower_connector_lora == takes
    assert model.stgp_encoder_limit == (sys.maxsize if takes else 77)


def test_cuda_graphs_of_the_encoder_have_no_frames_of_videos() -> None:
    from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

    from stgridpool_kernels.integrations.vllm_models import EncoderGraphs

    whole = EncoderCudaGraphConfig(["image", "video"], ["pixels"], 64, max_frames_per_video=7)
    stock = type("Stock", (), {"get_encoder_cudagraph_config": lambda self: whole})
    left = type("Ours", (EncoderGraphs, stock), {})().get_encoder_cudagraph_config()
    assert left == dataclasses.replace(whole, modalities=["image"], max_frames_per_video=1)
    assert whole.modalities == ["image", "video"]
