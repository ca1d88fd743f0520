"""The loss on held-out clips: at fixed noise levels and with fixed noise, so that its values compare along a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fastvdiff.data import VideoFolder
from fastvdiff.diffusion import video_noise

from .clips import loader
from .config import TrainConfig
from .objective import Draws, Objective, stream_seed
from .precision import Precision


class Validation:
    """Measures modules on `clips`, decoded in the training process and kept in memory like the others.

    The same clips, frames, noise levels and noise every time, every caption used, no weighting: runs with one seed,
    prediction type and forward process compare, whatever their weights, `unconditional` or `timestep_shift`.
    """

    def __init__(self, clips: VideoFolder, config: TrainConfig, objective: Objective, precision: Precision) -> None:
        self.clips, self.config, self.objective, self.precision = clips, config, objective, precision
        last = config.diffusion.num_train_timesteps - 1
        self.levels = {f"validation_loss_at_{share}": round(share * last) for share in config.validation.levels}

    @torch.no_grad()
    def losses(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """The mean over clips at each level, and `validation_loss`, the mean over levels; modules in eval mode."""
        sums = torch.zeros(len(self.levels), dtype=torch.float64, device=self.objective.device)
        size = self.config.run.batch_size
        numbers = [(0, index) for index in range(len(self.clips))]
        keys = iter([numbers[first : first + size] for first in range(0, len(numbers), size)])
        for batch in loader(self.clips, keys, 0, self.objective.device):
            video = batch["video"].to(self.objective.device)
            noise = self._noise(batch["index"].tolist(), video.shape)
            for position, level in enumerate(self.levels.values()):
                draws = Draws(torch.full((len(video),), level, device=video.device), noise, None)
                with self.precision.autocast():
                    losses = self.objective.loss(*modules.values(), video, batch["caption"], draws, weighted=False)
                sums[position] += losses.double().sum()
        means = (sums / len(self.clips)).tolist()
        return {"validation_loss": sum(means) / len(means), **dict(zip(self.levels, means, strict=True))}

    def _noise(self, indices: list[int], shape: torch.Size) -> torch.Tensor:
        """Each clip's own noise, the same in any batch."""
        seeds = [stream_seed(self.config.seed, "validation", index) for index in indices]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return video_noise(shape, self.config.diffusion.noise, generator=generators).to(self.objective.device)
