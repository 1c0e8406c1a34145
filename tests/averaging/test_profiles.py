"""Profiles: decays and weightings against closed forms, composition, meaning, and refused values."""

import json
import math
import pickle
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onehot import kept_weighting

from ddpm_ema.averaging import (
    PROFILES,
    BiasCorrected,
    ConstantDecay,
    CosineCooldown,
    Delayed,
    DiffusersDecay,
    HalfLife,
    HalfLifeShare,
    HardCopy,
    PowerFunction,
    Profile,
    SqrtCooldown,
    StochasticWeightAverage,
    Uniform,
    Warmup,
    Window,
    exponent_to_std,
    profile_from_dict,
    profile_to_dict,
    resolve_lengths,
    std_to_exponent,
    summarize,
)

EVERY_RULE: list[Profile] = [
    ConstantDecay(0.97),
    ConstantDecay(1.0),
    ConstantDecay(0.0),
    BiasCorrected(0.97),
    BiasCorrected(0.0),
    Warmup(0.97, inv_gamma=3.0, power=0.75),
    PowerFunction(std=0.10),
    Uniform(),
    StochasticWeightAverage(start=40, every=20),
    HardCopy(every=70),
    HalfLife(20.0, ramp_up=0.2),  # the ramp ends at step 101
    HalfLifeShare(0.1),
    DiffusersDecay(max_decay=0.9, update_after_step=30),
    Window(length=120, end=300),
    CosineCooldown(length=100, end=250),  # 300 is after its end
    SqrtCooldown(length=290, end=310),  # and within this one
    Delayed(ConstantDecay(0.97), start=40),
    Delayed(PowerFunction(std=0.10), start=40),
    Delayed(HardCopy(every=70), start=40),
    Delayed(DiffusersDecay(max_decay=0.9), start=310),
]
STEPS = 300


def one_step_at_a_time(decays: list[float]) -> list[float]:
    w = [1.0]
    for d in decays:
        w = [d * x for x in w] + [1 - d]
    return w


def run_with_decay(rate: Callable[[float], float], length: int, end: int) -> list[float]:
    """The run itself, at full rate until end - length and then at rate(u), its movements those of the one-hot parameters."""
    w = [0.0] * (end + 1)
    w[end - length] = 1.0
    for t in range(end - length, end):
        r = rate((t - (end - length)) / length)
        w[t], w[t + 1] = w[t] - r, w[t + 1] + r
    return w


RATES: dict[type[Profile], Callable[[float], float]] = {
    Window: lambda u: 1 - u,
    CosineCooldown: lambda u: (1 + math.cos(math.pi * u)) / 2,
    SqrtCooldown: lambda u: 1 - math.sqrt(u),
}


