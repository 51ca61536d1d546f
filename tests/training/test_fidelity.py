"""The authors' choices, against the configuration that claims them and what a run makes of it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import VIT, tiny_backbone
from torchvision import transforms

from singer.config.loading import load_config
from singer.config.schema import DataConfig
from singer.data.crops import create_crop
from singer.data.loader import create_loader
from singer.engine.run import build_methods
from singer.engine.student import create_optimizer
from singer.methods import SiNGER
from singer.methods.base import match_models
from singer.models.backbones import inspect_backbone

ROOT = Path(__file__).parents[2]
# Of SiNGER.py, SiNGERAdapter, imagenet.py and the YAML files of the authors' repository.
AUTHORS = {
    "method.variant": "official",
    "method.linearization": "mlp",
    "method.threshold": 0.05,
    "method.rank": 64,
    "method.random_vectors": None,
    "method.quantile": 0.97,
    "method.kd_weight": 1.0,
    "method.outlier_weight": 0.01,
    "method.info_weight": 1.0,
    "method.detach_kd": False,
    "method.layers": [17, 23],
    "method.projection_init": "random",
    "data.normalization": "imagenet",
    "data.interpolation": "bilinear",
    "data.crop_scale": [0.08, 1.0],
    "data.hflip": 0.5,
    "train.lr": 1e-3,
    "train.weight_decay": 1e-4,
    "train.betas": [0.9, 0.999],
    "train.decay_norm_and_bias": True,
    "train.epochs": 100,
    "train.batch_size": 512,
    "train.warmup": 0.05,
    "train.min_lr": 1e-4,
    "train.precision": "fp32",
    "train.max_grad_norm": None,
    "train.ema": None,
}


def official(pair="vit_large_to_small", method="singer_official"):
    files = [f"pairs/{pair}.yaml", f"methods/{method}.yaml"]
    return load_config([ROOT / "configs" / file for file in files], ["data.source=x", "output=run"])


@pytest.mark.parametrize("pair", ["vit_large_to_small", "vit_large_to_tiny", "deit3_large_to_base"])
def test_the_official_configuration_has_the_authors_choices(pair):
    values = official(pair).model_dump(mode="json")
    assert {key: values[key.split(".")[0]][key.split(".")[1]] for key in AUTHORS} == AUTHORS
    assert values["image_size"] == 224
    assert values["student"]["weights"] == "random"
    assert values["data"]["crops"] == "random"
    assert values["data"]["epoch_size"] is None


def test_the_document_lists_them():
    document = (ROOT / "docs/fidelity.md").read_text()
    table = document.partition("| choice of the code |")[2].partition("\n\n")[0]
    listed = dict(re.findall(r"`([a-z_.]+)=([^`]*)`", table))
    assert {key: yaml.safe_load(value) for key, value in listed.items()} == AUTHORS


@pytest.mark.parametrize(
    ("pair", "method", "layers", "blocks"),
    [
        ("vit_large_to_small", "singer_official", [17, 23], [8, 11]),
        ("deit3_small_to_tiny", "singer_official", [8, 11], [8, 11]),
        ("vit_large_to_tiny", "fitnet_table1", [11, 17, 23], [5, 8, 11]),
        ("deit3_small_to_tiny", "fitnet_table1_12_blocks", [8, 11], [8, 11]),
    ],
)
def test_the_students_blocks_are_the_authors(pair, method, layers, blocks):
    config = official(pair, method)
    teacher, student = (
        inspect_backbone(model.name, 224, key)
        for key, model in (("teacher", config.teacher), ("student", config.student))
    )
    assert match_models(teacher, student, config.method.layers) == (layers, blocks)


@pytest.fixture
def run(make_config):
    """A tiny run with the official method, data and recipe."""
    claimed = official()
    method = claimed.method.model_dump(include={"variant", "threshold"})
    data = claimed.data.model_dump(include={"interpolation", "normalization"})
    train = claimed.train.model_dump(include={"decay_norm_and_bias"})
    config = make_config(
        teacher={"name": "vit_tiny_patch16_224"}, method=method, data=data, train=train
    )
    (distiller,) = build_methods(config, create_loader(config), torch.device("cpu"))
    return config, distiller


def test_the_official_inputs_are_normalised_as_imagenets(run):
    _, method = run
    images = torch.rand(2, 3, 32, 32)
    expected = transforms.functional.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for backbone in (method.teacher, method.student_backbone):  # timm's own are 0.5
        torch.testing.assert_close(backbone.normalize(images), expected)


def test_the_official_crops_are_torchvisions_defaults(run):
    config, _ = run
    pixels = torch.randint(256, (40, 60, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    for seed in range(8):
        crops = []
        for crop in (create_crop(config.data, 32), theirs):
            torch.manual_seed(seed)
            crops.append(crop(image))
        torch.testing.assert_close(crops[0].float() / 255, crops[1])


def test_the_official_adapters_start_as_the_authors(run):
    """The first r left singular vectors below 0.05."""
    _, method = run
    for layer, block in ((2, 3), (3, 3)):
        mlp = method.teacher.block(block).mlp
        left, values, _ = torch.linalg.svd((mlp.fc2.weight @ mlp.fc1.weight).T)
        null = left[:, values < 0.05][:, :8]  # of so small weights, all are below
        assert null.shape[1] == 8
        adapter = method.adapters[str(layer)]
        # Singular vectors up to their sign: of float32 and float64.
        cosines = (null * adapter.down).sum(dim=0).abs()
        torch.testing.assert_close(cosines, torch.ones(8), rtol=0, atol=1e-3)
        assert torch.equal(adapter.up, adapter.down.T)


def test_the_official_optimizer_decays_every_parameter(run):
    config, method = run
    groups = create_optimizer(method, config.train).param_groups
    trained = sum(p.requires_grad for p in method.parameters())
    assert sum(len(group["params"]) for group in groups) == trained
    assert {group["weight_decay"] for group in groups} == {1e-4}


# --- what the keys do ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 70), (40, 400)])
@pytest.mark.parametrize("crops", ["center", "random"])
def test_crops_are_interpolated_as_configured(size, crops):
    pixels = np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = {}
    for interpolation, resampling in (
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
    ):
        used = []
        resize = Image.Image.resize

        def record(self, size, resample, *args, used=used, resize=resize, **kwargs):
            used.append(resample)
            return resize(self, size, resample, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image.Image, "resize", record)
            torch.manual_seed(0)
            data = DataConfig(source="x", crops=crops, interpolation=interpolation)
            found[interpolation] = create_crop(data, 32)(image)
        assert used == [resampling]
    assert not torch.equal(found["bicubic"], found["bilinear"])


def test_random_vectors_are_the_variants_or_chosen():
    rank = 5
    teacher, student = tiny_backbone(VIT, depth=4), tiny_backbone(VIT, dim=16)
    for options, is_orthonormal in (
        ({}, True),
        ({"variant": "official"}, False),
        ({"variant": "official", "random_vectors": "orthonormal"}, True),
        ({"random_vectors": "gaussian"}, False),
        ({"selection": "official"}, False),
    ):
        method = SiNGER(teacher, student, [3], rank=rank, linearization="random", **options)
        down = method.adapters["3"].down.detach()
        # float32 products of 32 terms; Gaussian vectors of 32 entries are far from orthogonal.
        off_diagonal = (down.T @ down - torch.eye(rank)).abs().max()
        assert (off_diagonal < 1e-5) == is_orthonormal, options
        assert is_orthonormal or off_diagonal > 0.1
        torch.testing.assert_close(down.norm(dim=0), torch.ones(rank))
