"""The bank: every averaged copy of one model, kept by one update."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_ema.averaging import gather, lerp
from ddpm_ema.averaging.hooks import UpdateHandle, update_after_steps
from ddpm_ema.averaging.naming import assign_owners, check_tensors, clean_name, clean_named
from ddpm_ema.averaging.offload import HostMirror
from ddpm_ema.averaging.profiles import Profile, profile_to_dict

STATE_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")


class AverageBank:
    """Averaged copies of a model's parameters, one for each profile, in fp32 whatever the model's dtype.

    Every copy starts at the current parameters. Parameters are paired by name, without the prefixes that torch.compile and
    DistributedDataParallel add; the names of a tied parameter share one average. Memory: 4 bytes x parameters x
    profiles / world_size on each process, and nothing else grows with the number of profiles.

    Example:
        bank = AverageBank(model.named_parameters(), {"ema_0_999": ConstantDecay(0.999)})
        for step, batch in enumerate(loader, start=1):
            train(batch)
            bank.update(step)
        bank.copy_to("ema_0_999", evaluation_model)
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        profiles: Mapping[str, Profile],
        *,
        named_buffers: Iterable[tuple[str, Tensor]] = (),
        buffers: Literal["copy", "average"] = "copy",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the copies.

        Args:
            named_parameters: `model.named_parameters()`, of any floating dtype, wrapped or not. Move the model to its device
                and memory format first: each copy takes its parameter's layout.
            profiles: name of the copy -> its profile. Names match [A-Za-z0-9_-]+.
            named_buffers: `model.named_buffers()`, if the model has any that matter (batch norm). Every process keeps all.
            buffers: "copy" them whenever a copy moves, or "average" the floating ones like parameters (integers are copied).
            rank: this process among `world_size`; it owns and updates its share of the parameters alone.
            world_size: number of processes that share the work.
            device: where the copies live: None, beside their parameters; "cpu", in host memory, updated behind the next
                step's computation.

        Raises:
            ValueError: a bad name, profile, rank or setting, two parameters of one name, or one that is not floating.
        """
        _check_settings(profiles, buffers, rank, world_size)
        self._parameters = clean_named(named_parameters, "parameters")
        self._buffers = clean_named(named_buffers, "buffers")
        for name, tensor in self._parameters.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"parameter {name!r}: only floating-point parameters can be averaged, not {tensor.dtype}"
                )
        self._profiles = dict(profiles)
        self._rank, self._world_size = rank, world_size
        self._step: int | None = None
        self._stored_as = _first_names(self._parameters)
        distinct = {name: p.numel() for name, p in self._parameters.items() if self._stored_as[name] == name}
        owners = assign_owners(distinct, world_size)
        self._owners = {name: owners[stored_as] for name, stored_as in self._stored_as.items()}
        owned = {name: self._parameters[name] for name in distinct if owners[name] == rank}
        averaged = {n: b for n, b in self._buffers.items() if buffers == "average" and b.is_floating_point()}
        copied = {n: b for n, b in self._buffers.items() if n not in averaged}
        self._allocate(owned | averaged, copied, None if device is None else torch.device(device))

    def _allocate(self, averaged: dict[str, Tensor], copied: dict[str, Tensor], device: torch.device | None) -> None:
        """Fix what the copies follow (`_averaged`, `_copied`: the live tensors or their mirror) and make the copies."""
        sources = averaged | copied
        self._mirror: HostMirror | None = None
        if device is not None and any(_elsewhere(source, device) for source in sources.values()):
            if device.type != "cpu":
                raise ValueError(
                    f"device: copies live beside their parameters (None) or on the CPU, got {str(device)!r}"
                )
            self._mirror = HostMirror(list(sources.values()))
            sources = dict(zip(sources, self._mirror.values, strict=True))
        self._averaged = {name: sources[name] for name in averaged}
        self._copied = {name: sources[name] for name in copied}
        self._device = next((source.device for source in sources.values()), torch.device("cpu"))
        self._averages = {name: _fp32_copies(self._averaged) for name in self._profiles}
        self._copies = {k: {n: s.detach().clone() for n, s in self._copied.items()} for k in self._profiles}

    @property
    def profiles(self) -> dict[str, Profile]:
        """Name of each copy -> its profile."""
        return dict(self._profiles)

    @property
    def parameter_names(self) -> list[str]:
        """Clean names of all parameters, in the model's order, owned here or not."""
        return list(self._parameters)

    @property
    def step(self) -> int | None:
        """The step of the last update; None before the first, and after weights were put in from outside."""
        return self._step

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies that this process owns."""
        tensors = [t for copy in (*self._averages.values(), *self._copies.values()) for t in copy.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def owner(self, parameter_name: str) -> int:
        """The rank that keeps this parameter's averages. Raises: KeyError: there is no such parameter."""
        return self._owners[clean_name(parameter_name)]

    def update(self, step: int, num_steps: int = 1) -> None:
        """Move every copy towards the current parameters. Never communicates and never waits for a device.

        Args:
            step: optimizer steps completed so far, this one included.
            num_steps: how many of them passed since the last update; the parameters now stand for all of them.

        Raises:
            ValueError: not 1 <= num_steps <= step, or steps are left out or counted twice since the last update: their
                weight would silently go elsewhere.
        """
        if self._step is not None and step - num_steps != self._step:
            raise ValueError(
                f"update(step={step}, num_steps={num_steps}) does not follow the update at step {self._step}: "
                f"expected num_steps={step - self._step}"
                if step > self._step
                else f"update(step={step}) comes after the update at step {self._step}: steps only grow"
            )
        weights = {name: 1.0 - profile.decay(step, num_steps) for name, profile in self._profiles.items()}
        self._step = step
        if self._mirror is None:
            self._move(weights)
        elif any(weights.values()):
            self._mirror.submit(lambda: self._move(weights))

    def _move(self, weights: Mapping[str, float]) -> None:
        moving = [name for name, weight in weights.items() if weight > 0.0]
        averages = [list(self._averages[name].values()) for name in moving]
        lerp.lerp_(averages, list(self._averaged.values()), [weights[name] for name in moving])
        if self._copied:
            copies = [list(self._copies[name].values()) for name in moving]
            lerp.lerp_(copies, list(self._copied.values()), [1.0] * len(moving))

    def weights(self, name: str) -> dict[str, Tensor]:
        """One copy's parameters: what this process owns, so everything when `world_size` is 1.

        Returns:
            clean parameter name -> fp32 tensor. These are the live averages, not clones: they move at the next update,
            and writing to them changes the bank.

        Raises:
            KeyError: there is no such copy.
        """
        averages = self._settled(name)
        return {n: averages[s] for n, s in self._stored_as.items() if self._owners[n] == self._rank}

    def buffers(self, name: str) -> dict[str, Tensor]:
        """One copy's buffers, all of them on every process, live: averaged ones in fp32, copied ones in their dtype."""
        averages = self._settled(name)
        return {n: averages[n] if n in averages else self._copies[name][n] for n in self._buffers}

    def _settled(self, name: str) -> dict[str, Tensor]:
        """A copy's averages, after whatever still runs in the background."""
        if name not in self._profiles:
            raise KeyError(f"no copy is called {name!r}; there are {', '.join(self._profiles) or 'none'}")
        if self._mirror is not None:
            self._mirror.wait()
        return self._averages[name]

    def load_weights(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put a whole set of weights into a copy; each process takes the part it owns.

        Args:
            name: the copy.
            tensors: parameter name -> tensor of any floating dtype, for *every* parameter of the model.

        Raises:
            KeyError: there is no such copy.
            ValueError: a tensor is missing, unknown or misshaped; every such tensor is named and nothing is changed.
        """
        averages = self._settled(name)
        given = clean_named(tensors.items(), f"weights of {name!r}")
        check_tensors(given, {n: p.shape for n, p in self._parameters.items()}, f"weights of {name!r}")
        with torch.no_grad():
            for parameter_name, stored_as in self._stored_as.items():
                if self._owners[parameter_name] == self._rank:
                    averages[stored_as].copy_(given[parameter_name])
        self._step = None

    def load_buffers(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put a whole set of buffers into a copy. Raises as `load_weights`."""
        buffers = self.buffers(name)
        given = clean_named(tensors.items(), f"buffers of {name!r}")
        check_tensors(given, {n: b.shape for n, b in buffers.items()}, f"buffers of {name!r}")
        with torch.no_grad():
            for buffer_name, buffer in buffers.items():
                buffer.copy_(given[buffer_name])

    def copy_to(self, name: str, module: nn.Module) -> None:
        """Write a copy's parameters and buffers into a module of the same architecture (in the module's dtype).

        Raises:
            KeyError: there is no such copy.
            ValueError: the module's parameters differ in name or shape, or the copy is split over processes.
        """
        if self._world_size > 1:
            raise ValueError("copy_to: this process has only its share of the copy; use gather_all(name)")
        values = self.weights(name) | self.buffers(name)
        targets = clean_named(module.named_parameters(remove_duplicate=False), "parameters")
        if self._buffers:
            targets |= clean_named(module.named_buffers(remove_duplicate=False), "buffers")
        stored = {id(parameter): n for n, parameter in targets.items() if n in values}
        values |= {n: values[stored[id(p)]] for n, p in targets.items() if n not in values and id(p) in stored}
        check_tensors(values, {n: t.shape for n, t in targets.items()}, f"copy of {name!r}")
        with torch.no_grad():
            for target_name, target in targets.items():
                target.copy_(values[target_name])

    def gather(self, name: str, dst: int = 0, group: dist.ProcessGroup | None = None) -> Iterator[tuple[str, Tensor]]:
        """A split copy brought together on one process, one tensor at a time. Collective.

        Every process calls it, in the same order of names; `dst` must exhaust the iterator, elsewhere it is empty.

        Args:
            name: the copy.
            dst: the rank that gets it.
            group: the processes the bank is split over; None for the default group.

        Returns:
            On `dst`, (clean parameter name, fp32 CPU tensor of its own) in the order of `parameter_names`.

        Raises:
            KeyError: there is no such copy.
            ValueError: the bank is split, and torch.distributed is not initialised or the group has another size.
        """
        owned = self.weights(name)
        if self._world_size == 1:
            return ((n, t.detach().cpu().contiguous().clone()) for n, t in owned.items())
        gather.require_group(self._world_size, group)
        shapes = {n: p.shape for n, p in self._parameters.items()}
        return gather.gather(self.parameter_names, self._owners, owned, shapes, rank=self._rank, dst=dst, group=group)

    def gather_all(self, name: str, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """A whole copy on every process, fp32, each tensor a clone on its parameter's device. Collective; raises as `gather`."""
        owned = self.weights(name)
        if self._world_size == 1:
            return {n: t.detach().to(self._parameters[n].device, copy=True) for n, t in owned.items()}
        gather.require_group(self._world_size, group)
        return gather.gather_all(
            self.parameter_names, self._owners, owned, self._parameters, rank=self._rank, group=group
        )

    def squared_distances(self) -> dict[str, Tensor]:
        """How far each copy is from the raw parameters: the sum over what is owned here of (average - raw)^2.

        Sum it over processes for the whole model. No host synchronisation; with copies in host memory, the parameters as of
        the last update count as raw.

        Returns:
            name of the copy -> float64 [] on the copies' device.
        """
        owned = [name for name in self._averaged if name in self._parameters]
        raw = [self._averaged[name] for name in owned]
        return {
            copy: lerp.squared_distance([self._settled(copy)[n] for n in owned], raw, self._device)
            for copy in self._profiles
        }

    def squared_norm(self) -> Tensor:
        """The sum of squares of the raw parameters owned here, float64 [] on the copies' device, to divide by."""
        if self._mirror is not None:
            self._mirror.wait()
        raw = [source for name, source in self._averaged.items() if name in self._parameters]
        return lerp.squared_norm(raw, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Everything this process has to be stored, live tensors; `merge_states` joins those of several processes.

        Returns:
            {"version", "step", "profiles": {name: {"kind", ...}}, "averages": {name: {parameter: fp32}},
            "buffers": {name: {buffer: tensor}}}.
        """
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "profiles": {name: profile_to_dict(profile) for name, profile in self._profiles.items()},
            "averages": {name: self.weights(name) for name in self._profiles},
            "buffers": {name: self.buffers(name) for name in self._profiles},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a stored bank, of whatever number of processes; each process takes the part it owns.

        Args:
            state: a whole `state_dict()`; of a split bank, `merge_states` of those of all its processes.

        Raises:
            ValueError: it is no bank's state, its copies or their profiles differ (each differing field is named), or a tensor is
                missing, unknown or misshaped (named, with both shapes). Nothing is changed then.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected the state of a bank, version {STATE_VERSION}, got {found!r}")
        self._check_profiles(state["profiles"])
        parameters = {n: p.shape for n, p in self._parameters.items()}
        buffers = {n: b.shape for n, b in self._buffers.items()}
        for name in self._profiles:
            check_tensors(state["averages"].get(name, {}), parameters, f"weights of {name!r}")
            check_tensors(state["buffers"].get(name, {}), buffers, f"buffers of {name!r}")
        for name in self._profiles:
            self.load_weights(name, state["averages"][name])
            self.load_buffers(name, state["buffers"][name])
        self._step = state["step"]

    def _check_profiles(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        here = {name: profile_to_dict(profile) for name, profile in self._profiles.items()}
        problems = [f"copy {name!r} is missing" for name in here if name not in stored]
        problems += [f"copy {name!r} is not known here" for name in stored if name not in here]
        for name in here:
            theirs = stored.get(name, here[name])
            for field in sorted(here[name].keys() | theirs.keys()):
                ours, other = here[name].get(field), theirs.get(field)
                if ours != other:
                    problems.append(f"{name}.{field} is {ours!r} here and {other!r} in the state")
        if problems:
            raise ValueError(f"profiles: {'; '.join(problems)}")

    def attach(self, optimizer: torch.optim.Optimizer, *, start_step: int = 0, every: int = 1) -> UpdateHandle:
        """Update after every `every`-th real step of an optimizer, so that no call can be forgotten or misplaced.

        A step that a gradient scaler skipped does not count. With a *fused* optimizer under a scaler the skip is known to
        the device alone, so that this one combination waits for it.

        Args:
            optimizer: any torch optimizer, also inside accelerate's wrapper.
            start_step: steps completed before now (when a run goes on); a multiple of `every`.
            every: steps between updates.

        Returns:
            A handle with the number of real steps so far (`step`) and `remove()`.

        Raises:
            ValueError: `every` or `start_step` is out of range.
        """
        return update_after_steps(optimizer, self.update, start_step=start_step, every=every)


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all processes of a split bank as the state of an unsplit one (tensors are shared, not cloned).

    Raises:
        ValueError: there is none, or they are not of one bank at one step.
    """
    states = list(states)
    if not states:
        raise ValueError("merge_states: expected the state of at least one process")
    first = states[0]
    for state in states[1:]:
        for field in ("version", "step", "profiles"):
            if state[field] != first[field]:
                raise ValueError(
                    f"merge_states: {field} differs between processes: {first[field]!r} and {state[field]!r}"
                )
    averages: dict[str, dict[str, Tensor]] = {name: {} for name in first["profiles"]}
    for state in states:
        for name, tensors in state["averages"].items():
            averages[name] |= tensors
    return {**first, "averages": averages}


def _check_settings(profiles: Mapping[str, Profile], buffers: str, rank: int, world_size: int) -> None:
    for name, profile in profiles.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"name of an average: expected letters, digits, '_' and '-' alone, got {name!r}")
        if not isinstance(profile, Profile):
            raise ValueError(f"{name}: expected a profile such as ConstantDecay(0.999), got {profile!r}")
    if buffers not in ("copy", "average"):
        raise ValueError(f"buffers: expected 'copy' or 'average', got {buffers!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, got rank={rank!r}, world_size={world_size!r}")


def _first_names(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name -> the first name of the same tensor: itself, but for the further names of a tied parameter."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in parameters.items()}


def _fp32_copies(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor, with its layout and on its device."""
    return {name: source.detach().to(torch.float32, copy=True) for name, source in sources.items()}


def _elsewhere(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index)
