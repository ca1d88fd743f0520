"""Standard normal noise inside a kernel: Philox4x32-10 and Box-Muller as fastvdiff/reference/philox.py defines them.

Block b of the counter gives the normals of elements 4 b .. 4 b + 3, counted in row-major order of the logical shape.
Triton's own Philox has the same constants, counter (low, high, 0, 0) and key (low, high); its uniforms and its normals
differ from the reference's, so those are written here. Sine, cosine and logarithm are polynomials: the hardware's
approximations are too coarse, and the libraries' functions hold more digits and larger arguments than noise needs.
On an H200 a bfloat16 step has about 55 instructions an element before it stops being bound by memory.
"""

import triton
import triton.language as tl


@triton.jit
def magnitude(word):
    """sqrt(-2 ln u), u = float32(word) 2^-32 + 2^-33, within 1e-7 of it.

    u = m 2^e with m in [sqrt(1/2), sqrt(2)) and r = m - 1: -2 ln u = r (r P(r) - 2) - 2 ln(2) e. The root is the
    hardware's after one step of Newton's method.
    """
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & ~0x007FFFFF  # e 2^23
    r = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(r, 0.20164568722248077, -0.3236095607280731)
    p = tl.fma(p, r, 0.3448648452758789)
    p = tl.fma(p, r, -0.3981377184391022)
    p = tl.fma(p, r, 0.499424546957016)
    p = tl.fma(p, r, -0.6666942834854126)
    p = tl.fma(p, r, 1.0000064373016357)
    square = tl.fma(r, tl.fma(p, r, -2.0), exponent.to(tl.float32) * -1.6525917e-07)  # -2 ln(2) 2^-23
    square = tl.maximum(square, 1e-30)  # a root of 0 as well
    inverse = tl.rsqrt(square)
    root = square * inverse
    return tl.fma(tl.fma(-root, root, square), 0.5 * inverse, root)


@triton.jit
def cosine_and_sine(word):
    """Of 2 pi v, v = (word >> 8) 2^-24, within 1.5e-7.

    With t = 2 pi (|v'| - 1/4) in [-pi / 2, pi / 2], v' in [-1/2, 1/2) the same angle: the cosine is -sin t, the sine
    cos t with the sign of v'. The polynomials are in x = 4 |v'| - 1, exact.
    """
    x = tl.fma(tl.abs((word.to(tl.int32, bitcast=True) >> 8).to(tl.float32)), 2.0**-22, -1.0)
    square = x * x
    c = tl.fma(square, -1.5082056264569e-4, 4.6722279189795e-3)
    c = tl.fma(c, square, -7.9688480537141e-2)
    c = tl.fma(c, square, 6.4596335986501e-1)
    c = tl.fma(c * square, x, x * -1.5707962900223)
    s = tl.fma(square, -2.3848337160965e-5, 9.1778877530548e-4)
    s = tl.fma(s, square, -2.0862751632548e-2)
    s = tl.fma(s, square, 2.5366934998276e-1)
    s = tl.fma(s, square, -1.2337005390217)
    s = tl.fma(s, square, 1.0)
    return c, (s.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def normals_of_blocks(block, seed):
    """The four normals of each counter block; block int64, seed an int64 scalar."""
    w0, w1, w2, w3 = tl.randint4x(seed, block)
    c0, s0 = cosine_and_sine(w1)
    c1, s1 = cosine_and_sine(w3)
    m0 = magnitude(w0)
    m1 = magnitude(w2)
    return m0 * c0, m0 * s0, m1 * c1, m1 * s1


@triton.jit
def normals_of_elements(element, seed):
    """One normal for each element (int64) anywhere: its block is drawn, and one of the four kept."""
    w0, w1, w2, w3 = tl.randint4x(seed, element >> 2)
    lane = (element & 3).to(tl.int32)
    second = lane >= 2
    # A sine is the cosine of an angle a quarter turn back: one polynomial instead of two.
    angle = tl.where(second, w3, w1) - ((lane & 1) << 30).to(tl.uint32, bitcast=True)
    cosine, _ = cosine_and_sine(angle)
    return magnitude(tl.where(second, w2, w0)) * cosine


@triton.jit
def interleaved(n0, n1, n2, n3):
    """(K,) each to (K, 2, 2), whose last two dimensions in order count 0, 1, 2, 3."""
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normals_of_runs(blocks, seed, RUN: tl.constexpr):
    """The normals of runs of RUN (4 or 8) elements, each run in one thread as a 16-byte access leaves it there.

    blocks: (K,), the first counter block of each run. Returns (K RUN,).
    """
    n0, n1, n2, n3 = normals_of_blocks(blocks, seed)
    first = interleaved(n0, n1, n2, n3)
    if RUN == 8:
        n4, n5, n6, n7 = normals_of_blocks(blocks + 1, seed)
        runs = tl.join(first, interleaved(n4, n5, n6, n7)).permute(0, 3, 1, 2)
    else:
        runs = first
    return runs.reshape(runs.numel)
