"""Make the optimizers and the learning-rate schedules of a worker, and step them.

Steps and constructions keep `torch._dynamo` out of the process: torch imports it on their way (about 2 s and 100 MB
per worker) only to say that they must not be compiled. Once something else has imported it, torch goes its own way.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lepton_ray.errors import CheckpointError, ConfigError
from lepton_ray.train.model import Model
from lepton_ray.train.tree import flatten
from lepton_ray.train.words import OPTIMIZERS, PerEpoch, check_optimizer, check_scheduler

# --- making optimizers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizers:
    """The optimizers of a model, by name, and the way back to what the user's callable returned."""

    named: dict[str, Optimizer]
    shape: Callable[[Mapping[str, Any]], Any]
    """Arrange something named like the optimizers as the user did: one, a list, or a dict."""


def make_optimizer(spec: Any, model: Model) -> Optimizers:
    """Build the optimizers of `model`.

    spec: a word, an Optimizer class or a functools.partial of one (called with the trainable parameters), or a
    callable of the user's module that returns an optimizer, or a list or dict of them.
    Raises ConfigError.
    """
    check_optimizer(spec)
    if spec is None:
        raise ConfigError(f"no optimizer was given. Pass one of {', '.join(OPTIMIZERS)}, or a callable(model).")
    parameters = model.parameters()
    if not parameters:
        raise ConfigError("the model has no trainable parameters (none, or all with requires_grad=False).")
    quiet_construction()
    if isinstance(spec, str):
        spec = getattr(torch.optim, OPTIMIZERS[spec])
    if _takes_parameters(spec):
        made = spec(list(parameters.values()))
    else:
        made = spec(model.user_module)
    optimizers = _named(made)
    own = {id(p) for p in parameters.values()}
    for optimizer in optimizers.named.values():
        _check(optimizer, own)
    return optimizers


def _takes_parameters(spec: Any) -> bool:
    made = spec.func if isinstance(spec, functools.partial) else spec
    return inspect.isclass(made) and issubclass(made, Optimizer)


def _named(made: Any) -> Optimizers:
    if isinstance(made, Mapping):
        optimizers = Optimizers(named={str(name): optimizer for name, optimizer in made.items()}, shape=dict)
    elif isinstance(made, (list, tuple)):
        named = {str(index): optimizer for index, optimizer in enumerate(made)}
        optimizers = Optimizers(named=named, shape=lambda parts: list(parts.values()))
    else:
        optimizers = Optimizers(named={"optimizer": made}, shape=lambda parts: parts["optimizer"])
    wrong = [type(value).__name__ for value in optimizers.named.values() if not isinstance(value, Optimizer)]
    if wrong or not optimizers.named:
        raise ConfigError(
            f"optimizer: the callable returned {', '.join(wrong) or 'none'}; expected a torch.optim.Optimizer, "
            "or a list or dict of them."
        )
    return optimizers


def _check(optimizer: Optimizer, own: set[int]) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizer=LBFGS evaluates the loss several times in one step, for which the workers have no data left. "
            f"Use one of {', '.join(OPTIMIZERS)}, or step_fn."
        )
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    strangers = sum(id(p) not in own for p in held)
    if strangers:
        raise ConfigError(
            f"optimizer={name}: {strangers} of its {len(held)} parameters are not the model's. "
            "Take them from the model that the callable is given, not from one outside."
        )


# --- without torch._dynamo -------------------------------------------------------------------------------------------


