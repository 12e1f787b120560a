"""MLP-Mixer on Fashion-MNIST: a model, its training, a parameter grid.

from mixer import Config, MlpMixer, train
"""

import sys
import warnings

# `python -m mixer.grid` runs a module that is imported here already; Python warns of it, and it does no harm.
warnings.filterwarnings("ignore", r"'mixer\.\w+' found in sys.modules", RuntimeWarning)

try:
    from mixer.config import Config
    from mixer.grid import grid, histories, run_grid
    from mixer.model import MixerBlock, MlpMixer
    from mixer.predict import classify
    from mixer.runs import train
except KeyboardInterrupt:  # PyTorch takes seconds to import
    if sys.argv[0] != "-m":
        raise
    sys.exit("Stopped before anything was done.")

__all__ = ["Config", "MixerBlock", "MlpMixer", "classify", "grid", "histories", "run_grid", "train"]
