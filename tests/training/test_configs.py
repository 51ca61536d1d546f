"""The shipped configurations: each fits its models, and trains them for a step when shrunk."""

import copy
import functools
import itertools
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2
from tiny_models import generator

from singer.cli import main
from singer.config.loading import load_config
from singer.config.schema import TrainConfig, method_config
from singer.errors import SingerError
from singer.methods import METHODS
from singer.methods.base import match_models
from singer.models.backbones import create_backbone, inspect_backbone

FOLDER = Path(__file__).parents[2] / "configs"
RUN = ["data.source=images", "output=run"]
DIM, GRID = 32, 3  # of the shrunk models; a teacher is twice as wide


def files(kind):
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob(f"{kind}/*.yaml"))


PAIRS, METHOD_FILES, ABLATIONS = files("pairs"), files("methods"), files("ablations")
ABLATED = "pairs/vit_large_to_small.yaml"
CASES = [
    ("photos.yaml",),
    *(
        (pair, method)
        for pair in PAIRS
        for method in METHOD_FILES
        # FitNet's presets name blocks: each fits teachers of one depth.
        if "table1" not in method or ("12_blocks" in method) == ("small_to" in pair)
    ),
    *((ABLATED, ablation) for ablation in ABLATIONS),
]
# Every pair and every method, not each with each.
BY_DEFAULT = {
    ("photos.yaml",),
    *zip(PAIRS, itertools.cycle(name for name in METHOD_FILES if "table1" not in name)),
    (ABLATED, "methods/fitnet_table1.yaml"),
    ("pairs/deit3_small_to_tiny.yaml", "methods/fitnet_table1_12_blocks.yaml"),
    *((ABLATED, ablation) for ablation in ABLATIONS[::4]),
}


def case_id(case):
    return "+".join(Path(name).stem for name in case)


each_case = pytest.mark.parametrize("case", CASES, ids=case_id)


def load(case):
    return load_config([FOLDER / name for name in case], RUN)


@functools.cache
def structure(name, image_size, key, options):
    return inspect_backbone(name, image_size, key, dict(options))


def structures(config):
    """Return the true models of a configuration, without values."""
    return [
        structure(model.name, config.image_size, key, tuple(model.options.items()))
        for key, model in (("teacher", config.teacher), ("student", config.student))
    ]


@functools.cache
def built(name, image_size, key, options):
    torch.manual_seed(0)
    return create_backbone(name, image_size, key, options=dict(options))


def shrunk(model, key, patch):
    """Return a model of the same family, depth and patch, narrow and on few patches."""
    width = 2 * DIM if key == "teacher" else DIM
    options = {**model.options, "embed_dim": width, "num_heads": 2}
    return copy.deepcopy(built(model.name, GRID * patch, key, tuple(options.items())))


# --- what is shipped ------------------------------------------------------------------------------


def test_everything_is_shipped():
    names = {Path(name).stem for name in PAIRS + METHOD_FILES + ABLATIONS}
    assert names >= {
        *("vit_large_to_small", "vit_large_to_tiny", "deit3_large_to_base", "deit3_small_to_tiny"),
        *("dinov2_large_to_tiny", "clip_large_to_tiny", "dinov3_large_to_tiny"),
        *("singer_paper", "singer_official", "fitnet", "vitkd", "vitkd_same_layers"),
        *("fitnet_table1", "fitnet_table1_12_blocks"),
        *("random_basis", "no_information", "no_outlier", "no_losses", "no_losses_random_basis"),
        *("rank_8", "rank_16", "rank_32", "rank_64", "rank_128"),
        *("quantile_90", "quantile_95", "quantile_97", "quantile_99"),
        *(f"outlier_weight_{weight}" for weight in ("0.05", "0.1", "0.5", "1", "10")),
        *("layers_11_17_23", "detached_kd"),
    }
    readme = (FOLDER / "README.md").read_text()
    between = ("rank_", "quantile_", "outlier_weight_")  # the first and the last are named
    for name in [*METHOD_FILES, *(n for n in ABLATIONS if not Path(n).stem.startswith(between))]:
        assert f"`{Path(name).stem}`" in readme


