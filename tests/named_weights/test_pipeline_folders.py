"""Other people's pipelines: scored as what they are, from their folder alone; anything odd in one is a message."""

import gc
import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from oracles import frechet_distance
from pickled import Bomb
from safetensors.torch import load_file, save_file
from scored import again, figures, make_run, results, settings, start, weights

from ddpm_ema import data, diffusion, metrics, model, sampling
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.features import open_extractor
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.rundir import RunDir
from ddpm_ema.sampling_network import SamplingNetwork
from ddpm_ema.score.driver import Job
from ddpm_ema.score.generate import Generator

LINEAR = {"num_train_timesteps": 100, "beta_end": 0.2}
COSINE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def example_unet(seed: int = 0, **changes: Any) -> Any:
    """As diffusers' examples/unconditional_image_generation/train_unconditional.py builds it, with few channels."""
    torch.manual_seed(seed)
    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 2,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return UNet2DModel(**(arguments | changes))


def save(folder: Path, unet: Any = None, scheduler: Any = None) -> Path:
    DDPMPipeline(unet or example_unet(), scheduler or DDPMScheduler(**LINEAR)).save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("pipelines") / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "pipe")


def alone(run: Config, output_dir: Path, *folders: Path, **changes: Any) -> Config:
    """No run at all: the default network and schedule, and only what a scoring needs."""
    tiny = settings(output_dir, **changes).model_dump(mode="json")
    tree = {key: tiny[key] for key in ("output_dir", "data", "evaluation")}
    tree["data"]["cache_dir"] = str(run.data.cache_dir)
    tree["evaluation"]["weights"] = [str(folder) for folder in folders]
    output_dir.mkdir(exist_ok=True)
    shutil.copy(run.output_dir / "features.safetensors", output_dir)
    return Config.model_validate(tree)


def named(folder: Path | str, config: Config | None = None) -> NamedWeights:
    resolver = WeightResolver(RunDir("nowhere"), None, config or settings(Path("nowhere")))
    return resolver.named(str(folder))


def test_a_pipeline_of_diffusers_own_example_is_scored_from_its_folder_alone(
    run: Config, folder: Path, tmp_path: Path
) -> None:
    """Sampled, read and compared here with nothing of the scorer."""
    config = alone(run, tmp_path / "scores", folder)
    pipeline = DDPMPipeline.from_pretrained(folder)
    images = sampling.sample(
        lambda x, t, c: pipeline.unet(x, t, return_dict=False)[0],
        sampling.Sampler(pipeline.scheduler.config, config.evaluation),
        seed=0,
        indices=torch.arange(60),
        image_shape=(1, 8, 8),
        device="cpu",
    )
    extractor = open_extractor("classifier", config.output_dir)
    real = data.load(config.data).batch(torch.arange(1797))
    ours, theirs = (metrics.statistics_of(extractor(x)) for x in (images, real))
    (row,) = results(config)["rows"]
    assert row["frechet_distance"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-3)
    assert row["warnings"] == [text for text in row["warnings"] if "scheduler" not in text]


def test_pipelines_of_different_schedules_are_each_scored_under_their_own(run: Config, tmp_path: Path) -> None:
    linear = save(tmp_path / "linear")
    cosine = save(tmp_path / "cosine", scheduler=DDPMScheduler(**COSINE))
    together = figures(results(alone(run, tmp_path / "both", linear, cosine)))
    assert together[str(linear)] != together[str(cosine)]
    for folder in (linear, cosine):
        assert figures(results(alone(run, tmp_path / folder.name / "scores", folder))) == {
            str(folder): together[str(folder)]
        }


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++"])
def test_a_folder_of_the_run_s_own_weights_has_exactly_raw_s_figures(run: Config, tmp_path: Path, sampler: str) -> None:
    network = model.build(run)
    network.load_state_dict(weights(0, 1.3))
    own = save(tmp_path / "own", network, diffusion.noise_scheduler(run.diffusion))
    found = figures(results(again(run, evaluation__weights=["raw", str(own)], evaluation__sampler=sampler)))
    assert found[str(own)] == found["raw"]


