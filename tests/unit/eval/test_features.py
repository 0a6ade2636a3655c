from __future__ import annotations

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from diffpress.errors import (
    CheckpointError,
    ConfigError,
    InfrastructureError,
    MissingDependencyError,
    NotComparableError,
)
from diffpress.eval.features import Features, extract, load_extractor, load_reference, save_features
from diffpress.eval.preprocessing import Preprocessing

SETTINGS = {"size": {"height": 48, "width": 48}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def images(count: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture(scope="module")
def extractor(folder):
    return load_extractor(str(folder), batch_size=4)


def test_transformers_features_are_what_the_classifier_pools(folder, extractor):
    model = ResNetForImageClassification.from_pretrained(folder).eval()
    seen = []
    model.classifier[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    pixels = []
    for image in images():
        resized = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)) / 255
        pixels.append((resized - SETTINGS["image_mean"]) / SETTINGS["image_std"])
    with torch.inference_mode():
        model(pixel_values=torch.tensor(np.array(pixels)).float().permute(0, 3, 1, 2))
    calls = []
    features = extractor(images(), progress=lambda done, total: calls.append((done, total)))
    np.testing.assert_allclose(features, seen[0].numpy(), atol=1e-5)
    assert np.abs(features - extractor(images()[..., ::-1])).max() > 1e-3  # control: channels in another order
    assert (features.dtype, features.shape, extractor.dimension) == (np.float32, (6, 16), 16)
    assert calls == [(4, 6), (6, 6)]


def test_identity_depends_on_weights_and_preprocessing(folder, extractor, tmp_path):
    assert load_extractor(str(folder)).identity == extractor.identity
    model = ResNetForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS | {"size": 40}))
    assert load_extractor(str(tmp_path)).identity != extractor.identity
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    assert load_extractor(str(tmp_path)).identity == extractor.identity
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path)
    assert load_extractor(str(tmp_path)).identity != extractor.identity


def test_a_pooler_without_weights_is_not_used(tmp_path, caplog):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS | {"size": 32}))
    first, second = load_extractor(str(tmp_path)), load_extractor(str(tmp_path))
    assert "no pooler weights" in caplog.text
    np.testing.assert_array_equal(first(images()), second(images()))  # a random pooler would differ


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        ({"size": 32}, (32, 32), "resize to 32x32"),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}, (32, 32), "centre crop 32x32"),
        ({"size": {"shortest_edge": 28}, "crop_pct": 0.875}, (28, 28), "shortest edge 32, centre crop 28x28"),
        ({"do_resize": False, "do_normalize": False}, (50, 70), "uint8 RGB, (x * 0.0039215686"),
        ({"size": 32, "resample": 2}, (32, 32), "PIL bilinear"),
        ({"size": 28, "crop_pct": 0.875}, (28, 28), "shortest edge 32, centre crop 28x28"),
        (
            {"size": 40, "do_center_crop": True, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
            (32, 32),
            "shortest edge 40, centre crop 32x32",
        ),
        ({"size": 40, "image_processor_type": "ViTImageProcessor"}, (40, 40), "resize to 40x40"),
    ],
)
def test_preprocessing_follows_the_file(settings, shape, words):
    prepare = Preprocessing.from_settings(SETTINGS | settings)
    assert prepare(np.zeros((2, 50, 70, 3), dtype=np.uint8)).shape == (2, 3, *shape)
    assert words in prepare.describe()


@pytest.mark.parametrize("settings", [{"size": "big"}, {"size": 0}, {"resample": 99}, {"image_mean": [0.5]}])
def test_preprocessing_that_is_not_understood_is_refused(folder, tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS | settings))
    with pytest.raises(CheckpointError, match="not understood"):
        Preprocessing.from_folder(tmp_path)


def test_bad_checkpoints_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors"):
        load_extractor(str(tmp_path))
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        load_extractor(str(tmp_path))
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_extractor(str(tmp_path))


