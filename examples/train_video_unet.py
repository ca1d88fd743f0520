"""Train diffusers' UNet3DConditionModel with accelerate, as any accelerate script does; one line is fastvdiff's.

    accelerate launch examples/train_video_unet.py --output runs/unet3d

The clips are bright squares that move left or right, and the "text" is one vector for each direction, so that nothing
has to be downloaded: put your own dataset and text encoder in their place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet3DConditionModel
from torch.utils.data import DataLoader, Dataset

import fastvdiff


class MovingSquares(Dataset):
    """Clips (3, T, S, S) in [-1, 1] and their text (L, C)."""

    def __init__(self, clips: int, frames: int, size: int, text_dim: int) -> None:
        self.clips, self.frames, self.size = clips, frames, size
        self.texts = torch.randn(2, 4, text_dim, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        direction = index % 2
        clip = torch.full((3, self.frames, self.size, self.size), -1.0)
        side, top = self.size // 4, (index // 2) % (self.size * 3 // 4)
        for t in range(self.frames):
            left = t if direction else self.size - side - t
            clip[index % 3, t, top : top + side, max(left, 0) : left + side] = 1.0
        return {"clip": clip, "text": self.texts[direction]}


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train and save; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the trained U-Net is saved")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    torch.manual_seed(options.seed)
    unet = UNet3DConditionModel(
        sample_size=options.size,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(options.channels),
        down_block_types=("CrossAttnDownBlock3D",) * (len(options.channels) - 1) + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (len(options.channels) - 1),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    report = fastvdiff.swap_kernels(unet)  # <-- the one line: same weights, same numbers, fused kernels
    accelerator.print(report)

    scheduler = DDPMScheduler(prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate)
    clips = options.steps * options.batch_size
    loader = DataLoader(MovingSquares(clips, options.frames, options.size, 32), options.batch_size, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    unet.train()
    losses = []
    for step, batch in enumerate(loader):
        clip = batch["clip"]
        noise = torch.randn_like(clip)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clip),), device=clip.device)
        noisy = scheduler.add_noise(clip, noise, timesteps)
        prediction = unet(noisy, timesteps, encoder_hidden_states=batch["text"]).sample
        loss = F.mse_loss(prediction.float(), scheduler.get_velocity(clip, noise, timesteps))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            accelerator.print(f"step {step}: loss {losses[-1]:.4f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(unet).save_pretrained(options.output)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
