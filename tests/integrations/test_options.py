"""One parser reads options as text for engines, evaluations, Ray and the command line."""

from __future__ import annotations

import inspect
import math

import pytest

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations.base import PoolOptions
from stgridpool_kernels.integrations.options import read_grid, read_option, read_options


@pytest.mark.parametrize(
    "text",
    [
        "2,4,8",
        "2:4:8",
        "2x4x8",
        "2×4×8",
        "2 × 4 × 8",
        "2 4 8",
        "[2, 4, 8]",
        "(2, 4, 8)",
        " 2, 4, 8 ",
        [2, 4, 8],
        (2, 4, 8),
    ],
    ids=repr,
)
def test_integers_in_every_form(text: object) -> None:
    assert read_option("frame_strides", text, "frame_strides") == (2, 4, 8)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("frame_strides", "4", (4,)),
        ("frame_strides", 4, (4,)),
        ("frame_strides", "none", ()),
        ("frame_strides", None, ()),
        ("frame_strides", "[]", ()),
        ("frame_strides", "[ ]", ()),
        ("frame_counts", "16,9", (16, 9)),
        ("frame_counts", "none", None),
        ("kernel_size", "3", 3),
        ("kernel_size", "3x2", (3, 2)),
        ("padding", "1:0", (1, 0)),
        ("stride", "none", None),
        ("stride", "null", None),
        ("output_size", [14, 14], (14, 14)),
        ("temperature", "-1", -1.0),
        ("norm_type", "inf", math.inf),
        ("ceil_mode", "true", True),
        ("ceil_mode", False, False),
        ("norm_channels", "2048", 2048),
        ("norm_channels", 2048, 2048),
        ("norm_channels", "none", None),
        ("norm_channels", None, None),
        ("sampling", "first", "first"),
        ("backend", "reference", "reference"),
    ],
)
def test_values_of_every_kind(name: str, given: object, meant: object) -> None:
    found = read_option(name, given, name)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    "text",
    [
        "temperature=2,frame_strides=2:4,norm_type=inf,normalize_norm=False",
        "temperature=2,frame_strides=2,4,norm_type=inf,normalize_norm=False",
        "frame_strides = [2, 4], norm_type = inf, temperature = 2, normalize_norm = false",
        '{"temperature": 2, "frame_strides": [2, 4], "norm_type": "inf", "normalize_norm": false}',
    ],
)
def test_several_options_in_one_text(text: str) -> None:
    meant = {"temperature": 2.0, "frame_strides": (2, 4), "norm_type": math.inf, "normalize_norm": False}
    assert read_options(text) == meant


def test_no_options() -> None:
    assert read_options("") == read_options("{}") == read_options({}) == {}


def test_every_argument_of_grid_pool_can_be_given() -> None:
    signature = inspect.signature(stgp.grid_pool).parameters
    for name in signature.keys() - {"x", "out", "frame_counts"}:
        default = PoolOptions().arguments[name]
        assert read_options({f"stgp_{name}": default}, "stgp_") == {name: default}
    assert read_options({"frame_counts": None}) == {"frame_counts": None}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("yes", ValueError, "options must be like temperature=2,frame_strides=2:4:8, or a JSON object, got 'yes'"),
        ("{", ValueError, "options must be a JSON object, got '{': Expecting property name"),
        ("temprature=2", TypeError, "there must be an option temprature, among frame_strides, .*, got temprature='2'"),
        ("out=2", TypeError, "there must be an option out"),
        ("temperature=1,temperature=2", ValueError, "temperature must be given once, got temperature=1.0 and"),
        ('{"temperature": 1, "temperature": 2}', ValueError, "temperature must be given once"),
        ("temperature=hot", ValueError, "temperature must be a number, got 'hot'"),
        ("frame_strides=2;4", ValueError, "frame_strides must be integers like 2,4,8, or none, got '2;4'"),
        ("frame_strides=2,4:8", ValueError, "frame_strides must be integers like 2,4,8, or none, got '2,4:8'"),
        ("frame_strides=2,4 8", ValueError, "frame_strides must be integers like 2,4,8, or none, got '2,4 8'"),
        ("frame_strides=2,", ValueError, "frame_strides must be integers"),
        ('{"frame_strides": [2, true]}', ValueError, r"frame_strides must be integers .*, got \[2, True\]"),
        ('{"frame_strides": 2.5}', ValueError, "frame_strides must be integers .*, got 2.5"),
        ("kernel_size=1,2,3", ValueError, "kernel_size must be one integer or two like 2,2, got '1,2,3'"),
        ("kernel_size=none", ValueError, "kernel_size must be one integer or two like 2,2, got 'none'"),
        ("kernel_size=[]", ValueError, r"kernel_size must be one integer or two like 2,2, got '\[\]'"),
        ("stride=x", ValueError, "stride must be one integer or two like 2,2, or none, got 'x'"),
        ('{"output_size": true}', ValueError, "output_size must be one integer or two .*, got True"),
        ("ceil_mode=1", ValueError, "ceil_mode must be True or False, got '1'"),
        ('{"temperature": true}', ValueError, "temperature must be a number, got True"),
        ("norm_channels=1,2", ValueError, "norm_channels must be an integer, or none, got '1,2'"),
        ("norm_channels=5.0", ValueError, "norm_channels must be an integer, or none, got '5.0'"),
        ("norm_channels=", ValueError, "norm_channels must be an integer, or none, got ''"),
        ('{"norm_channels": true}', ValueError, "norm_channels must be an integer, or none, got True"),
        ('{"norm_channels": 5.0}', ValueError, "norm_channels must be an integer, or none, got 5.0"),
        ('{"backend": 2}', ValueError, "backend must be a word, got 2"),
    ],
)
def test_what_is_wrong_is_named(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        read_options(text)


@pytest.mark.parametrize("given", ["18x32", "18,32", "18:32", "18 32", "18 × 32", [18, 32], (18, 32)], ids=repr)
def test_a_grid_in_every_form(given: object) -> None:
    assert read_grid(given, "grid") == (18, 32)


@pytest.mark.parametrize("given", ["18", "18x", "0x3", "-1x3", "1x2x3", "", "none", None, 18, [1.5, 2]], ids=repr)
def test_what_is_no_grid(given: object) -> None:
    with pytest.raises(ValueError, match=r"^grid must be rows and columns like 18x32, both at least 1, got "):
        read_grid(given, "grid")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kernel_size": ' + "[" * 100_000, "options must be a JSON object"),
        ('{"kernel_size": ' + "1" * 5000 + "}", "options must be a JSON object"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature must be a number"),
        ("kernel_size=" + "1" * 5000, "kernel_size must be one integer or two"),
        ("frame_strides=" + "1" * 5000, "frame_strides must be integers"),
    ],
    ids=["brackets", "digits of JSON", "digits of a float", "digits of a pair", "digits of a list"],
)
def test_endless_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        read_options(text)
