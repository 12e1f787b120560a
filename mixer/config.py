"""A run's config: one point of a grid, with a name of its own."""

import dataclasses
import math
import operator
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mixer.optim import OPTIMISERS, SCHEDULES

# Named configs: what differs from the coursework's.
RECIPES: dict[str, dict[str, Any]] = {
    "coursework": {},
    # The coursework's model trained as one would today: 92.3 %. recipe.ipynb says how its ingredients were chosen.
    "modern": {
        "lr": 0.02,
        "initialisation": "identity",
        "whiten": True,
        "optimiser": "muon",
        "weight_decay": 0.05,
        "schedule": "linear",
        "flip": True,
        "shift": 2,
        "mixup": 0.5,
        "label_smoothing": 0.1,
        "average": 0.998,
    },
    # The coursework's accuracy as soon as can be (mixer.studies.speedrun).
    "speedrun": {
        "lr": 0.06,
        "batch_size": 1024,
        "num_epochs": 4,
        "whiten": True,
        "optimiser": "muon",
        "schedule": "linear",
        "average": 0.9,
    },
    # Whom "distilled" and "patient" follow; it was not tuned.
    "teacher": {
        "network": "conv",
        "lr": 0.003,
        "num_epochs": 20,
        "optimiser": "adamw",
        "weight_decay": 0.01,
        "schedule": "linear",
        "flip": True,
        "shift": 2,
        "erase": 8,
        "average": 0.998,
    },
}
# "modern" with the answers of results/teachers/conv.safetensors in place of the labels and what else changes them.
RECIPES["distilled"] = RECIPES["modern"] | {
    **{"teacher": "conv", "temperature": 2.0},
    **{"erase": 0, "mixup": 0.0, "label_smoothing": 0.0},
}
# "distilled" with its settings chosen, and longer: recipe.ipynb.
RECIPES["patient"] = RECIPES["distilled"] | {"shift": 1, "temperature": 1.0, "num_epochs": 120}


