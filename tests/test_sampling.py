"""Sampling: what each image depends on, and that our samplers are diffusers' samplers wherever those are exact."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ddpm_ema import keyed_random, sampling
from ddpm_ema.config import Config, DiffusionSettings, EvaluationSettings
from ddpm_ema.diffusion import noise_scheduler
from ddpm_ema.errors import UserError
from ddpm_ema.keyed_random import Purpose
from ddpm_ema.model import build
from ddpm_ema.named_weights import build_scheduler, schedule_of
from ddpm_ema.sampling import Sampler, labels_for, sample, to_uint8, trailing

SHAPE = (1, 8, 8)
INDICES = torch.arange(6)


def make(sampler: str, steps: int, diffusion: DiffusionSettings | None = None, **settings) -> Sampler:
    evaluation = EvaluationSettings(sampler=sampler, num_inference_steps=steps, **settings)
    return Sampler(noise_scheduler(diffusion or DiffusionSettings()).config, evaluation)


def smooth(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """A network that is cheap, nonlinear, and mixes pixels; it looks at the timestep, too."""
    return torch.tanh(0.6 * x_t + 0.4 * x_t.flip(-1) + (timesteps[:, None, None, None] - 500) / 2000)


def images(predict, sampler: Sampler, indices: Tensor = INDICES, seed: int = 3, shape=SHAPE) -> Tensor:
    return sample(predict, sampler, seed=seed, indices=indices, image_shape=shape, device="cpu")


def keyed(step: int, shape=SHAPE) -> Tensor:
    return keyed_random.normal(3, Purpose.SAMPLE, step, INDICES, shape)


class TestEqualsDiffusers:
    """Where diffusers' own stepping is exact, ours gives its samples, fed the same noise: every bit of the float32 state."""

    @pytest.fixture(autouse=True)
    def float_samples(self, monkeypatch):
        monkeypatch.setattr(sampling, "to_uint8", lambda x_0: x_0)

    def run(self, scheduler, predict, **options) -> Tensor:
        x_t = keyed(0)
        for index, timestep in enumerate(scheduler.timesteps):
            output = predict(x_t, torch.full((len(INDICES),), int(timestep)), None)
            x_t = scheduler.step(output, timestep, x_t, **options.get(str(index), options.get("all", {}))).prev_sample
        return x_t

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
    def test_ddim_without_noise(self, schedule, prediction):
        settings = DiffusionSettings(schedule=schedule, prediction=prediction)
        base = noise_scheduler(settings)
        theirs = DDIMScheduler(
            trained_betas=base.betas.tolist(), prediction_type=prediction, timestep_spacing="trailing"
        )
        theirs.set_timesteps(50)
        expected = self.run(theirs, smooth, all={"use_clipped_model_output": True})
        assert torch.equal(images(smooth, make("ddim", 50, settings)), expected)

    def test_ddim_with_noise_at_any_eta(self):
        theirs = DDIMScheduler(1000, timestep_spacing="trailing")
        theirs.set_timesteps(20)
        options = {
            str(j): {"eta": 0.7, "variance_noise": keyed(j + 1), "use_clipped_model_output": True} for j in range(20)
        }
        assert torch.equal(images(smooth, make("ddim", 20, eta=0.7)), self.run(theirs, smooth, **options))

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
    def test_ancestral_over_all_timesteps(self, variance, monkeypatch):
        settings = DiffusionSettings(num_train_timesteps=40, variance=variance)
        both = (lambda *a: torch.cat([smooth(*a), -smooth(*a)], dim=1)) if variance == "learned" else smooth
        theirs = DDPMScheduler.from_config(noise_scheduler(settings).config)
        theirs.set_timesteps(40)
        drawn = iter(range(1, 40))
        with monkeypatch.context() as patched:
            patched.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: keyed(next(drawn)))
            expected = self.run(theirs, both)
        assert torch.equal(images(both, make("ddpm", 40, settings)), expected)

    @pytest.mark.parametrize(
        ("schedule", "steps", "clip"),
        [("linear", 1, False), ("linear", 2, True), ("linear", 7, False), ("cosine", 7, True), ("sigmoid", 25, True)],
    )
    def test_dpm_solver(self, schedule, steps, clip):
        settings = DiffusionSettings(schedule=schedule)
        theirs = DPMSolverMultistepScheduler(
            trained_betas=noise_scheduler(settings).betas.tolist(),
            timestep_spacing="trailing",
            thresholding=clip,
            dynamic_thresholding_ratio=1.0,
        )
        theirs.set_timesteps(steps)
        made = make("dpm_solver++", steps, settings, clip_sample=clip)
        assert torch.equal(images(smooth, made), self.run(theirs, smooth))

    def test_dpm_solver_twice_forgets_the_first_trajectory(self):
        sampler = make("dpm_solver++", 9)
        assert torch.equal(images(smooth, sampler), images(smooth, sampler))


