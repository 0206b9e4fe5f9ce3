"""
What a method is: the settings that it reads and fixes, and how it makes a model and an optimizer.

    @register("fira", "GaLore, and the residual of the gradient", fixes=FLOATS)
    class Fira(WholeGradient): ...

registers a method that moves each projected weight as that class does. Methods that train something
else are subclasses of Method. Every file in this folder is looked at, and nothing else lists them.
"""

import importlib
import os
import pkgutil
from dataclasses import fields
from functools import partial

from methods.after_backward import AdamW
from model import LLaMA, LLaMAConfig, QEmbedding, QLinear
from qgalore import QGaLore
from run import foreign

METHODS = {}  # by name, see find()

# settings that methods of projected weights read
SUBSPACE = ("rank", "proj_gap", "gap_growth", "proj_threshold", "proj_k", "proj_bits", "proj_side",
            "proj_svd", "galore_scale", "moments", "accumulation", "stochastic_rounding", "matmul")
# GaLore's own: float bases and moments, and a threshold that is never met, so that gaps stay fixed
FLOATS = {"proj_bits": 16, "proj_threshold": 2.0, "moments": "float32"}


class Method:
    """name: of --method. about: one line. weight_bits: those that it can train, the default first.

    reads: settings that not every method reads. fixes: {setting: value} that make it what it is;
    a user who sets one to another value, or a setting that only others read, is told so."""

    linear = QLinear  # of the blocks' matrices
    in_weights = ()  # settings that are a part of the weights: a resume cannot change them
    fragments = 0.75  # bytes lost in the heap for each of activations, on a CPU (docs/memory.md)

    def __init__(self, name, about, weight_bits=(8, 16), reads=(), fixes=None):
        self.name = name
        self.about = about
        self.weight_bits = weight_bits
        self.fixes = fixes or {}
        unread = set(self.fixes)
        if "proj_threshold" in self.fixes:  # never met: no mean of proj_k similarities is taken
            unread.add("proj_k")
        self.reads = [setting for setting in reads if setting not in unread]
        if name in METHODS:
            raise ValueError(f"there is a method {name!r} already")
        METHODS[name] = self  # this is all the registration

    def settle(self, s):
        """Put the method's own settings into s. Exits with one line if the user's do not fit it."""
        # what the user asked for, and this method cannot do
        for setting, where in s.given.items():
            if setting in self.fixes and getattr(s, setting) != self.fixes[setting]:
                raise SystemExit(
                    f"error: {where}: method {self.name} has {setting} = {self.fixes[setting]!r}, "
                    f"always{self._others(setting)}"
                )
            # settings that no method lists, such as batch_size, are for all
            of_methods = any(setting in other.reads for other in METHODS.values())
            if of_methods and setting not in (*self.reads, *self.fixes):
                raise SystemExit(
                    f"error: {where}: method {self.name} does not read {setting}"
                    f"{self._others(setting)}"
                )
        # what the method makes of the rest
        for setting, value in self.fixes.items():
            setattr(s, setting, value)
        if s.weight_bits == 0:
            s.weight_bits = self.weight_bits[0]
        if s.weight_bits not in self.weight_bits:
            known = " or ".join(map(str, self.weight_bits))
            raise SystemExit(f"error: weight_bits={s.weight_bits}: {self.name} has {known}")
        if s.by_block and "accumulation" not in s.given:  # one block's sums exist at a time
            s.accumulation = "bfloat16"
        by_row = s.weight_bits == 8 and s.weight_group_size == 0  # a recipe's int8 is for such
        if s.matmul == "int8" and not by_row and "matmul" not in s.given:
            s.matmul = "float"
        if s.embed_bits == 8 and self.trains_embedding(s):
            raise SystemExit(
                "error: embed_bits=8: an INT8 embedding is not trained; set freeze_embedding=True"
            )
        if s.learning_rate * s.weight_decay > 1:
            raise SystemExit(
                f"error: weight_decay={s.weight_decay:g}, at learning_rate={s.learning_rate:g}: a "
                "step would take more than the whole weight; their product is at most 1"
            )
        if s.min_lr > s.learning_rate:
            raise SystemExit(
                f"error: min_lr={s.min_lr:g} is above learning_rate={s.learning_rate:g}: set it to "
                "that at most, or to -1, a tenth of it"
            )
        if s.batch_size * s.block_size > 2**32:
            raise SystemExit(
                f"error: batch_size={s.batch_size} of block_size={s.block_size} tokens: a "
                f"micro-batch has at most {2**32}; lower one of them"
            )
        s.n_kv_head = s.n_kv_head or s.n_head
        return s

    def _others(self, setting):
        readers = [other.name for other in METHODS.values() if setting in other.reads]
        return f"; {', '.join(readers)} read it" if readers else ""

    def trains_embedding(self, s):
        return not s.freeze_embedding

    def check_model(self, s):
        """Exit with one line if the method cannot train the model that a run starts from."""

    def build(self, s, device, dtype, ranks=None, fill=None):
        """(model, optimizer) of settled settings. Raises ValueError for shapes that do not fit."""
        model = self.build_model(s, device, dtype, fill)
        return model, self.build_optimizer(model, s, ranks)

    def build_model(self, s, device, dtype, fill=None):
        """The model. dtype: of weights that are not quantised.

        fill: fills a model that is built on "meta", fill(model, device=, dtype=)."""
        config = shape(s)
        # its matrices
        linear = self.linear
        if linear is QLinear:
            linear = partial(QLinear, bits=s.weight_bits, group_size=s.weight_group_size,
                             matmul=s.matmul)
        embedding = None
        if s.embed_bits == 8:
            embedding = partial(QEmbedding, group_size=s.weight_group_size)
        # built, or filled tensor by tensor: no float copy of the whole exists
        first_device = "meta" if fill else device
        model = LLaMA(config, linear, first_device, dtype, embedding)
        if config.low_rank:
            foreign.checkpoints().put_low_rank(model, config.low_rank, dtype, first_device)
        if fill:
            fill(model, device=device, dtype=dtype)
        # what stays as it is
        if not self.trains_embedding(s):
            model.embed.requires_grad_(False)
            model.head.requires_grad_(False)
        self.adapt(model, s, device, dtype)
        return model

    def adapt(self, model, s, device, dtype):
        """What the method changes in a new model."""

    def build_optimizer(self, model, s, ranks=None):
        """torch's AdamW on all that requires grad."""
        betas = (s.beta1, s.beta2)
        return AdamW(model, s.learning_rate, betas, s.adam_eps, s.weight_decay, s.grad_clip, ranks)

    def rate(self, s, it):
        """What the schedule's rate is multiplied by after the warm-up."""
        return 1.0

    def before_step(self, model, optimizer, s, it):
        """Called before each step."""