def test_one_network_is_held_at_a_time_and_built_anew_for_another_kind_only(
    run: Config, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, built, of = [], [], SamplingNetwork.__init__

    def counted(self: SamplingNetwork, *arguments: Any) -> None:
        gc.collect()
        most.append(len(alive))
        of(self, *arguments)
        alive.add(self)
        built.append(self)
        built.clear()

    monkeypatch.setattr(SamplingNetwork, "__init__", counted)
    cosine = save(tmp_path / "cosine", scheduler=DDPMScheduler(**COSINE))
    names = ["raw", "ema_0_9", str(folder), str(cosine), "power_0_10"]
    mixed = figures(results(again(run, evaluation__weights=names, evaluation__seed=7)))
    assert most == [0, 0, 0]
    monkeypatch.undo()
    pure = figures(results(again(run, evaluation__weights=["raw", "power_0_10"], evaluation__seed=7)))
    assert mixed == mixed | pure


def test_what_a_rank_is_told_is_enough_to_build_the_folder_s_network_and_schedule(run: Config, folder: Path) -> None:
    """A rank that sees no file gets the job and the tensors."""
    weights = named(folder, run)
    job = pickle.loads(pickle.dumps(Job("folder", [0], ("classifier",), lambda made: None, weights)))
    generator = Generator(run, [open_extractor("classifier", run.output_dir)], batch_size=4)
    generator.load(job.weights.name, job.weights.pipeline, [read() for read in weights.members])
    assert generator.network is not None
    found = generator.network.unet
    torch.testing.assert_close(found.state_dict(), example_unet().state_dict(), rtol=0, atol=0, check_stride=False)
    assert found.config.downsample_padding == 1
    assert generator.sampler.timesteps == sampling.Sampler(DDPMScheduler(**LINEAR).config, run.evaluation).timesteps


class TestSchedule:
    def test_a_unet_alone_is_sampled_under_the_settings_schedule_and_says_so(self, run, tmp_path):
        example_unet().save_pretrained(tmp_path / "unet")
        found = {}
        for schedule in ("linear", "cosine"):
            config = alone(run, tmp_path / "scores", tmp_path / "unet")
            chosen = config.diffusion.model_copy(update={"schedule": schedule, "num_train_timesteps": 100})
            scored = results(config.model_copy(update={"diffusion": chosen}))
            (row,) = scored["rows"]
            assert (
                f"no scheduler_config.json: sampled with the diffusion settings given ({schedule}" in row["warnings"][0]
            )
            found[scored["settings_digest"]] = row["frechet_distance"]
        assert len(set(found.values())) == len(found) == 2

    def test_the_unet_folder_of_a_pipeline_has_the_pipeline_s_schedule(self, folder):
        assert named(folder / "unet").pipeline == named(folder).pipeline
        assert named(folder).warnings == ()

    def test_any_scheduler_with_betas_will_do(self, folder):
        before = named(folder).pipeline
        shutil.rmtree(folder / "scheduler")
        DDIMScheduler(**LINEAR).save_pretrained(folder / "scheduler")
        assert named(folder).pipeline == before

    def test_a_schedule_that_ends_in_pure_noise_is_kept(self, tmp_path):
        scheduler = DDPMScheduler(**LINEAR, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        pipeline = named(save(tmp_path / "zero", scheduler=scheduler)).pipeline
        assert pipeline is not None
        assert torch.equal(DDPMScheduler(**pipeline.schedule).alphas_cumprod, scheduler.alphas_cumprod)

    def test_too_many_steps_for_a_folder_s_schedule_are_an_error_before_the_first_image(
        self, run, tmp_path, monkeypatch
    ):
        short = save(tmp_path / "short", scheduler=DDPMScheduler(num_train_timesteps=3))
        monkeypatch.setattr(sampling, "sample", None)
        with pytest.raises(UserError, match="more than the 3 noise levels"):
            results(again(run, evaluation__weights=["raw", str(short)], evaluation__seed=3))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no schedule of betas"),
            ({"_class_name": "EDMEulerScheduler"}, "needs betas"),
            ({"_class_name": ["DDPMScheduler"]}, "no schedule of betas"),
            ({"num_train_timesteps": 10**13}, "num_train_timesteps"),
            ({"num_train_timesteps": "many"}, "num_train_timesteps"),
            ({"beta_schedule": "none of ours"}, "describes no DDPMScheduler"),
            ({"beta_end": "x"}, "describes no DDPMScheduler"),
            ({"beta_end": 7.0}, "betas from 0 to 1"),
            ({"beta_end": float("nan")}, "betas from 0 to 1"),
            ({"trained_betas": [[0.1]]}, "needs betas"),
            ({"prediction_type": "flow"}, "prediction_type"),
            ({"variance_type": ["learned"]}, "variance_type"),
        ],
    )
    def test_an_odd_scheduler_is_one_message(self, folder, changes, message):
        edit(folder / "scheduler" / "scheduler_config.json", **changes)
        with pytest.raises(UserError, match=message):
            named(folder)


