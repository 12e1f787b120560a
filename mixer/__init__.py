"""MLP-Mixer on Fashion-MNIST: the model, its training and a parameter grid.

from mixer import Config, MlpMixer, train
"""

from mixer.system import affinity, interruption  # isort: skip (before PyTorch)

from mixer.config import Config, grid
from mixer.kernels.acceleration import accelerate
from mixer.model import MixerBlock, MlpMixer
from mixer.prediction import classify
from mixer.records import histories
from mixer.runner import run_grid
from mixer.system.files import SHIPPED
from mixer.training import train

affinity.restore()
interruption.restore()

__all__ = [
    "SHIPPED",
    "Config",
    "MixerBlock",
    "MlpMixer",
    "accelerate",
    "classify",
    "grid",
    "histories",
    "run_grid",
    "train",
]