def closed_form(profile: Profile, steps: int) -> np.ndarray:
    """The weight of the parameters after step i, i = 0..steps, from the rule's definition in the literature."""
    w = [0.0] * (steps + 1)
    if isinstance(profile, ConstantDecay):
        d = profile.decay_per_step
        w = [d**steps] + [(1 - d) * d ** (steps - i) for i in range(1, steps + 1)]
    elif isinstance(profile, BiasCorrected):
        d = profile.decay_per_step
        total = sum(d ** (steps - i) for i in range(1, steps + 1))
        w = [0.0] + [d ** (steps - i) / total for i in range(1, steps + 1)]
    elif isinstance(profile, Warmup):
        d, g, p = profile.decay_per_step, profile.inv_gamma, profile.power
        w = one_step_at_a_time([min(d, 1 - (1 + t / g) ** -p) for t in range(1, steps + 1)])
    elif isinstance(profile, HalfLife):  # EDM's rule with images as the unit: batch 32
        batch, seen = 32, [32 * t for t in range(steps)]
        half_lives = [min(profile.half_life * batch, profile.ramp_up * images) for images in seen]
        w = one_step_at_a_time([0.5 ** (batch / max(half_life, 1e-8)) for half_life in half_lives])
    elif isinstance(profile, HalfLifeShare):
        w = one_step_at_a_time([2 ** (-1 / (profile.share * t)) for t in range(1, steps + 1)])
    elif isinstance(profile, DiffusersDecay):
        s = [t - profile.update_after_step - 1 for t in range(1, steps + 1)]
        w = one_step_at_a_time([0.0 if x <= 0 else min((1 + x) / (10 + x), profile.max_decay) for x in s])
    elif isinstance(profile, tuple(RATES)):
        end, begin = min(profile.end, steps), profile.end - profile.length
        copied, shape = min(begin, steps), RATES[type(profile)]
        if end > begin:  # cut short, what is emulated comes down to 0 at `steps` instead, on the same curve
            cut = shape((end - begin) / profile.length)
            w = run_with_decay(
                lambda u: (shape(u * (end - begin) / profile.length) - cut) / (1 - cut), end - begin, end
            )
        else:
            w[copied] = 1.0
        w += [0.0] * (steps + 1 - len(w))
    elif isinstance(profile, Delayed):
        begun = steps - profile.start
        late = closed_form(profile.profile, begun).tolist() if begun > 0 else [1.0]
        w = [0.0] * (steps + 1 - len(late)) + late
    elif isinstance(profile, PowerFunction):
        g = std_to_exponent(profile.std) + 1
        w = [0.0] + [(i / steps) ** g - ((i - 1) / steps) ** g for i in range(1, steps + 1)]
    elif isinstance(profile, Uniform):
        w = [0.0] + [1 / steps] * steps
    elif isinstance(profile, StochasticWeightAverage):
        taken = [i for i in range(1, steps + 1) if i >= profile.start and (i - profile.start) % profile.every == 0]
        w = [1 / len(taken) if i in taken else 0.0 for i in range(steps + 1)] if taken else [*w[1:], 1.0]
    elif isinstance(profile, HardCopy):
        w[steps // profile.every * profile.every] = 1.0
    return np.array(w)


@pytest.mark.parametrize("profile", EVERY_RULE, ids=repr)
@pytest.mark.parametrize("every", [1, 3, 10, 100])
def test_an_average_updated_every_n_steps_gives_each_block_of_n_its_closed_form_weight(
    profile: Profile, every: int
) -> None:
    expected = closed_form(profile, STEPS)
    blocks = np.concatenate([expected[:1], expected[1:].reshape(-1, every).sum(axis=1)])

    kept = kept_weighting(profile, STEPS, every)

    np.testing.assert_allclose(kept[::every], blocks, atol=2e-6)
    assert np.count_nonzero(kept) == np.count_nonzero(kept[::every])  # nothing lands between the updates


@pytest.mark.parametrize("profile", EVERY_RULE, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 39, 40, STEPS])
def test_the_weighting_a_profile_writes_down_is_its_closed_form(profile: Profile, steps: int) -> None:
    expected = closed_form(profile, steps)

    weighting = profile.weighting(steps)

    assert weighting.dtype == np.float64
    assert weighting.shape == (steps,)
    np.testing.assert_allclose(weighting, expected[1:], atol=1e-13)
    assert profile.initial_weight(steps) == pytest.approx(expected[0], abs=1e-13)
    assert weighting.sum() + profile.initial_weight(steps) == pytest.approx(1.0, abs=1e-12)


def test_closed_forms_hold_at_a_million_steps() -> None:
    step, half = 1_000_000, 500_000
    t = np.arange(half + 1, step + 1, dtype=np.float64)
    for profile, exponents in (
        (HalfLife(40_000.0, ramp_up=0.05), 1 / np.minimum(40_000.0, 0.05 * (t - 1))),
        (HalfLifeShare(0.05), 1 / (0.05 * t)),
    ):
        assert profile.decay(step, half) == pytest.approx(2 ** -math.fsum(exponents), rel=1e-10)
        assert profile.weighting(step)[:half].sum() == pytest.approx(profile.decay(step, half), rel=1e-9)


def test_a_half_life_that_is_a_share_of_training_is_nearly_a_power_function() -> None:
    share, steps = 0.05, 20_000
    std = exponent_to_std(math.log(2) / share - 1)
    assert std == pytest.approx(0.0629, abs=5e-5)
    for profile in (HalfLifeShare(share), HalfLife(steps, ramp_up=share)):
        assert profile.sigma_rel(steps) == pytest.approx(std, rel=1e-3)
        assert profile.centre(steps) == pytest.approx(PowerFunction(std).centre(steps), rel=1e-4)