def quiet_construction() -> None:
    """Let optimizers be built, saved, loaded and cleared without importing `torch._dynamo`."""
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        # torch 2.13: torch._compile._disable_dynamo wraps these methods; at the first call it imports torch._dynamo,
        # unless the wrapped function carries what to call in its place under `__dynamo_disable`.
        method = getattr(Optimizer, name)
        function = getattr(method, "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            setattr(function, "__dynamo_disable", _until_dynamo(method, function))


def _until_dynamo(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        # It is here now, so torch may do at this and all later calls what it would have done at the first one.
        if getattr(function, "__dynamo_disable", None) is call:
            delattr(function, "__dynamo_disable")
        return method(*args, **kwargs)

    return call


def step(optimizer: Optimizer) -> None:
    """Do what `optimizer.step()` does, without importing `torch._dynamo` where that is possible."""
    bare = None if "torch._dynamo" in sys.modules else _bare_step(optimizer)
    if bare is None:
        optimizer.step()
        return
    with torch.no_grad():
        bare(optimizer)


def prepare_step(optimizer: Optimizer) -> None:
    """Import now what the first step of this optimizer imports: the other workers would wait for that."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not Optimizer]
    is_of_torch = any(getattr(torch.optim, kind.__name__, None) is kind for kind in kinds)
    if is_of_torch and _bare_step(optimizer) is None:
        import_module("torch._dynamo")


def _bare_step(optimizer: Optimizer) -> Callable[[Optimizer], Any] | None:
    """Return the undecorated `step` of an optimizer whose decorations would do nothing, otherwise None.

    torch 2.13: `torch.optim.SGD.step` is profile_hook_step(_use_grad_for_differentiable(step)). The outer wrapper
    calls hooks and names the step for a profiler; the inner one imports torch._dynamo and turns gradients off.
    """
    kind = type(optimizer)
    is_stock = getattr(torch.optim, kind.__name__, None) is kind
    hooks = [
        getattr(optimizer, "_optimizer_step_pre_hooks", True),
        getattr(optimizer, "_optimizer_step_post_hooks", True),
        getattr(torch_optimizer, "_global_optimizer_pre_hooks", True),
        getattr(torch_optimizer, "_global_optimizer_post_hooks", True),
    ]
    if not is_stock or any(hooks) or optimizer.defaults.get("differentiable", True):
        return None
    # torch 2.13: an LRScheduler puts a `step` on the instance that notes the call, and nothing else.
    noted = vars(optimizer).get("step")
    if noted is not None:
        if not hasattr(noted, "_wrapped_by_lr_sched") or getattr(noted, "__wrapped__", None) is not kind.step:
            return None
        optimizer._opt_called = True  # type: ignore[attr-defined]
    return _innermost(kind.step)


@functools.cache
def _innermost(function: Callable[..., Any]) -> Callable[[Optimizer], Any] | None:
    """Unwrap `step` when its wrappers are exactly the known ones of torch."""
    for name in ("wrapper", "_use_grad"):
        code = getattr(function, "__code__", None)
        if code is None or code.co_name != name or code.co_filename != torch_optimizer.__file__:
            return None
        function = getattr(function, "__wrapped__", None)  # type: ignore[assignment]
    is_plain = inspect.isfunction(function) and not hasattr(function, "__wrapped__")
    return function if is_plain and function.__module__.startswith("torch.optim.") else None


# --- learning-rate schedules -----------------------------------------------------------------------------------------


class Schedulers:
    """The learning-rate schedules of a job; without any, only a view of the rate."""

    def __init__(self, schedulers: list[Any], rated: Optimizer, is_per_epoch: bool) -> None:
        """schedulers: torch's; rated: the optimizer whose rate is shown."""
        self._all, self._rated = schedulers, rated
        self._waiting = [s for s in schedulers if isinstance(s, ReduceLROnPlateau)]
        paced = [s for s in schedulers if not isinstance(s, ReduceLROnPlateau)]
        self._per_step, self._per_epoch = ([], paced) if is_per_epoch else (paced, [])

    def after_step(self) -> None:
        """Advance what follows the steps; call it after the optimizer's step."""
        for scheduler in self._per_step:
            scheduler.step()

    def after_epoch(self, loss: float | None) -> None:
        """Advance what follows the epochs. loss: in which a plateau is looked for; None: not measured in this epoch."""
        for scheduler in self._per_epoch:
            scheduler.step()
        if loss is not None:
            for plateau in self._waiting:
                plateau.step(loss)

    def rate(self) -> float:
        """Return the learning rate of the first parameter group."""
        return float(self._rated.param_groups[0]["lr"])

    def state_dict(self) -> list[dict[str, Any]]:
        """Return torch's own states. The rates themselves are in the optimizer's state."""
        return [scheduler.state_dict() for scheduler in self._all]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over a state; the optimizer's own state must be loaded as well."""
        for scheduler, saved in zip(self._all, state):
            scheduler.load_state_dict(saved)


def make_scheduler(spec: Any, optimizers: Optimizers) -> Schedulers:
    """Build the schedules of `optimizers`.

    spec: None, or a callable that takes what the user's `optimizer=` returned (one, a list or a dict) and returns a
    torch LR scheduler, or a list or dict of them. They advance after each step, inside `PerEpoch` after each epoch;
    ReduceLROnPlateau always does the latter.
    Raises ConfigError.
    """
    check_scheduler(spec)
    first = next(iter(optimizers.named.values()))
    if spec is None:
        return Schedulers([], first, is_per_epoch=False)
    is_per_epoch = isinstance(spec, PerEpoch)
    made = (spec.make if is_per_epoch else spec)(optimizers.shape(optimizers.named))
    if isinstance(made, Mapping):
        made = list(made.values())
    schedulers = list(made) if isinstance(made, (list, tuple)) else [made]
    wrong = [type(s).__name__ for s in schedulers if not isinstance(s, LRScheduler)]
    if wrong:
        raise ConfigError(
            f"scheduler: the callable returned {', '.join(wrong)}; expected a torch.optim.lr_scheduler.LRScheduler, "
            "or a list or dict of them."
        )
    for scheduler in schedulers:
        try:  # what cannot be saved is refused now, not at the first checkpoint
            flatten(scheduler.state_dict(), type(scheduler).__name__, {})
        except CheckpointError as error:
            raise ConfigError(f"scheduler: {error} Or give the class a state_dict() without it.") from error
    return Schedulers(schedulers, first, is_per_epoch)
