"""A run's config: one point of a grid, with a name of its own."""

import dataclasses
import math
import operator
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real
from typing import Any, Literal, get_args

LRS, DROPOUTS, BATCH_SIZES = (0.01, 0.001), (0.0, 0.1), (256, 512)  # the coursework's grid

# Named configs: what differs from the coursework's. `python -m mixer --recipe NAME` trains one.
RECIPES: dict[str, dict[str, Any]] = {
    # 88.75 % in the last epoch (three seeds), with dropout 0.1
    "coursework": {},
    # The coursework's model trained as one would today: 92.26 % (three seeds). recipe.ipynb says how it was chosen.
    "modern": {
        "lr": 0.02,
        "initialisation": "identity",
        "whiten": True,
        "optimiser": "muon",
        "weight_decay": 0.05,
        "schedule": "linear",
        "flip": True,
        "shift": 2,
        "mixup_prob": 0.5,
        "label_smoothing": 0.1,
        "ema_decay": 0.998,
    },
    # The coursework's 89.17 % as soon as possible: `python -m mixer.studies.speedrun`
    "speedrun": {
        "lr": 0.06,
        "batch_size": 1024,
        "num_epochs": 4,
        "whiten": True,
        "optimiser": "muon",
        "schedule": "linear",
        "ema_decay": 0.9,
    },
    # The teacher of "distilled" and "patient": 94.24 % (one seed). It was not tuned.
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
        "ema_decay": 0.998,
    },
}
# "modern", distilled from results/teachers/conv.safetensors in place of the labels: 92.77 % (three seeds).
RECIPES["distilled"] = RECIPES["modern"] | {
    **{"teacher": "conv", "temperature": 2.0},
    **{"erase": 0, "mixup_prob": 0.0, "label_smoothing": 0.0},
}
# "distilled" with its settings chosen on the validation split, and longer: 92.75 % (three seeds).
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
    gelu: Literal["exact", "tanh"] = "exact"  # tanh: the approximation, as in the paper's code
    initialisation: Literal["flax", "pytorch", "identity"] = "flax"  # flax: as in the paper's code
    whiten: bool = False  # initialise the stem so that its channels are uncorrelated
    inputs: Literal["normalised", "scaled"] = "normalised"  # scaled: pixels divided by 255, no more
    optimiser: Literal["adam", "adamw", "sgd", "momentum", "rmsprop", "muon"] = "adam"
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear"] = "constant"  # linear: warm-up in the first epoch, then down to 0
    flip: bool = False  # mirror half of the training images, drawn anew in every epoch
    shift: int = 0  # move each by up to so many pixels
    erase: int = 0  # cut a square of so many pixels a side out of each
    mixup_prob: float = 0.0  # probability that a batch is mixed with itself in reverse
    label_smoothing: float = 0.0
    network: Literal["mixer", "mlp", "conv"] = "mixer"  # the baselines mlp and conv have one size
    teacher: str = ""  # the name of the network that the run is distilled from, in place of the labels
    temperature: float = 1.0  # of both in distillation
    ema_decay: float = 0.0  # decay of the exponential moving average of the weights, which is what is tested
    validation: bool = False  # test on a twelfth of the training images, held out, in place of the test images

    def __post_init__(self) -> None:
        self._keep("lr", _real, lambda lr: 0 < lr < math.inf, "a positive number like 0.01")
        self._keep("dropout_p", _real, lambda p: 0 <= p < 1, "a number from 0.0 to below 1")
        for name in ("batch_size", "num_epochs", "num_blocks", "num_channels", "patches_mlp_dim", "channels_mlp_dim"):
            self._keep(name, _whole, lambda n: n > 0, "a whole number above 0")
        self._keep("seed", _whole, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 2**32 - 1")
        if self.limit is not None:
            self._keep("limit", _whole, lambda n: n > 0, "None or a whole number above 0")
        self._keep("patch_size", _pair, lambda pair: min(pair) > 0, "one or two whole numbers above 0")
        for field in dataclasses.fields(self):
            if field.type is bool:
                self._keep(field.name, _flag, lambda _: True, "True or False")
            elif words := get_args(field.type) if isinstance(field.default, str) else ():
                self._keep(field.name, str, words.__contains__, f"one of {', '.join(words)}")
        self._keep("weight_decay", _real, lambda decay: 0 <= decay < math.inf, "0 or a positive number")
        self._keep("temperature", _real, lambda t: 0 < t < math.inf, "a positive number")
        self._keep("teacher", str, lambda name: re.fullmatch("[a-z0-9-]*", name), "a name of small letters and digits")
        for name in ("shift", "erase"):
            self._keep(name, _whole, lambda pixels: pixels >= 0, "0 or a whole number of pixels")
        self._keep("mixup_prob", _real, lambda p: 0 <= p <= 1, "a number from 0.0 to 1.0")
        for name in ("label_smoothing", "ema_decay"):
            self._keep(name, _real, lambda share: 0 <= share < 1, "a number from 0.0 to below 1")
        if self.temperature != 1 and not self.teacher:
            raise ValueError("temperature applies with a teacher only; name one, or remove it")
        if self.teacher and (self.erase or self.label_smoothing):
            raise ValueError("teacher goes with flip, shift and mixup_prob, not with erase or label_smoothing")
        for name in _MIXER_ONLY if self.network != "mixer" else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"{name} applies to network='mixer' only, not to {self.network!r}; remove it")

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

    @classmethod
    def from_record(cls, fields: dict[str, Any]) -> "Config":
        """The config of a record or of a weights file, also under the names that two fields once had."""
        return cls(**{_OLD_NAMES.get(name, name): value for name, value in fields.items()})

    @property
    def name(self) -> str:
        """A readable name, one per config: what differs from the coursework's setting is added to its end."""
        parts = [f"lr{_digits(self.lr)}", f"dropout{_digits(self.dropout_p)}"]
        parts += [f"batch{self.batch_size}", f"seed{self.seed}"]
        for field, label in _LABELS.items():
            value = getattr(self, field)
            if value != _DEFAULTS[field]:
                shown = _digits(value) if isinstance(value, float) else value
                parts.append(label.format("x".join(map(str, value)) if isinstance(value, tuple) else shown))
        return "_".join(parts)


