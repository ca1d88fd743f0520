"""Counter-based normal noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, defined here for every implementation.

Element i (its index in row-major order of the logical shape, whatever the strides) and a 64-bit seed give:

- counter (4 x uint32) = (b & 0xffffffff, b >> 32, 0, 0) with b = i // 4;  key = (seed & 0xffffffff, seed >> 32);
- r0, r1, r2, r3 = Philox4x32-10(counter, key);
- magnitudes from r0 and r2:  u = float32(r) * 2^-32 + 2^-33, rounded to float32 (so 0 < u <= 1),  m = sqrt(-2 ln u);
- angles from r1 and r3:  v = (r >> 8) * 2^-24, exact in float32,  a = 2 pi v;
- the four normals of block b:  m(r0) cos a(r1),  m(r0) sin a(r1),  m(r2) cos a(r3),  m(r2) sin a(r3);  i takes i % 4.

The integers and the two uniforms agree bit for bit everywhere; the normals to 1e-6 (here they are computed in float64
and rounded once).
"""

import math
from collections.abc import Sequence

import torch

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(block: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """The four random words of each block.

    block int64 (n,); seed int64 (1,), read as 64 bits without a sign. Returns int64 (n, 4) with values in [0, 2^32).
    """
    c0, c1 = block & _LOW, (block >> 32) & _LOW
    c2, c3 = torch.zeros_like(block), torch.zeros_like(block)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 64-bit product; int64 wraps to the right bits and its shift's sign is masked off."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox_normal(shape: Sequence[int], seed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal noise of this shape on the seed's device; seed int64 (1,)."""
    count = math.prod(shape)
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    words = philox_4x32(block, seed)
    uniform = (words[:, 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33).to(torch.float64)
    magnitude = torch.sqrt(-2 * torch.log(uniform))
    angle = (words[:, 1::2] >> 8).to(torch.float64) * (2 * math.pi * 2.0**-24)
    normals = torch.stack((magnitude * torch.cos(angle), magnitude * torch.sin(angle)), dim=-1)
    return normals.reshape(-1)[:count].reshape(tuple(shape)).to(dtype)
