"""Settings: every error at once, with its key path and the nearest name, and nothing written before they hold."""

import re
from pathlib import Path

import pytest
import yaml

from ddpm_ema import ConstantDecay, Delayed, HalfLife, Window, config
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import Checkpoint
from ddpm_ema.train.resume import check_resume

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
        "extractors": ["inception-v3-compat"],
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
    assert set(loaded["averages"]) == {"ema_0_999", "ema_0_9999", "power_0_05", "power_0_10", "uniform"}


def test_a_snapshot_of_what_is_not_kept_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    message = problems("averages: {ema: {kind: uniform}}\ncheckpoints: {snapshots: [raw, emma]}\n", tmp_path)
    assert "checkpoints.snapshots: 'emma' is neither raw nor under averages; did you mean 'ema'?" in message


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


def test_errors_of_the_file_and_of_the_command_line_come_together_each_under_its_source(tmp_path: Path) -> None:
    text = "seed: -1\naverages: {a: {kind: constant, decay: 2}, b: {kind: constant, decay: 0.9}}\n"
    message = problems(text, tmp_path, training__batch_sise=["8"], averages__b__decay=["7"], data__channels=["2"])
    file, command_line = message.split("command line: 3 bad settings\n")
    assert file.startswith(f"{tmp_path / 'settings.yaml'}: 2 bad settings\n  seed: ")
    assert "  averages.a: decay: " in file
    assert "  training.batch_sise: unknown setting; did you mean 'batch_size'?" in command_line
    assert "  averages.b: decay: " in command_line
    assert "  data.channels: input should be 1 or 3" in command_line


def test_a_disagreement_is_of_the_command_line_where_one_of_its_values_is_named(tmp_path: Path) -> None:
    text = "model: {block_out_channels: [8, 16], attention: [false, true]}\n"
    message = problems(text, tmp_path, model__block_out_channels=["8"])
    assert message == (
        "command line: 1 bad setting\n  model.attention: needs one entry for each of model.block_out_channels"
    )
    message = problems(text + "training: {batch_size: 4, micro_batch_size: 8}\n", tmp_path, seed=["1"])
    assert message.startswith(
        f"{tmp_path / 'settings.yaml'}: 1 bad setting\n  training.micro_batch_size: 8 is more than"
    )


def test_a_setting_in_the_wrong_section_is_told_its_place(tmp_path: Path) -> None:
    assert "did you mean 'training.learning_rate'?" in problems("learning_rate: 0.1\n", tmp_path)


def test_a_number_in_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("training: {learning_rate: 1e-3, weight_decay: 5E-2}\n")
    loaded = config.load(path, {"training.adam_epsilon": ["1e-7"]}).training
    assert (loaded.learning_rate, loaded.weight_decay, loaded.adam_epsilon) == (0.001, 0.05, 1e-7)


LENGTHS = """training: {steps: 1500, batch_size: 512}
averages:
  edm: {kind: half_life, half_life: 500kimg}
  last_fifth: {kind: window, length: 20%, end: 100%}
  late: {kind: constant, decay: 0.999, start: 10%}
"""


def test_lengths_in_images_and_shares_of_the_run_are_resolved_once_and_recorded_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(LENGTHS)
    loaded = config.load(path)
    assert loaded.averages == {
        "edm": HalfLife(976.5625),
        "last_fifth": Window(length=300, end=1500),
        "late": Delayed(ConstantDecay(0.999), start=150),
    }
    path.write_text(config.to_yaml(loaded))
    longer = config.load(path, {"training.steps": ["3000"]})
    assert longer.averages == loaded.averages


def test_a_switch_without_a_value_is_no_number() -> None:
    with pytest.raises(UserError, match=r"4 bad(.|\n)*learning_rate: needs a value, not true"):
        config.load(None, {key: [] for key in ("seed", "data.path", "training.steps", "training.learning_rate")})
    assert config.load(None, {"training.compile": [], "training.split_averages": []}).training.split_averages is True


def test_no_is_a_precision_and_no_number_of_steps() -> None:
    assert config.load(None, {"training.mixed_precision": ["no"]}).training.mixed_precision == "no"
    assert config.load(None, {"evaluation.clip_sample": ["no"]}).evaluation.clip_sample is False
    assert config.load(None, {"training.compile": ["On"]}).training.compile is True