class TestCheckpointsOfTheExample:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        raw, averaged = example_unet(0), example_unet(1)
        raw.save_pretrained(tmp_path / "checkpoint-10" / "unet")
        ema = EMAModel(averaged.parameters(), model_cls=UNet2DModel, model_config=averaged.config)
        ema.save_pretrained(tmp_path / "checkpoint-10" / "unet_ema")
        return tmp_path / "checkpoint-10", raw, averaged

    def test_its_averaged_network_is_named_by_its_folder(self, checkpoint):
        path, raw, averaged = checkpoint
        for name, unet in (("unet", raw), ("unet_ema", averaged)):
            torch.testing.assert_close(named(path / name).members[0](), dict(unet.state_dict()), rtol=0, atol=0)

    def test_the_checkpoint_alone_is_refused_and_both_are_named(self, checkpoint):
        with pytest.raises(UserError, match=r"two networks; name \S*checkpoint-10/unet \(raw\) or \S*unet_ema"):
            named(checkpoint[0])


class TestFiles:
    def test_shards_are_read(self, folder):
        whole = named(folder).members[0]()
        shutil.rmtree(folder / "unet")
        example_unet().save_pretrained(folder / "unet", max_shard_size="10KB")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 2
        torch.testing.assert_close(named(folder).members[0](), whole, rtol=0, atol=0)

    def test_the_layout_of_google_s_first_pipelines_is_read(self, folder):
        """All at the root, and attention under its old names (google/ddpm-cifar10-32)."""
        expected = named(folder)
        renamed = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = {}
        for name, tensor in load_file(file).items():
            for new, old in renamed.items():
                name = name.replace(new, old)
            tensors[name] = tensor
        save_file(tensors, file)
        assert any("proj_attn" in name for name in tensors)
        for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
            path.rename(folder / path.name)
        shutil.rmtree(folder / "unet")
        shutil.rmtree(folder / "scheduler")
        found = named(folder)
        assert found.pipeline == expected.pipeline
        torch.testing.assert_close(found.members[0](), example_unet().state_dict(), rtol=0, atol=0, check_stride=False)

    def test_half_precision_comes_as_fp32(self, folder):
        DDPMPipeline(example_unet().half(), DDPMScheduler(**LINEAR)).save_pretrained(folder)
        tensors = named(folder).members[0]()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        torch.testing.assert_close(
            tensors["conv_in.weight"], example_unet().half().float().state_dict()["conv_in.weight"]
        )

    def test_the_key_is_of_the_files_that_are_loaded_and_of_nothing_else(self, folder, tmp_path):
        keys = [named(folder).key]
        (folder / "unet" / "other.safetensors").write_bytes(b"not loaded")
        (folder / "README.md").write_text("words")
        assert named(folder).key == keys[0] == named(save(tmp_path / "same")).key
        edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.1)
        keys.append(named(folder).key)
        edit(folder / "unet" / "config.json", norm_eps=1e-6)
        keys.append(named(folder).key)
        example_unet(5).save_pretrained(folder / "unet")
        keys.append(named(folder).key)
        assert len(set(keys)) == 4

    def test_weights_that_change_under_the_scorer_are_refused(self, folder):
        found = named(folder)
        example_unet(5).save_pretrained(folder / "unet")
        with pytest.raises(UserError, match="changed while"):
            found.members[0]()

    @pytest.mark.parametrize("decoy", ["decoy.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
    def test_a_pickle_is_never_opened_whatever_lies_beside_it(self, folder, tmp_path, decoy):
        unet, mark = folder / "unet", tmp_path / "opened"
        (unet / "diffusion_pytorch_model.safetensors").rename(unet / decoy)
        (unet / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(UserError, match=r"no diffusers folder with .*\.bin, is never opened"):
            named(folder)
        (unet / decoy).unlink()
        (unet / "diffusion_pytorch_model.bin").rename(unet / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="pickle"):
            named(folder)
        assert not mark.exists()

    @pytest.mark.parametrize("names", [["../w.safetensors"], ["w.bin"], [7], [[]], [], None, "x"])
    def test_an_index_that_leads_elsewhere_is_refused(self, folder, names):
        weight_map = {str(i): name for i, name in enumerate(names)} if isinstance(names, list) else names
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match="weight_map"):
            named(folder)


class TestNetwork:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"block_out_channels": [4_000_000, 8_000_000, 8_000_000]},
                "describes a network of .* the files beside it hold",
            ),
            ({"block_out_channels": [8, 8, 10**40]}, "describes no UNet2DModel"),
            ({"block_out_channels": "x"}, "describes no UNet2DModel"),
            ({"block_out_channels": [8, "a", 8]}, "describes no UNet2DModel"),
            ({"block_out_channels": None}, "describes no UNet2DModel"),
            ({"block_out_channels": [8] * 1000}, "more layers than there are tensors"),
            ({"layers_per_block": 10**9}, "more layers than there are tensors"),
            ({"layers_per_block": 1}, "describes a network of"),
            ({"norm_num_groups": 0}, "describes no UNet2DModel"),
            ({"down_block_types": ["Evil", "Evil", "Evil"]}, "describes no UNet2DModel"),
            ({"num_class_embeds": 10**15}, "describes a network of"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
            ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel; only a UNet2DModel"),
            ({"_class_name": ["UNet2DModel"]}, "only a UNet2DModel"),
            ({"sample_size": 32}, r"images are of size 32, data\.image_size is 8"),
            ({"sample_size": [8, 16]}, r"images are of size \[8, 16\]"),
        ],
    )
    def test_an_odd_config_is_one_message(self, folder, changes, message):
        edit(folder / "unet" / "config.json", **changes)
        with pytest.raises(UserError, match=message) as caught:
            named(folder)
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize("text", ["[1, 2]", "{", "", "[" * 100_000, "\udcff"])
    def test_a_config_that_is_no_object_is_one_message(self, folder, text):
        (folder / "unet" / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"config\.json: (cannot be read|expected a JSON object)"):
            named(folder)

    @pytest.mark.parametrize(
        ("changes", "config", "message"),
        [
            ({"in_channels": 3, "out_channels": 3}, {}, r"3 channels, data\.channels is 1"),
            ({"out_channels": 2}, {}, "predicts 2 channels, and variance fixed_small needs 1"),
            ({"num_class_embeds": 11}, {}, "takes class labels, and model.class_conditional is false"),
            ({}, {"model__class_conditional": True}, "takes no class labels, and model.class_conditional is true"),
            ({"class_embed_type": "timestep"}, {}, "class_embed_type is 'timestep'"),
        ],
    )
    def test_what_cannot_be_compared_is_refused_with_the_reason(self, tmp_path, changes, config, message):
        folder = save(tmp_path / "pipe", example_unet(**changes))
        with pytest.raises(UserError, match=message):
            named(folder, settings(tmp_path, **config))

    @pytest.mark.parametrize(
        ("embeddings", "scale", "fits"), [(11, 2, True), (10, 1, True), (10, 2, False), (12, 1, False)]
    )
    def test_class_labels_must_be_those_of_the_data(self, tmp_path, embeddings, scale, fits):
        folder = save(tmp_path / "pipe", example_unet(num_class_embeds=embeddings))
        config = settings(tmp_path, model__class_conditional=True, evaluation__guidance_scale=scale)
        resolver = WeightResolver(RunDir("nowhere"), None, config, num_classes=10)
        if fits:
            assert resolver.named(str(folder)).pipeline is not None
        else:
            with pytest.raises(UserError, match=f"{embeddings} class embeddings, the data 10 classes"):
                resolver.named(str(folder))

    def test_learned_variance_comes_with_its_schedule(self, tmp_path):
        scheduler = DDPMScheduler(**LINEAR, variance_type="learned_range")
        assert named(save(tmp_path / "learned", example_unet(out_channels=2), scheduler)).pipeline is not None