class TestClipping:
    """`clip_sample` holds for every sampler: the same samples as from a network whose x_0 never leaves [-1, 1]."""

    @pytest.mark.parametrize("variance", ["fixed_large", "learned"])
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++"])
    def test_clipping_equals_a_network_whose_x_0_is_clipped(self, sampler, prediction, variance, monkeypatch):
        monkeypatch.setattr(sampling, "to_uint8", lambda x_0: x_0)
        settings = DiffusionSettings(prediction=prediction, variance=variance)
        alphas_cumprod = noise_scheduler(settings).alphas_cumprod.double()

        def network(limit):
            def predict(x_t, timesteps, labels):
                x_0 = (4 * smooth(x_t, timesteps, labels)).clamp(-limit, limit).double()
                signal = alphas_cumprod[timesteps][:, None, None, None].sqrt()
                sigma = (1 - signal**2).sqrt()
                noise = (x_t - signal * x_0) / sigma
                said = {"epsilon": noise, "sample": x_0, "v_prediction": signal * noise - sigma * x_0}[
                    prediction
                ].float()
                return said if variance != "learned" else torch.cat([said, torch.zeros_like(said)], dim=1)

            return predict

        inside = images(network(1), make(sampler, 10, settings, clip_sample=False))
        clipped = images(network(4), make(sampler, 10, settings, clip_sample=True))
        wild = images(network(4), make(sampler, 10, settings, clip_sample=False))
        torch.testing.assert_close(clipped, inside, atol=1e-3, rtol=0)
        assert clipped.abs().max() <= 1 + 1e-6
        assert wild.abs().max() > 2

    def test_clipping_of_one_image_does_not_look_at_the_others_or_at_its_brightest_pixel(self):
        """Dynamic thresholding would scale an image down by its largest value."""
        network = torch.full((6, 1, 8, 8), 0.5)
        network[2, 0, 0, 0] = 9.0
        made = images(lambda x_t, t, c: network, make("dpm_solver++", 3, DiffusionSettings(prediction="sample")))
        expected = torch.full_like(made, round(0.75 * 255))
        expected[2, 0, 0, 0] = 255
        assert torch.equal(made, expected)


class TestWhatAnImageDependsOn:
    @pytest.fixture(scope="class")
    def network(self):
        config = Config.model_validate(
            {
                "model": {
                    "block_out_channels": [8, 16],
                    "attention": [False, True],
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                }
            }
        )
        return build(config).eval()

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++"])
    def test_batches_of_16_and_of_50_give_the_same_images_to_rounding(self, network, sampler):
        def predict(x_t, timesteps, labels):
            return network(x_t, timesteps, return_dict=False)[0]

        made = make(sampler, 6, eta=0.5)
        whole = torch.arange(50)
        by_50 = images(predict, made, whole)
        by_16 = torch.cat([images(predict, made, part) for part in whole.split(16)])
        backwards = images(predict, made, whole.flip(0)).flip(0)
        for other in (by_16, backwards):
            difference = (by_50.int() - other.int()).abs()
            # A pixel that lies on the edge between two levels may round either way.
            assert difference.max() <= 1
            assert (difference > 0).double().mean() < 1e-3

    def test_the_seed_and_the_index_change_an_image(self):
        sampler = make("ddim", 5)
        first = images(smooth, sampler)
        assert not torch.equal(first, images(smooth, sampler, seed=4))
        assert not torch.equal(first, images(smooth, sampler, INDICES + 6))

    def test_no_images_are_no_work(self):
        """A rank of a large cluster may have none of a preview's images."""
        none = images(lambda *a: pytest.fail("asked"), make("ddpm", 5), INDICES[:0], shape=(3, 8, 8))
        assert (none.shape, none.dtype) == ((0, 3, 8, 8), torch.uint8)

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++"])
    def test_no_global_generator_is_drawn_from(self, sampler):
        before = torch.random.get_rng_state()
        images(smooth, make(sampler, 5, eta=1.0))
        assert torch.equal(torch.random.get_rng_state(), before)


