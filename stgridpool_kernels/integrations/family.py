"""`patch`, `unpatch`, `register` and `unregister` of a family of models of transformers and their processors.

A family is the models that one adapter is for, and says what they and their processors are. `qwen_vl` documents the
four functions; every family offers them as functions of its module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from . import loading
from .base import require
from .modes import ModeOptions, mode_options
from .pooled_class import Members, is_pooled, patch_class, patch_classes, unpatch_classes


class Family(ABC):
    """A family of models that share one adapter.

    processor_members: what a patched processor overrides. processor_modes: the modes in which a processor is patched.
    processor_purpose: why these modes need one, as the end of an error message.
    """

    processor_members: Members
    processor_modes: Sequence[str]
    processor_purpose: str

    @abstractmethod
    def parts(self, model: nn.Module) -> list[tuple[Any, Members]]:
        """Return the modules of a model that are patched, and what they override. Raises TypeError for other models."""

    @abstractmethod
    def tested(self, model: nn.Module | None) -> list[dict[str, Any]]:
        """Return arguments of `require` for a model, or for every model of the family."""

    @abstractmethod
    def check(self, model: nn.Module, options: ModeOptions) -> None:
        """Raise ValueError if the options do not fit the sizes of a model."""

    @abstractmethod
    def model_classes(self) -> list[Any]:
        """Return the library's classes of models, without and with a language model head."""

    @abstractmethod
    def processor_classes(self) -> list[Any]:
        """Return the library's classes of processors. A checkpoint may have that of another model of its family."""

    def patch(self, model: nn.Module, processor: Any, mode: str, options: Mapping[str, Any]) -> None:
        """Patch a model, and its processor where the mode needs it, or raise before anything is changed."""
        parts = self.parts(model)
        for arguments in self.tested(model):
            require(**arguments)
        chosen = mode_options(mode, **options)
        self.check(model, chosen)
        patch_classes([*parts, *self._processor_parts(processor, chosen)], chosen)

    def patch_processor(self, processor: Any, options: ModeOptions) -> None:
        """Patch a processor alone, where the mode needs it, for an engine with models of its own. Raises as `patch`."""
        patch_classes(self._processor_parts(processor, options), options)

    def unpatch(self, model: nn.Module, processor: Any) -> None:
        """Restore a model and a processor, or raise before anything is changed."""
        modules = [module for module, _ in self.parts(model)]
        if processor is not None:
            self._check_class(processor)
        unpatch_classes([*modules, processor])

    def register(self, mode: str, options: Mapping[str, Any]) -> None:
        """Patch every model of the family, and processors where the mode needs it, when the library loads them."""
        for arguments in self.tested(None):
            require(**{**arguments, "signatures": {**arguments["signatures"], **loading.SIGNATURES}})
        chosen = mode_options(mode, **options)

        def change(loaded: Any) -> None:
            if not isinstance(loaded, nn.Module):
                parts = self._processor_parts(loaded, chosen)
            else:
                parts = [(module, members) for module, members in self.parts(loaded) if not is_pooled(module)]
                self.check(loaded, chosen)
            for one, members in parts:
                patch_class(one, members, chosen)

        loading.change_loaded([*self.model_classes(), *self.processor_classes()], change)

    def unregister(self) -> None:
        """End `register`."""
        for arguments in self.tested(None):
            require(**arguments)
        loading.stop_changing([*self.model_classes(), *self.processor_classes()])

    def _processor_parts(self, processor: Any, options: ModeOptions) -> list[tuple[Any, Members]]:
        """Return the processor and what it overrides; nothing if the mode needs none or it is patched alike already."""
        needed = options.mode in self.processor_modes
        if processor is None:
            if needed:
                raise TypeError(
                    f"processor must be given in mode {options.mode!r}, since {self.processor_purpose}: call "
                    f"patch(model, processor)"
                )
            return []
        self._check_class(processor)
        found = processor.stgp_options if is_pooled(processor) else None
        if found not in (None, options):
            raise RuntimeError(f"processor is patched already, with {found}: unpatch it first")
        return [(processor, self.processor_members)] if needed and found is None else []

    def _check_class(self, processor: Any) -> None:
        classes = self.processor_classes()
        if not isinstance(processor, tuple(classes)):
            names = " or ".join(cls.__name__ for cls in classes)
            raise TypeError(f"processor must be an instance of {names}, got {type(processor).__name__}")
