"""What it takes to build a backbone's architecture again, without its weights."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_deprecated_models
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from kinprune.backbones.classifier import set_num_classes
from kinprune.errors import BackboneError

# What timm's own constructors raise on arguments they cannot use.
CONSTRUCTION_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# A spec may come from a file someone else wrote: it must not make timm load weights from anywhere.
_FORBIDDEN_ARGUMENTS = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "features_only",
        "num_classes",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)


@dataclass(frozen=True)
class BackboneSpec:
    """How to build a backbone's architecture again.

    ``name`` is a timm model name, with or without its tag, or ``module:factory``; ``arguments`` go to the factory
    (``img_size`` of a vision transformer); ``head`` is the dotted name of the layer that makes the ``num_classes``
    logits.
    """

    name: str
    arguments: Mapping[str, Any]
    num_classes: int
    head: str

    @property
    def architecture(self) -> str:
        """The name without timm's tag, which says where weights came from and not how the model is built."""
        return architecture_name(self.name)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON's own types, read back by ``from_json``."""
        return {
            "name": self.name,
            "arguments": {key: _jsonable(value) for key, value in self.arguments.items()},
            "num_classes": self.num_classes,
            "head": self.head,
        }

    @classmethod
    def from_json(cls, data: Any) -> BackboneSpec:
        """Read what ``to_json`` wrote; raises BackboneError on unknown or missing keys and on wrong types."""
        if not isinstance(data, dict):
            raise BackboneError(f"A backbone spec is {type(data).__name__}, expected a JSON object.")
        expected: dict[str, type] = {"name": str, "arguments": dict, "num_classes": int, "head": str}
        if set(data) != set(expected):
            raise BackboneError(
                f"A backbone spec has the keys {sorted(map(str, data))}, expected exactly {sorted(expected)}."
            )
        for key, kind in expected.items():
            if not isinstance(data[key], kind) or isinstance(data[key], bool):
                raise BackboneError(
                    f"{key!r} of a backbone spec is {data[key]!r}, expected a value of type {kind.__name__}."
                )
        check_num_classes(data["num_classes"])
        _check_arguments(data["arguments"])
        return cls(data["name"], dict(data["arguments"]), data["num_classes"], data["head"])


def architecture_name(name: str) -> str:
    """A timm name without its tag (``resnet18.a1_in1k`` is ``resnet18``); a ``module:factory`` as it is."""
    return name if is_factory(name) else name.partition(".")[0]


def is_factory(name: str) -> bool:
    """Whether ``name`` has the form ``module:factory``."""
    return _FACTORY.fullmatch(name) is not None