class TestEnsembles:
    def test_a_folder_of_the_same_kind_joins_the_run_s_weights(self, run, tmp_path):
        own = save(tmp_path / "a+b", model.build(run), diffusion.noise_scheduler(run.diffusion))
        found = figures(results(again(run, evaluation__weights=["raw", f"raw+{own}"])))
        assert found[f"raw+{own}"] != found["raw"]

    @pytest.mark.parametrize("scheduler", [LINEAR, COSINE])
    def test_another_kind_is_refused_with_what_differs(self, run, tmp_path, scheduler):
        other = save(tmp_path / "pipe", scheduler=DDPMScheduler(**scheduler))
        with pytest.raises(UserError, match=r"no ensemble with 'raw', whose unet has another .*downsample_padding"):
            results(again(run, evaluation__weights=[f"raw+{other}"]))
        same = save(tmp_path / "same", model.build(run), DDPMScheduler(**COSINE))
        with pytest.raises(UserError, match=r"whose schedule has another .*prediction_type"):
            results(again(run, evaluation__weights=[f"raw+{same}"]))


@pytest.mark.slow
def test_several_processes_score_a_pipeline_as_one_does(run: Config, folder: Path, tmp_path: Path) -> None:
    one = figures(results(alone(run, tmp_path / "one", folder)))[str(folder)]
    launch = start(alone(run, tmp_path / "two", folder), world_size=2)
    assert launch.wait() == [0, 0], launch.output()
    (path,) = (tmp_path / "two").glob("scores/*/results.json")
    assert figures(json.loads(path.read_text()))[str(folder)] == pytest.approx(one, rel=0.01)
