"""Training: typed configurations, the trainer, averaged weights and checkpoints."""

from .averaged import AveragedModel, load_average
from .checkpoints import Checkpoint, CheckpointError
from .config import TrainConfig
from .ema import ExponentialAverage
from .objective import Objective
from .schema import ConfigError
from .trainer import Trainer, TrainingError

__all__ = [
    "AveragedModel",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ExponentialAverage",
    "Objective",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "load_average",
]
