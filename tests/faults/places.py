"""Workdirs of every kind, as small as they can be, and the commands that use them.

A place is prepared once, by the commands that users type; each of its files can then be damaged,
and its command be run.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from configs import mnist
from dar_jax.config import build
from dar_jax.data.sources import load_source
from dar_jax.modes import cache, evaluate, sample, train
from tests import tiny_model, tiny_text, tiny_transdiff
from tests.data import tiny_sets
from tests.faults.cheap import MeanExtractor

SIZE, CAPTION_TOKENS = tiny_model.SIZE, 8
TIMINGS = "perf/"
USED_MODELS = ("models/dar_tokenizer", "models/vae")
PLAIN = dict(guidance_scale=(2.0,), solver="euler", batch_size=8)


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory that a command uses.

    Attributes:
        prepare: writes to the directory what the command finds there.
        run: the command, given the directory; what it comes to, by name.
        used: folders of the directory whose files are damaged.
        given: files and folders of the user's own, where another whole file is another question:
            their files are cut and flipped only.
    """

    prepare: Callable[[pathlib.Path], None]
    run: Callable[[pathlib.Path], dict]
    used: tuple[str, ...]
    given: tuple[str, ...] = ()


def config_of(variant, root, **blocks):
    """A config of digits whose pictures, of `SIZE` pixels, lie in `root/pictures`."""
    config = mnist.get_config(variant)
    data = dict(source="folder", path=str(root / "pictures"), image_size=SIZE, padding=0)
    config.data.update(**data, batch_size=8, test_fraction=0.2, num_threads=2)
    config.train.update(log_every=1, checkpoint_every=2, image_every=2, steps=4)
    config.optimizer.update(warmup_steps=1, decay_start=2, decay_end=4)
    for name, values in blocks.items():
        if isinstance(values, dict):
            config[name].update(values)
        else:
            config[name] = values
    return config


def pictures(root):
    """Write pictures of three classes, with captions."""
    rng = np.random.default_rng(0)
    for number in range(tiny_sets.NUM_PICTURES):
        name = tiny_sets.CLASSES[number % 3]
        path = root / "pictures" / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIZE + number % 5, SIZE + number % 3, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"a {tiny_text.WORDS[number % 10]} {name}\n")


def content(path):
    """What a file says, whatever its bytes are."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image).tobytes()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(root, *patterns):
    """Contents of the files of a directory, by name."""
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return {path.relative_to(root).as_posix(): content(path) for path in sorted(found)}


def fit(config, workdir, steps):
    """Train; return what the run promises."""
    config.train.steps = steps
    train.train_and_evaluate(build(config), str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]
    kept = files(workdir, "model/**/config.json", "model/**/*.safetensors", "config.json")
    return {**kept, **files(workdir, f"images/*{steps:07d}.png"), "curve": curve}


def tokenizer_config(root):
    config = config_of("tokenizer", root)
    for name, value in dataclasses.asdict(tiny_model.TOKENIZER).items():
        if isinstance(value, dict):
            config.model[name].update({k: v for k, v in value.items() if v is not None})
        else:
            config.model[name] = value
    return config


def prior_config(root, **blocks):
    config = config_of("dar", root, tokenizer=str(root / "models/dar_tokenizer"), **blocks)
    prior = {k: v for k, v in dataclasses.asdict(tiny_model.PRIOR).items() if v is not None}
    config.model.update({**prior, "num_classes": len(tiny_sets.CLASSES)})
    return config


def captioned_config(root, **blocks):
    config = prior_config(root, **blocks)
    config.data.captions = True
    text = dict(caption_dim=tiny_text.DIM, condition_tokens=CAPTION_TOKENS, num_classes=1)
    config.model.update(**text, text_encoder=str(root / "encoder"))
    return config


def kl_vae_config(root):
    config = config_of("kl_vae", root)
    config.model.update(width=4, width_factors=(1, 1), latent_channels=2, num_groups=2)
    return config


def transdiff_config(root, **blocks):
    config = config_of("transdiff", root, vae=str(root / "models/vae"), **blocks)
    config.model.update(dataclasses.asdict(tiny_transdiff.LARGE))
    config.sample.num_steps = 2
    return config


def cached(config, root):
    """The config, with the cache in place of the pictures."""
    config.data.update(source=config.cache.kind.replace("images", "records"))
    config.data.path = str(root / "cache")
    return config


def write_cache(config, root):
    """Write a cache; return its files and what is read from it."""
    values = build(config)
    cache.cache(values, str(root / "cache"))
    found = files(root / "cache", "dataset.json", "*.array_record", "*.jsonl")
    if config.cache.kind != "references":
        data = build(cached(config, root)).data
        for split in ("train", "test"):
            source = load_source(data, split)
            for index in range(len(source)):
                for name, array in source[index].items():
                    found[f"{split} {index} {name}"] = np.asarray(array).tobytes()
    return found


def read_cache(config, root):
    """Read a cache as training does; return what is read."""
    data, found = build(cached(config, root)).data, {}
    for split in ("train", "test"):
        source = load_source(data, split)
        for index in range(len(source)):
            example = source[index]
            found[f"{split} {index}"] = [np.asarray(a).tobytes() for a in example.values()]
    return found


def models(root):
    """Write models of every kind, and a text encoder."""
    tiny_model.save(root / "models")
    tiny_transdiff.save_vae(root / "models")
    tiny_transdiff.save(root / "models", "transdiff", tiny_transdiff.LARGE)


def prepare(*steps):
    """Take steps, each given the directory."""

    def take(root):
        for step in steps:
            step(root)

    return take


def encoder(root):
    tiny_text.save(root / "encoder")


def draw(model, variant="dar", **settings):
    """`--mode=sample` with a model of `root/models`."""

    def run(root):
        config = config_of(variant, root)
        path = str(root / "models" / model)
        config.sample.update({**PLAIN, "model": path, "labels": (0, 1), **settings})
        workdir = root / "workdir"
        sample.sample(build(config), str(workdir))
        return files(workdir, "samples/*.*", "samples/set/0*", "samples/set/manifest.json")

    return run


def judge(root, **settings):
    """`--mode=evaluate`; return the figures."""
    config = config_of("dar", root)
    config.sample.update({**PLAIN, "model": str(root / "models/dar_prior")})
    basic = dict(features="vgg16", lpips="", classifier=True, num_images=12, batch_size=8)
    basic |= dict(evaluators="generation,previews,reconstruction,likelihood", num_reference=8)
    config.evaluate.update({**basic, **settings})
    evaluate.evaluate(build(config), str(root / "workdir"))
    return json.loads((root / "workdir/evaluation.json").read_text())


def reference(root):
    """Write a reference of images, one of statistics, and a set of images."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez_compressed(root / "images.npz", pixels)
    features = MeanExtractor().features(pixels)["pool"].astype(np.float64)
    np.savez_compressed(root / "moments.npz", mu=features.mean(0), sigma=np.cov(features.T))
    (root / "set").mkdir()
    for index in range(8):
        Image.fromarray(pixels[index]).save(root / "set" / f"{index}.png")


