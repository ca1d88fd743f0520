"""Which cuDNN a GPU's results were measured beside: before 9.15 it is no baseline for convolutions in bfloat16.

9.10 to 9.14 have a regression there. Figures from an older version are shown and marked; nothing is compared with them.
"""

from __future__ import annotations

from typing import Any

LEAST = 91500
MARK = "†"
_CONVOLVING = ("conv3d", "norm_silu_conv3d", "swap_kernels", "VideoUNet")


def words(version: int | None) -> str:
    """91002 as "9.10.2"."""
    if version is None:
        return "none"
    return f"{version // 10_000}.{version // 100 % 100}.{version % 100}"


def too_old(version: int | None) -> bool:
    """Whether its convolutions are no baseline; None is a device without cuDNN."""
    return version is not None and version < LEAST


def doubtful(version: int | None, op: str) -> bool:
    """Whether others' times for this op come from convolutions that are no baseline."""
    return too_old(version) and op in _CONVOLVING


def note(facts: dict[str, Any]) -> str:
    """A sentence for a table with marked figures; empty where there is nothing to mark."""
    version = facts.get("cudnn")
    if not too_old(version):
        return ""
    return (
        f"{MARK} from cuDNN {words(version)}: before {words(LEAST).removesuffix('.0')} its Conv3d in bfloat16 is"
        " broken, so these times are no baseline and nothing is compared with them."
    )
