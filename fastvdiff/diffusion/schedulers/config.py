"""Scheduler configurations: recorded constructor arguments, interchangeable with diffusers' in memory and on disk."""

from __future__ import annotations

import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

CONFIG_NAME = "scheduler_config.json"


class FrozenConfig(dict[str, Any]):
    """A read-only dict whose items are attributes too: `config.beta_start` is `config["beta_start"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's config has no {name!r}; it has {', '.join(self)}") from None

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a scheduler's config is read-only: make another with from_config(config, name=value)")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


def registers_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates `__init__`: every argument, given or default, is kept in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def record_and_init(self: Configurable, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = list(bound.arguments.items())[1:]
        config = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values}
        self._internal_dict = FrozenConfig(config, _class_name=type(self).__name__)
        init(self, *args, **kwargs)

    return record_and_init


class Configurable:
    """`config`, `from_config`, `save_pretrained` and `from_pretrained` for a class whose `__init__` is registered."""

    _internal_dict: FrozenConfig  # diffusers' pipelines replace it by this name when they amend an old config

    @property
    def config(self) -> FrozenConfig:
        """The constructor's arguments."""
        return self._internal_dict

    @classmethod
    def _argument_names(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters) - {"self"}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler with another one's configuration.

        config: ours, diffusers' FrozenDict or any mapping; `overrides` win over it. Keys that only other schedulers of
        this package take, and private ones ("_class_name"), are left out silently; any other unknown key is ignored
        with a warning, as in diffusers. Values that diffusers marks as its own defaults are left to ours.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"{cls.__name__}.from_config: config: expected a mapping, got {type(config).__name__}")
        own = cls._argument_names()
        unknown_overrides = sorted(set(overrides) - own)
        if unknown_overrides:
            raise TypeError(f"{cls.__name__}.from_config: unexpected {', '.join(unknown_overrides)}")
        defaulted = set(config.get("_use_default_values") or ())
        values = {k: v for k, v in config.items() if not k.startswith("_") and k not in defaulted}
        siblings = set().union(*(sibling._argument_names() for sibling in cls.__bases__[0].__subclasses__()))
        ignored = sorted(set(values) - own - siblings)
        if ignored:
            warnings.warn(
                f"{cls.__name__}.from_config: ignored {', '.join(ignored)}: not an argument of this scheduler",
                stacklevel=2,
            )
        return cls(**{**{k: v for k, v in values.items() if k in own}, **overrides})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json` in a folder (made if needed); the old file stays whole until the new one is."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{CONFIG_NAME}.{os.getpid()}"
        aside.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        os.replace(aside, folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any) -> Self:
        """The scheduler saved in a folder, such as the `scheduler/` one of a diffusers checkpoint.

        Raises FileNotFoundError where there is no scheduler_config.json, ValueError where it is not a JSON object.
        """
        file = Path(path, subfolder or "", CONFIG_NAME)
        if not file.is_file():
            raise FileNotFoundError(f"{cls.__name__}.from_pretrained: no {CONFIG_NAME} in {file.parent}")
        try:
            config = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.__name__}.from_pretrained: {file} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{cls.__name__}.from_pretrained: {file} holds a {type(config).__name__}, not an object")
        return cls.from_config(config, **overrides)