def judge_images(root):
    """Figures of a folder of images against references of both kinds."""
    found = {}
    for name in ("images", "moments"):
        options = dict(images=str(root / "set"), reference=str(root / f"{name}.npz"))
        found |= {
            f"{name} {k}": v for k, v in judge(root, evaluators="generation", **options).items()
        }
    return found


def trained(make, before):
    """A run of two steps, which its command continues to four."""
    return Place(
        prepare(pictures, before, lambda root: fit(make(root), root / "run", 2) and None),
        lambda root: fit(make(root), root / "run", 4),
        used=("run", *USED_MODELS, "encoder", "cache"),
    )


def cache_of(make, before, kind):
    """A cache, and the command that writes it."""

    def config(root):
        config = make(root)
        config.cache.update(kind=kind, pictures_per_shard=6)
        return config

    return Place(
        prepare(pictures, before, lambda root: write_cache(config(root), root) and None),
        lambda root: write_cache(config(root), root),
        used=("cache", *USED_MODELS, "encoder"),
    )


def cache_for_reading(make, before, kind):
    place = cache_of(make, before, kind)

    def run(root):
        config = make(root)
        config.cache.kind = kind
        return read_cache(config, root)

    return dataclasses.replace(place, run=run, used=("cache",))


def nothing(root):
    pass


def with_codes(root):
    """The pictures and captions as codes, for training."""
    models(root), encoder(root)
    config = captioned_config(root)
    config.cache.update(kind="codes", pictures_per_shard=6)
    cache.cache(build(config), str(root / "cache"))


def captioned_run(root):
    config = captioned_config(root)
    config.cache.kind = "codes"
    return cached(config, root)


def with_latents(root):
    models(root)
    config = transdiff_config(root)
    config.cache.update(kind="latents", pictures_per_shard=6)
    cache.cache(build(config), str(root / "cache"))


def transdiff_run(root):
    config = transdiff_config(root)
    config.cache.kind = "latents"
    return cached(config, root)


def drawn(run, model):
    """A model, from which the command draws."""
    return Place(prepare(pictures, models), run, used=(f"models/{model}",))


def drawn_twice(run):
    """A set that is whole, to which the same command is given."""
    return Place(prepare(pictures, models, lambda root: run(root) and None), run, used=("workdir",))


PLACES = {
    "run of a tokenizer": trained(tokenizer_config, nothing),
    "run of a prior on codes and captions": trained(captioned_run, with_codes),
    "run of a prior": trained(prior_config, models),
    "run of kl_vae": trained(kl_vae_config, nothing),
    "run of transdiff on latents": trained(transdiff_run, with_latents),
    "cache of images": cache_of(tokenizer_config, nothing, "images"),
    "cache of codes": cache_of(prior_config, models, "codes"),
    "cache of codes and captions": cache_of(captioned_config, prepare(models, encoder), "codes"),
    "cache of latents": cache_of(transdiff_config, models, "latents"),
    "cache of references": cache_of(tokenizer_config, nothing, "references"),
    "images that are read": cache_for_reading(tokenizer_config, nothing, "images"),
    "codes and captions that are read": cache_for_reading(
        captioned_config, prepare(models, encoder), "codes"
    ),
    "latents that are read": cache_for_reading(transdiff_config, models, "latents"),
    "model of a prior": drawn(draw("dar_prior"), "dar_prior"),
    "model of transdiff": drawn(
        draw("transdiff", "transdiff", solver="euler_maruyama"), "transdiff"
    ),
    "model of a tokenizer": drawn(draw("dar_tokenizer", "tokenizer"), "dar_tokenizer"),
    "set of images": drawn_twice(draw("dar_prior", num_images=10, batch_size=4)),
    "set of files": drawn_twice(draw("dar_prior", num_images=6, batch_size=4, format="png")),
    "evaluation": Place(
        prepare(pictures, models, lambda root: judge(root) and None),
        judge,
        used=("workdir", "models/dar_prior"),
    ),
    "images and references": Place(
        prepare(pictures, models, reference, lambda root: judge_images(root) and None),
        judge_images,
        used=("workdir",),
        given=("images.npz", "moments.npz"),
    ),
}
