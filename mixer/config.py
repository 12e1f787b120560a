"""The config of a run: one point of the grid, with a unique name."""

import dataclasses
import difflib
import functools
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

# Named configs, as differences from the coursework's. `python -m mixer --recipe NAME` trains one.
RECIPES: dict[str, dict[str, Any]] = {
    # 88.75 % in the last epoch (three seeds), with dropout 0.1
    "coursework": {},
    # The coursework's model with today's training methods: 92.26 % (three seeds). recipe.ipynb says how it was chosen.
    "modern": {
        **{"lr": 0.02, "initialisation": "identity", "whiten": True},
        **{"optimiser": "muon", "weight_decay": 0.05, "schedule": "linear", "ema_decay": 0.998},
        **{"flip": True, "shift": 2, "mixup_prob": 0.5, "label_smoothing": 0.1},
    },
    # 89.17 % fast: 89.89 % in a minute (twenty seeds on two cores of Zen 5), by `python -m mixer.studies.speedrun`
    "speedrun": {
        **{"lr": 0.08, "batch_size": 512, "num_epochs": 4, "initialisation": "identity", "whiten": True},
        **{"optimiser": "muon", "schedule": "decay", "ema_decay": 0.975, "label_smoothing": 0.1},
    },
    # The teacher of "distilled" and "patient": 94.24 % (one seed). It was not tuned.
    "teacher": {
        **{"network": "conv", "lr": 0.003, "num_epochs": 20},
        **{"optimiser": "adamw", "weight_decay": 0.01, "schedule": "linear", "ema_decay": 0.998},
        **{"flip": True, "shift": 2, "erase": 8},
    },
}
# "modern", distilled from results/teachers/conv.safetensors in place of the labels: 92.77 % (three seeds).
RECIPES["distilled"] = RECIPES["modern"] | {
    **{"teacher": "conv", "temperature": 2.0},
    **{"erase": 0, "mixup_prob": 0.0, "label_smoothing": 0.0},
}
# "distilled" with settings chosen on the validation split and more epochs: 92.75 % (three seeds).
RECIPES["patient"] = RECIPES["distilled"] | {"shift": 1, "temperature": 1.0, "num_epochs": 120}


def _field(group: str, default: Any, meaning: str) -> Any:
    """A field of Config, with its meaning for ``help(Config)`` and its group in ``--help``."""
    return dataclasses.field(default=default, metadata={"group": group, "meaning": meaning})


_grid, _model, _training, _data = (functools.partial(_field, name) for name in ("grid", "model", "training", "data"))


