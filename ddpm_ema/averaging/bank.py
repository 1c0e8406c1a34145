"""The bank: all averages of one model, updated by one call."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_ema.averaging import lerp, sharded
from ddpm_ema.averaging.checks import check_count
from ddpm_ema.averaging.gather import collect, require_group
from ddpm_ema.averaging.hooks import UpdateHandle, unwrapped
from ddpm_ema.averaging.module import with_tensors
from ddpm_ema.averaging.naming import assign_owners, check_tensors, clean_name, clean_named
from ddpm_ema.averaging.offload import HostMirror
from ddpm_ema.averaging.profiles import Profile, profile_to_dict

STATE_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")


class AverageBank:
    """Averages of a model's parameters, one per profile, in fp32 whatever the model's dtype.

    Every average starts at the current parameters. Parameters are paired by name, without the prefixes that torch.compile and
    DistributedDataParallel add; the names of a tied parameter share one average. Of DTensor parameters (`fully_shard`), each process
    averages its own shards. Memory: 4 bytes x parameters x profiles per process, of what it holds or, with `world_size`, owns.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> bank = AverageBank(model, {"ema_0_99": ConstantDecay(0.99), "power_0_10": PowerFunction(std=0.10)})
        >>> for step in range(1, 101):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 2)).square().mean().backward()
        ...     optimizer.step()
        ...     bank.update(step)
        >>> averaged = torch.nn.Linear(2, 1)
        >>> bank.copy_to("power_0_10", averaged)
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        profiles: Mapping[str, Profile],
        *,
        buffers: Literal["copy", "average"] = "copy",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the averages.

        Args:
            model: the model, wrapped or not, of any floating dtype, or `model.named_parameters()`. Of a model the bank also holds the
                buffers, on every process, and `update` notices replaced parameters. Move it to its device and memory format
                first: each average takes its parameter's layout.
            profiles: name of the average -> its profile. Names match [A-Za-z0-9_-]+.
            buffers: "copy" them whenever an average moves, or "average" the floating ones like parameters (integers are copied).
            rank: this process among `world_size`; it holds and updates its share of the parameters alone.
            world_size: number of processes that share the work of parameters that all of them hold.
            device: where the averages are: None, beside their parameters; "cpu", in host memory, updated in the background.

        Raises:
            ValueError: a bad name, profile, rank or setting, two parameters of one name, or one that cannot be averaged.
        """
        _check_settings(profiles, buffers, rank, world_size)
        self._module = model if isinstance(model, nn.Module) else nn.Module()  # without buffers and places to check
        sharded.reshard(self._module)
        self._find_places()
        self._buffers = clean_named(self._module.named_buffers(remove_duplicate=False), "buffers")
        named = model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else model
        self._parameters = _checked_parameters(list(named))
        if world_size > 1 and any(map(sharded.is_sharded, self._parameters.values())):
            raise ValueError("rank, world_size: the parameters are DTensors, split over processes: leave both out")
        self._profiles = dict(profiles)
        self._rank, self._world_size = rank, world_size
        self._step: int | None = None
        self._loaded = False
        self._handle: UpdateHandle | None = None
        self._allocate(buffers, None if device is None else torch.device(device))

    def _find_places(self) -> None:
        """Note where the module holds its parameters, submodules and buffers, since each may be replaced."""
        modules = list(self._module.named_modules(remove_duplicate=False))
        self._places = [(m._parameters, name, p) for _, m in modules for name, p in m._parameters.items()]
        self._children = [(m._modules, name, child) for _, m in modules for name, child in m._modules.items()]
        self._buffer_places = {
            clean_name(f"{at}.{n}".strip(".")): (m._buffers, n) for at, m in modules for n in m._buffers
        }

    @torch.inference_mode(False)  # tensors made in a validation under inference mode could not be updated after it
    @torch.no_grad()
    def _allocate(self, buffers: str, device: torch.device | None) -> None:
        """Choose the tensors that this process follows, and make its averages of them."""
        first: dict[int, str] = {}  # the further names of a tied parameter are stored as its first
        self._stored_as = {name: first.setdefault(id(p), name) for name, p in self._parameters.items()}
        distinct = {name: p.numel() for name, p in self._parameters.items() if self._stored_as[name] == name}
        owners = assign_owners(distinct, self._world_size)
        self._owners = {name: owners[stored_as] for name, stored_as in self._stored_as.items()}
        averaged = {n: b for n, b in self._buffers.items() if buffers == "average" and b.is_floating_point()}
        averaged = {name: self._parameters[name] for name in distinct if owners[name] == self._rank} | averaged
        self._num_averaged = len(averaged)
        self._followed = averaged | self._buffers  # the rest are copied
        self._mirror: HostMirror | None = None
        if device is not None and any(_elsewhere(tensor, device) for tensor in self._followed.values()):
            if device.type != "cpu":
                raise ValueError(f"device: expected None (beside the parameters) or 'cpu', got {str(device)!r}")
            self._mirror = HostMirror(self._current())
        self._averages = {
            name: {
                n: t.detach().to(device or t.device, torch.float32 if i < self._num_averaged else t.dtype, copy=True)
                for i, (n, t) in enumerate(self._followed.items())
            }
            for name in self._profiles
        }
        self._local = {name: list(map(sharded.local, average.values())) for name, average in self._averages.items()}

    def update(self, step: int, num_steps: int = 1) -> None:
        """Move every average towards the current parameters. Never communicates and never waits for a device.

        Args:
            step: optimizer steps completed so far, this one included.
            num_steps: how many of them passed since the last update; the parameters count for all of them.

        Raises:
            ValueError: not whole numbers with 1 <= num_steps <= step, steps are left out or counted twice since the last
                update, a parameter of the model was replaced, or a rule gave no decay in [0, 1]. The step does not count then.
        """
        step, num_steps = check_count("step", step), check_count("num_steps", num_steps)
        self._check_update(step, num_steps)
        weights = {name: 1.0 - profile.decay(step, num_steps) for name, profile in self._profiles.items()}
        for name, weight in weights.items():
            if not -1e-9 <= weight <= 1.0 + 1e-9:
                raise ValueError(
                    f"{name}: {self._profiles[name]!r} gives no decay in [0, 1] at step {step}: {1.0 - weight}"
                )
        if self._mirror is None:
            self._move(weights, self._current())
        elif any(weights.values()):
            values = self._mirror.values
            self._mirror.submit(self._current(), lambda: self._move(weights, values))
        self._step = step

    @torch.no_grad()
    def _current(self) -> list[Tensor]:
        """This process's part of the followed tensors, as they are now. FSDP may replace the storage of a shard.

        `model.to` replaces every buffer, and so does a `self.count = self.count + 1`. Raises ValueError for one of another shape.
        """
        for name, held in self._buffers.items():
            store, key = self._buffer_places.get(name, (self._buffers, name))
            if (found := store.get(key)) is not held:
                check_tensors({} if found is None else {name: found}, {name: held.shape}, "buffers of the model")
                self._buffers[name] = self._followed[name] = found
        return [sharded.local(tensor) for tensor in self._followed.values()]

    def _move(self, weights: Mapping[str, float], current: list[Tensor]) -> None:
        moving, n = [self._local[name] for name, weight in weights.items() if weight > 0.0], self._num_averaged
        lerp.lerp_([average[:n] for average in moving], current[:n], [w for w in weights.values() if w > 0.0])
        with torch.no_grad():
            for average in moving:
                for target, source in zip(average[n:], current[n:], strict=True):
                    target.copy_(source)

    def _check_update(self, step: int, num_steps: int) -> None:
        last = self._step
        if last is not None and step <= last:
            raise ValueError(f"update(step={step}) comes after the update at step {last}: steps only grow")
        if last is not None and step - num_steps != last:
            raise ValueError(
                f"update(step={step}, num_steps={num_steps}) does not follow the update at step {last}: "
                f"expected num_steps={step - last}"
            )
        self._check_places()

    def _check_places(self) -> None:
        # After a forward pass FSDP shows whole copies of its shards; that is no replacement.
        replaced = [
            name
            for store, name, held in self._places
            if (found := store.get(name)) is not held and (sharded.is_sharded(found) or not sharded.is_sharded(held))
        ]
        if wrapped := any(store.get(name) is not held for store, name, held in self._children):
            # torch.compile and PEFT wrap layers: the parameters are the same, perhaps by other names.
            sharded.reshard(self._module)
            now = clean_named(self._module.named_parameters(remove_duplicate=False), "parameters")
            there = set(map(id, now.values()))
            replaced += [n for n, p in self._parameters.items() if now.get(n, p) is not p or id(p) not in there]
        if replaced:
            raise ValueError(
                f"parameter {replaced[0]!r} of the model was replaced (load_state_dict(assign=True), fully_shard, a new layer), so "
                "this bank no longer follows it: make a new bank and call its load_state_dict(bank.state_dict())"
            )
        if wrapped:
            self._find_places()

    def weights(self, name: str) -> dict[str, Tensor]:
        """The parameters of one average: those that this process owns, so all of them when `world_size` is 1.

        Returns:
            clean parameter name -> fp32 tensor, in the model's order; a DTensor of the same placements where the parameter is one.
            These are the bank's own tensors: the next update changes them, and writing to them changes the bank.

        Raises:
            KeyError: no average has this name.
        """
        average = self._settled(name)
        return {n: average[s] for n, s in self._stored_as.items() if self._owners[n] == self._rank}

    def buffers(self, name: str) -> dict[str, Tensor]:
        """All buffers of one average, on every process: averaged ones in fp32, copied ones in their dtype; else as `weights`."""
        average = self._settled(name)
        return {n: average[n] for n in self._buffers}

    def _settled(self, name: str) -> dict[str, Tensor]:
        """The tensors of an average, after any update that still runs in the background."""
        if name not in self._profiles:
            raise KeyError(f"no average is called {name!r}; there are {', '.join(self._profiles) or 'none'}")
        if self._mirror is not None:
            self._mirror.wait()
        return self._averages[name]

    def copy_to(self, name: str, module: nn.Module, *, strict: bool = True) -> None:
        """Write the parameters and buffers of an average into a module of the same architecture, in the module's dtype.

        Args:
            name: the average.
            module: any module but the one that is trained, wrapped, sharded or not. From a sharded bank into one that is not, this
                is a collective; into one that is sharded alike, nothing is sent.
            strict: False leaves tensors of the module that the bank does not follow (of a bank of some layers) unchanged.

        Raises:
            KeyError: no average has this name.
            ValueError: the module's tensors differ in name or shape, or the bank is split over processes.
        """
        values = self._values(name)
        sharded.reshard(module)
        targets = clean_named(module.named_parameters(remove_duplicate=False), "parameters")
        if self._buffers:
            targets |= clean_named(module.named_buffers(remove_duplicate=False), "buffers")
        tied = {id(target): values[n] for n, target in targets.items() if n in values}
        values |= {n: tied[id(target)] for n, target in targets.items() if id(target) in tied}
        if not strict:
            targets = {n: target for n, target in targets.items() if n in values}
        check_tensors(values, _shapes(targets), f"average {name!r}")
        _fill(targets, values)

    def module(self, name: str, model: nn.Module) -> nn.Module:
        """A module like `model`, in eval mode, whose parameters and buffers *are* those of an average: nothing is copied or swapped.

        It follows later updates, and shares with `model` the tensors that the bank does not hold (the frozen layers of a LoRA). Its
        averaged tensors are fp32, without gradient, on the averages' device: for a model of lower precision call it under autocast.
        With `device="cpu"`, `weights(name)` waits for an update that still runs.

        Raises:
            KeyError: no average has this name.
            ValueError: the model's tensors differ in name or shape or are sharded, or the bank is split over processes.
        """
        return with_tensors(model, self._values(name), self)  # the model may hold its bank

    def _values(self, name: str) -> dict[str, Tensor]:
        if self._world_size > 1:
            raise ValueError("copy_to, module: this process has only its share of the average; use gather_all(name)")
        return self.weights(name) | self.buffers(name)

    @property
    def profiles(self) -> dict[str, Profile]:
        """Name of each average -> its profile."""
        return dict(self._profiles)

    @property
    def parameter_names(self) -> list[str]:
        """Clean names of all parameters, in the model's order, owned by this process or not."""
        return list(self._parameters)

    @property
    def step(self) -> int | None:
        """The step of the last update; None before the first, and after `load_weights`."""
        return self._step

    @property
    def num_bytes(self) -> int:
        """Bytes of all averages that this process holds."""
        return sum(tensor.nbytes for average in self._local.values() for tensor in average)

    def load_weights(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters of an average; each process takes the part that it owns.

        Args:
            name: the average.
            tensors: parameter name -> tensor of any floating dtype, for *every* parameter of the model; whole, or a DTensor.

        Raises:
            KeyError: no average has this name.
            ValueError: a tensor is missing, unknown or misshaped; every such tensor is named and nothing is changed.
        """
        targets, given = self.weights(name), clean_named(tensors.items(), f"weights of {name!r}")
        check_tensors(given, _shapes(self._parameters), f"weights of {name!r}")
        _fill(targets, given)
        self._step, self._loaded = None, True

    def load_buffers(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set all buffers of an average. Raises as `load_weights`."""
        given = clean_named(tensors.items(), f"buffers of {name!r}")
        check_tensors(given, _shapes(self._buffers), f"buffers of {name!r}")
        _fill(self.buffers(name), given)

    def state_dict(self) -> dict[str, Any]:
        """What this process has to store, with the bank's own tensors.

        `merge_states` joins those of a split bank's processes. That of a sharded bank holds DTensors, which
        torch.distributed.checkpoint saves and loads on any number of processes.

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
        """Restore a stored bank, of any number of processes; each process takes the part that it owns.

        Args:
            state: a whole `state_dict()`, with DTensors or whole tensors; of a split bank, `merge_states` of its processes'.

        Raises:
            ValueError: not the state of a bank, other averages or profiles (each is named), no such step, or a tensor is missing,
                unknown, misshaped (named, with both shapes) or without values. Nothing is changed then.
        """
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        if found != STATE_VERSION or (lacking := {"step", "profiles", "averages", "buffers"} - state.keys()):
            what = repr(found) if found != STATE_VERSION else f"one without {', '.join(sorted(lacking))}"
            raise ValueError(f"state: expected the state of a bank, version {STATE_VERSION}, got {what}")
        here = {name: profile_to_dict(profile) for name, profile in self._profiles.items()}
        names, stored = {**here, **state["profiles"]}, state["profiles"]
        if wrong := [n for n in names if here.get(n) != stored.get(n)]:
            differing = "; ".join(f"{n} is {here.get(n)} here and {stored.get(n)} in the state" for n in wrong)
            raise ValueError(f"profiles: {differing}")
        step = None if state["step"] is None else check_count("step", state["step"], 0)
        for name in self._profiles:
            check_tensors(state["averages"].get(name, {}), _shapes(self._parameters), f"weights of {name!r}")
            check_tensors(state["buffers"].get(name, {}), _shapes(self._buffers), f"buffers of {name!r}")
        for name in self._profiles:
            _fill(self.weights(name) | self.buffers(name), {**state["averages"][name], **state["buffers"][name]})
        self._step, self._loaded = step, True

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a bank follows the parameters of one model and cannot be copied or pickled: make a bank of the other model and "
            "call its load_state_dict(bank.state_dict())"
        )

    def gather(self, name: str, dst: int = 0, group: dist.ProcessGroup | None = None) -> Iterator[tuple[str, Tensor]]:
        """Collect a split or sharded average on one process, one tensor at a time. Collective.

        Every process calls it, in the same order of names; `dst` must exhaust the iterator, elsewhere it is empty.

        Args:
            name: the average.
            dst: the rank that receives it.
            group: the processes that the bank is split over; None for the default group. Shards have a mesh of their own.

        Returns:
            On `dst`, (clean parameter name, new fp32 CPU tensor) in the order of `parameter_names`.

        Raises:
            KeyError: no average has this name.
            ValueError: the bank is split, and torch.distributed is not initialised or the group has another size.
        """
        whole = self._whole(name, dst, group)
        here = self._rank if self._world_size > 1 else dst
        if any(map(sharded.is_sharded, self._parameters.values())):
            here = dist.get_rank()
        if here == dst:
            return ((n, _own(tensor, torch.device("cpu"))) for n, tensor in whole)
        for _ in whole:
            pass  # this process sends, and takes part in all-gathers
        return iter(())

    def gather_all(self, name: str, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """A whole average on every process, as new fp32 tensors on the parameters' devices. Collective; raises as `gather`."""
        return {n: _own(tensor, self._parameters[n].device) for n, tensor in self._whole(name, None, group)}

    def _whole(self, name: str, dst: int | None, group: dist.ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
        average = self.weights(name)
        if self._world_size == 1:
            return ((n, sharded.whole(tensor)) for n, tensor in average.items())
        require_group(self._world_size, group)
        return collect(average, self._owners, _shapes(self._parameters), self._rank, dst, group)

    def squared_distances(self) -> dict[str, Tensor]:
        """Squared distance of each average from the raw parameters, summed over the parameters that this process owns.

        The sum over processes is that of the whole model: replicas of a DTensor count by their share. No host synchronisation; with
        averages in host memory, raw are the parameters as of the last update.

        Returns:
            name of the average -> float64 [] on the averages' device.
        """
        raw = self._raw()
        return {name: self._squares(average[i] - raw[i] for i in raw) for name, average in self._local.items()}

    def squared_norm(self) -> Tensor:
        """Squared norm of the raw parameters that this process owns, float64 []; else as `squared_distances`."""
        return self._squares(self._raw().values())

    def _raw(self) -> dict[int, Tensor]:
        """This process's raw parameters by their place among the followed tensors."""
        if self._mirror is not None:
            self._mirror.wait()
        current = self._current() if self._mirror is None else self._mirror.values
        return {i: current[i] for i, name in enumerate(self._followed) if name in self._parameters}

    def _squares(self, tensors: Iterable[Tensor]) -> Tensor:
        copies = [sharded.num_replicas(tensor) for name, tensor in self._followed.items() if name in self._parameters]
        device = next((t.device for average in self._local.values() for t in average), torch.device("cpu"))
        return lerp.squared_norm((t / n**0.5 if n > 1 else t for t, n in zip(tensors, copies, strict=True)), device)

    def attach(
        self, optimizer: torch.optim.Optimizer, *, start_step: int | None = None, every: int = 1
    ) -> UpdateHandle:
        """Call `update` after every `every`-th step of an optimizer.

        A step that a gradient scaler skipped does not count. With a *fused* optimizer under a scaler only the device knows of the
        skip, so this one combination waits for it.

        Args:
            optimizer: any torch optimizer, also inside accelerate's wrapper.
            start_step: steps completed before now, by default the bank's last step. With `every`, the bank's last step must be the
                last multiple of it, so a run that stopped between two updates continues exactly.
            every: steps between updates.

        Returns:
            A handle with the number of steps so far (`step`) and `remove()`.

        Raises:
            ValueError: `every` or `start_step` is out of range or not the bank's last step, weights were loaded and `start_step`
                is not given, the bank is attached already, or the optimizer has none of its parameters.
        """
        inner = unwrapped(optimizer)
        trained = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        if trained.isdisjoint(map(id, self._parameters.values())):
            raise ValueError(
                "attach: the optimizer has none of this bank's parameters: make the bank of the parameters that it has, or call "
                "update(step) after each step"
            )
        if self._handle is not None and self._handle.active:
            raise ValueError("attach: already attached: remove() that handle first, or make one bank per optimizer")
        if start_step is None and self._step is None and self._loaded:
            raise ValueError("attach: weights were loaded: pass start_step, the number of steps that they have seen")
        every = check_count("every", every)
        start_step = check_count("start_step", (self._step or 0) if start_step is None else start_step, 0)
        last = start_step - start_step % every
        if self._step is None and last not in (0, start_step):
            raise ValueError(f"start_step: expected a multiple of every={every}, got {start_step}")
        if self._step not in (None, last):
            raise ValueError(f"start_step: the last update was at step {self._step}, got {start_step!r}, every={every}")
        self._handle = UpdateHandle(inner, self.update, start_step, every)
        return self._handle


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
            if (one := first[field]) != (other := state[field]):
                raise ValueError(f"merge_states: {field} differs between processes: {one!r} and {other!r}")
    parts = [state["averages"] for state in states]
    return {**first, "averages": {name: {n: t for part in parts for n, t in part[name].items()} for name in parts[0]}}


def _check_settings(profiles: Mapping[str, Profile], buffers: str, rank: int, world_size: int) -> None:
    for name, profile in profiles.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"name of an average: expected letters, digits, '_' and '-' alone, got {name!r}")
        if not isinstance(profile, Profile):
            raise ValueError(f"{name}: expected a profile such as ConstantDecay(0.999), got {profile!r}")
        profile_to_dict(profile)  # refuses what could be stored, but not read back
    if buffers not in ("copy", "average"):
        raise ValueError(f"buffers: expected 'copy' or 'average', got {buffers!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, got rank={rank!r}, world_size={world_size!r}")


def _checked_parameters(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Clean name -> parameter. Raises: ValueError: not named tensors, or one that cannot be averaged."""
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        raise ValueError("parameters: expected a module or model.named_parameters(), names included")
    parameters = clean_named(named, "parameters")
    for name, tensor in parameters.items():
        if not tensor.is_floating_point():
            raise ValueError(f"parameter {name!r}: only floating-point parameters can be averaged, not {tensor.dtype}")
        sharded.check_parameter(name, tensor)
    return parameters


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        sharded.assign(target, values[name])


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _elsewhere(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index)
