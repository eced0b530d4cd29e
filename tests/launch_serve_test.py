"""What launches the API on several devices: it is short, and what it names exists."""

import pathlib

import pytest

from configs import mnist
from dar_jax.config import build as read_config

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
MAX_LINES = 60


def test_ray_has_a_short_script():
    assert len((LAUNCH / "serve_ray.py").read_text().splitlines()) <= MAX_LINES


def test_an_image_of_the_api_is_a_target_and_not_what_is_built_by_default():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    targets = [line for line in lines if line.startswith("FROM")]
    assert targets[1:] == ["FROM base AS serve", "FROM base"]
    assert '"--mode=serve"' in lines[lines.index("FROM base AS serve") + 3]


def test_kubernetes_serves_what_is_ready_with_flags_that_exist():
    yaml = pytest.importorskip("yaml", reason="reading the manifest needs pyyaml")
    parts = {part["kind"]: part for part in yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())}
    claim, service, deployment = (
        parts[kind] for kind in ("PersistentVolumeClaim", "Service", "Deployment")
    )
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": port["name"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    config = mnist.get_config("dar")
    for argument in container["args"]:
        name, value = argument.removeprefix("--").split("=")
        if name.startswith("config."):
            config.update_from_flattened_dict({name.removeprefix("config."): value})
        else:
            assert name in ("config", "workdir")
        assert not value.startswith("/") or value.startswith(tuple(mounts.values()))
    settings = read_config(config).serve
    assert settings.port == port["containerPort"]
    assert settings.drain < template["spec"]["terminationGracePeriodSeconds"]
