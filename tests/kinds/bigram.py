"""A fifth kind in one file: each token from the one before it and the class, by two layers.

It is what `dar_jax/README.md` says a new family needs, written down as a test uses it.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from flax import nnx

from dar_jax.common import image as images
from dar_jax.common.flops import flops
from dar_jax.common.keys import image_keys
from dar_jax.kinds.base import Kind
from dar_jax.kinds.dar_tokenizer import DarTokenizer
from dar_jax.losses.cross_entropy import token_cross_entropy
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.runs import Part, Runs, Work
from dar_jax.pipelines.base import ModelPipeline, Pipeline
from dar_jax.pipelines.dar import Generated
from dar_jax.tasks.base import ModelTask, picture_batch

TOKENIZER = "tokenizer"
REFERENCE_NAMES = {"labels.weight": "labels", "tokens.weight": "tokens", "head.weight": "head"}


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    """Architecture; the label `num_classes` is the null class, the token `vocab_size` the first."""

    num_tokens: int = 32
    vocab_size: int = 256
    num_classes: int = 10
    dim: int = 16


@dataclasses.dataclass(frozen=True)
class BigramSampling:
    """How tokens are drawn."""

    guidance_scale: tuple[float, ...] = (1.0,)
    temperature: float = 1.0

    def check(self, config: BigramConfig) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")


class Bigram(nnx.Module):
    """Embeddings of the class and of the last token, and an output layer."""

    def __init__(self, config: BigramConfig, *, rngs: nnx.Rngs, compute: Compute):
        def table(rows: int) -> nnx.Param:
            return nnx.Param(0.1 * jax.random.normal(rngs.params(), (rows, config.dim)))

        self.labels, self.tokens = table(config.num_classes + 1), table(config.vocab_size + 1)
        self.head = table(config.vocab_size)

    def hidden(self, labels, previous):
        """[B], [B, n] to [B, n, D]."""
        return jax.nn.gelu(self.labels[labels][:, None] + self.tokens[previous])

    def logits(self, hidden):
        return hidden @ self.head[...].T


class BigramTask(ModelTask):
    """Next-token prediction over the codes of a frozen tokenizer."""

    def __init__(self, config, tokenizer, compute):
        self.model = FunctionalModel(Bigram, config, compute)
        self.tokenizer = tokenizer

    def frozen(self):
        return {TOKENIZER: self.tokenizer.params}

    def abstract_frozen(self):
        return {TOKENIZER: self.tokenizer.model.abstract_params()}

    def abstract_batch(self, batch_size):
        return picture_batch(batch_size, self.tokenizer.model.config.image_size)

    def loss(self, params, batch, rng, frozen):
        image = images.to_float(batch["pixels"])
        indices = self.tokenizer.model.bind(frozen[TOKENIZER]).encode(image).indices
        bigram, config = self.model.bind(params), self.model.config
        previous = jnp.pad(indices[:, :-1], ((0, 0), (1, 0)), constant_values=config.vocab_size)
        hidden = bigram.hidden(batch["label"], previous)
        result = token_cross_entropy(bigram.logits, hidden, indices, num_chunks=1)
        return result.loss, {"token_accuracy": result.accuracy}

    def metrics(self):
        return {"token_accuracy": metrics.Average.from_output("token_accuracy")}

    def pictures(self, params, batch, rng, frozen):
        return {}


class BigramPreview(NamedTuple):
    step: int
    images: jax.Array
    indices: jax.Array


class BigramPipeline(Pipeline):
    """Labels to tokens, and through the tokenizer to images."""

    sampling_class = BigramSampling
    generated_class = Generated

    def __init__(self, prior, tokenizer, *, class_names=()):
        super().__init__(prior, class_names)
        self.tokenizer = tokenizer

    @property
    def autoencoder(self):
        return self.tokenizer

    @property
    def image_size(self):
        return self.tokenizer.config.image_size

    def stream(
        self,
        labels,
        *,
        rng,
        sampling=None,
        first_index=0,
        previews=True,
        microbatch=None,
        **options,
    ):
        sampling = dataclasses.replace(sampling or BigramSampling(), **options)
        labels = self.prior.put(np.asarray(labels, np.int32))
        rngs = self.prior.put(image_keys(rng, len(labels), first_index))
        scale = sampling.guidance_scale[0]
        indices = draw(
            self.prior.model, self.prior.params, labels, rngs, scale, sampling.temperature
        )
        decoded = self.tokenizer.decode(indices, rng=rng, microbatch=microbatch)
        yield BigramPreview(1, jnp.clip(decoded, -1, 1), indices)


@functools.partial(jax.jit, static_argnames="model")
def draw(model, params, labels, rngs, scale, temperature):
    """Draw all tokens, one after the other: [B, N]."""
    bigram, config = model.bind(params), model.config
    null = jnp.full_like(labels, config.num_classes)

    def step(previous, position):
        conditional, other = (
            bigram.logits(bigram.hidden(each, previous[:, None]))[:, 0] for each in (labels, null)
        )
        guided = (other + scale * (conditional - other)) / temperature
        keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, position)
        tokens = jax.vmap(jax.random.categorical)(keys, guided).astype(jnp.int32)
        return tokens, tokens

    first = jnp.full_like(labels, config.vocab_size)
    _, tokens = jax.lax.scan(step, first, jnp.arange(config.num_tokens))
    return tokens.T


class BigramRuns(Runs):
    """What is timed: labels to tokens."""

    def tokens(self, scale):
        model, rows = self.pipeline.prior.model, jax.ShapeDtypeStruct((1,), jnp.int32)
        rngs = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        one = flops(draw, model, model.abstract_params(), rows, rngs, scale, 1.0)
        return Work(self.batch_size * one)

    def parts(self, scale):
        if scale is None:
            return ()
        prior, labels = self.pipeline.prior, self.pipeline.prior.put(self.labels)
        rngs = image_keys(jax.random.key(0), self.batch_size)
        run = functools.partial(draw, prior.model, prior.params, labels, rngs, scale, 1.0)
        return (Part("tokens", run, [self.tokens(scale)], lambda seconds: {}),)

    def first_preview(self, scale):
        return (self.tokens(scale),)

    def cache_bytes(self, scale):
        return 0


class BigramKind(Kind[BigramConfig]):
    """The entry."""

    name = "bigram"
    noun = "a bigram model"
    module = Bigram
    architecture = BigramConfig
    pipeline = BigramPipeline
    companions: ClassVar = {TOKENIZER: DarTokenizer.name}
    runs = BigramRuns

    def task(self, model, loss, *, compute, data, companions):
        return BigramTask(model, companions[TOKENIZER], compute)

    def make_pipeline(self, model, params, *, companions, class_names=(), mesh=None):
        prior = ModelPipeline(model, params, mesh=mesh)
        return BigramPipeline(prior, companions[TOKENIZER], class_names=class_names)

    def from_reference(self, checkpoint, model):
        params = {ours: checkpoint.state_dict[name] for name, ours in REFERENCE_NAMES.items()}
        return model, params, ()

    def to_reference(self, params, model):
        return {name: params[ours] for name, ours in REFERENCE_NAMES.items()}
