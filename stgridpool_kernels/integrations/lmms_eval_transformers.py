"""This module puts ST-GridPool into those models of lmms-eval that hold a model of transformers.

It takes place between encoder and language model. lmms-eval keeps model and processor as attributes, and prompts get
their placeholders from the processor, so both are patched as soon as they are loaded. Other models in the process are
not affected.
"""

from __future__ import annotations

import importlib
from typing import Any

from .base import require
from .family import Family
from .modes import mode_options
from .options import split_arguments


class _Failed(BaseException):
    """This exception carries an error through code that catches every Exception."""


def members(base: Any, family: Family) -> dict[str, Any]:
    """Return the method, by name, with which a subclass of a model's class patches what it loads.

    family: the family of the models that it loads.
    """

    def __init__(self: Any, *positional: Any, **arguments: Any) -> None:
        self.stgp_options, others = split_arguments(arguments, mode_options, {"mode": "pool"})
        if self.stgp_options is None:
            base.__init__(self, *positional, **others)
            return
        for tested in family.tested(None):
            require(**tested)
        base.__init__(self, *positional, **others)
        options = dict(self.stgp_options)
        family.patch(self.model, self.processor, options.pop("mode"), options)
        log = importlib.import_module("loguru").logger  # lmms-eval's logger, since it does not show Python's logging
        log.info(f"ST-GridPool: videos of {type(self.model).__name__}, {mode_options(**self.stgp_options)}")

    return {"__init__": __init__}


def members_that_raise(base: Any, family: Family) -> dict[str, Any]:
    """Return `members`, and a `generate_until` that raises the errors of `generate`.

    Where `generate` raises, lmms-eval's own method takes an empty string for the answer, so that an error is scored as
    a mistake.
    """

    def generate_until(self: Any, requests: Any) -> Any:
        generate = self.model.generate

        def raising(*positional: Any, **arguments: Any) -> Any:
            try:
                return generate(*positional, **arguments)
            except Exception as error:
                raise _Failed(error) from error

        self.model.generate = raising
        try:
            return base.generate_until(self, requests)
        except _Failed as failed:
            [error] = failed.args
            raise error from error.__cause__
        finally:
            del self.model.generate

    return members(base, family) | {"generate_until": generate_until}
