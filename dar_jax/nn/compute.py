"""How a model is computed, as opposed to what it is: none of this changes its parameters."""

import dataclasses

import jax.numpy as jnp

DTYPES = ("float32", "bfloat16")
RESIDUAL_DTYPES = ("float32", "compute")
REMAT_POLICIES = ("none", "blocks", "dots", "auto")
ATTENTIONS = ("auto", "xla", "cudnn", "splash")
DECODINGS = ("xla", "pallas")
DECODE_STORES = ("compute", "int8")


@dataclasses.dataclass(frozen=True)
class Compute:
    """Execution choices of every model.

    Attributes:
        dtype: of matrix multiplications and activations; parameters stay float32, and norms,
            softmax, losses and the flow state are float32 in any case.
        decode_dtype: the same of a tokenizer or autoencoder that is not being trained, where it
            makes images: float32, as published figures do, or bfloat16, which is faster. Codes and
            latents of images are in float32 in any case: see `FunctionalModel.in_float32`.
        residual_dtype: of the residual stream of transformers: `float32`, as the references' is
            under autocast, or that of `compute`, which keeps half the bytes and rounds after every
            branch, so that errors of gradients grow with the depth. The stream of D-AR's flow
            decoder has the compute dtype in any case, as in the reference.
        remat: what the backward pass recomputes: `none`, whole `blocks`, or all but `dots`
            (matrix products are kept, and what the kernels of attention give). With `auto`,
            training compiles its step to find the least recomputation that fits into memory; on
            GPUs that is `none` with `unroll` at best. A policy by name compiles faster.
        attention: what computes it, see `nn.fused_attention`: `auto` by device, dtype, length and
            mask; `xla` with all weights in memory; `cudnn` or `splash` wherever these kernels can,
            which is never in float32 or where weights are dropped out.
        decoding: what runs a prior's blocks while it draws tokens: `xla`, or `pallas`, kernels for
            one NVIDIA GPU in bfloat16, see `nn.decode_kernels`; not for captions, and not yet timed
            on a card.
        decode_weights: what D-AR's prior reads its matrices in while it draws tokens: the `compute`
            dtype, or `int8` with a scale for every output, half the bytes of bfloat16. See
            `nn.int8`; likelihoods are not touched.
        decode_cache: the same of keys and values, with a scale for each of a token and head; on
            TPUs, of the heads that share a row.
        loss_chunks: pieces of the sequence whose logits are computed one after the other, so that
            they are never all in memory; 1 is all at once. See `losses.cross_entropy`; distilling
            and rewards compare all logits, whatever this says.
        unroll: unroll the scan over repeated blocks: compiles several times as long. Small models
            run faster, and so does training on GPUs (`performance/README.md`), where `remat=auto`
            may choose it.
        cache: directory that keeps compiled programs from run to run; empty takes the user's cache
            folder, "off" keeps none. See `common.compiled`.
        stacked: hold the repeated blocks as one block with a leading layer axis. Decoding wants
            them apart, see `stack.unstack`.
    """

    dtype: str = "float32"
    decode_dtype: str = "float32"
    residual_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    decoding: str = "xla"
    decode_weights: str = "compute"
    decode_cache: str = "compute"
    loss_chunks: int = 1
    unroll: bool = False
    cache: str = ""
    stacked: bool = True

    def __post_init__(self):
        for name in ("dtype", "decode_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} must be one of {', '.join(DTYPES)}"
                )
        if self.residual_dtype not in RESIDUAL_DTYPES:
            raise ValueError(
                f"residual_dtype {self.residual_dtype!r} must be one of "
                f"{', '.join(RESIDUAL_DTYPES)}"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} must be one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention {self.attention!r} must be one of {', '.join(ATTENTIONS)}")
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding {self.decoding!r} must be one of {', '.join(DECODINGS)}")
        for name, store in self.quantized.items():
            if store not in DECODE_STORES:
                raise ValueError(f"{name} {store!r} must be one of {', '.join(DECODE_STORES)}")
            if self.decoding == "pallas":
                raise ValueError(
                    f"{name}={store!r} needs decoding='xla': the kernels of 'pallas' read bfloat16"
                )
        if self.loss_chunks < 1:
            raise ValueError(f"loss_chunks {self.loss_chunks} is not positive; 1 is all at once")

    def of_decoding(self) -> "Compute":
        """Choices for a tokenizer or autoencoder that is not being trained."""
        return dataclasses.replace(self, dtype=self.decode_dtype)

    @property
    def quantized(self) -> dict[str, str]:
        """What drawing tokens reads in another form than the compute dtype's, by option."""
        stores = {name: getattr(self, name) for name in ("decode_weights", "decode_cache")}
        return {name: store for name, store in stores.items() if store != "compute"}

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def residual_jnp_dtype(self) -> jnp.dtype:
        return self.jnp_dtype if self.residual_dtype == "compute" else jnp.dtype(jnp.float32)
