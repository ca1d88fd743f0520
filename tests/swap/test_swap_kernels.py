"""The contract of a swap on plain torch modules: same parameters, keys, hooks, classes and random numbers."""

from __future__ import annotations

import copy
import functools
import pickle
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastvdiff
from fastvdiff.swap import classes, verification
from tests.swap import contract


class Block(nn.Module):
    """The pairs that every library has, and one that cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, 16), nn.SiLU(), nn.Dropout(0.3), nn.Conv3d(16, 16, 3, padding=1),
            nn.GroupNorm(2, 16, eps=1e-3, affine=False), nn.SiLU(), nn.SiLU(), nn.Conv3d(16, 16, 1),
        )  # fmt: skip
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(x + self.body(x)))


def block() -> tuple[Block, torch.Tensor]:
    torch.manual_seed(0)
    return Block(), torch.randn(2, 16, 3, 6, 8)


def draw(model: nn.Module, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(x)


def test_the_report_says_what_was_replaced_and_what_was_not_and_why() -> None:
    model, _ = block()
    report = fastvdiff.swap_kernels(model)
    assert [(e.path, e.what) for e in report.replaced] == [("body", "Sequential"), ("body.3", "Conv3d")]
    assert [e.path for e in report.refused] == ["norm"]  # the last convolution is part of the body, and as it was
    assert "not beside a SiLU" in report.refused[0].why
    printed = str(report)
    assert "2 modules replaced in Block" in printed
    assert "GroupNorm and SiLU in one pass" in printed
    again = fastvdiff.swap_kernels(model)
    assert not again.replaced
    assert ("body", "swapped already") in [(e.path, e.why) for e in again.refused]


def test_the_same_parameters_keys_classes_and_paths() -> None:
    model, _ = block()
    parameters, keys, kinds = list(model.parameters()), list(model.state_dict()), [type(m) for m in model.modules()]
    fastvdiff.swap_kernels(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert [type(m).__qualname__ for m in model.modules()] == [kind.__qualname__ for kind in kinds]


@contract.narrow
def test_16_bit_weights(dtype: torch.dtype) -> None:
    model, x = block()
    contract.hold(model.body.eval(), {"input": x}, dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_dropout_draws_the_same_random_numbers_and_undo_is_bitwise(memory_format: torch.memory_format) -> None:
    model, x = block()
    x = x.contiguous(memory_format=memory_format)
    before = draw(model, x)
    report = fastvdiff.swap_kernels(model)
    after, state = draw(model, x), torch.get_rng_state()
    # Another mask would move the result by its own size.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    report.undo()
    assert torch.equal(draw(model, x), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(classes.is_swapped(m) for m in model.modules())


def test_verify_measures_every_module_and_passes() -> None:
    model, x = block()
    report = fastvdiff.swap_kernels(model)
    found = report.verify(x, seconds=0.01)
    assert [m.path for m in found.modules] == ["body", "body.3", ""]
    assert found.passed, str(found)
    for m in found.modules:
        assert 0 < m.forward_after < 1e-5
        assert 0 < m.backward_after < 1e-4
        assert min(*m.forward_ms, *m.training_ms, *m.bytes) > 0
    assert "body" in str(found)


def test_verify_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block()
    report = fastvdiff.swap_kernels(model)
    right = fastvdiff.ops.group_norm_silu
    monkeypatch.setattr(fastvdiff.ops, "group_norm_silu", lambda *a, **k: right(*a, **k) * (1 + 1e-4))
    found = report.verify(x, seconds=0.0)
    assert not found.passed
    assert [m.path for m in found.modules if m.failures] == ["body", ""]


@pytest.mark.parametrize("always", [False, True])
def test_what_fails_in_one_draw_is_measured_over_several(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice eager's error: by chance in the first draw, or in all of them."""
    monkeypatch.setattr(
        verification, "_errors",
        lambda eager, swapped, call, seed: (torch.float32, {"gradient": (1e-5, 2e-5 if always or seed == 0 else 1e-5)}),
    )  # fmt: skip
    model, x = block()
    found = fastvdiff.swap_kernels(model.body).verify(x, seconds=0.0)
    assert all(bool(m.failures) == always for m in found.modules if m.path)


def test_hooks_inside_a_swapped_module_still_run() -> None:
    model, x = block()
    seen: list[str] = []
    model.body[0].register_forward_hook(lambda *a: seen.append("norm"))
    model.body.register_forward_pre_hook(lambda *a: seen.append("body"))
    before = draw(model, x)
    fastvdiff.swap_kernels(model)
    after = draw(model, x)
    model.body[1].register_forward_hook(lambda *a: seen.append("silu"))
    draw(model, x)
    assert seen == ["body", "norm"] * 2 + ["body", "norm", "silu"]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_hooks_on_every_module_see_what_a_kernel_would_pass_over() -> None:
    model, x = block()
    fastvdiff.swap_kernels(model)
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *a: seen.append(type(module)))
    try:
        draw(model, x)
    finally:
        handle.remove()
    assert seen.count(nn.GroupNorm) == 3