def test_shares_are_of_the_steps_however_these_are_written() -> None:
    for steps in ("2e3", "'2000'", "2000"):
        found = config.load(None, {"training.steps": [steps], "training.sample_every": ["5%"]}).training
        assert (found.steps, found.sample_every) == (2000, 100)
    assert config.load(None, {"training.sample_every": ["0%"]}).training.sample_every == 0


def test_intervals_that_are_shares_keep_their_place_in_a_shortened_run() -> None:
    for steps in (20_000, 2_000, 12):
        run = config.load(ROOT / "configs" / "image_folder.yaml", {"training.steps": [str(steps)]})
        found = (
            run.training.warmup_steps,
            run.training.sample_every,
            run.checkpoints.every,
            run.checkpoints.keep_every,
        )
        assert found == tuple(max(1, round(steps * share)) for share in (0.025, 0.05, 0.05, 0.25))


def test_a_resumed_run_with_more_steps_cannot_change_a_resolved_length_unnoticed(tmp_path: Path) -> None:
    path, record = tmp_path / "settings.yaml", tmp_path / "config.yaml"
    path.write_text(LENGTHS)
    record.write_text(config.to_yaml(config.load(path)))
    checkpoint = Checkpoint(tmp_path / "step-00001500")
    checkpoint.manifest = {"settings": config.to_dict(config.load(record)), "world_size": 1}
    more = {"training.steps": ["3000"]}
    with pytest.raises(UserError) as refused:
        check_resume(config.load(path, more), checkpoint, world_size=1)
    assert "averages.last_fifth: was {'kind': 'window', 'length': 300, 'end': 1500}, is {" in str(refused.value)
    assert "averages.late: was {'kind': 'constant', 'decay': 0.999, 'start': 150}, is {" in str(refused.value)
    assert "averages.edm" not in str(refused.value)
    check_resume(config.load(record, more), checkpoint, world_size=1)  # the run's own config.yaml goes on


def test_a_bad_length_is_named_with_its_key_path_beside_the_other_errors(tmp_path: Path) -> None:
    message = problems("training: {steps: 0}\naverages: {w: {kind: window, length: a fifth, end: 100%}}\n", tmp_path)
    assert "2 bad settings" in message
    assert "averages.w: length: expected a number of steps, a share of the run such as 5%" in message


@pytest.mark.parametrize("name", ["ema.999", "raw", "a b", '""'])
def test_a_bad_name_of_an_average_is_an_error(name: str, tmp_path: Path) -> None:
    assert "averages" in problems(f"averages: {{{name}: {{kind: uniform}}}}\n", tmp_path)


def test_a_repeated_name_is_an_error_where_yaml_alone_would_keep_the_last(tmp_path: Path) -> None:
    text = "averages:\n  ema: {kind: constant, decay: 0.9}\n  ema: {kind: constant, decay: 0.99}\n"
    message = problems(text, tmp_path)
    assert "line 3" in message
    assert "'ema' is repeated" in message


def test_weights_that_nobody_keeps_are_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    text = "averages: {ema_0_999: {kind: constant, decay: 0.999}}\nevaluation: {weights: [ema_0_99]}\n"
    assert "did you mean 'ema_0_999'?" in problems(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("[1, 2]", "mapping"), ("a: [1", "not YAML"), ("training: 3", "training")]
)
def test_a_file_that_is_no_mapping_of_sections_says_so(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in problems(text, tmp_path)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB + "seed: *a8", "aliases"),
        (BOMB + "averages: {a: {kind: *a8}}", "aliases"),
        ("a: &a {b: 1}\nc: &c {<<: [*a, *a, *a], d: &d [*a]}\nseed: &s [*s]", "aliases"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "[" * 60 + "]" * 60, "nested too deeply"),
        (f"seed: {[1] * 50_000}", "more than 100,000 characters"),
        ("? [a, b]\n: c", r"line 1: a key must be a word"),
        ("seed: " + "9" * 6000, "line 1: .* more than 63 bits"),
        ("seed: 0x" + "f" * 9000, "line 1: .* more than 63 bits"),
        ("seed: 2020-99-99", "seed: input should be a valid integer.*'2020-99-99'"),
        ("seed: !!timestamp x", "cannot be read"),
        ("seed: !!bool x", "cannot be read"),
        ("seed: [" + "abcdefgh, " * 500 + "]", r"seed: input should be a valid integer.*\.\.\."),
        ("machine: {device: " + "x" * 5000 + "}", r"machine\.device: .*x\.\.\.x"),
        ("averages: {a: {kind: " + "x" * 5000 + "}}", r"averages\.a: kind: unknown profile 'x+"),
        ("averages: {a: {kind: constant, decay: [[[[[[1]]]]]]}}", "expected a number with 0 <= decay <= 1"),
        ("x" * 900 + ": 1", "x{80}: unknown setting"),
        ("'x]': 1", r"x\]: unknown setting"),
        ("".join(f"k{i}: 1\n" for i in range(2000)), r"2000 bad settings"),
        ("1: 2\ntrue: 3", "keys should be strings"),
        ("training:\n", "training: is a section: write its settings below it, or leave it out"),
        ("training: {steps: true}\noutput_dir: true", "2 bad(.|\n)*steps: needs a value, not true"),
        ("evaluation: {every: yes}\ntraining: {sample_every: on}", "2 bad(.|\n)*unable to parse string as an int"),
        ("training: {steps: five, sample_every: 5%}\ncheckpoints: {every: 5%}", "1 bad setting\n.*steps"),
        ("training: {steps: 2, log_every: 0%}", "log_every: input should be greater than 0"),
        ("averages: {1: {kind: uniform}}", r"averages\.1"),
    ],
)
def test_whatever_stands_in_a_file_gives_a_short_message(text: str, expected: str, tmp_path: Path) -> None:
    message = problems(text, tmp_path)
    assert re.search(expected, message), message[:2000]
    assert len(message) < 6000
    assert max(map(len, message.splitlines())) < 1000