def test_unknown_specs_are_refused():
    for spec in ("/no/such/folder", "a/b/c/d"):
        with pytest.raises(ConfigError, match="allowed: a folder or hub id"):
            load_extractor(spec)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        load_extractor("inception", batch_size=0)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), [[1]]]
)
def test_images_of_another_kind_are_refused(extractor, bad):
    with pytest.raises(ConfigError, match="expected"):
        extractor(bad)


def test_inception_matches_torch_fidelity(fidelity_package, monkeypatch, tmp_path):
    module = fidelity_package.feature_extractor_inceptionv3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)  # the default lets the signal die out
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    ours = load_extractor(f"inception:{path}")
    expected = model(torch.from_numpy(images(2).transpose(0, 3, 1, 2)))[0].numpy()
    np.testing.assert_allclose(ours(images(2)), expected, rtol=1e-3, atol=1e-4 * expected.max())
    assert ours.dimension == 2048
    assert np.abs(ours(images(2) // 2) - expected).max() > 0.01 * expected.max()


class _RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


def test_inception_weights_must_be_there_and_safe(fidelity_package, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"checkpoints/weights-inception-2015-12-05-6726825d\.pth"):
        load_extractor("inception")
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"weight": _RunsCode()}, protocol=2))
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_extractor(f"inception:{path}")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="2015 Inception"):
        load_extractor(f"inception:{path}")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingDependencyError, match="torch-fidelity"):
        load_extractor(f"inception:{path}")


class _Mean(torch.nn.Module):
    preprocessing = "none"

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x):
        return x.float().mean(dim=(2, 3)) * self.factor


