"""`.pt` files: every layout of the reference, and nothing that a pickle asks for is run."""

import argparse
import collections
import os
import pickle
import sys
import types
from collections.abc import Mapping

import numpy as np
import pytest

from dar_jax.convert.checkpoints import read_checkpoint

torch = pytest.importorskip("torch")

WEIGHTS = {"norm.weight": np.float32([1, 2, 3]), "layers.0.weight": np.eye(2, dtype=np.float32)}
CONFIG = {"model": {"encoder_dim": 64, "diff_decoder": {"patch_size": 2, "sizes": [1, 2]}}}


class Config(Mapping):
    """What the reference pickles as `config_util.Config`."""

    def __init__(self, data):
        self._data = {k: Config(v) if isinstance(v, dict) else v for k, v in data.items()}

    def __getitem__(self, name):
        return self._data[name]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


def tensors(prefix="", dtype=torch.float32, scale=1.0):
    return {f"{prefix}{n}": torch.tensor(scale * a).to(dtype) for n, a in WEIGHTS.items()}


def assert_weights(checkpoint):
    assert checkpoint.state_dict.keys() == WEIGHTS.keys()
    for name, array in checkpoint.state_dict.items():
        assert type(array) is np.ndarray and array.dtype == np.float32
        np.testing.assert_array_equal(array, WEIGHTS[name])


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The container of the released tokenizer."""
    module = types.ModuleType("config_util")
    module.Config = Config
    monkeypatch.setitem(sys.modules, "config_util", module)
    monkeypatch.setattr(Config, "__module__", "config_util")
    path = tmp_path / "tokenizer.pt"
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    ema = collections.OrderedDict(tensors("_orig_mod.", torch.bfloat16))
    ema._metadata = {"": {"version": 1}}
    content = {
        "model": tensors("module._orig_mod.", scale=-1.0),
        "ema": ema,
        "optimizer": optimizer.state_dict(),
        "discriminator": None,
        "steps": 210_000,
        "args": argparse.Namespace(lr=2e-4, use_gan=False, betas=(0.9, 0.95), path="data"),
        "config": Config(CONFIG),
    }
    torch.save(content, path)
    monkeypatch.undo()
    assert "config_util" not in sys.modules
    return path


def test_official_tokenizer_gives_average_weights_and_config(official):
    checkpoint = read_checkpoint(str(official))
    assert_weights(checkpoint)
    assert checkpoint.container == "ema"
    assert checkpoint.config == CONFIG


@pytest.mark.parametrize("container", ["ema", "model", "module", "state_dict", "", "ema.module"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.", "_fsdp_wrapped_module._orig_mod."])
def test_every_container_and_prefix_is_read(tmp_path, container, prefix):
    state_dict = tensors(prefix)
    for name in reversed(container.split(".") if container else []):
        state_dict = {name: state_dict, "steps": 1}
    torch.save(state_dict, tmp_path / "a.pt")
    checkpoint = read_checkpoint(str(tmp_path / "a.pt"))
    assert_weights(checkpoint)
    assert checkpoint.container == container and checkpoint.config is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    state_dict = {name: torch.nn.Parameter(tensor) for name, tensor in tensors(dtype=dtype).items()}
    torch.save(state_dict, tmp_path / "a.pt")
    assert_weights(read_checkpoint(str(tmp_path / "a.pt")))


def test_wrappers_are_taken_out_of_the_middle_of_names(tmp_path):
    wrapped = {
        "module._fsdp_wrapped_module.norm._orig_mod.weight": torch.tensor(WEIGHTS["norm.weight"]),
        "layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.weight": torch.eye(2),
    }
    torch.save(wrapped, tmp_path / "a.pt")
    assert_weights(read_checkpoint(str(tmp_path / "a.pt")))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth.tar"])
def test_old_format_and_every_suffix_are_read(tmp_path, suffix):
    content = {
        "state_dict": tensors(scale=-1.0),
        "state_dict_ema": tensors(),
        "best": np.float64(3.5),
        "others": [np.float32(1), np.int64(2), np.bool_(True), np.float16(2)],
    }
    path = tmp_path / f"a{suffix}"
    for new_format in (False, True):
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        checkpoint = read_checkpoint(str(path))
        assert_weights(checkpoint)
        assert checkpoint.container == "state_dict_ema"


def test_8_bit_floats_become_float32(tmp_path):
    torch.save(tensors(dtype=torch.float8_e4m3fn), tmp_path / "a.pt")
    assert_weights(read_checkpoint(str(tmp_path / "a.pt")))


@pytest.mark.parametrize("kept", [40, 0.5, -4])
def test_old_format_that_ends_early_is_one_line(tmp_path, kept):
    torch.save(tensors(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    kept = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "a.pth").write_bytes(content[:kept])
    with pytest.raises(ValueError, match="damaged, cut short") as caught:
        read_checkpoint(str(tmp_path / "a.pth"))
    assert "\n" not in str(caught.value)


class Run:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": lambda marker: Run(os.system, f"touch {marker}"),
    "exec": lambda marker: Run(exec, f"open({str(marker)!r}, 'w').close()"),
    "getattr": lambda marker: Run(getattr, str(marker), "join"),
    "open": lambda marker: Run(open, str(marker), "w"),
    "inside": lambda marker: argparse.Namespace(lr=Run(os.mkdir, str(marker))),
    "class": lambda marker: Config({"path": str(marker)}),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_pickle_is_run(tmp_path, name, new_format):
    marker = tmp_path / "marker"
    content = {"ema": tensors(), "args": ATTACKS[name](marker)}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"bad\.pt is refused: it would import \w+") as caught:
        read_checkpoint(str(tmp_path / "bad.pt"))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_allowed_classes_cannot_be_called_with_arguments(tmp_path):
    """Only the plain construction of the allow-list is of use; everything else fails inside."""
    attack = Run(argparse.Namespace, "positional")
    torch.save({"ema": tensors(), "args": attack}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_checkpoint(str(tmp_path / "bad.pt"))


def test_plain_pickle_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"ema": Run(os.mkdir, str(marker))}))
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_checkpoint(str(tmp_path / "bad.pt"))
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_file_is_one_line(official, kept):
    content = official.read_bytes()
    official.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"tokenizer\.pt is not a readable checkpoint") as caught:
        read_checkpoint(str(official))
    assert "\n" not in str(caught.value)


NO_STATE_DICTS = {
    "no container": {"optimizer": {}, "steps": 3},
    "container of numbers": {"model": {"weight": 1.0}},
    "sparse": {"model": {"weight": torch.eye(3).to_sparse()}},
    "without data": {"model": {"weight": torch.ones(3, device="meta")}},
    "list": [1, 2],
}


@pytest.mark.parametrize("name", NO_STATE_DICTS)
def test_file_without_weights_is_refused(tmp_path, name):
    torch.save(NO_STATE_DICTS[name], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt holds (no state dict|a list)"):
        read_checkpoint(str(tmp_path / "a.pt"))


def test_same_tensor_under_two_prefixes_is_refused(tmp_path):
    torch.save({**tensors(), **tensors("module.")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="tensors twice"):
        read_checkpoint(str(tmp_path / "a.pt"))
