"""The boundary between the public functionals and native kernels: one `torch.library` op per kernel.

`define` + `impl` + `register_fake` costs about 9 us a call on a CPU, against 24-34 us for `custom_op`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from fastvdiff import tuned
from fastvdiff.dispatch import Facts

_NATIVE = "fastvdiff.native"
_LIBRARY = torch.library.Library("fastvdiff", "DEF")
_RECORDED: dict[Any, type] = {}  # op -> its autograd function
_KERNELS: dict[Any, Callable[..., Any]] = {}  # op -> what runs it
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_VALUES = frozenset({type(None), bool, int, float, str})
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
# What tells whether a call may go past the dispatcher is not torch's public interface: without it, calls do not.
_BYPASS = all(
    hasattr(torch._C, name)
    for name in ("_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_get_tracing_state")
) and hasattr(torch._C._autograd, "_profiler_enabled")


def define(schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `fastvdiff::<schema>`, run by `kernel` on every device, with its fake; returns the op, ready to call.

    The schema's last argument is `str impl`, the implementation that the public functional has chosen.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"fastvdiff::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastvdiff, name).default
    _KERNELS[op] = kernel
    return op


@functools.cache
def backend(impl: str, op: str) -> ModuleType:
    """The module whose `forward` and `backward` are `op`'s kernels of this implementation, imported at first use."""
    if impl != "triton":
        return importlib.import_module(f"fastvdiff.native.{op}{'' if impl == 'cpu' else f'_{impl}'}")
    module = importlib.import_module(f"fastvdiff.kernels.{op}")
    if torch.cuda.is_available():
        module.launch.use_tuned(tuned.load())
    return module


def differentiable(
    op: Any, *, setup_context: Callable[..., None], backward: Callable[..., Any], backward_op: Any
) -> None:
    """Register `backward` for `op`; differentiating `backward_op` once more, or vmap over either, raises."""
    name, backward_name = op._schema.name, backward_op._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    _RECORDED[op] = _function(op, setup_context, backward)

    def second(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name.replace('::', '.')}: its kernel has no second derivative;"
            ' pass impl="reference" where one is needed (attention: under sdpa_kernel(SDPBackend.MATH))'
        )

    torch.library.register_autograd(backward_name, second, lib=_LIBRARY)
    refuse_vmap(op)
    refuse_vmap(backward_op)


