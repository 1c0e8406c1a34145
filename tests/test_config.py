"""Settings: every error at once, with its key path and the nearest name, and nothing written before they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ddpm_ema import cli, config
from ddpm_ema.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def problems(text: str, tmp_path: Path, **overrides: list[str]) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(path, {key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    loaded = config.load(path)
    again = config.validate(config.to_dict(loaded))
    assert again == loaded
    assert config.digest(config.to_dict(again)) == config.digest(config.to_dict(loaded))


# Ho et al. 2020: section 4, appendix B, and their code (initialisation, GroupNorm's 32 groups, Adam's defaults).
PAPERS_RECIPE = {
    "data": {"name": "CIFAR10", "split": "train", "image_size": 32, "channels": 3, "horizontal_flip": True},
    "model": {
        "block_out_channels": [128, 256, 256, 256],
        "layers_per_block": 2,
        "attention": [False, True, False, False],
        "norm_num_groups": 32,
        "dropout": 0.1,
        "initialization": "ddpm",
    },
    "diffusion": {
        "num_train_timesteps": 1000,
        "schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction": "epsilon",
        "variance": "fixed_large",
    },
    "training": {
        "steps": 800_000,
        "batch_size": 128,
        "learning_rate": 2e-4,
        "learning_rate_schedule": "constant",
        "warmup_steps": 5000,
        "optimizer": "adam",
        "adam_betas": [0.9, 0.999],
        "adam_epsilon": 1e-8,
        "gradient_clip": 1.0,
    },
    "averages": {"ema_0_9999": {"kind": "constant", "decay": 0.9999}},
    "evaluation": {
        "num_images": 50_000,
        "sampler": "ddpm",
        "num_inference_steps": 1000,
        "extractor": "inception-v3-compat",
        "reference": "train",
    },
}


def test_the_cifar10_config_spells_out_the_whole_recipe_of_the_paper() -> None:
    """In the file itself, so that no default of ours can change what it claims."""
    path = ROOT / "configs" / "cifar10.yaml"
    written, loaded = yaml.safe_load(path.read_text()), config.to_dict(config.load(path))
    for section, recipe in PAPERS_RECIPE.items():
        assert recipe.keys() <= written[section].keys(), section
        assert {key: loaded[section][key] for key in recipe} == recipe


def test_all_errors_of_a_file_come_at_once_with_key_path_and_nearest_name(tmp_path: Path) -> None:
    text = "training: {stepz: 4, steps: abc, mixed_precision: bf15}\nlerning: 3\naverages: {a: {kind: constnt}}\n"
    message = problems(text, tmp_path)
    assert "5 bad settings" in message
    assert "training.stepz: unknown setting; did you mean 'steps'?" in message
    assert "training.steps: input should be a valid integer" in message
    assert "did you mean 'bf16'? (got 'bf15')" in message
    assert "lerning: unknown setting; did you mean 'training'?" in message
    assert "averages.a" in message
    assert "'constant'" in message


def test_errors_of_the_file_and_of_the_command_line_come_together(tmp_path: Path) -> None:
    message = problems("seed: -1\n", tmp_path, training__batch_sise=["8"])
    assert "2 bad settings" in message
    assert "seed:" in message
    assert "training.batch_sise: unknown setting; did you mean 'batch_size'?" in message


def test_a_setting_in_the_wrong_section_is_told_its_place(tmp_path: Path) -> None:
    assert "did you mean 'training.learning_rate'?" in problems("learning_rate: 0.1\n", tmp_path)


def test_a_number_in_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("training: {learning_rate: 1e-3, weight_decay: 5E-2}\n")
    loaded = config.load(path, {"training.adam_epsilon": ["1e-7"]}).training
    assert (loaded.learning_rate, loaded.weight_decay, loaded.adam_epsilon) == (0.001, 0.05, 1e-7)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("{kind: constant, decay: 1.5}", "decay"),
        ("{kind: constant, decay: -0.1}", "decay"),
        ("{kind: power_function, std: 0.4}", "std"),
        ("{kind: power_function, std: 0.0}", "std"),
        ("{kind: constant, decay: 0.9, tau: 1}", "tau"),
        ("{decay: 0.9}", "kind"),
    ],
)
def test_a_profile_out_of_range_is_an_error_at_that_field(profile: str, expected: str, tmp_path: Path) -> None:
    message = problems(f"averages: {{mine: {profile}}}\n", tmp_path)
    assert "averages.mine" in message
    assert expected in message


@pytest.mark.parametrize("name", ["ema.999", "raw", "a b", '""'])
def test_a_bad_name_of_an_average_is_an_error(name: str, tmp_path: Path) -> None:
    assert "averages" in problems(f"averages: {{{name}: {{kind: uniform}}}}\n", tmp_path)


def test_a_repeated_name_is_an_error_where_yaml_alone_would_keep_the_last(tmp_path: Path) -> None:
    text = "averages:\n  ema: {kind: constant, decay: 0.9}\n  ema: {kind: constant, decay: 0.99}\n"
    message = problems(text, tmp_path)
    assert "line 3" in message
    assert "'ema' stands there twice" in message


def test_weights_that_nobody_keeps_are_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    text = "averages: {ema_0_999: {kind: constant, decay: 0.999}}\nevaluation: {weights: [ema_0_99]}\n"
    assert "did you mean 'ema_0_999'?" in problems(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("[1, 2]", "mapping"), ("a: [1", "not YAML"), ("training: 3", "training")]
)
def test_a_file_that_is_no_mapping_of_sections_says_so(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in problems(text, tmp_path)


def test_a_missing_file_is_one_message() -> None:
    with pytest.raises(UserError, match=r"--config nowhere\.yaml: No such file"):
        config.load("nowhere.yaml")


def test_the_command_line_takes_both_forms_lists_switches_and_dashes() -> None:
    arguments = (
        "--config=a.yaml --training.steps 5 --training.batch-size=7 --evaluation.weights raw ema --training.no-compile"
    )
    path, overrides = cli.split(arguments.split())
    assert path == "a.yaml"
    assert overrides == {
        "training.steps": ["5"],
        "training.batch_size": ["7"],
        "evaluation.weights": ["raw", "ema"],
        "training.compile": ["false"],
    }


def test_one_value_for_a_setting_that_takes_several_is_a_list_of_one() -> None:
    loaded = config.load(None, {"evaluation.weights": ["raw"], "evaluation.steps": ["7"], "data.split": ["test"]})
    assert loaded.evaluation.weights == ("raw",)
    assert loaded.evaluation.steps == (7,)
    assert config.load(None, {"evaluation.steps": ["all"]}).evaluation.steps == "all"


def test_a_stray_word_is_an_error() -> None:
    with pytest.raises(UserError, match="'steps': not a setting"):
        cli.split(["steps", "5"])


def test_guard_prints_one_message_and_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("what, where, what to do")

    assert cli.guard(fail) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: what, where, what to do\n"
    assert captured.out == ""


def test_help_lists_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--config", str(ROOT / "configs" / "digits.yaml"), "--help"], "What it does.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section, field in config.Config.model_fields.items():
        for setting in getattr(field.annotation, "model_fields", {}):
            assert f"--{section}.{setting}" in text
    assert "--averages.power_0_05" in text
    assert "(default: 64)" in " ".join(text.split())


def test_every_setting_has_a_description() -> None:
    for field in config.Config.model_fields.values():
        for name, setting in getattr(field.annotation, "model_fields", {}).items():
            assert setting.description, name


@pytest.mark.parametrize("key", ["seed", "evaluation.seed"])
def test_a_seed_beyond_32_bits_is_an_error_because_it_is_half_of_a_key(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: input should be less than 4294967296"):
        config.load(None, {key: [str(2**32)]})