class TestTimesteps:
    def test_any_number_of_steps_begins_at_the_last_noise_level_and_takes_that_many(self):
        for levels in (996, 1000):
            for steps in range(1, levels + 1):
                timesteps = trailing(levels, steps)
                assert len(set(timesteps)) == steps
                assert timesteps == sorted(timesteps, reverse=True)
                assert timesteps[0] == levels - 1
                assert timesteps[-1] >= 0

    @pytest.mark.parametrize("steps", [1, 2, 10, 25, 30, 50, 100, 250, 1000])
    def test_they_are_those_of_diffusers_where_diffusers_takes_as_many_steps(self, steps):
        theirs = DDPMScheduler(1000, timestep_spacing="trailing")
        theirs.set_timesteps(steps)
        assert trailing(1000, steps) == theirs.timesteps.tolist()

    @pytest.mark.parametrize("steps", [30, 50, 61, 300])
    def test_ddim_goes_from_each_chosen_timestep_exactly_to_the_next(self, steps):
        """A network that knows x_0 sees, at every step, the noise the image began with. diffusers' DDIM steps over
        T // n levels, so at 30 steps of 1000 the noise level drifts away from the timestep it tells the network."""
        x_0 = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8)
        alphas_cumprod = noise_scheduler(DiffusionSettings()).alphas_cumprod
        seen = []

        def oracle(x_t, timesteps, labels):
            alpha = alphas_cumprod[timesteps][:, None, None, None].double()
            noise = (x_t.double() - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
            seen.append(noise)
            return noise.float()

        made = images(oracle, make("ddim", steps))
        for noise in seen:
            torch.testing.assert_close(noise, keyed(0).double() - 0 * noise, atol=0.02, rtol=0.01)
        assert (made.int() - to_uint8(x_0).int()).abs().max() <= 1

    def test_without_clipping_dpm_solver_starts_a_cosine_schedule_where_predicted_noise_still_says_something(self):
        cosine = DiffusionSettings(schedule="cosine")
        assert make("dpm_solver++", 10, cosine, clip_sample=False).timesteps[0] == 995
        assert make("dpm_solver++", 10, clip_sample=False).timesteps[0] == 999
        for sampler in ("ddpm", "ddim", "dpm_solver++"):
            assert make(sampler, 10, cosine).timesteps[0] == 999

    @pytest.mark.parametrize(("levels", "steps"), [(1000, 5), (2000, 8), (4000, 2), (4000, 18)])
    def test_ddim_with_all_of_its_noise_is_finite_at_the_end_of_a_cosine_schedule(self, levels, steps):
        """The share of the predicted noise, 1 - abar - sigma^2 of Song et al. 2021, eq. 12, is below fp32's rounding there."""
        made = make("ddim", steps, DiffusionSettings(schedule="cosine", num_train_timesteps=levels), eta=1.0)
        assert images(smooth, made).shape == (6, *SHAPE)  # which are not finite in diffusers

    @pytest.mark.parametrize(("sampler", "close"), [("ddpm", 2), ("ddim", 1), ("dpm_solver++", 1)])
    def test_a_schedule_that_ends_without_any_signal_is_sampled_from_its_end(self, sampler, close):
        """A folder's of zero terminal SNR (Lin et al. 2023), here with a network that knows x_0."""
        theirs = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        made = Sampler(
            build_scheduler(schedule_of(theirs)).config, EvaluationSettings(sampler=sampler, num_inference_steps=10)
        )
        x_0, seen = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8), []

        def oracle(x_t, timesteps, labels):
            seen.append(int(timesteps[0]))
            signal = theirs.alphas_cumprod[timesteps][:, None, None, None].sqrt()
            return (signal * x_t - x_0) / (1 - signal**2).sqrt()

        assert (images(oracle, made).int() - to_uint8(x_0).int()).abs().max() <= close
        assert seen[0] == 999

    def test_more_steps_than_noise_levels_is_an_error_that_names_both(self):
        with pytest.raises(UserError, match=r"2000 is more than the 1000 noise levels.*at most 1000$"):
            make("ddim", 2000)

    def test_more_steps_than_dpm_solver_has_usable_levels_is_an_error_before_the_first_image(self):
        cosine = DiffusionSettings(schedule="cosine")
        with pytest.raises(
            UserError, match=r"1000 is more than the 996 of 1000 .* at most 996, or .*clip_sample to true"
        ):
            make("dpm_solver++", 1000, cosine, clip_sample=False)
        images(smooth, make("dpm_solver++", 996, cosine, clip_sample=False), INDICES[:1])  # which are finite
        images(smooth, make("dpm_solver++", 1000, cosine), INDICES[:1])