def test_subclasses_and_parametrised_layers_are_called_not_read() -> None:
    class Doubled(nn.GroupNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    model = nn.Sequential(Doubled(2, 4), nn.SiLU(), nn.GroupNorm(2, 4), nn.SiLU())
    x = torch.randn(2, 4, 3, 5)
    parametrize.register_parametrization(model[2], "weight", Halved())
    before = model(x)
    report = fastvdiff.swap_kernels(model)
    assert [e.path for e in report.refused] == ["0", "2"]
    model.append(nn.GroupNorm(2, 4)).append(nn.SiLU())
    report = fastvdiff.swap_kernels(model)
    assert [e.path for e in report.replaced] == [""]
    parametrize.register_parametrization(model[4], "weight", Halved())
    assert torch.equal(model[:4](x), before)
    torch.testing.assert_close(model(x), model[4:](before))


def test_a_forward_on_the_instance_is_left_alone() -> None:
    model, x = block()
    model.body.forward = lambda x: x
    before = model(x)
    report = fastvdiff.swap_kernels(model)
    assert ("body", "another forward has been put on this instance") in [(e.path, e.why) for e in report.refused]
    assert torch.equal(model(x), before)


def test_undo_reaches_a_forward_that_a_hook_has_kept() -> None:
    """As accelerate's `add_hook_to_module` does: the forward found on the module goes into one put on the instance."""
    model, x = block()
    model.eval()
    before = model(x)
    report = fastvdiff.swap_kernels(model)
    model.body.forward = functools.partial(lambda old, *args: old(*args), model.body.forward)
    assert not torch.equal(model(x), before)
    report.undo()
    assert torch.equal(model(x), before)


def test_a_copy_runs_the_kernels_and_a_file_holds_the_module_as_it_was() -> None:
    model, x = block()
    model.eval()
    report = fastvdiff.swap_kernels(model)
    twin = copy.deepcopy(model)
    assert classes.is_swapped(twin.body)
    assert torch.equal(twin(x), model(x))
    assert twin.body[0].weight is not model.body[0].weight
    file = BytesIO()
    torch.save(model.body, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is nn.Sequential
    assert type(pickle.loads(pickle.dumps(model.body))) is nn.Sequential
    report.undo()
    assert torch.equal(loaded(x), model.body(x))
    assert classes.is_swapped(twin.body)
    classes.restore_all(twin)
    assert type(twin.body) is nn.Sequential


def test_a_state_dict_goes_round() -> None:
    model, x = block()
    model.eval()
    fastvdiff.swap_kernels(model)
    other = Block().eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_training_with_dropout_follows_eager() -> None:
    x = block()[1]
    contract.hold_training(lambda: block()[0], {"x": x}, torch.randn(x.shape))


def test_autocast_and_compile_in_one_graph() -> None:
    model, x = block()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
    fastvdiff.swap_kernels(model)
    with torch.autocast("cpu", torch.bfloat16):
        after = model(x)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=3e-2, atol=3e-2)
    plain = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain, rtol=1e-5, atol=1e-5)


def test_not_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"swap_kernels: model: expected a torch\.nn\.Module"):
        fastvdiff.swap_kernels("unet")


def test_fsdp_and_ddp_around_swapped_modules(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, x = block()
        model.eval()
        model(x).sum().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        report = fastvdiff.swap_kernels(model)
        replica = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        replica(x).sum().backward()
        for name, p in replica.module.named_parameters():
            torch.testing.assert_close(p.grad, before[name], rtol=1e-3, atol=1e-4)
        fully_shard(model.body)
        fully_shard(model)
        model(x).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), before[name], rtol=1e-3, atol=1e-4)
        report.undo()
        assert not any(classes.is_swapped(m) for m in model.modules())
        assert isinstance(model.body, FSDPModule)
        assert isinstance(model.body, nn.Sequential)
        model(x).sum().backward()
    finally:
        distributed.destroy_process_group()


def test_fastvdiffs_own_modules_are_not_reported() -> None:
    report = fastvdiff.swap_kernels(fastvdiff.VideoUNet.from_preset("tiny"))
    assert not report.replaced
    assert not report.refused


def test_a_class_with_other_fields_is_refused() -> None:
    class ResnetBlock2D(nn.Module):
        def forward(self, x: torch.Tensor, temb: Any) -> torch.Tensor:
            return x

    class AlphaBlender(ResnetBlock2D):
        pass

    class TransformerTemporalModel(ResnetBlock2D):
        pass

    model = nn.ModuleList([ResnetBlock2D(), AlphaBlender(), TransformerTemporalModel()])
    report = fastvdiff.swap_kernels(model)
    assert not report.replaced
    assert [e.path for e in report.refused] == ["0", "1", "2"]
    assert "without norm1" in report.refused[0].why
    assert "not those that are known" in report.refused[2].why
