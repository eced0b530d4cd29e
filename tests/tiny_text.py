"""The smallest text encoders, of random weights, as directories in the form of the hub."""

import json
import pathlib

import numpy as np
import safetensors.numpy

DIM, HIDDEN, HEADS, HEAD_DIM, LAYERS, POSITIONS = 12, 20, 3, 4, 2, 64
WORDS = ("a", "red", "green", "blue", "apple", "car", "the", "big", "of", "in")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCAB = [*SPECIAL, *WORDS]
BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 2,
    "vocab_size": len(VOCAB),
}
T5 = {
    "model_type": "t5",
    "d_model": DIM,
    "d_ff": HIDDEN,
    "d_kv": 5,  # unlike T5 of the released sizes, but like its small one: heads are not D wide
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "num_heads": HEADS,
    "num_layers": LAYERS,
    "relative_attention_max_distance": 20,
    "relative_attention_num_buckets": 8,
    "vocab_size": len(VOCAB),
}


TOWER = {
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 7,
    "text_config": {
        **TOWER,
        "max_position_embeddings": 77,
        "vocab_size": len(VOCAB),
        "eos_token_id": VOCAB.index("[SEP]"),
    },
    "vision_config": {**TOWER, "hidden_act": "gelu", "image_size": 16, "patch_size": 8},
}


def bert_shapes():
    """Shape of every tensor that is read, by name."""
    norm = {"weight": (DIM,), "bias": (DIM,)}

    def dense(width, out):
        return {"weight": (out, width), "bias": (out,)}

    parts = {
        "embeddings.word_embeddings": {"weight": (len(VOCAB), DIM)},
        "embeddings.position_embeddings": {"weight": (POSITIONS, DIM)},
        "embeddings.token_type_embeddings": {"weight": (2, DIM)},
        "embeddings.LayerNorm": norm,
    }
    for layer in range(LAYERS):
        where = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            parts[f"{where}.attention.self.{name}"] = dense(DIM, DIM)
        parts[f"{where}.attention.output.dense"] = dense(DIM, DIM)
        parts[f"{where}.attention.output.LayerNorm"] = norm
        parts[f"{where}.intermediate.dense"] = dense(DIM, HIDDEN)
        parts[f"{where}.output.dense"] = dense(HIDDEN, DIM)
        parts[f"{where}.output.LayerNorm"] = norm
    return {f"{part}.{n}": shape for part, of in parts.items() for n, shape in of.items()}


def t5_shapes():
    """Likewise."""
    inner = HEADS * T5["d_kv"]
    shapes = {"shared": (len(VOCAB), DIM), "encoder.final_layer_norm": (DIM,)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    shapes[bias] = (T5["relative_attention_num_buckets"], HEADS)
    for layer in range(LAYERS):
        where = f"encoder.block.{layer}.layer"
        shapes |= {f"{where}.0.SelfAttention.{name}": (inner, DIM) for name in "qkv"}
        shapes[f"{where}.0.SelfAttention.o"] = (DIM, inner)
        shapes |= {f"{where}.{part}.layer_norm": (DIM,) for part in (0, 1)}
        shapes |= {f"{where}.1.DenseReluDense.wi_{n}": (HIDDEN, DIM) for n in (0, 1)}
        shapes[f"{where}.1.DenseReluDense.wo"] = (DIM, HIDDEN)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def clip_shapes():
    """Likewise."""
    norm, square = {"weight": (DIM,), "bias": (DIM,)}, {"weight": (DIM, DIM), "bias": (DIM,)}
    shapes = {
        "text_model.embeddings.token_embedding.weight": (len(VOCAB), DIM),
        "text_model.embeddings.position_embedding.weight": (77, DIM),
        "vision_model.embeddings.class_embedding": (DIM,),
        "vision_model.embeddings.patch_embedding.weight": (DIM, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (5, DIM),
        "text_projection.weight": (CLIP["projection_dim"], DIM),
        "visual_projection.weight": (CLIP["projection_dim"], DIM),
    }
    parts = {
        "text_model.final_layer_norm": norm,
        "vision_model.pre_layrnorm": norm,  # so it is written
        "vision_model.post_layernorm": norm,
    }
    for tower in ("text_model", "vision_model"):
        for layer in range(LAYERS):
            where = f"{tower}.encoder.layers.{layer}"
            parts |= {f"{where}.self_attn.{n}_proj": square for n in ("q", "k", "v", "out")}
            parts |= {f"{where}.layer_norm{number}": norm for number in (1, 2)}
            parts[f"{where}.mlp.fc1"] = {"weight": (HIDDEN, DIM), "bias": (HIDDEN,)}
            parts[f"{where}.mlp.fc2"] = {"weight": (DIM, HIDDEN), "bias": (DIM,)}
    return shapes | {f"{part}.{n}": shape for part, of in parts.items() for n, shape in of.items()}


def weights(shapes, seed=0):
    """Draw float32 arrays."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def save(directory: pathlib.Path, config=BERT, seed=0) -> pathlib.Path:
    """Write an encoder whose tokens are words, and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"bert": bert_shapes, "clip": clip_shapes, "t5": t5_shapes}[config["model_type"]]()
    safetensors.numpy.save_file(weights(shapes, seed), directory / "model.safetensors")
    tokenizer = {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 30},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", VOCAB.index("[SEP]")],
            "cls": ["[CLS]", VOCAB.index("[CLS]")],
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(VOCAB)},
            "unk_token": "[UNK]",
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory
