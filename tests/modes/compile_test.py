"""Compile mode: for the eight devices at hand, for a topology, and for none."""

import json

import jax
import ml_collections
import pytest

from configs import mnist
from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.kinds.loading import build_task
from dar_jax.modes import compile as compile_mode
from dar_jax.parallel import sharding
from dar_jax.parallel.chips import CHIPS, Chip
from dar_jax.performance import topologies
from dar_jax.performance.config import CompileConfig
from dar_jax.performance.hlo import Collective
from dar_jax.performance.kernels import START

CHIP = Chip(100e12, 16e9, 1e12, 200e9, 2)


def tiny_config(root, **compile_block) -> ml_collections.ConfigDict:
    """A prior of one layer on 2 x 4 devices, whose tokenizer has a config and no weights."""
    tokenizer = mnist.get_config("tokenizer")
    tokenizer.model.update_from_flattened_dict(
        {"encoder.depth": 1, "decoder.depth": 1, "encoder.dim": 32, "condition.dim": 32}
    )
    directory = root / "tokenizer"
    model_dir.save_model(directory, tokenizer.task, tokenizer.model.to_dict(), {}, {})
    config = mnist.get_config("dar")
    config.tokenizer = str(directory)
    config.model.update(num_layers=1, dim=64, ffn_dim=64)
    config.compute.update(unroll=False, loss_chunks=4)
    config.optimizer.name = "adamw"
    config.data.batch_size = 16
    config.train.accumulation = 2
    config.mesh.update(data=2, fsdp=4)
    config.compile.update(images_per_device=2, **compile_block)
    return config


def test_local_compilation_reports_every_program(tmp_path, caplog):
    config = tiny_config(tmp_path)
    compile_mode.logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        compile_mode.compile_programs(read_config(config), str(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "compile.json").read_text())
    assert (report["topology"], report["devices"]) == ("local", 8)
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    programs = report["programs"]
    step, decode, flow = (programs[n] for n in ("train step", "decode a group", "flow step"))
    assert step["images"] == 16
    assert decode["images"] == flow["images"] == 16
    assert step["executed_flops"] > step["model_flops"] > 0
    assert step["collectives"]  # gradients are summed
    assert decode["collectives"] == flow["collectives"] == []  # every device draws its own images
    assert 0 < step["memory"]["arguments"] < step["memory"]["total"]
    assert step["memory_traffic"] > step["memory"]["arguments"]
    assert all(not each["loops_of_unknown_length"] for each in report["programs"].values())
    assert "roofline" not in step  # nobody knows the peak of this CPU
    rows = [line for line in caplog.messages[-1].splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 3
    assert len({row.count("|") for row in rows}) == 1


def test_prior_without_a_tokenizer_takes_the_released_one_if_it_fits(tmp_path):
    config = tiny_config(tmp_path)
    config.tokenizer = str(tmp_path / "none")
    with pytest.raises(
        ValueError, match="vocab_size=256, but the tokenizer .* codebook_size=16384"
    ):
        compile_mode.compile_programs(read_config(config), str(tmp_path / "run"))


@pytest.mark.slow
def test_latent_model_has_a_condition_and_a_step_of_every_image_on_its_device(tmp_path):
    config = mnist.get_config("transdiff_mrar")
    config.model.update(encoder_depth=1, decoder_depth=1)
    config.compute.unroll = False
    config.compile.images_per_device = 2
    model_dir.save_model(
        tmp_path / "vae", "kl_vae", mnist.get_config("kl_vae").model.to_dict(), {}, {}
    )
    config.vae = str(tmp_path / "vae")
    settings = read_config(config)
    mesh = sharding.make_mesh(settings.mesh)
    jobs = list(compile_mode.sampling_programs(settings, mesh))
    assert [job.name for job in jobs] == ["condition", "flow step"]
    assert [job.images for job in jobs] == [16, 16]
    condition, step = (compile_mode.analyse(job, jax.devices()) for job in jobs)
    for program in (condition, step):  # nothing is computed twice
        assert program["executed_flops"] == program["model_flops"] > 0
    assert condition["collectives"] == step["collectives"] == []


def test_weights_are_shapes_only(tmp_path):
    config = tiny_config(tmp_path)
    frozen = build_task(read_config(config), with_weights=False).frozen()
    leaves = jax.tree.leaves(frozen)
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("INVALID_ARGUMENT: Invalid TPU external name: TPU v9", "'v9:2x2'.*v9.*v5e:16x16, .*local"),
        ("JAX TPU support not installed; cannot generate TPU topology.", r"pip install.*\[tpu\]"),
    ],
)
def test_topology_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, reason, message):
    def refuse(**_):
        raise RuntimeError(reason)

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        compile_mode.compile_programs(
            read_config(tiny_config(tmp_path, topology="v9:2x2")), str(tmp_path / "r")
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="images_per_device 0 is not positive"):
        CompileConfig(images_per_device=0)


def test_roofline_takes_the_longest_or_all():
    report = {"model_flops": 80e12, "executed_flops": 100e12, "memory_traffic": 0.1e12}
    ring = Collective("all-gather", 4, 1, 10e9, 4)
    limits = compile_mode.roofline(report, [ring], CHIP, num_devices=4)
    assert (limits.compute, limits.memory) == (0.25, 0.1)
    assert limits.interconnect == pytest.approx(10e9 / 200e9)
    assert limits.overlapped == 0.25
    assert limits.serial == pytest.approx(0.4)
    assert limits.mfu_overlapped == pytest.approx(0.8)
    assert limits.mfu_serial == pytest.approx(80 / 4 / 100 / 0.4)


@pytest.mark.parametrize(
    ("kind", "group_size", "devices", "share"),
    [
        ("all-gather", 256, 256, 1.0),  # both axes of 16 x 16
        ("all-gather", 16, 256, 0.5),
        ("all-gather", 32, 256, 0.75),  # a ring and a line of two
        ("all-gather", 4, 256, 0.25),
        ("collective-permute", 256, 256, 0.5),
        ("all-gather", 1, 1, 1.0),
    ],
)
def test_small_groups_use_part_of_the_links(kind, group_size, devices, share):
    collective = Collective(kind, group_size, 1, 1.0, group_size)
    assert compile_mode.share_of_links(collective, CHIP, devices) == share


H200 = CHIPS["NVIDIA H200"]


@pytest.mark.parametrize(
    ("group_size", "on_a_host", "bandwidth"),
    [
        (8, 8, 450e9),  # a host: NVLink
        (64, 8, 400e9),  # through all eight adapters of the host
        (8, 1, 50e9),  # one card of each host
    ],
)
def test_groups_over_hosts_are_as_fast_as_the_network(group_size, on_a_host, bandwidth):
    collective = Collective("all-gather", group_size, 1, 1.0, on_a_host)
    assert compile_mode.bandwidth_of(collective, H200, 64) == bandwidth


@pytest.mark.parametrize("topology", ["h100:1x8", "h200:8x8", "b200:9x8"])
def test_gpus_without_their_compiler_are_one_line(monkeypatch, topology):
    asked = {}

    def refuse(**options):
        asked.update(options)
        raise RuntimeError("Unknown backend cuda\nmore")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=r"pip install -e '.\[gpu-aot\]' \(Unknown backend cuda\)"):
        topologies.find_devices(topology)
    assert asked["topology"] == f"1x{topology[5:]}"
    assert f'name: "{topologies.GPUS[topology[:4]].kind}"' in asked["target_config"]


@pytest.mark.slow
def test_compilation_for_gpus_that_are_not_there(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13")
    config = tiny_config(tmp_path, topology="h200:2x4")
    config.compute.dtype = "bfloat16"
    compile_mode.compile_programs(read_config(config), str(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "compile.json").read_text())
    assert (report["device_kind"], report["devices"]) == ("NVIDIA H200", 8)
    for program in report["programs"].values():
        assert program["fits"]
        assert 0 < program["roofline"]["mfu_serial"] < program["roofline"]["mfu_overlapped"] < 1
    step = report["programs"]["train step"]
    assert {each["on_a_host"] for each in step["collectives"]} == {1, 4}  # data, fsdp
    assert step["kernels"]["seconds"] >= step["kernels"]["count"] * START
    assert "__cudnn$fmhaSoftmaxBackward" in step["kernels"]["libraries"]


@pytest.mark.slow
def test_compilation_for_a_tpu_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu")
    config = tiny_config(tmp_path, topology="v5e:2x4")
    compile_mode.compile_programs(read_config(config), str(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "compile.json").read_text())
    assert (report["device_kind"], report["devices"]) == ("TPU v5 lite", 8)
    for program in report["programs"].values():
        assert program["fits"]
        limits = program["roofline"]
        assert 0 < limits["mfu_serial"] < limits["mfu_overlapped"] < 1
        assert not program["loops_of_unknown_length"]
    assert report["programs"]["train step"]["collectives"]
    config.compile.topology = "v9:2x2"
    with pytest.raises(ValueError, match="no compile.topology 'v9:2x2'"):
        compile_mode.compile_programs(read_config(config), str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "shape"), [("v5e:16x16", (8, 32, 1)), ("v5p:4x4x4", (2, 32, 1))]
)
def test_open_mesh_fits_every_torus(topology, shape):
    pytest.importorskip("libtpu")
    devices = compile_mode.find_devices(topology)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=-1), devices)
    assert mesh.devices.shape == shape
