"""Sets of images on a Ray cluster: actors around `dar_jax.from_pretrained`, on all its machines.

    pip install 'dar-jax[ray,gcs]'
    python launch/ray_sampling.py --model=gs://my-bucket/dar_l/model --out=gs://my-bucket/sets \
        --num_images=1000000 --actors=16 --gpus=1 --sampling '{}' '{"guidance_scale": 4}'

Image i depends on the seed, i and its label, all classes in turn, alone. For each `--sampling`
OUT/0, OUT/1, ... has the form of the sets of `--mode=sample`; the same command goes on with them.
"""

import argparse
import json
import logging

import ray
from ray.util import ActorPool

from dar_jax.common import image, model_dir, storage
from dar_jax.generation.image_set import ImageSet
from dar_jax.kinds.loading import from_pretrained, open_model


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Sampler:
    def __init__(self, model: str):
        self.pipeline = from_pretrained(model)

    def draw(self, images: ImageSet, first: int, stop: int, **how) -> None:
        drawn = self.pipeline.generate(images.labels_of(first, stop), first_index=first, **how)
        images.write(first, image.to_pixels(drawn.images), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=storage.to_path)
    for name, default in dict(num_images=1000, batch_size=64, seed=0, actors=1, gpus=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sampling", type=json.loads, nargs="+", default=[{}])
    args = parser.parse_args()
    labels = tuple(range(open_model(args.model).architecture.num_classes))
    about = {"model": model_dir.fingerprint(model_dir.locate(args.model)), "seed": args.seed}
    count, size, work = args.num_images, args.batch_size, []
    sets = [ImageSet(args.out / str(i), count, labels) for i, _ in enumerate(args.sampling)]
    for images, sampling in zip(sets, args.sampling, strict=True):
        images.bind({**about, "sampling": sampling})
        missing, how = images.missing(), {"rng": args.seed, **sampling}
        starts = [s for s in range(0, count, size) if missing[s : s + size].any()]
        work += [(images, start, min(start + size, count), how) for start in starts]
    actors = [Sampler.options(num_gpus=args.gpus).remote(args.model) for _ in range(args.actors)]
    done = ActorPool(actors).map_unordered(lambda a, w: a.draw.remote(*w[:3], **w[3]), work)
    for number, _ in enumerate(done, 1):
        logging.info("%d of %d batches", number, len(work))
    for images in sets:
        images.merge(images.directory / f"samples_{count}.npz")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
