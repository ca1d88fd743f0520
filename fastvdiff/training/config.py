"""What a training run is: one frozen dataclass per section of the TOML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastvdiff.diffusion import DDIMScheduler
from fastvdiff.models import PRESETS, VideoUNetConfig
from fastvdiff.text import ByteTextEncoderConfig
from fastvdiff.text.bytes import MAX_NGRAM

from .schema import Count, Fraction, Natural, Positive, Within, from_table, read_toml, to_table


@dataclass(frozen=True)
class DataConfig:
    """The clips: a folder of captioned videos, and the frames taken from each.

    folder: see `fastvdiff.data.VideoFolder`. num_frames, height, width: of a training clip. fps: sampling rate in
    frames per second; left out, every frame as stored. random_flip: mirror half of the clips, captions included.
    workers: processes that decode; 0 decodes in the training process, which for a small data set kept in memory is
    fastest. cache_mib: decoded frames kept in memory, in each process; with a cache_folder, on the disk, memory-mapped,
    for all processes and later runs. skip_broken: replace a broken clip by another instead of stopping (up to 1 %).
    """

    folder: str
    num_frames: Count = 16
    height: Count = 32
    width: Count = 32
    fps: Positive | None = None
    random_flip: bool = False
    workers: Natural = 0
    cache_mib: Natural = 2048
    cache_folder: str | None = None
    skip_broken: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The network: a preset of `fastvdiff.models`, and in [model.changes] the fields that differ from it."""

    preset: str = "tiny"
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {self.preset!r}")
        self.resolved()

    def resolved(self) -> VideoUNetConfig:
        """The whole configuration of the network."""
        return VideoUNetConfig.from_dict({**PRESETS[self.preset].to_dict(), **self.changes})


@dataclass(frozen=True)
class TextConfig:
    """The byte-level text encoder that is trained with the network; its width is the network's cross_attention_dim.

    ngrams, ngram_buckets: lengths of the n-grams that have vectors of their own, and how many of each length.
    """

    depth: Natural = 3
    heads: Count = 4
    max_length: Annotated[int, Within(least=3)] = 64
    ngrams: tuple[Annotated[int, Within(least=2, most=MAX_NGRAM)], ...] = ()
    ngram_buckets: Count = 1021

    def resolved(self, width: int) -> ByteTextEncoderConfig:
        """The encoder's configuration at this width."""
        return ByteTextEncoderConfig(width=width, **dataclasses.asdict(self))


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, what the network predicts, and how noise levels are weighted.

    snr_gamma: min-SNR's gamma (arXiv:2303.09556); left out, every noise level counts alike. snr_floor: the SNR counts
    as at least this much there, so that x0 or v keeps a weight near pure noise (1 in arXiv:2202.00512). noise: "iid",
    or frames that share noise, "mixed" or "progressive" (arXiv:2305.10474). unconditional: the share of captions that
    are dropped, for classifier-free guidance. timestep_shift: s > 1 trains more on the noisy steps, where a caption
    decides what is seen: a uniform share u of the steps becomes s u / (1 + (s - 1) u) (arXiv:2403.03206, eq. 23).
    """

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    num_train_timesteps: Count = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02
    zero_terminal_snr: bool = False
    snr_gamma: Positive | None = None
    snr_floor: Annotated[float, Within(least=0)] = 0.0
    noise: Literal["iid", "mixed", "progressive"] = "iid"
    unconditional: Fraction = 0.1
    timestep_shift: Positive = 1.0

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr: at zero signal the noise says nothing; use v_prediction or sample")
        if self.snr_floor > 0 and (self.prediction_type == "epsilon" or not self.snr_floor <= (self.snr_gamma or 0)):
            raise ValueError(
                "snr_floor: expected 0, or up to snr_gamma with v_prediction or sample, got "
                f"{self.snr_floor:g} with snr_gamma = {self.snr_gamma} and {self.prediction_type}"
            )

    def scheduler(self) -> DDIMScheduler:
        """A sampler of this forward process, starting from its last, noisiest step."""
        return DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.zero_terminal_snr,
            timestep_spacing="trailing",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate: linear warm-up, then constant or a half cosine down to `final_lr` of the peak.

    weight_decay falls on matrices and kernels only, not on biases, norms and embeddings of position. text_lr_share: the
    text encoder's rate as a share of lr; at the full rate of a small network it learns what all captions have in common
    so fast that what tells them apart drowns in it. matrices: what updates the network's matrices and kernels; "muon"
    learns fine detail in a fraction of AdamW's steps, each about a half longer for a small network on a CPU.
    """

    lr: Positive = 3e-4
    betas: tuple[Fraction, ...] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Within(least=0)] = 0.01
    warmup_steps: Natural = 500
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr: Fraction = 0.02
    max_grad_norm: Positive = 1.0
    text_lr_share: Fraction = 1.0
    matrices: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {len(self.betas)}")


