"""Official D-AR checkpoints: names, layouts and configs of the reference, and ours.

The tables follow the state dicts of the reference's `VQModel` (tokenizer) and `Transformer`
(prior); both directions come from the same table.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from absl import logging

from dar_jax.common.typing import Any, Params
from dar_jax.convert.rules import (
    POINTWISE,
    Rule,
    Transform,
    embedding,
    linear,
    norm,
    patch_conv,
    split,
    tensor,
    to_params,
    to_state_dict,
    under,
)
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import Llama, LlamaConfig, ffn_hidden_dim
from dar_jax.models.dar.tokenizer import ConditionConfig, Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.dar import PriorPipeline, TokenizerPipeline

TABLE_ROWS = 1024
"""The reference's query and position tables have this many rows whatever their use."""
QUERY_RANK = 8
HEAD_DIM = 64
ROPE_BASE = 10000
MULTIPLE_OF = 256
DEFAULT_FEATURE_LAYER = 8
"""The reference's default `repa_layer`; its head exists even where this is past the last block."""
HEAD = "diff_decoder.net.repa_out"
CODEBOOK_QUEUE = "quantize.codebook_used"
"""Recently used codes, a statistic of training."""
CODEBOOK_QUEUE_LENGTH = 65536
UNUSED_TOKENIZER_KEYS = (CODEBOOK_QUEUE,)
UNUSED_PRIOR_KEYS = ("freqs_cis", "layers.*.attention.kv_cache.*")


def tokenizer_from_reference(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    image_size: int | None = None,
    compute: Compute | None = None,
) -> TokenizerPipeline:
    """Build the tokenizer from the reference's state dict (arrays) and config.

    Args:
        state_dict: arrays under the reference's names.
        config: the reference's config, with or without its outer `model` key.
        image_size: default size to decode to; None takes the config's `sampling_resolution`.
        compute: execution choices.

    Raises:
        ValueError: keys or shapes that do not fit the config, or an unsupported config.
    """
    architecture = with_head_of(state_dict, tokenizer_config(config, image_size=image_size))
    model = FunctionalModel(Tokenizer, architecture, (compute or Compute()).of_decoding())
    params = tokenizer_params(state_dict, architecture)
    return TokenizerPipeline(model, params)


def prior_from_reference(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], *, compute: Compute | None = None
) -> PriorPipeline:
    """Build the prior from the reference's state dict (arrays) and `ModelArgs` dict.

    Raises:
        ValueError: keys or shapes that do not fit the config.
    """
    architecture = prior_config(config)
    model = FunctionalModel(Llama, architecture, compute or Compute())
    return PriorPipeline(model, prior_params(state_dict, architecture))


def tokenizer_params(state_dict: Mapping[str, Any], config: TokenizerConfig) -> Params:
    """Convert a tokenizer state dict; `quantize.codebook_used` (statistics) is not used."""
    like = FunctionalModel(Tokenizer, config).abstract_params()
    return to_params(tokenizer_rules(config), state_dict, like, ignored=UNUSED_TOKENIZER_KEYS)


def with_head_of(state_dict: Mapping[str, Any], config: TokenizerConfig) -> TokenizerConfig:
    """Leave the alignment head out of the config if a file lacks it: it is for training only."""
    if config.decoder.feature_layer is None or any(n.startswith(HEAD) for n in state_dict):
        return config
    logging.info(
        "The file lacks the alignment head, %s, which is for training only: the model is written "
        "with decoder.feature_layer=None",
        HEAD,
    )
    decoder = dataclasses.replace(config.decoder, feature_layer=None)
    return dataclasses.replace(config, decoder=decoder)


def prior_params(state_dict: Mapping[str, Any], config: LlamaConfig) -> Params:
    """Convert a prior state dict; rotary tables and left-over caches are not used."""
    like = FunctionalModel(Llama, config).abstract_params()
    return to_params(prior_rules(config), state_dict, like, ignored=UNUSED_PRIOR_KEYS)


def tokenizer_state_dict(params: Params, config: TokenizerConfig) -> dict[str, Any]:
    """Convert tokenizer parameters to a state dict that the reference loads strictly.

    Raises:
        ValueError: a size that the reference has fixed at another value.
    """
    fixed = {
        "max_tokens": (config.max_tokens, TABLE_ROWS),
        "encoder.head_dim": (config.encoder.head_dim, HEAD_DIM),
        "encoder.query_rank": (config.encoder.query_rank or QUERY_RANK, QUERY_RANK),
        "condition.head_dim": (config.condition.head_dim, HEAD_DIM),
        "decoder.head_dim": (config.decoder.head_dim, HEAD_DIM),
        "decoder.feature_dim": (config.decoder.feature_dim, FlowDecoderConfig.feature_dim),
        "decoder.feature_hidden_dim": (
            config.decoder.feature_hidden_dim,
            FlowDecoderConfig.feature_hidden_dim,
        ),
    }
    for name, (value, expected) in fixed.items():
        if value != expected:
            raise ValueError(f"the reference cannot hold {name}={value}, only {expected}")
    if config.decoder.feature_layer is None:
        raise ValueError("the reference cannot hold decoder.feature_layer=None: it has that head")
    state_dict = to_state_dict(tokenizer_rules(config), params)
    if not config.codebook_size:
        return state_dict
    return {**state_dict, CODEBOOK_QUEUE: np.zeros(CODEBOOK_QUEUE_LENGTH, np.float32)}


