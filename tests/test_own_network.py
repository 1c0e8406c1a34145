"""`model.factory`: a network of one's own goes through every stage, and a stranger's run directory runs no code."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import assert_bit_equal, settings, state
from safetensors.torch import load_file
from scored import Trained, classifier, save_classifier
from torch import nn

import ddpm_ema
from ddpm_ema import cli, config, model, train
from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from ddpm_ema.export import export
from ddpm_ema.rundir import RunDir
from ddpm_ema.sampling import Sampler, to_uint8
from ddpm_ema.sampling_network import SamplingNetwork
from examples import dit

ROOT = Path(__file__).resolve().parents[1]
FACTORY = "examples.dit:small"
EVALUATION = {"num_images": 40, "num_inference_steps": 3, "groups": 10}


def run_of(folder: Path, **changes: Any) -> config.Config:
    evaluation = {f"evaluation__{key}": value for key, value in EVALUATION.items()}
    return settings(folder / "run", **{"training__steps": 2, "model__factory": FACTORY, **evaluation, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """Two steps of the transformer with classes, averages, and a classifier for its features."""
    run = run_of(tmp_path_factory.mktemp("own"), model__class_conditional=True)
    train.run(run)
    save_classifier(run.output_dir / "features.safetensors", Trained(classifier(), 0.1), fingerprint="none", seed=0)
    return run


def test_it_is_trained_averaged_scored_loaded_and_sampled(trained: config.Config) -> None:
    assert cli.main(["score", str(trained.output_dir), "--model.factory", FACTORY]) == EXIT_DONE
    [results] = trained.output_dir.glob("scores/*/results.json")
    assert {row["weights"] for row in json.loads(results.read_text())["rows"]} == {"raw", "ema_0_9", "power_0_10"}
    loaded = ddpm_ema.load(trained.output_dir, "power_0_10", factory=FACTORY)
    assert isinstance(loaded.network, dit.DiT)
    stored = RunDir(trained.output_dir).checkpoint(2).weights("power_0_10")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.network.state_dict().items())
    assert ddpm_ema.sample(loaded, 3).shape == (3, 1, 8, 8)


class Dropping(nn.Module):
    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, channels, size, padding="same"), nn.Dropout(0.5))

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, labels: None) -> torch.Tensor:
        return self.layers(x_t)


def dropping(image_size: int, channels: int, out_channels: int, num_classes: None) -> nn.Module:
    return Dropping(channels, 3)


def test_its_dropout_is_that_of_an_undisturbed_run_after_a_stop_and_code_that_changed_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model__factory": f"{__name__}:dropping", "training__steps": 4}
    train.run(run_of(tmp_path / "whole", **changes))
    train.run(run_of(tmp_path, **changes | {"training__steps": 2}))
    train.run(run := run_of(tmp_path, **changes))
    assert_bit_equal(state(run), state(run_of(tmp_path / "whole")))
    monkeypatch.setattr(sys.modules[__name__], "dropping", lambda **shape: Dropping(shape["channels"], 5))
    with pytest.raises(UserError, match=r"step 4: its weights are not of the network[^\0]*3, 3\][^\0]*5, 5\]"):
        train.run(run_of(tmp_path, **changes | {"training__steps": 6}))


def test_its_export_is_safetensors_and_code_that_samples_without_this_package(
    trained: config.Config, tmp_path: Path
) -> None:
    loaded = ddpm_ema.load(trained.output_dir, "ema_0_9", factory=FACTORY)
    folder = export(trained.output_dir, "ema_0_9", tmp_path / "out", factory=FACTORY)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "model.safetensors", "scheduler/scheduler_config.json"}
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.network.state_dict().items())
    card = (folder / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in loaded.network.parameters())
    assert f"network: `{FACTORY}`, {parameters:,} parameters\n" in card
    code = re.findall(r"```python\n(.*?)```", card, flags=re.S)[0].replace("path/to/this/folder", str(folder))
    check = "import sys, numpy\nassert 'ddpm_ema' not in sys.modules\nnumpy.save('made.npy', numpy.stack(images))"
    seeded = code.replace("x_t = torch.randn", "torch.manual_seed(0)\nx_t = torch.randn")
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{seeded}\n{check}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    assert np.array_equal(np.load(tmp_path / "made.npy"), _ddim(loaded, torch.randn(16, 1, 8, 8))[:, 0].numpy())


def _ddim(loaded: ddpm_ema.from_run.Loaded, x_t: torch.Tensor) -> torch.Tensor:
    """uint8: three steps of the scoring's own sampler from this noise."""
    no_label = model.no_label(loaded.network)
    labels = None if no_label is None else torch.arange(16) % no_label
    sampler = Sampler(loaded.scheduler.config, loaded.config.evaluation)
    with torch.inference_mode():
        for index, timestep in enumerate(sampler.start()):
            x_t = sampler.step(index, loaded.network(x_t, torch.full((16,), timestep), labels), x_t)
    return to_uint8(x_t)