def test_a_range_is_a_range_where_yaml_would_read_a_number_of_base_60() -> None:
    found = config.load(None, {"evaluation.sweep.cooldowns": ["3:9:3"], "evaluation.sweep.stds": ["0.04:0.20:3"]})
    assert (found.evaluation.sweep.cooldowns, found.evaluation.sweep.stds) == ("3:9:3", "0.04:0.20:3")
    tree = config.load(None, {"training.steps": ["1_000"], "training.learning_rate": ["2e-4"], "seed": ["0x10"]})
    assert (tree.training.steps, tree.training.learning_rate, tree.seed) == (1000, 2e-4, 16)


def test_a_folder_called_like_a_date_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("output_dir: 2024-01-31\n")
    assert config.load(tmp_path / "settings.yaml").output_dir == Path("2024-01-31")


def test_an_alias_that_is_no_bomb_is_read(tmp_path: Path) -> None:
    text = "averages:\n  a: &base {kind: warmup, decay: 0.9}\n  b: {<<: *base, decay: 0.99}\n"
    (tmp_path / "settings.yaml").write_text(text)
    assert config.to_dict(config.load(tmp_path / "settings.yaml"))["averages"]["b"]["decay"] == 0.99


def test_the_command_line_takes_both_forms_lists_switches_and_dashes() -> None:
    arguments = (
        "runs/x --config=a.yaml --training.steps 5 --training.batch-size=7 --evaluation.weights raw ema --training.compile "
        "--averages.my-ema.decay 0.9"
    )
    run, path, overrides = config.split(arguments.split())
    assert (run, path) == ("runs/x", "a.yaml")
    assert overrides == {
        "training.steps": ["5"],
        "training.batch_size": ["7"],
        "evaluation.weights": ["raw", "ema"],
        "training.compile": [],
        "averages.my-ema.decay": ["0.9"],
    }


def test_one_value_for_a_setting_that_takes_several_is_a_list_of_one() -> None:
    loaded = config.load(None, {"evaluation.weights": ["raw"], "evaluation.steps": ["7"], "data.split": ["test"]})
    assert loaded.evaluation.weights == ("raw",)
    assert loaded.evaluation.steps == (7,)
    assert config.load(None, {"evaluation.steps": ["all"]}).evaluation.steps == "all"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/x", "5"], "'5': not a setting; write RUN, --config FILE"),
        (
            ["-training.steps=5", "--config", "configs/digits.yaml"],
            "'-training.steps=5': a setting begins with two hyphens",
        ),
        (["\N{EN DASH}training.steps", "5"], "a setting begins with two hyphens"),
        (["--training.seed", "1"], r"training\.seed: unknown setting; did you mean 'seed'\?"),
        (["--evaluation.steps", "lsat"], r"evaluation\.steps: input should be 'last' or 'all'"),
        (["--config"], "--config: takes one file"),
        (["--config", "a", "-training.steps"], "--config: takes one file, not a -training.steps"),
        (["--config", "nowhere.yaml"], r"--config nowhere\.yaml: no such file$"),
        (["--config", "configs/digit.yaml"], r"no such file; did you mean 'digits\.yaml'\?"),
        (["--config", "configs"], "--config configs: Is a directory"),
        (["--config", "docs/images/digits_grid.png"], r"digits_grid\.png: not a text file"),
        (["nowhere"], r"nowhere: no such run directory; name one, or settings with --config FILE"),
        (["."], r"\.: no run directory: it holds no config\.yaml; .* a folder of images with --data\.path"),
    ],
)
def test_a_command_line_that_names_no_settings_is_one_message(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=expected):
        config.parse(arguments)