@pytest.mark.parametrize("profile", EVERY_RULE, ids=repr)
@pytest.mark.parametrize("steps", [1, 40, STEPS])
def test_the_cumulative_weighting_is_what_survives_and_the_sum_of_the_weighting_and_lies_between_elsewhere(
    profile, steps
) -> None:
    expected = np.cumsum(closed_form(profile, steps))
    whole = np.arange(steps + 1.0)
    survived = [profile.decay(steps, steps - until) for until in range(steps)]
    np.testing.assert_allclose([*survived, 1.0], expected, atol=1e-12)  # the average after t steps survives as P(t)
    np.testing.assert_allclose(profile.cumulative(steps, whole), expected, atol=1e-12)
    between = profile.cumulative(steps, whole[:-1] + 0.5)
    assert np.all((between >= expected[:-1] - 1e-12) & (between <= expected[1:] + 1e-12))
    assert profile.cumulative(steps, np.array([steps + 3.0])) == 1.0


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    decay, length = draw(st.floats(0.0, 1.0 - 1e-9)), draw(st.integers(1, 1000))
    cooldown, end = draw(st.sampled_from(sorted(RATES, key=str))), draw(st.integers(1000, 10**5))
    rule = draw(
        st.sampled_from(
            [
                ConstantDecay(decay),
                BiasCorrected(decay),
                Warmup(decay, draw(st.floats(0.01, 1e4)), draw(st.floats(0.1, 3.0))),
                PowerFunction(draw(st.floats(0.001, 0.288))),
                Uniform(),
                StochasticWeightAverage(draw(st.integers(1, 500)), draw(st.integers(1, 50))),
                HardCopy(draw(st.integers(1, 500))),
                HalfLife(draw(st.floats(1.0, 1e6)), draw(st.floats(0.001, 1.0))),
                HalfLifeShare(draw(st.floats(0.01, 1.0))),
                DiffusersDecay(decay, update_after_step=draw(st.integers(-1, 500))),
                cooldown(length, end),
            ]
        )
    )
    if draw(st.booleans()) and not {"start", "end"} & rule.settings().keys():
        return Delayed(rule, draw(st.integers(1, 10**5)))
    return rule


