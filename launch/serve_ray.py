"""`--mode=serve` on a Ray cluster: replicas as the queue needs them, a device each, one address.

pip install -e '.[serve]' 'ray[serve]' && ray start --head
python launch/serve_ray.py --config=mnist.py --workdir=runs/first --config.compute.cache=DIR

The same command again replaces the replicas in turn; `serve shutdown` ends them.
"""

import secrets

import ray
from absl import app, flags
from ray import serve
from ray.exceptions import RayActorError

from dar_jax.common.compiled import keep_programs
from dar_jax.config import build
from dar_jax.main import parse_flags
from dar_jax.modes.serve import make_service
from dar_jax.serving import app as api
from dar_jax.serving import remote

DEVICES = {"TPU": {"resources": {"TPU": 1}}, "GPU": {"num_gpus": 1}, "CPU": {"num_cpus": 1}}


@serve.deployment
class Replica(remote.Replica):
    def __init__(self, config, workdir, _restart):
        keep_programs(config.compute.cache)
        super().__init__(api.make_app(service := make_service(config, workdir)), service.engine)


@serve.deployment(max_ongoing_requests=10**4, ray_actor_options={"num_cpus": 0})
class Front(remote.Front):
    def __init__(self, replicas, limit):
        super().__init__(replicas.options(stream=True).answer.remote, RayActorError, limit)


def main(_):
    try:
        config, workdir = build(flags.FLAGS.config), flags.FLAGS.workdir
        ray.init(address="auto")
    except (ValueError, ConnectionError) as error:
        raise SystemExit(f"launch/serve_ray.py: {error}") from None
    resources, how = ray.cluster_resources(), config.serve
    device = next(name for name in DEVICES if name in resources)
    scale = dict(max_replicas=int(resources[device]), target_ongoing_requests=how.batch_size)
    replica = Replica.options(
        ray_actor_options=DEVICES[device],
        max_ongoing_requests=how.max_waiting,
        graceful_shutdown_timeout_s=how.drain,
        autoscaling_config=scale,
    )
    serve.start(http_options=dict(host=how.host, port=how.port))
    serve.run(Front.bind(replica.bind(config, workdir, secrets.token_hex()), how.max_body_bytes))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