def test_its_first_weights_are_a_function_of_the_seed_and_leave_the_generator_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = model.build(run_of(tmp_path)).state_dict()
    before = torch.get_rng_state()
    second = model.build(run_of(tmp_path)).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = model.build(run_of(tmp_path, seed=1)).state_dict()
    assert not torch.equal(first["patches.weight"], other["patches.weight"])


def wrong_shape(**_: Any) -> nn.Module:
    class Half(nn.Module):
        def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            return x_t[:, :, ::2]

    return Half()


def writing(**_: Any) -> nn.Module:
    class Writing(nn.Module):
        def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            return x_t.mul_(0.5)

    return Writing()


class Labelled(nn.Module):
    """Of half precision, with a parameter that is called as this package might call one, and one of five dimensions."""

    def __init__(self, embeddings: int) -> None:
        super().__init__()
        self.label, self.no_label = nn.Embedding(embeddings, 1), nn.Parameter(torch.ones(1))
        self.kernel = nn.Parameter(torch.ones(1, 1, 1, 3, 3))
        self.bfloat16()

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (
            nn.functional.conv2d(x_t, self.kernel[0], padding=1) * self.no_label + self.label(labels)[:, :, None, None]
        )


def labelled(num_classes: int, **_: Any) -> nn.Module:
    return Labelled(num_classes + 1)


def without_a_label_for_none(num_classes: int, **_: Any) -> nn.Module:
    return Labelled(num_classes)


def of_other_arguments(size: int) -> nn.Module:
    raise AssertionError(size)


def test_names_dtype_and_shapes_of_its_parameters_are_its_own_matter(tmp_path: Path) -> None:
    run = run_of(tmp_path, model__factory=f"{__name__}:labelled", model__class_conditional=True)
    network = model.build(run, 10)
    assert model.no_label(network) == 10
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    weights = network.state_dict()
    assert weights["no_label"].tolist() == [1.0]
    sampling = SamplingNetwork(network, run.evaluation, torch.device("cpu"), 2, 10)
    sampling.load([weights], "raw")
    x_t, timesteps, labels = torch.ones(2, 1, 8, 8), torch.tensor([0, 99]), torch.tensor([3, 10])
    assert torch.equal(sampling.predict(x_t, timesteps, labels), network(x_t, timesteps, labels))
    train.run(run)
    assert RunDir(run.output_dir).checkpoint(2)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            f"{__name__}:of_other_arguments",
            r"TypeError, .*unexpected keyword.* \(line \d+ of .*docs/extending.md says how",
        ),
        (f"{__name__}:without_a_label_for_none", r"IndexError, .* \(line \d+ of [^ ]*test_own_network.py\)"),
        ("examples.dit:smal", "has no such function; did you mean 'small'"),
        ("examples.nowhere:small", "No module named 'examples.nowhere'; it must be installed, or lie below"),
        (f"{__name__}:wrong_shape", r"returned \(2, 1, 4, 8\) for x_t \(2, 1, 8, 8\), expected \(2, 1, 8, 8\)"),
        (f"{__name__}:writing", "writes to x_t, which the sampler goes on with: let it work on a copy"),
        ("builtins:dict", "returned dict, no torch.nn.Module"),
        ("examples.dit", "model.factory: string should match pattern"),
    ],
)
def test_a_factory_that_makes_no_such_network_is_one_message(factory: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        model.build(run_of(tmp_path, model__factory=factory, model__class_conditional=True), 10)


def test_a_factory_in_a_folder_called_torch_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "in_torch.py").write_text("def small(**shape):\n    return shape['depth']\n")
    monkeypatch.syspath_prepend(tmp_path / "torch")
    with pytest.raises(UserError, match=r"KeyError, 'depth' \(line 2 of .*in_torch.py\)"):
        model.build(run_of(tmp_path, model__factory="in_torch:small"))


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nsmall = None\n"


def test_a_run_directory_runs_no_code_unless_its_factory_is_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stranger's module lies where it would be imported from; it leaves a file when it is."""
    run = run_of(tmp_path, model__factory="strange:small")
    rundir = RunDir(run.output_dir)
    weights = {"raw.safetensors": {"weight": torch.zeros(1)}}
    rundir.write_checkpoint(2, weights, {"settings": config.to_dict(run), "profiles": {}})
    rundir.config_path.write_text(config.to_yaml(run))
    (tmp_path / "strange.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    for command in (["score"], ["sweep", "--evaluation.sweep.stds", "0.1:0.2:2"], ["train"], ["features"], ["export"]):
        name, *rest = command
        assert cli.main([name, "run", *(["raw"] if name == "export" else []), *rest]) == EXIT_BAD_INPUT
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "its network comes from strange:small, Python code" in said
        assert "--model.factory strange:small" in said
    with pytest.raises(UserError, match="if you trust that code"):
        ddpm_ema.load("run", "raw")
    cli.main(["report", "run"])
    assert not (tmp_path / "ran").exists()
    assert cli.main(["export", "run", "raw", "--model.factory", "strange:small"]) == EXIT_BAD_INPUT
    assert (tmp_path / "ran").exists(), "named again, it is imported"
