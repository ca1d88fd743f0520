"""Argument checks: every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the project's one message form."""
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


def describe(value: object) -> str:
    """What came, in a few words: a tensor's shape and dtype, or the value with its type."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def tensor(op: str, argument: str, value: object) -> None:
    """`value` is a strided tensor."""
    if not isinstance(value, torch.Tensor):
        fail(op, argument, "a tensor", describe(value), TypeError)
    if value.layout != torch.strided:
        fail(op, argument, "a dense (strided) tensor", f"layout {value.layout}", TypeError)


def floating(op: str, argument: str, value: torch.Tensor) -> None:
    """`value` holds float32, bfloat16, float16 or float64."""
    if value.dtype not in FLOAT_DTYPES:
        fail(op, argument, "dtype float32, bfloat16, float16 or float64", value.dtype, TypeError)


def same_device(op: str, argument: str, value: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """`value` lives where `like` does."""
    if value.device != like.device:
        fail(op, argument, f"a tensor on {like.device} as {like_name}", value.device)


def same_dtype(op: str, argument: str, value: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """`value` has the dtype of `like`."""
    if value.dtype != like.dtype:
        fail(op, argument, f"{like.dtype} as {like_name}", value.dtype, TypeError)


def shape(op: str, argument: str, value: torch.Tensor, *allowed: Sequence[int], symbols: str) -> None:
    """`value` has one of the `allowed` shapes; `symbols` names them, such as "(B, C) or (B, C, T)"."""
    if tuple(value.shape) not in allowed:
        sizes = " or ".join(str(tuple(s)) for s in allowed)
        fail(op, argument, f"shape {symbols} = {sizes}", tuple(value.shape))


def parameter(
    op: str, argument: str, value: object, like: torch.Tensor, like_name: str, *allowed: Sequence[int], symbols: str
) -> None:
    """`value` is None, or a floating tensor beside `like` with one of the `allowed` shapes."""
    if value is None:
        return
    tensor(op, argument, value)
    floating(op, argument, value)
    same_device(op, argument, value, like, like_name)
    shape(op, argument, value, *allowed, symbols=symbols)
