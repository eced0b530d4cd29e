"""How D-AR draws images: the options of the flow decoder, and those of tokens on top.

This is where they are documented and checked. The defaults draw as the models were trained to, with
no guidance; recipes set what makes good images.
"""

import dataclasses
import numbers
import os
from collections.abc import Sequence

import numpy as np

from dar_jax.common.checks import Numbers, check_number, read_numbers
from dar_jax.common.typing import Any, Float
from dar_jax.flow import solvers
from dar_jax.flow.times import check_num_steps
from dar_jax.models.dar.draft import open_draft
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.nn.target import traced_devices
from dar_jax.sampling.logits import SamplingConfig, guidance_schedule
from dar_jax.sampling.search import Search

Positions = tuple[int, ...] | Sequence[int] | int | None
"""Likewise; a number k stands for (0, k + 1), as the reference counts."""
AUTO = -1
AUTO_WINDOW, AUTO_BATCH_SIZE = 8, 4
"""A batch takes as many calls as its slowest image, and few are left to save beyond. On CPUs a call
takes longer with every token that it draws, and there is nothing to gain."""


@dataclasses.dataclass(frozen=True)
class FlowSampling:
    """How an image is drawn from given tokens.

    Attributes:
        solver: of the flow decoder: "adams_bashforth2" or "euler".
        num_steps: denoising steps; 0 takes the tokenizer's own number.
    """

    solver: str = "adams_bashforth2"
    num_steps: int = 0

    def __post_init__(self):
        solvers.coefficients(self.solver, num_steps=1)
        check_num_steps(self.num_steps, least=0)

    def steps(self, config: TokenizerConfig) -> int:
        """Number of denoising steps with this tokenizer."""
        return self.num_steps or config.num_steps

    def check(self, config: TokenizerConfig) -> None:
        """Raise ValueError unless these options suit the architecture; all of them do."""


@dataclasses.dataclass(frozen=True)
class DarSampling(FlowSampling):
    """How tokens are drawn for a class label, and the image from them.

    Attributes:
        guidance_scale: one scale for all tokens, or the first and last of a ramp; 1 is no guidance.
        guidance_schedule: of that ramp over the tokens: "linear" or "cosine".
        guidance_interval: first and last token that is guided; empty guides all.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this total probability; 1 keeps all.
        lookahead: tokens of a call of the prior, of which all but one are guessed ahead: the same
            tokens in fewer calls, but for ties, which products of another shape round the other
            way: in float32 one digit of 4,000, in bfloat16 with guidance up to a third. Pays for
            few images at a time. 0 is off, -1 chooses by the device and the batch size.
        draft: model directory of a smaller prior over the tokens of the same tokenizer, that
            guesses for look-ahead; empty: the tokens that the call before has drawn there. It may
            be a distilled one. What is drawn does not depend on it.
        search: draw several candidates and keep the best, e.g. `dar_jax.Search("groups", num=2)`.
    """

    guidance_scale: Numbers = (1.0,)
    guidance_schedule: str = "linear"
    guidance_interval: Positions = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    lookahead: int = 0
    draft: str | os.PathLike = ""
    search: Search = Search()

    def __post_init__(self):
        super().__post_init__()
        scales = read_numbers("guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", scales)
        for name in ("top_k", "lookahead"):
            check_number(name, getattr(self, name), numbers.Integral)
        if self.lookahead < AUTO or self.lookahead == 1:
            raise ValueError(
                f"lookahead={self.lookahead} must be at least 2 (0 is off, -1 chooses by the "
                "device and the batch size)"
            )
        if not isinstance(self.draft, str | os.PathLike):
            raise ValueError(f"draft={self.draft!r} must be the path of a model directory")
        object.__setattr__(self, "draft", str(self.draft))
        if self.draft and not self.lookahead:
            raise ValueError(
                f"draft={self.draft!r} guesses for look-ahead, which is off: set lookahead, e.g. "
                "to 4, or leave draft empty"
            )
        for name in ("temperature", "top_p"):
            check_number(name, getattr(self, name))
        object.__setattr__(self, "guidance_interval", _positions(self.guidance_interval))
        SamplingConfig(self.temperature, self.top_k, self.top_p)

    @property
    def tokens(self) -> SamplingConfig:
        """How a token is drawn from guided logits."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p)

    def window(self, batch_size: int) -> int:
        """Tokens that a call draws of each image; 0 is no look-ahead."""
        if self.lookahead == AUTO:
            pays = batch_size <= AUTO_BATCH_SIZE and traced_devices()[0].platform != "cpu"
            return AUTO_WINDOW if pays else 0
        return self.lookahead

    def scales(self, num_tokens: int) -> Float[np.ndarray, " N"]:
        """Guidance scale of every token.

        Raises:
            ValueError: see `sampling.logits.guidance_schedule`.
        """
        interval = None if self.guidance_interval == () else self.guidance_interval
        return guidance_schedule(
            self.guidance_scale, num_tokens, schedule=self.guidance_schedule, interval=interval
        )

    def check(self, config: LlamaConfig) -> None:
        """Raise ValueError unless these options suit a prior of this architecture."""
        models = {"the model": config}
        if self.draft:
            models[f"draft={self.draft!r}"] = open_draft(str(self.draft), config).config
        largest = self.scales(config.num_tokens).max()
        for name, each in models.items():
            if 0 < each.max_guidance < largest:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale} must be at most {each.max_guidance:g}, "
                    f"up to which {name} was distilled"
                )
        if not self.search.method:
            return
        self.search.check_file()
        if self.temperature == 0:
            raise ValueError("temperature=0 draws equal candidates: search needs a higher one")
        if self.search.reward == "classifier" and config.caption_dim is not None:
            raise ValueError("search.reward='classifier' needs classes, not captions")


def check_pair(prior: LlamaConfig, tokenizer: TokenizerConfig, where: str) -> None:
    """Raise ValueError unless the prior fits the tokens of the tokenizer at `where`."""
    for ours, theirs in (("vocab_size", "codebook_size"), ("num_tokens", "num_tokens")):
        value, expected = getattr(prior, ours), getattr(tokenizer, theirs)
        if value != expected:
            raise ValueError(
                f"config.model.{ours}={value}, but the tokenizer in {where} has {theirs}={expected}"
            )


def _positions(interval: Any) -> tuple[int, ...] | int:
    """Return positions as whole numbers of Python.

    Raises:
        ValueError: they are something else.
    """
    if interval is None:
        return ()
    found = np.asarray(interval)
    if found.ndim > 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"guidance_interval={interval!r} must be an integer, or two")
    return tuple(found.tolist()) if found.ndim else int(found)