@dataclass(frozen=True)
class Config:
    """One point of the grid. Two equal configs are the same run. Raises ValueError for impossible values.

    Every field defaults to the coursework's setting; any number that means the value will do (0, NumPy's).
    """

    lr: float = 0.01
    dropout_p: float = 0.0
    batch_size: int = 256
    num_epochs: int = 60
    seed: int = 0
    limit: int | None = None  # train on the first so many images only
    num_blocks: int = 8
    patch_size: tuple[int, int] = (4, 4)
    num_channels: int = 16
    patches_mlp_dim: int = 1024
    channels_mlp_dim: int = 512
    skip_connections: bool = True
    gelu: str = "exact"  # or "tanh", its approximation, as in the paper's code
    initialisation: str = "flax"  # as the paper's code; "pytorch", as its layers do; "identity": so blocks begin
    whiten: bool = False  # the stem starts by making the pixels of a patch uncorrelated
    inputs: str = "normalised"  # or "scaled": pixels divided by 255, no more
    optimiser: str = "adam"  # one of OPTIMISERS
    weight_decay: float = 0.0
    schedule: str = "constant"  # one of SCHEDULES; "linear": up during the first epoch, then down to 0
    flip: bool = False  # mirror half of the training images, drawn anew in every epoch
    shift: int = 0  # move each by up to so many pixels
    erase: int = 0  # cut a square of so many pixels a side out of each
    mixup: float = 0.0  # so often, a batch's images and labels are mixed with one another's
    label_smoothing: float = 0.0
    network: str = "mixer"  # or one of its peers, "mlp" or "conv", which have one size
    teacher: str = ""  # the name of one: the only target is what it makes of the very image that is seen
    temperature: float = 1.0  # of both, when a teacher is followed
    average: float = 0.0  # what is tested is the weights' moving average, which keeps so much of itself a step
    validation: bool = False  # a twelfth of the training images is held out, and stands for the test images

    def __post_init__(self) -> None:
        self._keep("lr", _real, lambda lr: 0 < lr < math.inf, "a positive number like 0.01")
        self._keep("dropout_p", _real, lambda p: 0 <= p < 1, "a number from 0.0 to below 1")
        for name in ("batch_size", "num_epochs", "num_blocks", "num_channels", "patches_mlp_dim", "channels_mlp_dim"):
            self._keep(name, _whole, lambda n: n > 0, "a whole number above 0")
        self._keep("seed", _whole, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 2**32 - 1")
        if self.limit is not None:
            self._keep("limit", _whole, lambda n: n > 0, "None or a whole number above 0")
        self._keep("patch_size", _pair, lambda pair: min(pair) > 0, "one or two whole numbers above 0")
        for name in ("skip_connections", "whiten", "flip", "validation"):
            self._keep(name, _flag, lambda _: True, "True or False")
        for name, words in _WORDS.items():
            self._keep(name, str, words.__contains__, f"one of {', '.join(words)}")
        self._keep("weight_decay", _real, lambda decay: 0 <= decay < math.inf, "0 or a positive number")
        self._keep("temperature", _real, lambda t: 0 < t < math.inf, "a positive number")
        self._keep("teacher", str, lambda name: re.fullmatch("[a-z0-9-]*", name), "a name of small letters and digits")
        if self.temperature != 1 and not self.teacher:
            raise ValueError("temperature goes with a teacher: name one, or leave it out")
        if self.teacher and (self.erase or self.label_smoothing):
            raise ValueError("teacher goes with flips, shifts and mixup, not with erase or label_smoothing")
        for name in _OF_A_MIXER if self.network != "mixer" else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"{name} is of a mixer, and network is {self.network!r}: leave it out")
        for name in ("shift", "erase"):
            self._keep(name, _whole, lambda pixels: pixels >= 0, "0 or a whole number of pixels")
        self._keep("mixup", _real, lambda p: 0 <= p <= 1, "a number from 0.0 to 1.0")
        for name in ("label_smoothing", "average"):
            self._keep(name, _real, lambda share: 0 <= share < 1, "a number from 0.0 to below 1")

    def _keep(self, name: str, kind: Callable[[Any], Any], fits: Callable[[Any], bool], wanted: str) -> None:
        given = getattr(self, name)
        try:
            value = kind(given)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is PyTorch's, of tensors
            value = None
        if value is None or not fits(value):
            shown = " ".join(reprlib.repr(given).split())
            raise ValueError(f"{name} is {shown}, but it has to be {wanted}")
        object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """A readable name, one per config: what differs from the coursework's setting is added to its end."""
        parts = [f"lr{_digits(self.lr)}", f"dropout{_digits(self.dropout_p)}"]
        parts += [f"batch{self.batch_size}", f"seed{self.seed}"]
        labels = {
            "num_epochs": f"epochs{self.num_epochs}",
            "limit": f"limit{self.limit}",
            "num_blocks": f"blocks{self.num_blocks}",
            "patch_size": "patch{}x{}".format(*self.patch_size),
            "num_channels": f"channels{self.num_channels}",
            "patches_mlp_dim": f"tokenmlp{self.patches_mlp_dim}",
            "channels_mlp_dim": f"channelmlp{self.channels_mlp_dim}",
            "skip_connections": "noskip",
            "gelu": f"{self.gelu}gelu",
            "initialisation": f"{self.initialisation}init",
            "whiten": "whiten",
            "inputs": self.inputs,
            "optimiser": self.optimiser,
            "weight_decay": f"decay{_digits(self.weight_decay)}",
            "schedule": self.schedule,
            "flip": "flip",
            "shift": f"shift{self.shift}",
            "erase": f"erase{self.erase}",
            "mixup": f"mixup{_digits(self.mixup)}",
            "label_smoothing": f"smooth{_digits(self.label_smoothing)}",
            "network": self.network,
            "teacher": f"by-{self.teacher}",
            "temperature": f"temperature{_digits(self.temperature)}",
            "average": f"average{_digits(self.average)}",
            "validation": "validation",
        }
        return "_".join(parts + [label for field, label in labels.items() if getattr(self, field) != _DEFAULTS[field]])


_WORDS = {
    "gelu": ("exact", "tanh"),
    "initialisation": ("flax", "pytorch", "identity"),
    "inputs": ("normalised", "scaled"),
    "network": ("mixer", "mlp", "conv"),
    "optimiser": tuple(OPTIMISERS),
    "schedule": tuple(SCHEDULES),
}
_OF_A_MIXER = (
    *("num_blocks", "patch_size", "num_channels", "patches_mlp_dim", "channels_mlp_dim"),
    *("skip_connections", "gelu", "initialisation", "whiten"),
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


def _real(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    return float(value) + 0.0  # which makes one zero of the two


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, Integral):
        return operator.index(value)
    if int(_real(value)) != value:
        raise ValueError
    return int(value)


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, Real) else value
    return _whole(height), _whole(width)


def _flag(value: Any) -> bool:
    if value not in (True, False):
        raise TypeError
    return bool(value)


def _digits(value: float) -> str:
    """The fewest digits that stand for this number and no other."""
    return repr(value).removesuffix(".0")
