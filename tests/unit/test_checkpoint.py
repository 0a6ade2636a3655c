"""What may be loaded is decided before anything of it is loaded."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffpress.checkpoint import components, fetch, is_stock, stock_class, verify
from diffpress.errors import CheckpointError

INDEX = {
    "_class_name": "DiTPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "safety_checker": [None, None],
}


@pytest.fixture
def folder(tmp_path):
    """The least that is whole: an index, a scheduler's config, one component with weights."""
    root = tmp_path / "pipeline"
    (root / "transformer").mkdir(parents=True)
    (root / "scheduler").mkdir()
    write_index(root, INDEX)
    (root / "scheduler/scheduler_config.json").write_text("{}")
    (root / "transformer/config.json").write_text("{}")
    save_file({"weight": np.arange(64, dtype=np.float32)}, root / "transformer/model.safetensors")
    return root


def write_index(root, index):
    (root / "model_index.json").write_text(json.dumps(index))


def test_whole_checkpoint_is_let_through(folder):
    assert verify(folder) == INDEX
    assert fetch(str(folder)) == folder


def test_parts_of_pipelines_of_diffusers_are_stock():
    """Stable Diffusion 1's safety checker lies in a pipeline's own module."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": [None, None],
        "text_encoder_select_layers": [2, 5],
        "empty": [],
    }
    assert list(components(index)) == ["safety_checker", "feature_extractor"]
    assert stock_class(*index["safety_checker"]).__name__ == "StableDiffusionSafetyChecker"
    assert not any(map(is_stock, ("os", "my_module", "stable_diffusion.safety_checker", "..os", "")))
    with pytest.raises(CheckpointError, match=r"stable_diffusion\.NoSuch is no class of diffusers"):
        stock_class("stable_diffusion", "NoSuch")


def test_missing_folder_names_what_is_allowed(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*allowed: a folder in the diffusers layout, or a hub id"):
        fetch(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(CheckpointError, match="is a file"):
        fetch(str(folder / "model_index.json"))


def test_a_hub_that_does_not_answer_is_one_error(monkeypatch):
    import diffusers

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", refuse)
    with pytest.raises(CheckpointError, match=r"'owner/name' is no folder here.*no route to host"):
        fetch("owner/name")


def test_missing_index(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        verify(folder)


@pytest.mark.parametrize("text", ["{", "", "\x00\xff"])
def test_index_that_is_not_json(folder, text):
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
        verify(folder)


@pytest.mark.parametrize("text", ["[]", "3", '{"transformer": ["diffusers", "DiTTransformer2DModel"]}'])
def test_index_that_names_no_pipeline(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match="names no pipeline class"):
        verify(folder)


def test_component_that_is_not_there(folder):
    write_index(folder, INDEX | {"vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(CheckpointError, match="vae is named in model_index"):
        verify(folder)


class _Trap:
    """A pickle that would raise an alarm where it is opened."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickle_alone_is_refused_unopened(folder, name):
    (folder / "transformer/model.safetensors").unlink()
    (folder / "transformer" / name).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({name}\).*safetensors"):
        verify(folder)


def test_pickle_beside_safetensors_stays_unopened(folder):
    (folder / "transformer/pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))
    assert verify(folder) == INDEX


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_safetensors(folder, kept):
    path = folder / "transformer/model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(\d+ bytes\) is cut off or corrupt"):
        verify(folder)


def test_safetensors_with_a_wrong_header(folder):
    path = folder / "transformer/model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:16] = b"\xff" * 8
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="cut off or corrupt"):
        verify(folder)


def plant_module(root):
    (root / "transformer/modeling.py").write_text("raise SystemExit")


def plant_component(root):
    write_index(root, INDEX | {"transformer": ["modeling", "Own"]})


def plant_pipeline(root):
    write_index(root, INDEX | {"_class_name": ["pipeline", "Own"]})


@pytest.mark.parametrize(
    ("plant", "named"),
    [(plant_module, "modeling.py"), (plant_component, "transformer"), (plant_pipeline, "_class_name")],
)
def test_code_of_its_own_is_refused_unless_trusted(folder, plant, named):
    plant(folder)
    with pytest.raises(CheckpointError, match=rf"{named} would run code.*trust_remote_code"):
        verify(folder)
    assert verify(folder, trust_remote_code=True)["scheduler"] == INDEX["scheduler"]


def test_weights_of_a_variant(folder):
    part = folder / "transformer"
    (part / "model.safetensors").rename(part / "model.fp16-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer has weights of variant fp16 alone; allowed: variant: fp16"):
        verify(folder)
    with pytest.raises(CheckpointError, match=r"no weights of variant 'bf16'; there: fp16"):
        verify(folder, variant="bf16")
    assert verify(folder, variant="fp16")
    save_file({"weight": np.arange(64, dtype=np.float32)}, part / "model-00001-of-00002.safetensors")
    assert verify(folder)
    with pytest.raises(CheckpointError, match="no weights of variant 'bf16'"):
        verify(folder, variant="bf16")