@dataclass(frozen=True)
class Config:
    """One point of the grid. Equal configs describe the same run. Raises ValueError for impossible values.

    Every field defaults to the coursework's setting. Any numeric type is accepted (0 for 0.0, NumPy's numbers).
    """

    lr: float = _grid(0.01, "learning rate")
    dropout_p: float = _grid(0.0, "dropout probability")
    batch_size: int = _grid(256, "images per training step")
    num_epochs: int = _training(60, "passes over the training images")
    seed: int = _grid(0, "seed of initial weights, image order, dropout and augmentation")
    limit: int | None = _data(None, "use only this many training images, the first ones, and as many test images")
    num_blocks: int = _model(8, "number of mixer blocks")
    patch_size: tuple[int, int] = _model((4, 4), "height and width of a patch, in pixels")
    num_channels: int = _model(16, "channels per patch; more than 64 train several times slower on a CPU")
    patches_mlp_dim: int = _model(1024, "hidden units of the token-mixing MLP")
    channels_mlp_dim: int = _model(512, "hidden units of the channel-mixing MLP")
    skip_connections: bool = _model(True, "add the input of each MLP to its output")
    gelu: Literal["exact", "tanh"] = _model("exact", "tanh: the approximation that the paper's code uses")
    initialisation: Literal["flax", "pytorch", "identity"] = _model("flax", "identity: blocks that do nothing at first")
    whiten: bool = _model(False, "initialise the stem so that its channels are uncorrelated")
    inputs: Literal["normalised", "scaled"] = _data("normalised", "scaled: pixels divided by 255 only")
    optimiser: Literal["adam", "adamw", "sgd", "momentum", "rmsprop", "muon"] = _training("adam", "momentum: SGD, 0.9")
    weight_decay: float = _training(0.0, "weight decay of the optimiser")
    shared_filters: int = _training(0, "side of filters that all patches share while training (RepMLP), in patches")
    sam_radius: float = _training(0.0, "radius of sharpness-aware minimisation (SAM), say 0.1; takes twice as long")
    schedule: Literal["constant", "linear", "decay"] = _training(
        "constant", "linear: warm-up for one epoch, then linear decay to 0; decay: without the warm-up"
    )
    flip: bool = _training(False, "mirror each training image with probability 0.5, anew in every epoch")
    shift: int = _training(0, "largest shift of a training image, in pixels")
    affine: float = _training(0.0, "largest change of an entry in a training image's affine map, say 0.1")
    erase: int = _training(0, "side of the square erased from each training image, in pixels (cutout)")
    mixup_prob: float = _training(0.0, "probability of mixing a batch with itself in reverse order (mixup)")
    plain_epochs: int = _training(0, "number of last epochs in which training images are at most mirrored")
    label_smoothing: float = _training(0.0, "share of the target spread evenly over all classes")
    network: Literal["mixer", "mlp", "conv"] = _model("mixer", "mlp and conv are baselines, each of a fixed size")
    teacher: str = _training("", "network to distil from, by name, in place of the labels")
    temperature: float = _training(1.0, "temperature of both networks in distillation")
    token_labels: float = _training(0.0, "weight of the teacher's answers for single patches, say 0.5")
    ema_decay: float = _training(0.0, "decay of the exponential moving average of the weights, which is then tested")
    validation: bool = _data(False, "hold out a twelfth of the training images and test on it, not on the test images")

    def __post_init__(self) -> None:
        self._keep("lr", _real, lambda lr: 0 < lr < math.inf, "a positive number like 0.01")
        for name in ("batch_size", "num_epochs", "num_blocks", "num_channels", "patches_mlp_dim", "channels_mlp_dim"):
            self._keep(name, _whole, lambda n: 0 < n < 2**31, "a whole number from 1 to 2**31 - 1")
        self._keep("seed", _whole, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 2**32 - 1")
        if self.limit is not None:
            self._keep("limit", _whole, lambda n: n > 0, "None or a whole number above 0")
        self._keep("patch_size", _pair, lambda pair: min(pair) > 0, "one or two whole numbers above 0")
        for field in dataclasses.fields(self):
            if field.type is bool:
                self._keep(field.name, lambda flag: bool((False, True).index(flag)), lambda _: True, "True or False")
            elif words := get_args(field.type) if isinstance(field.default, str) else ():
                self._keep(field.name, str, words.__contains__, f"one of {', '.join(words)}")
        self._keep("weight_decay", _real, lambda decay: 0 <= decay < math.inf, "0 or a positive number")
        self._keep("sam_radius", _real, lambda radius: 0 <= radius < math.inf, "0 or a positive number like 0.1")
        self._keep("token_labels", _real, lambda weight: 0 <= weight < math.inf, "0 or a positive number like 0.5")
        self._keep("temperature", _real, lambda t: 0 < t < math.inf, "a positive number")
        self._keep("teacher", str, lambda name: re.fullmatch("[a-z0-9-]*", name), "lower-case letters, digits, hyphens")
        self._keep(
            "shared_filters", _whole, lambda side: side == 0 or (side > 0 and side % 2), "0 or an odd number of patches"
        )
        for name in ("shift", "erase"):
            self._keep(name, _whole, lambda pixels: pixels >= 0, "0 or a whole number of pixels")
        self._keep("mixup_prob", _real, lambda p: 0 <= p <= 1, "a number from 0.0 to 1.0")
        for name in ("dropout_p", "label_smoothing", "ema_decay", "affine"):
            self._keep(name, _real, lambda share: 0 <= share < 1, "a number from 0.0 to below 1")
        self._keep("plain_epochs", _whole, lambda n: 0 <= n <= self.num_epochs, "a whole number from 0 to num_epochs")
        if self.plain_epochs and not any(getattr(self, name) for name in _PLAIN):
            raise ValueError("plain_epochs applies only with shift, affine, erase or mixup_prob; set one, or remove it")
        if self.temperature != 1 and not self.teacher:
            raise ValueError("temperature applies only with a teacher; name one, or remove it")
        if self.token_labels and not (self.teacher and self.patch_size == (4, 4)):  # the teacher's last layer has these
            raise ValueError("token_labels applies only with a teacher and patches of 4×4; set both, or remove it")
        if self.teacher and self.label_smoothing:
            raise ValueError("teacher cannot be combined with label_smoothing; set it to 0")
        for name in _MIXER_ONLY if self.network != "mixer" else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"{name} applies to network='mixer' only, not to {self.network!r}; remove it")

    def _keep(self, name: str, kind: Callable[[Any], Any], fits: Callable[[Any], bool], wanted: str) -> None:
        given = getattr(self, name)
        try:
            value = kind(given)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last one is PyTorch's, for tensors
            value = None
        if value is None or not fits(value):
            shown = " ".join(reprlib.repr(given).split())
            raise ValueError(f"{name} is {shown}, but it has to be {wanted}")
        object.__setattr__(self, name, value)

    @classmethod
    def from_record(cls, fields: dict[str, Any]) -> "Config":
        """Read the config of a record or a weights file; two fields may have their former names."""
        return cls(**{_OLD_NAMES.get(name, name): value for name, value in fields.items()})

    def of_epoch(self, epoch: int) -> "Config":
        """Return the config by which this epoch, from 1, is augmented: it differs in the ``plain_epochs``."""
        plain = epoch > self.num_epochs - self.plain_epochs
        return dataclasses.replace(self, plain_epochs=0, **_PLAIN if plain else {})

    @property
    def name(self) -> str:
        """A readable, unique name; settings other than the coursework's are appended."""
        parts = []
        for field, label in _LABELS.items():
            value = getattr(self, field)
            if field in _LISTS or value != _DEFAULTS[field]:
                shown = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
                parts.append(label.format(shown.removesuffix(".0")))
        return "_".join(parts)


