"""What DDPM and DDIM schedulers share: the schedule, its timesteps, and look-ups that never wait for a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..prediction import add_noise, check_prediction_type, velocity
from ..schedules import make_betas, rescale_zero_terminal_snr
from .config import Configurable

SPACINGS = ("leading", "trailing", "linspace")


class StepOutput(NamedTuple):
    """One step's result: the less noisy sample, and the clean one it was derived from."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def spaced_timesteps(spacing: str, num_train: int, num_inference: int, offset: int = 0) -> list[int]:
    """The training timesteps visited by `num_inference` steps, falling.

    "leading": 0, r, 2r, ... plus `offset`, with r = num_train // num_inference; "trailing": num_train - 1 and every
    num_train / num_inference below it; "linspace": from num_train - 1 to 0 inclusive. (arXiv:2305.08891, table 2.)
    """
    if spacing == "leading":
        ratio = num_train // num_inference
        return [i * ratio + offset for i in reversed(range(num_inference))]
    if spacing == "trailing":
        stride = num_train / num_inference
        delta = (num_train - stride) - num_train  # rounded as numpy.arange rounds its step, so that ties fall alike
        return [round(num_train + i * delta) - 1 for i in range(math.ceil(num_train / stride))]
    if num_inference == 1:
        return [0]
    stride = (num_train - 1) / (num_inference - 1)
    return [num_train - 1] + [round(i * stride) for i in reversed(range(num_inference - 1))]


class Scheduler(Configurable):
    """A discrete schedule of `num_train_timesteps` cumulative products a_t, and the timesteps of a sampling run.

    A timestep is a Python int or a tensor. An int, or a CPU tensor of one element, is looked up on the host and reaches
    the step as floats; a tensor on the sample's device is looked up there, in a table that `set_timesteps(device=)`
    or the first use puts in place. So the sampling loop never waits for the device.
    """

    order = 1
    init_noise_sigma = 1.0
    num_inference_steps: int | None = None

    def __init__(
        self,
        num_train_timesteps: int,
        beta_start: float,
        beta_end: float,
        beta_schedule: str,
        trained_betas: Sequence[float] | None,
        prediction_type: str,
        timestep_spacing: str,
        rescale_betas_zero_snr: bool,
    ) -> None:
        name = type(self).__name__
        check_prediction_type(name, prediction_type)
        if timestep_spacing not in SPACINGS:
            known = ", ".join(map(repr, SPACINGS))
            raise ValueError(f"{name}: timestep_spacing: expected one of {known}, got {timestep_spacing!r}")
        if trained_betas is None:
            self.betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        else:
            self.betas = torch.as_tensor(trained_betas, dtype=torch.float32)
            if self.betas.shape != (num_train_timesteps,):
                raise ValueError(
                    f"{name}: trained_betas: expected {num_train_timesteps} values (num_train_timesteps), "
                    f"got shape {tuple(self.betas.shape)}"
                )
        if rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._visit(range(num_train_timesteps - 1, -1, -1), None)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: these schedulers feed it to the model unscaled."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps of a run of `num_inference_steps` and put them on `device`, as `self.timesteps`."""
        config = self.config
        if not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}.set_timesteps: num_inference_steps: expected 1 to {config.num_train_timesteps} "
                f"(num_train_timesteps), got {num_inference_steps}"
            )
        self.num_inference_steps = num_inference_steps
        offset = config.steps_offset
        steps = spaced_timesteps(config.timestep_spacing, config.num_train_timesteps, num_inference_steps, offset)
        if steps[0] >= config.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}.set_timesteps: num_inference_steps: expected a number that leaves room for "
                f"steps_offset = {offset} below {config.num_train_timesteps}, got {num_inference_steps}"
            )
        self._visit(steps, device)

    def _visit(self, timesteps: Sequence[int], device: torch.device | str | None) -> None:
        """Make these the run's timesteps and rebuild the look-up tables, on `device` too."""
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        alphas = self.alphas_cumprod.tolist()
        self._host_tables = alphas, self._previous_alphas(alphas, timesteps)
        self._device_tables: dict[torch.device, torch.Tensor] = {}
        self._tables_on(self.timesteps.device)

    def _previous_alphas(self, alphas: list[float], timesteps: Sequence[int]) -> list[float]:
        """For every training timestep, a at the timestep that follows it in the run; NaN where none does."""
        raise NotImplementedError

    def adds_noise(self, timestep: int, **options: Any) -> bool:
        """Whether `step` at this timestep takes noise, for options of `step` that decide it (DDIM: eta)."""
        raise NotImplementedError

    def _tables_on(self, device: torch.device) -> torch.Tensor:
        """(a_t, a at the next timestep) over the training timesteps: float32 (2, num_train_timesteps)."""
        if device not in self._device_tables:
            self._device_tables[device] = torch.tensor(self._host_tables, dtype=torch.float32, device=device)
        return self._device_tables[device]

    def alphas_at(
        self, timestep: int | torch.Tensor, device: torch.device
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """a at this timestep and at the one that follows it in the run.

        timestep: an int, or an integer tensor of one element or (B,). Returns floats for what is on the host, else
        0-dim or (B,) float32 tensors on `device`. Raises ValueError for a host timestep out of range or out of the run.
        """
        if not isinstance(timestep, torch.Tensor):
            return self._alphas_on_host(int(timestep))
        if timestep.device.type == "cpu" and timestep.numel() == 1:
            return self._alphas_on_host(int(timestep))
        shape = timestep.shape if timestep.numel() > 1 else ()
        found = self._tables_on(device).index_select(1, timestep.to(device, torch.int64).reshape(-1))
        return found[0].reshape(shape), found[1].reshape(shape)

    def _alphas_on_host(self, timestep: int) -> tuple[float, float]:
        alphas, previous = self._host_tables
        if not 0 <= timestep < len(alphas):
            raise ValueError(
                f"{type(self).__name__}: timestep: expected 0 to {len(alphas) - 1} (num_train_timesteps - 1), "
                f"got {timestep}"
            )
        if math.isnan(previous[timestep]):
            raise ValueError(f"{type(self).__name__}: timestep: expected one of self.timesteps, got {timestep}")
        return alphas[timestep], previous[timestep]

    def _alpha_of(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """a at each of these timesteps, whether the run visits it or not: (B,) or (1,) float32."""
        return self._tables_on(like.device)[0].index_select(0, timesteps.to(like.device, torch.int64).reshape(-1))

    def _limits(self) -> dict[str, Any]:
        """The arguments of `ddim_step` that keep x0 in range: a dynamic threshold, a clip, or neither."""
        config = self.config
        if config.thresholding:
            return {"dynamic_threshold": (config.dynamic_thresholding_ratio, config.sample_max_value)}
        return {"clip_sample": config.clip_sample_range if config.clip_sample else None}

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt(a_t) x0 + sqrt(1 - a_t) noise; samples and noise (B, ...), timesteps integer (B,) or (1,)."""
        return add_noise(original_samples, noise, self._alpha_of(timesteps, original_samples))

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = sqrt(a_t) noise - sqrt(1 - a_t) x0, the target of a v-prediction model; shapes as in `add_noise`."""
        return velocity(sample, noise, self._alpha_of(timesteps, sample))