def test_no_file_lies_elsewhere():
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")}
    assert found == {"photos.yaml", *PAIRS, *METHOD_FILES, *ABLATIONS}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_have_the_authors_recipe(pair):
    config = load([pair])
    assert config.train == TrainConfig(batch_size=512)
    recipe = config.train
    assert (recipe.epochs, recipe.lr, recipe.min_lr, recipe.weight_decay) == (100, 1e-3, 1e-4, 1e-4)
    assert recipe.warmup * recipe.epochs == 5
    assert recipe.betas == (0.9, 0.999)
    assert (recipe.precision, recipe.max_grad_norm, recipe.ema) == ("fp32", None, None)
    assert config.image_size == (518 if "dinov2" in pair else 224)
    assert config.method.layers == ([8, 11] if "small_to" in pair else [17, 23])
    assert timm.is_model_pretrained(config.teacher.name)
    assert "." in config.teacher.name  # the weights are named, not left to timm's default
    assert config.teacher.weights == "pretrained"
    assert config.student.weights == "random"


@pytest.mark.parametrize(
    ("pair", "teacher", "student"),
    [
        ("vit_large_to_small", (24, 1024, 14), (12, 384)),
        ("vit_large_to_tiny", (24, 1024, 14), (12, 192)),
        ("deit3_large_to_base", (24, 1024, 14), (12, 768)),
        ("deit3_small_to_tiny", (12, 384, 14), (12, 192)),
        ("dinov2_large_to_tiny", (24, 1024, 37), (12, 192)),
        ("clip_large_to_tiny", (24, 1024, 16), (12, 192)),
        ("dinov3_large_to_tiny", (24, 1024, 14), (12, 192)),
    ],
)
def test_pairs_are_the_models_they_are_called(pair, teacher, student):
    big, small = structures(load([f"pairs/{pair}.yaml"]))
    assert (big.depth, big.dim, big.grid) == (*teacher[:2], (teacher[2],) * 2)
    assert (small.depth, small.dim) == student


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("singer_paper", method_config("singer")(layers=[17, 23])),
        ("singer_official", method_config("singer")(layers=[17, 23], variant="official")),
        ("fitnet", method_config("fitnet")(layers=[17, 23])),
        ("fitnet_table1", method_config("fitnet")(layers=[11, 17, 23], kd_weight=10.0)),
        (
            "fitnet_table1_12_blocks",
            method_config("fitnet")(layers=[8, 11], layer_weights=[1.0, 2.0], kd_weight=10.0),
        ),
        ("vitkd", method_config("vitkd")(layers=[-1], mimic_layers=(0, 1), generation_weight=0.1)),
        ("vitkd_same_layers", method_config("vitkd_same_layers")(layers=[17, 23])),
    ],
)
def test_methods_share_the_recipe_and_their_options_are_those_named(file, expected):
    plain, config = load([ABLATED]), load([ABLATED, f"methods/{file}.yaml"])
    assert config.method == expected
    train, data = {}, {}
    if file == "singer_official":
        train = {"decay_norm_and_bias": True}
        data = {"interpolation": "bilinear", "normalization": "imagenet"}
    assert config.train == plain.train.model_copy(update=train)
    assert config.data == plain.data.model_copy(update=data)
    for section in ("teacher", "student", "image_size"):
        assert getattr(config, section) == getattr(plain, section)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("random_basis", {"linearization": "random"}),
        ("no_information", {"info_weight": 0.0}),
        ("no_outlier", {"outlier_weight": 0.0}),
        ("no_losses", {"outlier_weight": 0.0, "info_weight": 0.0}),
        (
            "no_losses_random_basis",
            {"outlier_weight": 0.0, "info_weight": 0.0, "linearization": "random"},
        ),
        ("detached_kd", {"detach_kd": True}),
        ("layers_11_17_23", {"layers": [11, 17, 23]}),
        *((f"rank_{rank}", {"rank": rank}) for rank in (8, 16, 32, 64, 128)),
        *((f"quantile_{q}", {"quantile": q / 100}) for q in (90, 95, 97, 99)),
        *((f"outlier_weight_{w}", {"outlier_weight": w}) for w in (0.05, 0.1, 0.5, 1, 10)),
    ],
)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_an_ablation_changes_its_options_alone(variant, file, change):
    before = [ABLATED, f"methods/singer_{variant}.yaml"]
    plain, config = load(before), load([*before, f"ablations/{file}.yaml"])
    assert config == plain.model_copy(update={"method": plain.method.model_copy(update=change)})
    assert config.method.variant == variant