def _function(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> type:
    """The same formula as a plain autograd function: what eager calls take (see `call`)."""
    return type(
        f"{op._schema.name.partition('::')[2]}_function",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: below_autograd(op, *args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(_vmap_refusal(op)),
        },
    )


def below_autograd(op: Any, *args: Any) -> Any:
    """`op(*args)` straight to its kernel; past the dispatcher too, 5 to 11 us a call, where nothing waits there."""
    if _BYPASS and _unobserved() and all(map(_ordinary, args)):
        return _KERNELS[op](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def plain(tensors: tuple[Any, ...]) -> bool:
    """Whether an eager call on them is only its numbers: float32, no gradient, no transform, nobody to see it."""
    return (
        _BYPASS
        and _unobserved()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and all(_ordinary(t) and t.is_cpu and t.dtype is torch.float32 for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def isa() -> int:
    """The instruction set that the C++ kernels run on, as a number."""
    return importlib.import_module(_NATIVE).library().current_isa()


def _unobserved() -> bool:
    """Whether no mode, transform, tracer or profiler wants to see the calls that are made."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


def _ordinary(argument: Any) -> bool:
    """A plain value, or a tensor that is nothing but its memory: no subclass, no pending negation."""
    kind = type(argument)
    return kind in _VALUES or (kind in _TENSORS and (argument.is_cpu or argument.is_cuda) and not argument.is_neg())


def call(op: Any, recorded: bool, *args: Any) -> Any:
    """`op(*args)`, its autograd formula included where autograd records the call.

    The formula registered with torch.library costs some 100 us forward and backward, most of it bookkeeping in Python;
    eager calls go through an autograd function of the same formula instead, and past both where nothing is recorded.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
    if recorded and op in _RECORDED:
        function = _RECORDED[op]
        if not _BYPASS or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        # Function.apply less its binding of arguments by name: 20 us a call.
        return super(torch.autograd.Function, function).apply(*args)
    return op(*args) if recorded else below_autograd(op, *args)


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Forward-mode differentiation would lose its tangents in the kernel without a word."""
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(
            f"{op._schema.name.replace('::', '.')}: its kernel has no forward-mode derivative;"
            ' pass impl="reference" under torch.func.jvp'
        )


def _vmap_refusal(op: Any) -> Callable[..., NoReturn]:
    name = op._schema.name.replace("::", ".")

    def rule(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f'{name}: its kernel has no vmap rule; pass impl="reference" under vmap')

    return rule


def refuse_vmap(op: Any) -> None:
    """vmap over `op` raises a sentence that names the way out."""
    torch.library.register_vmap(op._schema.name, _vmap_refusal(op), lib=_LIBRARY)


def on_cpu(facts: Facts) -> str | None:
    """What every C++ CPU kernel asks for: CPU tensors, no float64."""
    if facts.device != "cpu":
        return f"runs on CPU tensors, not {facts.device}"
    if facts.dtype == torch.float64:
        return "no float64 kernel: the reference keeps its precision"
    return None


def on_triton(facts: Facts) -> str | None:
    """What every Triton kernel asks for: Triton, a GPU that it compiles for (or its interpreter), no float64."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if facts.device not in ("cuda", "cpu") or (facts.device == "cpu" and not _INTERPRETED):
        return f"runs on CUDA and ROCm devices, not {facts.device}"
    if facts.dtype == torch.float64:
        return "no float64 kernel: the reference keeps its precision"
    if facts.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def on_cuda(facts: Facts) -> str | None:
    """What every CUDA C++ kernel asks for: an NVIDIA GPU that this build has code for, no float64."""
    return _for_cuda(facts) or _not_built_for_this()


def on_sm90(facts: Facts) -> str | None:
    """What a kernel of clusters asks for besides: capability 9.0 or 10.0, and code compiled for it."""
    return _for_cuda(facts) or _no_clusters_on_this()


def on_sm90a(facts: Facts) -> str | None:
    """What a kernel of capability 9.0's own instructions asks for besides: exactly that device, and code for 90a."""
    return _for_cuda(facts) or _not_sm90a()


def _for_cuda(facts: Facts) -> str | None:
    if facts.device != "cuda":
        return f"runs on NVIDIA GPUs, not {facts.device}"
    if facts.dtype == torch.float64:
        return "no float64 kernel: the reference keeps its precision"
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs, not ROCm devices"
    return None


def _not_built_for_this() -> str | None:
    """Why this build's CUDA kernels do not run on the current device, None if they do; compilers do not trace it."""
    return _not_built_for(*torch.cuda.get_device_capability())


def _no_clusters_on_this() -> str | None:
    """`_not_built_for_this` of the kernels of clusters, which code for an older architecture does not hold."""
    major, minor = torch.cuda.get_device_capability()
    if major not in (9, 10):
        return f"runs on compute capability 9.0 and 10.0, not {major}.{minor}"
    if _not_built_for(major, minor) is None and _not_built_for(major, minor, least=90) is not None:
        built = ", ".join(importlib.import_module(_NATIVE).cuda_architectures())
        return (
            f"built for {built}: no code with clusters for compute capability {major}.{minor};"
            f' rebuild: CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=80;{major}{minor}a-real" pip install -e .'
        )
    return _not_built_for(major, minor)


def _not_sm90a() -> str | None:
    """`_not_built_for_this` of the kernels for 90a, whose code runs on 9.0 alone."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"runs on compute capability 9.0, not {major}.{minor}"
    reason = _not_built_for(major, minor)
    if reason is None and not any(
        name.startswith("90a") for name in importlib.import_module(_NATIVE).cuda_architectures()
    ):
        return "built without code for 90a: CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=90a-real"
    return reason


# torch.compiler.assume_constant_result without its import of Dynamo, which costs a second.
for _of_this_device in (_not_built_for_this, _no_clusters_on_this, _not_sm90a):
    _of_this_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _not_built_for(major: int, minor: int, least: int = 0) -> str | None:
    native = importlib.import_module(_NATIVE)
    try:
        built = native.cuda_architectures()
    except ImportError as error:  # Triton and the reference run without it
        return str(error)
    if not built:
        return "built without CUDA: with nvcc on the PATH, rebuild: FASTVDIFF_CUDA=ON pip install -e ."
    if not native.runs_on((major, minor), least):
        return f"built for {', '.join(built)}, not for compute capability {major}.{minor}"
    return None


def interpreted(facts: Facts) -> str | None:
    """On a CPU, Triton kernels run under an interpreter that is there to test them."""
    return "slower here: Triton's interpreter" if facts.device == "cpu" else None


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype an op computes in: autocast's where it is on for x's device and x is not float64, else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast does nothing: the op has already chosen its dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
