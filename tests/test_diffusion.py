"""The objective, against closed forms, diffusers' own formulas and computations done another way."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm_ema import diffusion
from ddpm_ema.config import DiffusionSettings
from ddpm_ema.diffusion import Objective, noise_scheduler
from ddpm_ema.network_call import Predict

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SCHEDULES = ["linear", "cosine", "sigmoid"]
TIMESTEPS = torch.tensor([0, 1, 10, 500, 998, 999])


def settings(**fields: Any) -> DiffusionSettings:
    return DiffusionSettings.model_validate(fields)


def images() -> tuple[Tensor, Tensor]:
    """x_0 of 8-bit levels, the end ones among them, and noise."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (len(TIMESTEPS), 3, 4, 4), generator=generator)
    levels[:, 0, 0] = torch.tensor([0, 255, 0, 255])
    return levels / 127.5 - 1, torch.randn(levels.shape, generator=generator)


def predictor_of(guess: Tensor, prediction: str, objective: Objective) -> Predict:
    """A network that says, in the objective's own terms, that x_0 is `guess`."""
    abar = noise_scheduler(objective.settings).alphas_cumprod

    def predict(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        signal, sigma = abar[timesteps, None, None, None].sqrt(), (1 - abar[timesteps, None, None, None]).sqrt()
        epsilon = (x_t - signal * guess) / sigma
        return {"epsilon": epsilon, "sample": guess, "v_prediction": signal * epsilon - sigma * guess}[prediction]

    return predict


def test_linear_betas_are_the_papers() -> None:
    scheduler: Any = noise_scheduler(settings())
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.variance_type == "fixed_large"


def test_cosine_schedule_is_nichol_and_dhariwals() -> None:
    scheduler: Any = noise_scheduler(settings(schedule="cosine"))
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    expected = torch.tensor([f[t + 1] / f[0] for t in range(990)])
    torch.testing.assert_close(scheduler.alphas_cumprod[:990], expected, rtol=1e-3, atol=1e-6)
    assert float(scheduler.betas.max()) == pytest.approx(0.999)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_falls_from_nearly_one_and_never_reaches_zero(schedule: str) -> None:
    """epsilon-prediction needs some signal at the last step: x_0 is had by dividing by it."""
    scheduler: Any = noise_scheduler(settings(schedule=schedule))
    abar = scheduler.alphas_cumprod
    assert float(abar[0]) > 0.999
    assert (abar.diff() < 0).all()
    assert 0 < float(abar[-1]) < (0.1 if schedule == "sigmoid" else 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_is_diffusers_to_rounding(schedule: str) -> None:
    x_0, noise = images()
    ours = Objective(settings(schedule=schedule)).add_noise(x_0, noise, TIMESTEPS)
    theirs = noise_scheduler(settings(schedule=schedule)).add_noise(x_0, noise, TIMESTEPS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("schedule", "prediction"), itertools.product(SCHEDULES, PREDICTIONS))
def test_a_perfect_network_has_no_loss(schedule: str, prediction: str) -> None:
    x_0, noise = images()
    objective = Objective(settings(schedule=schedule, prediction=prediction))
    truth = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": noise_scheduler(objective.settings).get_velocity(x_0, noise, TIMESTEPS),
    }[prediction]
    loss = objective.loss(lambda x_t, t, labels: truth, x_0, noise, TIMESTEPS)
    torch.testing.assert_close(loss, torch.zeros(len(TIMESTEPS)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prediction_gives_back_the_x_0_it_means(prediction: str) -> None:
    x_0, noise = images()
    objective = Objective(settings(prediction=prediction))
    x_t = objective.add_noise(x_0, noise, TIMESTEPS)
    output = predictor_of(x_0, prediction, objective)(x_t, TIMESTEPS, None)
    torch.testing.assert_close(objective.predicted_x_0(output, x_t, TIMESTEPS), x_0, rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_mean_squared_error_of_each_image() -> None:
    x_0, noise = images()
    error = torch.arange(1.0, len(TIMESTEPS) + 1)
    loss = Objective(settings()).loss(lambda x_t, t, y: noise + error[:, None, None, None], x_0, noise, TIMESTEPS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, error.square())


def test_the_network_gets_x_t_timesteps_and_labels() -> None:
    x_0, noise = images()
    given: list[Any] = []
    labels = torch.arange(len(TIMESTEPS))
    objective = Objective(settings())

    def predict(x_t: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        given.extend([x_t, timesteps, y])
        return x_t

    objective.loss(predict, x_0, noise, TIMESTEPS, labels)
    assert torch.equal(given[0], objective.add_noise(x_0, noise, TIMESTEPS))
    assert torch.equal(given[1], TIMESTEPS)
    assert given[1].dtype == torch.int64
    assert torch.equal(given[2], labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_noising_and_loss_stay_fp32_inside_autocast(dtype: torch.dtype, variance: str) -> None:
    x_0, noise = images()
    objective = Objective(settings(variance=variance))
    seen: dict[str, Tensor] = {}
    channels = 6 if variance == "learned" else 3
    weight = torch.randn(channels, 3, 1, 1)

    def predict(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        seen["x_t"] = x_t
        seen["output"] = torch.nn.functional.conv2d(x_t, weight)
        return seen["output"]

    with torch.autocast("cpu", dtype=dtype):
        loss = objective.loss(predict, x_0, noise, TIMESTEPS)
    assert seen["output"].dtype == dtype, "the network itself runs in the ambient precision"
    assert seen["x_t"].dtype == loss.dtype == torch.float32
    assert torch.equal(seen["x_t"], objective.add_noise(x_0, noise, TIMESTEPS))
    output = seen["output"].float()
    assert torch.equal(loss, objective.loss(lambda *_: output, x_0, noise, TIMESTEPS))


def test_every_timestep_gets_its_noise_where_bf16_noising_would_lose_some() -> None:
    """In bf16 the coefficient of the first timesteps' noise is lost next to x_0; in fp32 neighbours all differ."""
    objective = Objective(settings())
    timesteps = torch.arange(1000)
    x_t = objective.add_noise(torch.ones(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1), timesteps).flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective.add_noise(torch.ones(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1), timesteps).flatten()
    assert torch.equal(x_t, inside)
    assert len(x_t[:300].unique()) == 300
    assert len(x_t[:300].bfloat16().unique()) < 100


def test_min_snr_weights_by_hand() -> None:
    abar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)  # SNR 9, 1, 1/9
    table = {"sample": [5, 1, 1 / 9], "epsilon": [5 / 9, 1, 1], "v_prediction": [0.5, 0.5, 0.1]}
    for prediction, expected in table.items():
        weight = diffusion._loss_weight(abar, settings(prediction=prediction, min_snr_gamma=5))
        torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))
        unweighted = diffusion._loss_weight(abar, settings(prediction=prediction))
        assert unweighted.tolist() == [1, 1, 1]


def test_min_snr_makes_one_loss_of_all_three_predictions() -> None:
    """The weight is min(SNR, gamma) in units of x_0's error, whatever the network is asked for."""
    x_0, noise = images()
    guess = x_0 + 0.3
    abar = noise_scheduler(settings()).alphas_cumprod[TIMESTEPS].double()
    expected = ((abar / (1 - abar)).clamp(max=5.0) * 0.09).float()
    for prediction in PREDICTIONS:
        objective = Objective(settings(prediction=prediction, min_snr_gamma=5.0))
        loss = objective.loss(predictor_of(guess, prediction, objective), x_0, noise, TIMESTEPS)
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("schedule", "prediction"), itertools.product(SCHEDULES, PREDICTIONS))
def test_min_snr_weights_are_finite_and_positive_at_every_timestep(schedule: str, prediction: str) -> None:
    weight = Objective(settings(schedule=schedule, prediction=prediction, min_snr_gamma=5.0))._weight
    assert weight.isfinite().all()
    assert (weight > 0).all()


def schedule_of(name: str, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Betas and alphas_cumprod in float64, from the papers' definitions."""
    times = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = ((times + 0.008) / 1.008 * math.pi / 2).cos().square()  # Nichol & Dhariwal 2021, eq. 17
    linear = torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64)  # Ho et al. 2020, section 4
    betas = {"linear": linear, "cosine": (1 - f[1:] / f[:-1]).clamp(max=0.999)}[name]
    return betas, (1 - betas).cumprod(0)


def hybrid_loss(
    schedule: tuple[Tensor, Tensor], prediction: str, x_0: Tensor, noise: Tensor, x_t: Tensor, output: Tensor, t: int
) -> Tensor:
    """L_simple + 0.001 L_vlb of one image, a scalar in float64 (Nichol & Dhariwal 2021, eqs. 15 and 16).

    L_vlb is a sum over T timesteps of which one is drawn: T times its L_t, in bits a dimension.
    """
    betas, abar = schedule
    signal, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
    before = abar[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
    value, v = output.chunk(2)
    target = {"epsilon": noise, "sample": x_0, "v_prediction": signal * noise - sigma * x_0}[prediction]
    fixed = value.detach()
    guess = {"epsilon": (x_t - sigma * fixed) / signal, "sample": fixed, "v_prediction": signal * x_t - sigma * fixed}

    def mean(x: Tensor) -> Tensor:  # Ho et al. 2020, eq. 7
        return (before.sqrt() * betas[t] * x + (1 - betas[t]).sqrt() * (1 - before) * x_t) / (1 - abar[t])

    s = max(t, 1)  # the first posterior variance is zero: the second stands in for it
    small = betas[s] * (1 - abar[s - 1]) / (1 - abar[s])
    fraction = (v + 1) / 2
    p = torch.distributions.Normal(
        mean(guess[prediction]), ((fraction * betas[t].log() + (1 - fraction) * small.log()) / 2).exp()
    )
    if t:
        nats = torch.distributions.kl_divergence(torch.distributions.Normal(mean(x_0), small.sqrt()), p)
    else:
        above, below = p.cdf(x_0 + 1 / 255).where(x_0 < 0.999, 1.0), p.cdf(x_0 - 1 / 255).where(x_0 > -0.999, 0.0)
        nats = -(above - below).log()
    return (value - target).square().mean() + 1e-3 * len(betas) * nats.mean() / math.log(2)


@pytest.mark.parametrize(
    ("schedule", "num_train_timesteps", "prediction"), itertools.product(["linear", "cosine"], [1000, 100], PREDICTIONS)
)
def test_the_hybrid_loss_and_its_gradient_are_the_papers_in_float64(
    schedule: str, num_train_timesteps: int, prediction: str
) -> None:
    fields = {"schedule": schedule, "num_train_timesteps": num_train_timesteps, "prediction": prediction}
    objective = Objective(settings(**fields, variance="learned"))
    x_0, noise = images()
    last = num_train_timesteps // 2  # later the cosine schedule leaves so little signal that fp32 cannot divide by it
    timesteps = torch.tensor([0, 1, 2, 10, last - 1, last])
    guess = x_0 + 0.01 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    v = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x_t = objective.add_noise(x_0, noise, timesteps)
    output = torch.cat([predictor_of(guess, prediction, objective)(x_t, timesteps, None), v], 1).requires_grad_()
    loss = objective.loss(lambda *_: output, x_0, noise, timesteps)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    for i, t in enumerate(timesteps.tolist()):
        exact = output[i].detach().double().requires_grad_()
        tensors = (x_0[i].double(), noise[i].double(), x_t[i].double())
        expected = hybrid_loss(schedule_of(schedule, num_train_timesteps), prediction, *tensors, exact, t)
        (slope,) = torch.autograd.grad(expected, exact)
        assert loss[i].item() == pytest.approx(expected.item(), rel=2e-3), t
        for part in (slice(0, 3), slice(3, 6)):  # of the mean, and of the variance
            assert (gradient[i, part] - slope[part]).norm() < 3e-3 * slope[part].norm(), (t, part)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_the_last_denoising_step_the_posterior_mean_is_x_0_itself(schedule: str) -> None:
    x_0, x_t = images()
    posterior = Objective(settings(schedule=schedule, variance="learned"))._posterior
    assert posterior is not None
    assert torch.equal(posterior._mean(x_0, x_t, torch.zeros(len(x_0), dtype=torch.int64)), x_0)


def test_the_bound_does_not_pull_at_the_mean() -> None:
    x_0, noise = images()
    gradients = []
    for variance in ("learned", "fixed_small"):
        mean = (noise + 0.1).requires_grad_()
        v = torch.zeros_like(mean, requires_grad=True)
        output = torch.cat([mean, v], 1) if variance == "learned" else mean
        loss = Objective(settings(variance=variance)).loss(lambda x, t, y, out=output: out, x_0, noise, TIMESTEPS)
        loss.sum().backward()
        gradients.append(mean.grad)
        if variance == "learned":
            assert v.grad is not None
            assert v.grad.isfinite().all()
            assert (v.grad[1:].flatten(1).abs().sum(1) > 0).all()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_learned_variance_is_the_one_diffusers_samples_with() -> None:
    scheduler: Any = noise_scheduler(settings(variance="learned"))
    posterior = Objective(settings(variance="learned"))._posterior
    assert posterior is not None
    v = torch.linspace(-1, 1, 9)
    for t in (1, 2, 500, 999):
        theirs = scheduler._get_variance(t, predicted_variance=v)
        ours = (v + 1) / 2 * posterior._log_large[t] + (1 - v) / 2 * posterior._log_small[t]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("mean", "log_std"), [(0.3, -4.6), (-1.2, -5.0), (1.05, -4.0), (0.0, -1.0), (0.2, 3.0)])
def test_the_probabilities_of_all_levels_add_up_to_one(mean: float, log_std: float) -> None:
    x = torch.arange(256) / 127.5 - 1
    log_likelihood = diffusion._discretized_gaussian_log_likelihood(
        x, torch.full_like(x, mean), torch.full_like(x, log_std)
    )
    assert float(log_likelihood.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_a_level_far_out_keeps_its_likelihood_and_its_gradient() -> None:
    """Where fp32 probabilities underflow: log p is about -(distance / std)^2 / 2 and pulls the mean back."""
    x, mean = torch.tensor([0.5 / 127.5]), torch.tensor([0.9], requires_grad=True)
    value = diffusion._discretized_gaussian_log_likelihood(x, mean, torch.tensor([-6.0]))
    nearest = (0.9 - 0.5 / 127.5 - 1 / 255) * math.exp(6)
    assert value.item() == pytest.approx(stats.norm.logsf(nearest), rel=1e-4)
    value.sum().backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()
    assert float(mean.grad) < 0


def test_timesteps_are_keyed_by_position_and_reach_all_levels() -> None:
    objective = Objective(settings(num_train_timesteps=50))
    drawn = objective.timesteps(0, 7, torch.arange(5000))
    assert drawn.dtype == torch.int64
    assert sorted(set(drawn.tolist())) == list(range(50))
    assert torch.equal(drawn[100:200], objective.timesteps(0, 7, torch.arange(100, 200)))
    assert not torch.equal(drawn, objective.timesteps(0, 8, torch.arange(5000)))


def test_labels_are_dropped_at_the_rate_that_was_set_and_by_position() -> None:
    labels, positions = torch.arange(20_000) % 10, torch.arange(20_000)
    objective = Objective(settings(label_dropout=0.2))
    dropped = objective.drop_labels(labels, 10, 0, 3, positions)
    hidden = dropped == 10
    assert float(hidden.double().mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 20_000))
    assert torch.equal(dropped[~hidden], labels[~hidden])
    part = slice(500, 900)
    assert torch.equal(dropped[part], objective.drop_labels(labels[part], 10, 0, 3, positions[part]))
    assert torch.equal(Objective(settings(label_dropout=0)).drop_labels(labels, 10, 0, 3, positions), labels)
    assert (Objective(settings(label_dropout=1)).drop_labels(labels, 10, 0, 3, positions) == 10).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_the_loss_is_the_same_on_the_gpu(variance: str) -> None:
    x_0, noise = images()
    output = torch.randn(len(TIMESTEPS), 6 if variance == "learned" else 3, 4, 4)
    on_cpu = Objective(settings(variance=variance)).loss(lambda *_: output, x_0, noise, TIMESTEPS)
    there = output.cuda()
    on_gpu = Objective(settings(variance=variance)).to("cuda")
    loss = on_gpu.loss(lambda *_: there, x_0.cuda(), noise.cuda(), TIMESTEPS.cuda())
    torch.testing.assert_close(loss.cpu(), on_cpu, rtol=1e-4, atol=1e-5)