# How a field that differs from its default is written in a name; file names depend on it.
_LABELS = {
    **{"num_epochs": "epochs{}", "limit": "limit{}", "num_blocks": "blocks{}", "patch_size": "patch{}"},
    **{"num_channels": "channels{}", "patches_mlp_dim": "tokenmlp{}", "channels_mlp_dim": "channelmlp{}"},
    **{"skip_connections": "noskip", "gelu": "{}gelu", "initialisation": "{}init", "whiten": "whiten"},
    **{"inputs": "{}", "optimiser": "{}", "weight_decay": "decay{}", "schedule": "{}", "flip": "flip"},
    **{"shift": "shift{}", "erase": "erase{}", "mixup_prob": "mixup{}", "label_smoothing": "smooth{}"},
    **{"network": "{}", "teacher": "by-{}", "temperature": "temperature{}", "ema_decay": "average{}"},
    **{"validation": "validation"},
}
_OLD_NAMES = {"mixup": "mixup_prob", "average": "ema_decay"}
_MIXER_ONLY = (
    *("num_blocks", "patch_size", "num_channels", "patches_mlp_dim", "channels_mlp_dim"),
    *("skip_connections", "gelu", "initialisation", "whiten"),
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
_LISTS = {"lr": "lrs", "dropout_p": "dropouts", "batch_size": "batch_sizes", "seed": "seeds"}


def grid(
    lrs: Iterable[float] | None = None,
    dropouts: Iterable[float] | None = None,
    batch_sizes: Iterable[int] | None = None,
    seeds: Iterable[int] = (0,),
    recipe: str | None = None,
    **others: Any,
) -> list[Config]:
    """The configs of a parameter grid; without arguments the coursework's eight.

    ``recipe``: one of ``RECIPES``, whose values stand where none are given here.
    ``others``: any other fields of ``Config``, each with one value or with a list of values:
    ``grid(seeds=range(3), num_epochs=10, num_blocks=[1, 2, 4])``. Raises ValueError, TypeError.
    """
    for name in _LISTS.keys() & others.keys():
        raise TypeError(f"a grid takes {_LISTS[name]}, a list of values, in place of {name}")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, but it has to be one of {', '.join(RECIPES)}")
    base = Config(**RECIPES[recipe]) if recipe else None
    lrs = lrs if lrs is not None else [base.lr] if base else LRS
    dropouts = dropouts if dropouts is not None else [base.dropout_p] if base else DROPOUTS
    batch_sizes = batch_sizes if batch_sizes is not None else [base.batch_size] if base else BATCH_SIZES
    others = {name: value for name, value in RECIPES.get(recipe, {}).items() if name not in _LISTS} | others
    lists = [values if isinstance(values, list | range) else [values] for values in others.values()]
    return [
        Config(lr=lr, dropout_p=dropout_p, batch_size=batch_size, seed=seed, **dict(zip(others, rest, strict=True)))
        for seed, lr, dropout_p, batch_size, *rest in product(seeds, lrs, dropouts, batch_sizes, *lists)
    ]


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