class InBackward(Method):
    """A method whose weights step inside backward, by QGaLore; projected ones as `weight` does."""

    weight = None

    def build_optimizer(self, model, s, ranks=None):
        # without projected weights, QGaLore's default is never used
        chosen = {} if self.weight is None else {"weight": self.weight}
        return QGaLore(
            model,
            lr=s.learning_rate,
            betas=(s.beta1, s.beta2),
            eps=s.adam_eps,
            weight_decay=s.weight_decay,
            rank=s.rank,
            gap=s.proj_gap,
            gap_growth=s.gap_growth,
            threshold=s.proj_threshold,
            k=s.proj_k,
            scale=s.galore_scale,
            side=s.proj_side,
            svd=s.proj_svd,
            proj_bits=s.proj_bits,
            moments=s.moments,
            accumulation=s.accumulation,
            stochastic_rounding=s.stochastic_rounding,
            grad_clip=s.grad_clip,
            seed=s.seed,
            ranks=ranks,
            **chosen,
        )


def shape(s):
    """The LLaMAConfig of settings. Raises ValueError for sizes that do not fit each other."""
    known = {field.name for field in fields(LLaMAConfig)}
    return LLaMAConfig(**{k: v for k, v in s.as_dict().items() if k in known})


def register(name, about, weight_bits=(8, 16), reads=SUBSPACE, fixes=None, kind=InBackward):
    """Decorate a subclass of ProjectedWeight: it is then the method `name`. Arguments: Method."""

    def decorate(weight):
        kind(name, about, weight_bits, reads, fixes).weight = weight
        return weight

    return decorate


def find(name):
    """The Method of that name. Exits with one line if there is none."""
    for file in pkgutil.iter_modules([os.path.dirname(__file__)]):
        importlib.import_module(f"{__package__}.{file.name}")
    if name not in METHODS:
        raise SystemExit(f"error: method {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name]