# --- every one fits and trains --------------------------------------------------------------------


@each_case
def test_a_configuration_fits_its_models(case):
    config = load(case)
    teacher, student = structures(config)
    layers, of_student = match_models(teacher, student, config.method.layers)
    assert layers[-1] == teacher.depth - 1
    assert of_student[-1] == student.depth - 1
    METHODS[config.method.name].check(teacher, student, config.method.model_dump())


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in BY_DEFAULT else pytest.mark.slow) for case in CASES],
    ids=case_id,
)
def test_a_configuration_trains_for_a_step(case):
    config = load(case)
    true_teacher, _ = structures(config)
    patch = config.image_size // true_teacher.grid[0]
    options = config.method.model_dump(exclude={"name"})
    if isinstance(config.method, method_config("singer")):
        options["rank"] = max(1, config.method.rank * 2 * DIM // true_teacher.dim)
    torch.manual_seed(0)
    method = METHODS[config.method.name](
        shrunk(config.teacher, "teacher", patch),
        shrunk(config.student, "student", patch),
        **options,
    )
    train = config.train
    optimizer = create_optimizer_v2(
        method,
        opt="adamw",
        lr=train.lr,
        weight_decay=train.weight_decay,
        betas=train.betas,
        filter_bias_and_bn=not train.decay_norm_and_bias,
    )
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in trainable.values()}
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    size = (2, 3, GRID * patch, GRID * patch)
    images = torch.randint(256, size, generator=generator(0), dtype=torch.uint8)
    losses = method.train()(images)
    assert all(loss.isfinite() for loss in losses.values())
    losses["loss"].backward()
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in trainable.values())
    moved = {n.partition(".")[0] for n, p in trainable.items() if not torch.equal(p, before[n])}
    assert moved == {name.partition(".")[0] for name in trainable}
    assert method(images)["loss"].isfinite()


# --- several files --------------------------------------------------------------------------------


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_later_files_win_key_by_key(tmp_path, values):
    base = write(tmp_path / "a.yaml", values)
    second = write(tmp_path / "b.yaml", {"method": {"rank": 5, "layers": [1, 3]}})
    third = write(tmp_path / "c.yaml", {"method": {"layers": [2]}, "train": {"lr": 0.5}})
    config = load_config([base, second, third], ["train.lr=0.25"])
    assert (config.method.rank, config.method.layers, config.train.lr) == (5, [2], 0.25)
    assert config.train.steps == values["train"]["steps"]
    assert load_config([second, third, base]).method.rank == values["method"]["rank"]
    assert load_config([base]) == load_config(base) == load_config(str(base))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "b.yaml"),
        ("- 1", "b.yaml: expected keys and values"),
        ("method: [1]", r"b.yaml: method: got \['1'\], expected keys and values"),
        ("train: {stepz: 1}", "unknown key 'train.stepz'; did you mean 'steps'"),
        ("output: a\noutput: b", "b.yaml: found the key 'output' twice"),
    ],
)
def test_a_mistake_in_a_later_file_is_one_line(tmp_path, values, content, expected):
    base = write(tmp_path / "a.yaml", values)
    second = tmp_path / "b.yaml"
    second.write_text(content)
    with pytest.raises(SingerError, match=expected) as caught:
        load_config([base, second])
    assert "\n" not in str(caught.value)


def test_no_file_is_an_empty_configuration():
    with pytest.raises(SingerError, match="teacher: missing"):
        load_config([])


def test_the_command_line_takes_several_files(tmp_path, values, capsys):
    base = write(tmp_path / "a.yaml", values)
    second = write(tmp_path / "b.yaml", {"method": {"rank": 99}})
    arguments = ["distill", "--config", str(base), "--config", str(second)]
    assert main(arguments) == 2
    assert "method.rank: got 99" in capsys.readouterr().err
    assert main([*arguments, "method.rank=0"]) == 2
    assert "method.rank: got 0" in capsys.readouterr().err