@given(profile=profiles(), start=st.integers(0, 10**5), a=st.integers(1, 300), b=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_decays_are_shares_and_compose(profile: Profile, start: int, a: int, b: int) -> None:
    end = start + a + b
    together = profile.decay(end, a + b)
    apart = profile.decay(end, b) * profile.decay(start + a, a)
    assert together == pytest.approx(apart, rel=1e-9, abs=1e-300)
    assert 0.0 <= together <= 1.0


def test_the_debiased_decay_is_exact_to_float64_where_the_plain_formula_cancels() -> None:
    d, t = Fraction(999999, 1000000), 5
    exact = float(d * (1 - d ** (t - 1)) / (1 - d**t))
    assert BiasCorrected(float(d)).decay(t) == pytest.approx(exact, rel=1e-15)


def test_the_debiased_average_is_adams_moment_divided_by_its_correction() -> None:
    rng, decay, steps = np.random.default_rng(0), 0.98, 200
    values = rng.normal(size=steps)
    moment, ours = 0.0, 123.0  # a bad initial value: it must not matter
    profile = BiasCorrected(decay)
    for t, value in enumerate(values, start=1):
        moment = decay * moment + (1 - decay) * value
        keep = profile.decay(t)
        ours = keep * ours + (1 - keep) * value
        assert ours == pytest.approx(moment / (1 - decay**t), rel=1e-12, abs=1e-12)


# std, centre = (gamma + 1) / (gamma + 2); the second is the figure that an average updated every N steps must not miss.
@pytest.mark.parametrize(("std", "centre"), [(0.05, 0.9473), (0.10, 0.8881), (0.20, 0.7387)])
@pytest.mark.parametrize("every", [1, 100])
def test_a_power_function_sits_where_the_paper_says_also_when_updated_every_n_steps(
    std: float, centre: float, every: int
) -> None:
    steps = 2000
    kept = kept_weighting(PowerFunction(std), steps, every)
    times = np.arange(steps + 1) / steps
    assert kept @ times == pytest.approx(centre, abs=0.5 * every / steps + 1e-3)
    assert PowerFunction(std).centre(20_000) == pytest.approx(centre, abs=2e-4)
    assert PowerFunction(std).sigma_rel(20_000) == pytest.approx(std, rel=1e-4)


def test_a_profile_says_what_it_means() -> None:
    steps = 20_000
    assert ConstantDecay(0.999).effective_window(steps) == pytest.approx(1999, rel=1e-4)
    assert ConstantDecay(0.999).centre(steps) == pytest.approx(1 - 999 / steps, rel=1e-6)
    assert ConstantDecay(0.999).sigma_rel(steps) == pytest.approx(math.sqrt(0.999) / 0.001 / steps, rel=1e-4)
    assert Uniform().effective_window(steps) == pytest.approx(steps)
    assert Uniform().centre(steps) == pytest.approx(0.5, abs=1e-4)
    assert Uniform().sigma_rel(steps) == pytest.approx(1 / math.sqrt(12), rel=1e-6)
    assert HardCopy(3000).centre(steps) == pytest.approx(18_000 / steps)
    assert HardCopy(3000).effective_window(steps) == 1.0
    assert StochasticWeightAverage(10_001, 1000).effective_window(steps) == pytest.approx(10)
    assert ConstantDecay(1.0).centre(steps) == 0.0  # frozen: all at the start
    assert ConstantDecay(1.0).effective_window(steps) == 0.0
    assert ConstantDecay(0.9999).effective_window(10) == pytest.approx(
        10, abs=1e-3
    )  # not the initial weights, nearly all
    assert "88.8%" in PowerFunction(0.10).describe(steps)
    assert "initial" in ConstantDecay(0.9999).describe(1000)


def test_the_time_constant_is_that_of_the_last_update_where_every_step_has_one() -> None:
    assert ConstantDecay(0.999).time_constant(10) == pytest.approx(1000)
    assert BiasCorrected(0.9999).time_constant(1500) == pytest.approx((1 - 0.9999**1500) / 0.0001)  # 1393
    assert Uniform().time_constant(700) == pytest.approx(700)
    assert Delayed(Uniform(), start=100).time_constant(700) == pytest.approx(600)
    for profile in (HardCopy(400), StochasticWeightAverage(100, 100), ConstantDecay(1.0), CosineCooldown(9, 400)):
        assert profile.time_constant(400) is None


def test_the_table_says_before_training_which_average_is_too_long_for_the_run() -> None:
    lines = summarize(
        {"ema_0_9999": ConstantDecay(0.9999), "ema_0_99": ConstantDecay(0.99), "hard": HardCopy(1000)}, num_steps=1500
    )
    # 0.9999^1500 = 0.8607; (1 + d)(1 - d^n) / ((1 - d)(1 + d^n)) = 1,497 steps; 1 - d (1 - d^n) / ((1 - d) n) = 0.0714
    assert [line.split() for line in lines[1:4]] == [
        ["ema_0_9999", "10,000", "1,497", "7.1%", "86.1%"],
        ["ema_0_99", "100", "199", "93.4%", "0.0%"],
        ["hard", "-", "1", "66.7%", "0.0%"],
    ]
    assert lines[4:] == [
        "warning: ema_0_9999 will still hold 86% of the initial weights after 1,500 steps: use bias_corrected or power_function"
    ]
    assert summarize({}, 1500) == []


def test_a_length_is_steps_or_a_share_of_the_run_or_images_and_becomes_steps_once() -> None:
    run = {"num_steps": 1500, "batch_size": 512}
    edm = resolve_lengths({"kind": "half_life", "half_life": "500kimg"}, **run)
    assert profile_from_dict(edm) == HalfLife(976.5625, ramp_up=0.05)
    window = resolve_lengths({"kind": "window", "length": "20%", "end": "100%"}, **run)
    assert window == {"kind": "window", "length": 300, "end": 1500}
    late = resolve_lengths({"kind": "constant", "decay": 0.9, "start": "0.1 Mimg"}, **run)
    assert profile_from_dict(late) == Delayed(ConstantDecay(0.9), start=195)  # 195.3 steps: whole where it must be
    assert resolve_lengths(window, num_steps=3000, batch_size=1) == window
    with pytest.raises(
        ValueError, match=r"length: expected a number of steps, .* such as 5%, .* 500kimg, got '5 percent'"
    ):
        resolve_lengths({"kind": "window", "length": "5 percent", "end": 10}, **run)
    with pytest.raises(ValueError, match=r"decay: expected a number with 0 <= decay <= 1, got '5%'"):
        profile_from_dict(resolve_lengths({"kind": "constant", "decay": "5%"}, **run))


def test_tau_is_one_minus_decay() -> None:
    assert ConstantDecay.from_tau(0.005) == ConstantDecay(0.995)
    assert 1.0 - ConstantDecay.from_tau(0.005).decay(7) == pytest.approx(0.005, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantDecay(1.5), r"decay: expected a number with 0 <= decay <= 1, got 1\.5"),
        (lambda: ConstantDecay(-0.1), r"decay: .*got -0\.1"),
        (lambda: ConstantDecay(float("nan")), r"decay: .*got nan"),
        (lambda: ConstantDecay(True), r"decay: .*got True"),
        (lambda: ConstantDecay("0.999"), r"decay: .*got '0\.999'"),
        (lambda: ConstantDecay.from_tau(1.5), r"tau: .*got 1\.5"),
        (lambda: BiasCorrected(1.0), r"decay: expected a number with 0 <= decay < 1 .*got 1\.0"),
        (lambda: BiasCorrected(np.bool_(False)), r"decay: "),
        (lambda: Warmup(0.999, inv_gamma=0.0), r"inv_gamma: expected a finite number above 0, got 0\.0"),
        (lambda: Warmup(0.999, power=float("inf")), r"power: .*got inf"),
        (lambda: PowerFunction(0.4), r"std: expected a number with 0 < std < 0\.288675 .*got 0\.4"),
        (lambda: PowerFunction(0.0), r"std: .*got 0\.0"),
        (lambda: PowerFunction(1 / math.sqrt(12)), r"std: "),
        (lambda: PowerFunction(True), r"std: .*got True"),
        (lambda: PowerFunction("0.1"), r"std: .*got '0\.1'"),
        (lambda: StochasticWeightAverage(0, 10), r"start: expected a whole number of steps of at least 1, got 0"),
        (lambda: StochasticWeightAverage(10, 2.5), r"every: .*got 2\.5"),
        (lambda: HardCopy(True), r"every: .*got True"),
        (lambda: HardCopy(float("nan")), r"every: .*got nan"),
        (lambda: HalfLife(0.0), r"half_life: expected a finite number above 0, got 0\.0"),
        (lambda: HalfLife(10, ramp_up=-1), r"ramp_up: .*got -1"),
        (lambda: HalfLifeShare("5%"), r"share: .*got '5%'"),
        (lambda: Window(11, 10), r"length: expected at most `end`, 10 steps, got 11"),
        (lambda: CosineCooldown(0, 10), r"length: .*got 0"),
        (lambda: DiffusersDecay(min_decay=1.5), r"min_decay: expected a number with 0 <= min_decay <= 1, got 1\.5"),
        (lambda: DiffusersDecay(update_after_step="3"), r"update_after_step: .*got '3'"),
        (lambda: DiffusersDecay(use_ema_warmup="no"), "use_ema_warmup: expected true or false, got 'no'"),
        (lambda: Delayed(Uniform(), 1.5), r"start: expected a whole number of steps of at least 1, got 1\.5"),
        (
            lambda: Delayed(Delayed(Uniform(), 3), 4),
            r"start: Delayed\(Uniform\(\), start=3\) begins by its own 'start'",
        ),
        (lambda: Delayed(Window(1, 2), 4), r"start: Window\(length=1, end=2\) begins by its own 'end'"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("step", "num_steps"), [(0, 1), (5, 0), (5, 6), (-1, 1)])
@pytest.mark.parametrize("profile", EVERY_RULE, ids=repr)
def test_an_update_for_no_step_or_more_than_there_were_is_refused(profile: Profile, step: int, num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"step={step}, num_steps={num_steps}"):
        profile.decay(step, num_steps)


@pytest.mark.parametrize("profile", EVERY_RULE, ids=repr)
def test_a_profile_survives_json_pickle_and_comparison(profile: Profile) -> None:
    stored = json.loads(json.dumps(profile_to_dict(profile)))
    assert profile_from_dict(stored) == profile
    assert pickle.loads(pickle.dumps(profile)) == profile
    assert hash(profile_from_dict(stored)) == hash(profile)
    assert eval(repr(profile)) == profile
    assert PROFILES[stored["kind"]] is type(getattr(profile, "profile", profile))


def test_every_kind_is_among_those_tested_and_a_profile_is_immutable() -> None:
    assert {profile.kind for profile in EVERY_RULE} == set(PROFILES)
    with pytest.raises(AttributeError):
        ConstantDecay(0.9).decay_per_step = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "powerfunction", "std": 0.1},
            r"kind: unknown profile 'powerfunction': did you mean 'power_function'\?",
        ),
        ({"kind": 3}, r"kind: unknown profile 3"),
        ({"decay": 0.9}, r"profile: expected a mapping with a 'kind'"),
        ({"kind": "constant", "decy": 0.9}, r"decy: unknown field of profile 'constant': did you mean 'decay'\?"),
        ({"kind": "constant"}, r"decay: missing field of profile 'constant'"),
        ({"kind": "uniform", "std": 0.1}, r"std: unknown field of profile 'uniform': expected no fields"),
        ({"kind": "power_function", "std": 0.3}, r"std: expected a number with 0 < std < 0\.288675"),
    ],
)
def test_bad_settings_name_the_field_and_the_nearest_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_from_dict(settings)


def test_optional_fields_have_defaults() -> None:
    assert profile_from_dict({"kind": "warmup", "decay": 0.9}) == Warmup(0.9, inv_gamma=1.0, power=2 / 3)
    assert profile_from_dict({"kind": "swa", "start": 5}) == StochasticWeightAverage(start=5, every=1)
    assert profile_from_dict({"kind": "half_life", "half_life": 900}) == HalfLife(900.0, ramp_up=0.05)
    assert profile_from_dict({"kind": "uniform", "start": 0}) == Uniform()