_PLAIN = {"shift": 0, "affine": 0.0, "erase": 0, "mixup_prob": 0.0}  # in the plain epochs
# A field's form in a name: the first four always, others unless they are the default. File names depend on it.
_LABELS = {
    **{"lr": "lr{}", "dropout_p": "dropout{}", "batch_size": "batch{}", "seed": "seed{}"},
    **{"num_epochs": "epochs{}", "limit": "limit{}", "num_blocks": "blocks{}", "patch_size": "patch{}"},
    **{"num_channels": "channels{}", "patches_mlp_dim": "tokenmlp{}", "channels_mlp_dim": "channelmlp{}"},
    **{"skip_connections": "noskip", "gelu": "{}gelu", "initialisation": "{}init", "whiten": "whiten"},
    **{"inputs": "{}", "optimiser": "{}", "weight_decay": "decay{}", "shared_filters": "filters{}"},
    **{"sam_radius": "sam{}", "schedule": "{}", "flip": "flip", "shift": "shift{}", "affine": "affine{}"},
    **{"erase": "erase{}", "mixup_prob": "mixup{}", "plain_epochs": "plain{}", "label_smoothing": "smooth{}"},
    **{"network": "{}", "teacher": "by-{}", "temperature": "temperature{}", "token_labels": "tokens{}"},
    **{"ema_decay": "average{}", "validation": "validation"},
}
_OLD_NAMES = {"mixup": "mixup_prob", "average": "ema_decay"}
_ALIASES = _OLD_NAMES | {"learning_rate": "lr", "ema": "ema_decay", "workers": "jobs", "output": "results"}
_FIELDS = dataclasses.fields(Config)
_MIXER_ONLY = [field.name for field in _FIELDS if field.metadata["group"] == "model" and field.name != "network"]
_MIXER_ONLY += ["shared_filters", "token_labels"]
_DEFAULTS = {field.name: field.default for field in _FIELDS}
_LISTS = {"lr": "lrs", "dropout_p": "dropouts", "batch_size": "batch_sizes", "seed": "seeds"}
_WORDS = {field.name: ", ".join(get_args(field.type)) for field in _FIELDS if isinstance(field.default, str)}
MEANINGS = {f.name: "; ".join(filter(None, [_WORDS.get(f.name), f.metadata["meaning"]])) for f in _FIELDS}
Config.__doc__ = "\n    ".join([f"{Config.__doc__}", *map(": ".join, MEANINGS.items())])