def check_num_classes(num_classes: int) -> None:
    """Raise BackboneError unless ``num_classes`` is an int of at least 1."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise BackboneError(f"num_classes is {num_classes!r}, expected a whole number of at least 1.")


def check_name(name: str) -> None:
    """Raise BackboneError, with close names, unless ``name`` is a timm model or has the form ``module:factory``."""
    if is_factory(name):
        return
    if ":" in name or "/" in name or "\\" in name:
        raise BackboneError(
            f"Backbone {name!r} is neither a timm model name nor 'module:factory'. "
            "For weights in a file, give the timm name as the backbone and the file with --weights."
        )
    architecture, _, tag = name.partition(".")
    if architecture in get_deprecated_models():
        successor = get_deprecated_models()[architecture]
        raise BackboneError(f"timm has retired the name {name!r}; use {successor or 'another model'}.")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"Did you mean {_listed(close)}?" if close else "timm.list_models() lists all names."
        raise BackboneError(f"timm has no model {architecture!r}. {hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        known = f"known are {_listed(tags)}" if tags else "it has none"
        raise BackboneError(f"timm knows no pre-trained tag {tag!r} of {architecture!r}; {known}.")


def build_architecture(spec: BackboneSpec) -> nn.Module:
    """The architecture of ``spec`` in evaluation mode, for weights to be assigned to.

    Nothing is initialised where that can be avoided: parameters of timm models are on the meta device, all buffers
    are real; assign tensors with ``load_state_dict(..., assign=True)``. Models that compute with their parameters
    while being built, and a user's own factories, come with arbitrary real parameters. A ``module:factory`` imports
    and calls the user's code. Raises BackboneError where the architecture cannot be built.
    """
    check_name(spec.name)
    model: nn.Module | None = None
    if not is_factory(spec.name):
        # Some timm models read their parameters' values, or put buffers where their parameters are.
        with contextlib.suppress(*CONSTRUCTION_FAILURES), seeded(0), _parameters_on_meta():
            model = _timm_model(spec.name, spec.arguments, spec.num_classes)
        if model is not None and any(buffer.is_meta for buffer in model.buffers()):
            model = None
    if model is None:
        model = build_model(spec.name, spec.arguments, spec.num_classes, seed=0)
    with seeded(0):
        set_num_classes(model, spec.head, spec.num_classes)
    return model.eval()


def build_model(name: str, arguments: Mapping[str, Any], num_classes: int, *, seed: int) -> nn.Module:
    """A newly initialised model, the same for the same seed, in float32 and evaluation mode.

    A factory that takes no ``num_classes`` returns its own number of classes.
    """
    with seeded(seed):
        if is_factory(name):
            model = _call_factory(name, num_classes)
        else:
            try:
                model = _timm_model(name, arguments, num_classes)
            except CONSTRUCTION_FAILURES as error:
                raise BackboneError(
                    f"timm cannot build {name!r} with {json.dumps(_jsonable(dict(arguments)))} and {num_classes} "
                    f"classes: {error}. Use another image size, or the model's own by giving none."
                ) from error
    return model.float().eval()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's default random generator inside the block and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _timm_model(name: str, arguments: Mapping[str, Any], num_classes: int) -> nn.Module:
    keywords: dict[str, Any] = {"num_classes": num_classes}
    keywords |= {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    return timm.create_model(name, pretrained=False, **keywords)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters on the meta device as modules register them; buffers stay real, unlike ``torch.device("meta")``.

    The hook is global to the process, so it leaves modules that other threads build alone.
    """
    thread = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _call_factory(name: str, num_classes: int) -> nn.Module:
    factory = _import_factory(name)
    takes_classes = _takes_num_classes(factory)
    try:
        model = factory(num_classes=num_classes) if takes_classes else factory()
    except Exception as error:  # anything can go wrong in the user's code; the cause stays attached
        call = f"num_classes={num_classes}" if takes_classes else ""
        raise BackboneError(f"The factory {name}({call}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BackboneError(f"The factory {name!r} returned {type(model).__name__}, expected a torch.nn.Module.")
    return model


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables written in C tell nothing about themselves
        return False
    return "num_classes" in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)  # a console script, unlike ``python -m``, does not see the current folder
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise BackboneError(f"Module {module_name!r} of {name!r} imports what is not there: {error}.") from error
        raise BackboneError(
            f"No module {module_name!r}, of {name!r}, is installed or in the current folder. "
            "Run from the folder it is in, or install it."
        ) from error
    except Exception as error:  # anything can go wrong in the user's code; the cause stays attached
        raise BackboneError(
            f"Importing {module_name!r}, of {name!r}, failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(folder)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        what = "has no" if factory is None else "holds no callable"
        close = difflib.get_close_matches(attribute, [key for key in vars(module) if callable(getattr(module, key))])
        raise BackboneError(
            f"Module {module_name!r} {what} {attribute!r}, of {name!r}."
            + (f" Did you mean {_listed(close)}?" if close else " Name a function in it that returns the model.")
        )
    return factory  # type: ignore[no-any-return]


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    forbidden = sorted(_FORBIDDEN_ARGUMENTS.intersection(arguments))
    if forbidden:
        raise BackboneError(f"A backbone spec must not set {_listed(forbidden)} among its arguments: remove them.")
    for key, value in arguments.items():
        items = value if isinstance(value, list) else [value]
        if any(item is not None and not isinstance(item, bool | int | float | str) for item in items):
            raise BackboneError(
                f"Argument {key!r} of a backbone spec is {value!r}, expected a number, a text, or a list of them."
            )


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