def test_a_users_module_or_function_is_an_extractor(monkeypatch):
    user = types.ModuleType("user_features")
    user.Mean = _Mean
    user.mean = lambda batch: batch.mean(axis=(1, 2)) * 2
    user.flat = lambda batch: np.zeros(3)
    user.number = 3
    monkeypatch.setitem(sys.modules, "user_features", user)
    module, function = load_extractor("module:user_features:Mean"), load_extractor("module:user_features:mean")
    np.testing.assert_allclose(module(images()), function(images()), rtol=1e-5)
    assert (module.dimension, module.preprocessing) == (3, "none")
    assert module.identity != function.identity
    for target, words in [
        ("user_features:flat", r"expected \(1, dimension\)"),
        ("user_features:number", "allowed: a callable"),
        ("user_features:none", "has no none"),
        ("user_features", "incomplete"),
        ("no_such_module:x", "cannot be imported"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load_extractor(f"module:{target}")


def test_a_users_module_is_found_in_the_working_directory_and_its_faults_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name, text in (
        ("own_good", "mean = lambda batch: batch.mean(axis=(1, 2))"),
        ("own_wrong", "def f(:"),
        ("own_lacks", "import no_such_package"),
        ("own_asserts", "def f(batch):\n    assert len(batch) > 1"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    assert load_extractor("module:own_good:mean").dimension == 3
    for target, words in (
        ("own_wrong:f", "own_wrong.* cannot be imported: SyntaxError"),
        ("own_lacks:f", "own_lacks.* cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_asserts:f", "fails on one black image .*AssertionError"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_extractor(f"module:{target}")


def test_features_that_are_not_finite_are_refused(monkeypatch):
    user = types.ModuleType("user_features")
    user.broken = lambda batch: np.full((len(batch), 3), np.nan)
    monkeypatch.setitem(sys.modules, "user_features", user)
    with pytest.raises(ConfigError, match="NaN"):
        load_extractor("module:user_features:broken")(images())


def test_stored_features_come_back_and_same_features_are_the_same_bytes(extractor, tmp_path):
    features = extract(extractor, images(), source="noise")
    for name in ("a.safetensors", "b.safetensors"):
        features.save(tmp_path / "deep" / name)
    assert (tmp_path / "deep/a.safetensors").read_bytes() == (tmp_path / "deep/b.safetensors").read_bytes()
    loaded = load_reference(tmp_path / "deep/a.safetensors", extractor)
    np.testing.assert_array_equal(loaded.values, features.values)
    assert (loaded.source, loaded.extractor_hash, len(loaded)) == ("noise", extractor.identity, 6)
    assert [path.name for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")] == []


def test_several_sets_in_one_file(extractor, tmp_path):
    parts = {
        name: extract(extractor, images(3, seed), source="noise") for seed, name in enumerate(["train", "held_out"])
    }
    path = tmp_path / "reference.safetensors"
    save_features(path, parts)
    np.testing.assert_array_equal(load_reference(f"{path}#train", extractor).values, parts["train"].values)
    assert len(load_reference(path, extractor)) == 6
    with pytest.raises(CheckpointError, match="has no tensor 'test'"):
        load_reference(f"{path}#test", extractor)
    with pytest.raises(ConfigError, match="different extractors"):
        save_features(path, {**parts, "other": Features(parts["train"].values, "", "", "", "")})


def test_a_number_sign_may_be_in_the_name_of_a_folder_or_file(extractor, tmp_path):
    parts = {name: extract(extractor, images(3, seed), source="") for seed, name in enumerate(["a", "b"])}
    for path in (tmp_path / "runs #3" / "features", tmp_path / "features#1"):
        save_features(path, parts)
        assert len(Features.load(path)) == 6
        np.testing.assert_array_equal(Features.load(f"{path}#b").values, parts["b"].values)
        with pytest.raises(CheckpointError, match=r"has no tensor 'c'; it has a, b"):
            Features.load(f"{path}#c")
    with pytest.raises(CheckpointError, match=r"runs #3/nothing#b is missing"):
        Features.load(f"{tmp_path}/runs #3/nothing#b")


def test_features_of_another_extractor_are_not_comparable(extractor, tmp_path, caplog):
    path = tmp_path / "features.safetensors"
    features = extract(extractor, images(), source="noise")
    Features(features.values, "other", "PIL", "0" * 64, "noise").save(path)
    with pytest.raises(NotComparableError, match="was made by other"):
        load_reference(path, extractor)
    save_file({"features": features.values[:, :8].copy()}, path)
    with pytest.raises(NotComparableError, match="8 dimensions"):
        load_reference(path, extractor)
    save_file({"train": features.values, "held_out": features.values}, path)
    assert len(load_reference(path, extractor)) == 12
    assert "only the dimension was checked" in caplog.text


def test_broken_feature_files_are_refused(extractor, tmp_path):
    path = tmp_path / "features.safetensors"
    with pytest.raises(CheckpointError, match="is missing"):
        load_reference(path, extractor)
    path.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_reference(path, extractor)
    save_file({"features": np.zeros(4, dtype=np.float32)}, path)
    with pytest.raises(CheckpointError, match="expected matrices"):
        load_reference(path, extractor)
    with pytest.raises(InfrastructureError, match="cannot be written"):
        Features.load(_plain(tmp_path)).save(path / "below a file")


def _plain(folder):
    save_file({"features": np.zeros((2, 4), dtype=np.float32)}, folder / "plain.safetensors")
    return folder / "plain.safetensors"


def test_a_folder_of_images_is_a_reference(extractor, tmp_path):
    with pytest.raises(ConfigError, match="holds no image"):
        load_reference(tmp_path, extractor)
    for index, image in enumerate(images()):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    calls = []
    reference = load_reference(tmp_path, extractor, progress=lambda done, total: calls.append((done, total)))
    np.testing.assert_allclose(reference.values, extractor(images()), atol=1e-5)
    assert calls == [(6, 6)]
    Image.new("RGBA", (32, 40), (0, 0, 0, 0)).save(tmp_path / "6.png")  # another size, fully transparent: white
    white = extractor(np.full((1, 40, 32, 3), 255, dtype=np.uint8))
    np.testing.assert_allclose(load_reference(tmp_path, extractor).values[-1:], white, atol=1e-5)
    (tmp_path / "7.png").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"7\.png cannot be read"):
        load_reference(tmp_path, extractor)