def test_a_mistyped_run_is_told_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"no such run directory.*; did you mean 'photos'\?"):
        config.parse([str(tmp_path / "fotos")])
    with pytest.raises(UserError, match="FILE; known here: photos"):  # the folder above makes no two names alike
        config.parse([str(tmp_path / "x")])


def test_a_run_directory_gives_its_settings_where_it_lies_now(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("output_dir: runs/where-it-was\nseed: 7\n")
    found = config.parse([str(tmp_path), "--training.steps", "5"])
    assert (found.output_dir, found.seed, found.training.steps) == (tmp_path, 7, 5)
    assert config.parse([str(tmp_path), "--output-dir", "elsewhere"]).output_dir == Path("elsewhere")
    other = config.parse(["2024-01-31", "--config", str(tmp_path / "config.yaml")])
    assert (other.output_dir, other.seed) == (Path("2024-01-31"), 7)


def test_every_setting_has_a_description() -> None:
    for field in config.Config.model_fields.values():
        for name, setting in getattr(field.annotation, "model_fields", {}).items():
            assert setting.description, name


@pytest.mark.parametrize("key", ["seed", "evaluation.seed"])
def test_a_seed_beyond_32_bits_is_an_error_because_it_is_half_of_a_key(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: input should be less than 4294967296"):
        config.load(None, {key: [str(2**32)]})


def test_cached_data_go_to_one_folder_that_the_environment_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert config.DataSettings().cache_folder == Path("/caches/ddpm_ema")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.DataSettings().cache_folder == Path.home() / ".cache" / "ddpm_ema"
    assert config.DataSettings(cache_dir=Path("mine")).cache_folder == Path("mine")


@pytest.mark.parametrize("name", ["2024", "007", "a #1", "a: b", "[x]", "true", "*x", "x\ny"])
def test_a_text_or_a_path_on_the_command_line_is_taken_as_it_stands(name: str) -> None:
    overrides = {"data.path": [name], "data.split": [name], "output_dir": [name], "evaluation.extractors": [name]}
    overrides["data.source"] = ["folder"]
    found = config.load(None, overrides)
    assert (found.data.path, found.data.split, found.output_dir) == (Path(name), name, Path(name))
    assert found.evaluation.extractors == (name,)


@pytest.mark.parametrize("nothing", ["", "null"])
def test_an_empty_path_on_the_command_line_is_none_and_not_the_working_directory(nothing: str) -> None:
    with pytest.raises(UserError, match=r"data\.path: a folder source needs the folder"):
        config.load(None, {"data.source": ["folder"], "data.path": [nothing]})


def test_a_list_on_the_command_line_may_be_written_as_in_a_file() -> None:
    found = config.load(None, {"model.block_out_channels": ["[32, 64]"], "model.attention": ["[false, true]"]})
    assert (found.model.block_out_channels, found.model.attention) == ((32, 64), (False, True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.steps: 5\n", r"training\.steps: in a file write steps below its section, training$"),
        ("training: {mixed_precision: fp32}\n", r"should be 'no', 'bf16' or 'fp16' \(got 'fp32'\)"),
        ("evaluation: {steps: first}\n", r"\n  evaluation\.steps: "),
    ],
)
def test_a_message_leads_nowhere_else(text: str, expected: str, tmp_path: Path) -> None:
    assert re.search(expected, problems(text, tmp_path))


def test_a_number_with_leading_zeros_is_decimal() -> None:
    assert config.load(None, {"seed": ["010"]}).seed == 10


@pytest.mark.parametrize("source", ["digits", "hub"])
def test_a_folder_of_images_beside_a_source_that_reads_none_is_an_error(source: str) -> None:
    with pytest.raises(UserError, match=rf"command line: .*\n  data\.path: the source {source} reads no folder; for a"):
        config.load({"data": {"source": source, "name": "x"}}, {"data.path": ["photos"]})
