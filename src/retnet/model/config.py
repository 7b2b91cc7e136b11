"""`ModelConfig`: a language model's configuration as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from retnet.mixers import MixerConfig, RetentionConfig
from retnet.settings import At, Checked, Count, UserError, nearest

FFN = Literal["gelu", "geglu", "swiglu"]
Summand = Annotated[float, At(least=0)]  # the factor of one
Residual = tuple[float, float]  # α and β of a residual sum


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A language model: embedding, `num_layers` blocks of mixer and FFN, norm, head (paper §3). No layer has a bias.

    All layers have `mixer` and `ffn`, unless patterns say otherwise, which are repeated from the first layer to the last:
    ``layers = ["retention", "retention", "retention", "softmax"]`` makes every fourth layer softmax. A name there is that of
    `mixer`, or one of `mixers`, where settings of the others stand, or that of a mixer with its default settings.
    """

    vocab_size: Count | None = None  # None: that of the tokenizer it is trained with
    d_model: Count = 256
    num_layers: Annotated[int, At(least=1, most=10_000)] = 6
    mixer: MixerConfig = field(default_factory=RetentionConfig)
    layers: tuple[str, ...] | None = None  # mixers by layer, repeated; None: `mixer` in all
    # settings of the others that `layers` names
    mixers: dict[str, MixerConfig] | None = field(default=None, hash=False)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, At(least=0, most=1)] = 1e-5
    ffn: FFN = "gelu"
    ffn_layers: tuple[FFN, ...] | None = None  # kinds of FFN by layer, repeated; None: `ffn` in all
    ffn_dim: Count | None = None  # 2 · d_model
    ffn_dims: tuple[Count, ...] | None = None  # widths of FFNs by layer, repeated; None: `ffn_dim` in all
    tie_embeddings: bool = True
    embedding_scale: bool = False  # embeddings × √d_model
    embedding_norm: bool = False
    # x becomes α·x + β·f(norm(x)), or α·norm(x) + β·f(norm(x)), by every mixer and every FFN; a list has numbers of mixers
    # and FFNs in turn, repeated
    residual: Literal["input", "norm"] = "input"
    residual_alpha: Summand | tuple[Summand, ...] = 1.0
    residual_beta: Summand | tuple[Summand, ...] = 1.0
    dropout: Annotated[float, At(least=0, below=1)] = 0.0
    init: Literal["deepnet", "normal"] = "deepnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "ffn_layers", "ffn_dims"):
            pattern = getattr(self, name)
            if pattern is not None and not 0 < len(pattern) <= self.num_layers:
                raise UserError(
                    f"{name} has {len(pattern)} entries for {self.num_layers} layers; allowed: 1 to num_layers, repeated"
                )
        for name in ("residual_alpha", "residual_beta"):
            factors = getattr(self, name)
            if isinstance(factors, tuple) and (
                len(factors) % 2 or not 0 < len(factors) <= 2 * self.num_layers
            ):
                raise UserError(
                    f"{name} lists {len(factors)} numbers for {self.num_layers} layers; give one for all, or two for each "
                    "layer, of its mixer and its FFN, repeated"
                )
        named, others = self.layers or (self.mixer.name,), self.mixers or {}
        known = {self.mixer.name, *others, *MixerConfig.options()}
        for name in named:
            if name not in known:
                raise UserError(f"unknown mixer {name!r} in layers; {nearest(name, sorted(known))}")
        if self.mixer.name in others:
            raise UserError(
                f"mixers.{self.mixer.name} has the name of mixer, whose settings stand there; rename it"
            )
        if self.mixer.name not in named:
            raise UserError(
                f"layers names no {self.mixer.name!r}, which is mixer.name; make mixer one of those in layers"
            )
        if unused := [name for name in others if name not in named]:
            raise UserError(f"mixers.{unused[0]} is not in layers; take it out, or name it there")
        _ = self.mixers_by_layer  # which may not fit so many layers

    @property
    def mixers_by_layer(self) -> tuple[MixerConfig, ...]:
        """The configuration of each layer's mixer, from the first layer to the last, as it is there."""
        return tuple(
            kind.of_layer(layer, self.num_layers) for layer, kind in enumerate(self.mixer_kinds_by_layer)
        )

    @property
    def mixer_kinds_by_layer(self) -> tuple[MixerConfig, ...]:
        """The same as it stands in the configuration: what depends on the depth is not worked out."""
        settings = {self.mixer.name: self.mixer, **(self.mixers or {})}
        pattern = [
            settings.get(name) or MixerConfig.options()[name]() for name in self.layers or (self.mixer.name,)
        ]
        return tuple(pattern[number % len(pattern)] for number in range(self.num_layers))

    @property
    def ffns_by_layer(self) -> tuple[tuple[FFN, int], ...]:
        """Kind and width of each layer's FFN, from the first layer to the last."""
        kinds, widths = self.ffn_layers or (self.ffn,), self.ffn_dims or (self.ffn_dim or 2 * self.d_model,)
        return tuple((kinds[n % len(kinds)], widths[n % len(widths)]) for n in range(self.num_layers))

    @property
    def residuals_by_layer(self) -> tuple[tuple[Residual, Residual], ...]:
        """α and β of each layer's mixer and of its FFN, from the first layer to the last."""
        lists = [x if isinstance(x, tuple) else (x,) for x in (self.residual_alpha, self.residual_beta)]
        alphas, betas = ([x[n % len(x)] for n in range(2 * self.num_layers)] for x in lists)
        sums = list(zip(alphas, betas, strict=True))
        return tuple(zip(sums[::2], sums[1::2], strict=True))

    def of_layer(self, layer: int) -> ModelConfig:
        """The configuration of a model that has only this layer."""
        ffn, width = self.ffns_by_layer[layer]
        alphas, betas = zip(*self.residuals_by_layer[layer], strict=True)
        return replace(
            self,
            num_layers=1,
            mixer=self.mixers_by_layer[layer],
            layers=None,
            mixers=None,
            ffn=ffn,
            ffn_layers=None,
            ffn_dim=width,
            ffn_dims=None,
            residual_alpha=alphas,
            residual_beta=betas,
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are alike: `mixer`, `ffn` and `ffn_dim` say all about them, but for residual sums."""
        alike = {(self.mixer, (self.ffn, self.ffn_dim or 2 * self.d_model))}
        return (
            set(zip(self.mixer_kinds_by_layer, self.ffns_by_layer, strict=True)) == alike
            and len(set(self.residuals_by_layer)) == 1
        )

    @property
    def has_states(self) -> bool:
        """Whether states can carry the model: False with torchscale's score norm, a sum over whole sequences."""
        return all(getattr(kind, "score_norm", None) != "torchscale" for kind in self.mixers_by_layer)