def check_names(of: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for an unknown name, suggesting the closest known one."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(_ALIASES.get(name.strip("-").replace("-", "_"), name), known, 1)
            raise TypeError(f"{of} does not accept {name}{f'; did you mean {close[0]}?' if close else ''}")


def _naming(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Config, *values: Any, **fields: Any) -> None:
        check_names("Config", fields, _DEFAULTS)
        init(self, *values, **fields)

    return checked


Config.__init__ = _naming(Config.__init__)


def check_configs(configs: Any) -> list[Config]:
    """Return one config or several as a list, without duplicates, in order. Raises TypeError for anything else."""
    configs = list(configs) if isinstance(configs, Iterable) and not isinstance(configs, dict | str) else [configs]
    for config in configs:
        if not isinstance(config, Config):
            right = "a Config: Config(**config)" if isinstance(config, dict) else "a Config"
            raise TypeError(f"config is a {type(config).__name__}, but it has to be {right}")
    return list(dict.fromkeys(configs))


def grid(
    lrs: Iterable[float] | float | None = None,
    dropouts: Iterable[float] | float | None = None,
    batch_sizes: Iterable[int] | int | None = None,
    seeds: Iterable[int] = (0,),
    recipe: str | None = None,
    **others: Any,
) -> list[Config]:
    """List the configs of a parameter grid; without arguments, the coursework's eight.

    ``recipe``: one of ``RECIPES``, which supplies the values not given here.
    ``others``: any other fields of ``Config``. ``seeds`` is a list; all others take one value or a list of values:
    ``grid(lrs=0.01, seeds=range(3), num_blocks=[1, 2, 4])``. Raises ValueError, TypeError.
    """
    check_names("grid", others, [*_LISTS.values(), "recipe", *(_DEFAULTS.keys() - _LISTS.keys())])
    if isinstance(seeds, Real):
        raise ValueError(f"seeds is {seeds!r}, but it has to be a list of seeds: range({seeds!r}), or [{seeds!r}]")
    if recipe is not None and recipe not in list(RECIPES):
        raise ValueError(f"recipe is {recipe!r}, but it has to be one of {', '.join(RECIPES)}")
    lists = {"seed": seeds, "lr": LRS, "dropout_p": DROPOUTS, "batch_size": BATCH_SIZES}
    if recipe is not None:
        lists = {"seed": seeds} | {name: _DEFAULTS[name] for name in _LISTS if name != "seed"} | RECIPES[recipe]
    given = {"lr": lrs, "dropout_p": dropouts, "batch_size": batch_sizes}
    lists |= {name: values for name, values in given.items() if values is not None} | others
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Iterable) or (name, type(values)) == ("patch_size", tuple):
            lists[name] = [values]
    return [Config(**dict(zip(lists, values, strict=True))) for values in product(*lists.values())]


def _real(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    return float(value) + 0.0  # turns -0.0 into 0.0


def _whole(value: Any) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return operator.index(value)
    if int(_real(value)) != value:
        raise ValueError
    return int(value)


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, Real) else value
    return _whole(height), _whole(width)