@dataclass(frozen=True)
class RunConfig:
    """How long and how: steps of `batch_size * accumulate` clips each.

    precision: of the forward and backward pass; weights and optimizer stay in fp32. "fp16" scales the loss and leaves
    out the steps that overflow. ema_decay: of the averaged weights, which are the ones sampled and exported; it warms
    up as (1 + n) / (10 + n). gradient_checkpointing: recompute the network's blocks in the backward pass: less memory,
    about a third more time, the same numbers.
    """

    steps: Count
    batch_size: Count = 8
    accumulate: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: Annotated[float, Within(least=0, below=1)] = 0.999
    gradient_checkpointing: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class ValidationConfig:
    """The averaged weights' loss on clips that are not trained on, at fixed noise levels with fixed noise.

    every: steps between two; 0 for none. clips: how many, drawn by the seed. folder: where they are, another folder
    like data.folder; left out, they are held out of data.folder. levels: shares of num_train_timesteps.
    """

    every: Natural = 0
    clips: Count = 64
    folder: str | None = None
    levels: tuple[Fraction, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels: expected one or more different numbers, got {list(self.levels)}")

    @property
    def holds_out(self) -> bool:
        """Whether some of data.folder's clips are not trained on."""
        return self.every > 0 and self.folder is None


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves in its folder, and how often (in steps).

    keep: checkpoints kept, the oldest go first. sample_every: sheets of samples from the averaged weights; 0 for none.
    tensorboard: event files with the log's numbers and the samples (pip install "fastvdiff[train]").
    """

    log_every: Count = 50
    checkpoint_every: Count = 1000
    keep: Count = 2
    sample_every: Natural = 1000
    sample_prompts: tuple[str, ...] = ("a red circle moving right", "a blue square moving up")
    sample_steps: Count = 50
    sample_guidance: Annotated[float, Within(least=0)] = 1.5
    tensorboard: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """A whole run, as `fastvdiff train` reads it."""

    run: RunConfig
    data: DataConfig
    seed: Natural = 0
    folder: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        unet = self.model.resolved()
        if unet.cross_attention_dim is None:
            raise ValueError("model: expected a network with text (cross_attention_dim), this one has none")
        if unet.in_channels != 3 or unet.out_channels != 3:
            raise ValueError(f"model: expected 3 channels in and out, got {unet.in_channels} and {unet.out_channels}")
        self.text.resolved(unet.cross_attention_dim)
        if self.run.steps <= self.optimizer.warmup_steps:
            raise ValueError(
                f"optimizer.warmup_steps: expected fewer than run.steps = {self.run.steps}, "
                f"got {self.optimizer.warmup_steps}"
            )

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> TrainConfig:
        """Read a TOML file and apply overrides of the form "optimizer.lr=3e-4"; ConfigError says what is wrong."""
        return from_table(cls, read_toml(Path(path)), str(path), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Every section with its resolved values, as JSON or TOML knows them."""
        return to_table(self)


def differing_keys(a: TrainConfig, b: TrainConfig, sections: tuple[str, ...]) -> list[str]:
    """The dotted keys in these sections whose values differ between two configurations."""
    keys = []
    for section in sections:
        left, right = getattr(a, section), getattr(b, section)
        for each in dataclasses.fields(left):
            if getattr(left, each.name) != getattr(right, each.name):
                keys.append(f"{section}.{each.name}")
    return keys
