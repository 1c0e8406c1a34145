"""`NAME[@STEP][+NAME...]`: one grammar for every stage, one spelling for every number, and never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ema.averaging import PROFILES, profile_from_dict, profile_to_dict
from ddpm_ema.weight_names import FIELDS, WeightName, canonical, name_of_profile, parse, profile_named, split_step

AVERAGES = ("ema_0_999", "power_0_1", "mean")
EXAMPLES = [
    ({"kind": "power_function", "std": 0.075}, "power_0_075"),
    ({"kind": "power_function", "std": 0.1}, "power_0_10"),
    ({"kind": "constant", "decay": 0.5}, "constant_0_50"),
    ({"kind": "constant", "decay": 1.0}, "constant_1_00"),
    ({"kind": "constant", "decay": 1e-7}, "constant_0_0000001"),
    ({"kind": "bias_corrected", "decay": 0.776393}, "bias_corrected_0_776393"),
    ({"kind": "warmup", "decay": 0.9999, "inv_gamma": 10.0, "power": 0.75}, "warmup_0_9999_10_00_0_75"),
    ({"kind": "uniform"}, "uniform"),
    ({"kind": "swa", "start": 1000, "every": 50}, "swa_1000_50"),
    ({"kind": "hard_copy", "every": 7}, "hard_copy_7"),
    ({"kind": "half_life", "half_life": 3906.25, "ramp_up": 0.05}, "half_life_3906_25_0_05"),
    ({"kind": "half_life_share", "share": 0.05}, "half_life_share_0_05"),
    ({"kind": "window", "length": 100, "end": 3000}, "window_100_3000"),
    ({"kind": "cosine_cooldown", "length": 100, "end": 3000}, "cosine_cooldown_100_3000"),
    ({"kind": "sqrt_cooldown", "length": 100, "end": 3000}, "sqrt_cooldown_100_3000"),
    ({"kind": "power_function", "std": 0.05, "start": 1000}, "power_0_05_after_1000"),
]


@pytest.mark.parametrize(("settings", "name"), EXAMPLES, ids=[name for _, name in EXAMPLES])
def test_a_profile_has_one_name_without_a_dot_which_gives_it_back(settings: dict[str, object], name: str) -> None:
    assert name_of_profile(settings) == name
    assert profile_named(name) == settings
    assert profile_to_dict(profile_from_dict(profile_named(name) or {})) == settings


def test_every_kind_of_profile_has_names() -> None:
    assert set(FIELDS) == set(PROFILES) - {"diffusers_ema"}  # whose six fields make no name
    assert name_of_profile({"kind": "diffusers_ema", "max_decay": 0.99, "start": 5}) == "diffusers_ema_after_5"
    assert {settings["kind"] for settings, _ in EXAMPLES} == set(FIELDS)


@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_every_value_survives_its_name_exactly(kind: str, data: st.DataObject) -> None:
    values = {float: st.floats(0, 1e6), int: st.integers(0, 10**9)}
    settings = {"kind": kind, **{field: data.draw(values[of]) for field, of in FIELDS[kind].items()}}
    assert profile_named(name_of_profile(settings)) == settings


@pytest.mark.parametrize("spelling", ["power_0_1", "power_0_10", "power_0_100", "power_00_1"])
def test_a_number_has_one_spelling_however_it_was_written(spelling: str) -> None:
    assert canonical(spelling) == "power_0_10"
    assert parse(f"raw+{spelling}@0012") == (WeightName("raw"), WeightName("power_0_10", 12))


def test_a_name_under_averages_is_left_as_it_is_written_there() -> None:
    assert parse("power_0_1", AVERAGES) == (WeightName("power_0_1"),)
    assert parse("power_0_10", AVERAGES) == (WeightName("power_0_10"),)


@pytest.mark.parametrize(
    "name", ["raw", "ema_0_999", "power_1", "power_0_", "constant_1", "swa_1_2_after_3", "uniform_1"]
)
def test_what_no_reconstruction_is_called_is_no_profile(name: str) -> None:
    assert profile_named(name) is None
    assert canonical(name) == name


def test_a_name_is_written_as_it_is_read() -> None:
    assert [str(part) for part in parse("raw@4+mean+power_0_1@7")] == ["raw@4", "mean", "power_0_10@7"]


def test_only_one_name_at_a_step_is_split_into_both() -> None:
    assert split_step("ema_0_999@0015") == ("ema_0_999", 15)
    for text in ("raw", "raw@4+ema@4", "/models/a@5", "raw@x", "raw@", "@5", "a@b@5"):
        assert split_step(text) == (text, None)


@pytest.mark.parametrize("path", ["a+b", "a@5", "plain", "a+b@c+d", "$\\frac$"])
def test_a_folder_that_is_there_may_have_any_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / path
    folder.mkdir()
    assert parse(str(folder)) == (WeightName(str(folder), folder=True),)
    assert parse(f"raw+{folder}+raw@3") == (
        WeightName("raw"),
        WeightName(str(folder), folder=True),
        WeightName("raw", 3),
    )
    monkeypatch.chdir(tmp_path)
    assert parse(path) == (WeightName(path, folder=True),)


@pytest.mark.parametrize("name", ["raw", "raw@4", "raw+ema_0_999", "uniform", "power_0_10"])
def test_a_folder_in_the_way_does_not_change_what_a_name_means(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert not any(part.folder for part in parse(name, AVERAGES))


def test_a_path_that_is_not_there_is_a_folder_still_and_is_looked_for_later() -> None:
    assert parse("no/such/folder") == (WeightName("no/such/folder", folder=True),)


@pytest.mark.parametrize("text", ["raw@²", "raw@", "raw@x", "raw@1_0", "raw@-1", "raw@1.5", "raw@" + "9" * 5000])
def test_a_step_that_is_no_number_is_one_message(text: str) -> None:
    with pytest.raises(ValueError, match="after @ must be a step"):
        parse(text)


@pytest.mark.parametrize("text", ["", "+", "raw+", "+raw", "@5"])
def test_an_empty_name_is_one_message(text: str) -> None:
    with pytest.raises(ValueError, match="empty name"):
        parse(text)


def test_the_module_needs_neither_torch_nor_numpy() -> None:
    code = "import importlib.util, sys; s = importlib.util.spec_from_file_location('n', 'ddpm_ema/weight_names.py')\n"
    code += "m = importlib.util.module_from_spec(s); sys.modules['n'] = m; s.loader.exec_module(m)\n"
    code += "print(m.canonical('power_0_1'), {'torch', 'numpy', 'ddpm_ema'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == "power_0_10 set()"