def prior_state_dict(params: Params, config: LlamaConfig) -> dict[str, Any]:
    """Convert prior parameters to a state dict that the reference loads strictly."""
    return to_state_dict(prior_rules(config), params)


def tokenizer_config(
    config: Mapping[str, Any], *, image_size: int | None = None
) -> TokenizerConfig:
    """Translate the reference's tokenizer config (`encoder_dim`, ...).

    Raises:
        ValueError: a missing key.
    """
    c = config.get("model", config)
    try:
        return TokenizerConfig(
            image_size=image_size or c.get("sampling_resolution", 256),
            output_size=c.get("output_resolution", 0),
            num_tokens=c["num_all_queries"],
            num_groups=c["num_query_groups"],
            tokens_per_step=c.get("queries_per_step"),
            num_steps=c["num_denoising_steps"],
            codebook_size=c["vq_codebook_size"] if c.get("vq_enable", True) else 0,
            code_dim=c["vq_dim"],
            max_tokens=TABLE_ROWS,
            encoder=EncoderConfig(
                patch_size=c["encoder_patch_size"],
                dim=c["encoder_dim"],
                depth=c["num_encoder_layers"],
                head_dim=HEAD_DIM,
                query_rank=QUERY_RANK if c.get("query_low_rank", True) else None,
                rope_base=float(c.get("rope_base_len", ROPE_BASE)),
            ),
            condition=ConditionConfig(
                dim=c["decoder_dim"], depth=c["num_decoder_layers"], head_dim=HEAD_DIM
            ),
            decoder=flow_decoder_config(c["diff_decoder"]),
        )
    except KeyError as error:
        raise ValueError(f"reference config lacks the key {error}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"reference config holds a value of another type ({error})") from error


def flow_decoder_config(config: Mapping[str, Any]) -> FlowDecoderConfig:
    """Translate the reference's `diff_decoder` block."""
    return FlowDecoderConfig(
        patch_size=config["patch_size"],
        dim=config["dim"],
        depth=config["depth"],
        head_dim=HEAD_DIM,
        data_std=float(config.get("data_std", 1.0)),
        time_shift=float(config.get("time_shift", 1.0)),
        rope_base=float(config.get("rope_base_len", ROPE_BASE)),
        shared_time=config.get("share_time_encoding", False),
        modulated_head=config.get("mlp_head", False),
        feature_layer=config.get("repa_layer", DEFAULT_FEATURE_LAYER),
    )


def prior_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Translate the reference's `ModelArgs`.

    Raises:
        ValueError: a missing key, or a value of another type.
    """
    try:
        is_text = config.get("model_type", "c2i") == "t2i"
        return LlamaConfig(
            num_layers=config["n_layer"],
            num_heads=config["n_head"],
            num_kv_heads=config.get("n_kv_head"),
            dim=config["dim"],
            ffn_dim=ffn_hidden_dim(
                config["dim"],
                config.get("multiple_of", MULTIPLE_OF),
                config.get("ffn_dim_multiplier"),
            ),
            vocab_size=config["vocab_size"],
            num_tokens=config["block_size"],
            num_classes=config["num_classes"],
            caption_dim=config["caption_dim"] if is_text else None,
            condition_tokens=config.get("cls_token_num", 1),
            norm_epsilon=float(config.get("norm_eps", 1e-5)),
            rope_base=float(config.get("rope_base", ROPE_BASE)),
            token_dropout=config.get("token_dropout_p", 0.1),
            residual_dropout=config.get("resid_dropout_p", 0.1),
            label_dropout=config.get("class_dropout_prob", 0.1),
        )
    except KeyError as error:
        raise ValueError(f"reference config lacks the key {error}") from error
    except TypeError as error:
        raise ValueError(f"reference config holds a value of another type ({error})") from error


ATTENTION = (
    *linear("q", "q"),
    *linear("k", "k"),
    *linear("v", "v"),
    *linear("proj", "out"),
    *norm("q_norm", "q_norm"),
    *norm("k_norm", "k_norm"),
)
MLP = (*linear("fc1", "up"), *linear("fc2", "down"))
TRANSFORMER_BLOCK = (
    *tensor("gate1", "gate1"),
    *tensor("gate2", "gate2"),
    *norm("norm1", "norm1"),
    *norm("norm2", "norm2"),
    *under("attention", "attention", ATTENTION),
    *under("mlp", "mlp", MLP),
)


def tokenizer_rules(config: TokenizerConfig) -> tuple[Rule, ...]:
    """Table of the tokenizer's tensors."""
    encoder, condition = config.encoder, config.condition
    rules = [
        *linear("patchify", "encoder/patch_embed", kernel=patch_conv(encoder.patch_size)),
        *tensor("query_embedding.weight", "encoder/query_table"),
        *under("encoder_layers.{i}", "encoder/stack/blocks", TRANSFORMER_BLOCK),
        *linear("quant_in_conv", "encoder/to_code", bias=False, kernel=POINTWISE),
        *linear("quant_out_conv", "condition_layers/from_code", bias=False, kernel=POINTWISE),
        *tensor("decoder_embedding.weight", "condition_layers/position_table"),
        *under("diff_decoder", "decoder", flow_decoder_rules(config.decoder)),
    ]
    if config.codebook_size:
        rules += tensor("quantize.embedding.weight", "quantizer/codebook")
    if encoder.query_rank:
        rules += linear("query_linear", "encoder/query_projection")
    if condition.depth:
        rules += under("decoder_layers.{i}", "condition_layers/stack/blocks", TRANSFORMER_BLOCK)
    return tuple(rules)


def flow_decoder_rules(config: FlowDecoderConfig) -> tuple[Rule, ...]:
    """Table of the flow decoder's tensors, whose reference names start with `net.`."""
    sequence = {"up": "0", "down": "2"}
    block = [
        *under("attention", "attention", ATTENTION),
        *under("cross_attn", "cross_attention", ATTENTION),
        *under("mlp", "mlp", MLP),
        *linear("adaLN_modulation.1", "modulation"),
        *_sequential("cond_embed", "condition_mlp", sequence),
    ]
    if not config.shared_time:
        block += _sequential("time_embed.mlp", "time_embed", sequence)
    rules = [
        *linear("cond_mlp", "condition_projection"),
        *linear("conv_in", "patch_embed", kernel=POINTWISE),
        *under("blocks.{i}", "stack/blocks", block),
    ]
    if config.shared_time:
        rules += _sequential("time_embed.mlp", "time_embed", sequence)
    if config.modulated_head:
        rules += linear("linear_out.linear", "head/out")
        rules += linear("linear_out.adaLN_modulation.1", "head/modulation")
    else:
        rules += linear("conv_out", "head", kernel=POINTWISE)
    if config.feature_layer is not None:
        layers = {"layer1": "0", "layer2": "2", "layer3": "4"}
        rules += _sequential("repa_out", "alignment_head", layers)
    return tuple(Rule(f"net.{rule.reference}", rule.ours, rule.transform) for rule in rules)


def prior_rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """Table of the prior's tensors."""
    kv_width = (config.num_kv_heads or config.num_heads) * config.head_dim
    qkv: Transform = split((config.dim, kv_width, kv_width))
    attention = "attention/{}/kernel"
    block = (
        Rule("attention.wqkv.weight", tuple(attention.format(n) for n in "qkv"), qkv),
        *linear("attention.wo", "attention/out", bias=False),
        *linear("feed_forward.w1", "ffn/gate", bias=False),
        *linear("feed_forward.w3", "ffn/up", bias=False),
        *linear("feed_forward.w2", "ffn/down", bias=False),
        *norm("attention_norm", "attention_norm", bias=False),
        *norm("ffn_norm", "ffn_norm", bias=False),
    )
    if config.caption_dim is None:
        condition = embedding("cls_embedding.embedding_table", "condition_embed")
    else:
        condition = (
            *linear("cls_embedding.cap_proj.fc1", "condition_embed/hidden", bias=False),
            *linear("cls_embedding.cap_proj.fc2", "condition_embed/out", bias=False),
            *tensor("cls_embedding.uncond_embedding", "condition_embed/null_caption"),
        )
    return (
        *condition,
        *embedding("tok_embeddings", "token_embed"),
        *under("layers.{i}", "stack/blocks", block),
        *norm("norm", "norm", bias=False),
        *linear("output", "output", bias=False),
    )


def _sequential(reference: str, ours: str, members: Mapping[str, str]) -> tuple[Rule, ...]:
    """Linear layers of a `torch.nn.Sequential`: our member name -> position."""
    return tuple(
        rule
        for name, position in members.items()
        for rule in linear(f"{reference}.{position}", f"{ours}/{name}")
    )