class TestDistribution:
    @pytest.mark.parametrize(
        ("sampler", "steps", "options", "close"),
        [
            ("ddim", 300, {}, 0.03),
            ("dpm_solver++", 80, {}, 0.02),
            # A reverse variance at its lower bound makes too little spread in few steps (Ho et al. 2020, section 3.2).
            ("ddpm", 400, {}, 0.05),
            ("ddim", 400, {"eta": 1.0}, 0.05),
        ],
    )
    def test_gaussian_data_comes_back_with_its_mean_and_spread(self, sampler, steps, options, close):
        """The best possible network for N(0.2, 0.3²) data is known in closed form."""
        mean, std = 0.2, 0.3
        settings = DiffusionSettings(variance="fixed_small")
        alphas_cumprod = noise_scheduler(settings).alphas_cumprod

        def best(x_t, timesteps, labels):
            alpha = alphas_cumprod[timesteps][:, None, None, None]
            return (1 - alpha).sqrt() * (x_t - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)

        made = images(best, make(sampler, steps, settings, clip_sample=False, **options), torch.arange(150))
        pixels = made.double() / 127.5 - 1
        assert pixels.mean() == pytest.approx(mean, abs=4 * std / math.sqrt(pixels.numel()) + 0.003)
        assert pixels.std() == pytest.approx(std, rel=close)

    def test_the_last_step_adds_no_noise(self):
        """diffusers' ancestral sampler adds some wherever its last timestep is not 0: at 10 steps of 1000 it is 99."""
        made = images(lambda x_t, t, c: torch.zeros_like(x_t), make("ddpm", 1, DiffusionSettings(prediction="sample")))
        assert set(made.unique().tolist()) == {128}

    def test_the_last_step_looks_at_no_variance(self):
        """However far a learned variance lies outside: infinity times no noise would be NaN."""
        learned = DiffusionSettings(prediction="sample", variance="learned")
        made = images(lambda x_t, t, c: torch.cat([0 * x_t, 100 + 0 * x_t], dim=1), make("ddpm", 1, learned))
        assert set(made.unique().tolist()) == {128}


class TestPixels:
    def test_they_are_those_of_diffusers_pipelines(self):
        x_0 = 1.5 * keyed(0, (3, 64, 64))
        theirs = DDPMPipeline.numpy_to_pil((x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
        assert torch.equal(to_uint8(x_0), torch.stack([pil_to_tensor(image) for image in theirs]))

    def test_every_level_survives_the_round_trip(self):
        levels = torch.arange(256).reshape(1, 1, 16, 16)
        assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels.to(torch.uint8))

    def test_they_are_rounded_to_the_nearest_level_not_down(self):
        values = torch.tensor([-1.0, -0.9990, 0.4 / 127.5, 0.999, 1.0, 7.0]).reshape(1, 1, 2, 3)
        assert to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255, 255]
        dark = torch.full((1, 1, 4, 4), 99.6 / 127.5 - 1)
        assert to_uint8(dark).unique().tolist() == [100]

    def test_images_that_are_not_finite_are_named(self):
        broken = torch.zeros(4, 1, 2, 2)
        broken[2, 0, 1, 1] = math.nan
        with pytest.raises(sampling.NonFiniteImages) as error:
            to_uint8(broken)
        assert error.value.positions == [2]


def test_labels_come_as_often_as_in_the_data_and_are_keyed_by_seed_and_image():
    known = torch.tensor([0] * 75 + [1] * 25)
    drawn = labels_for(0, torch.arange(4000), known)
    assert drawn.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drawn[1000:1010], labels_for(0, torch.arange(1000, 1010), known))
    assert not torch.equal(drawn, labels_for(1, torch.arange(4000), known))
