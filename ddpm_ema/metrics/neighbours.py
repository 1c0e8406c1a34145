"""Precision and recall (Kynkäänniemi et al. 2019) with their errors by jackknife.

Precision: the share of samples within the balls of reference images, which reach to their third nearest neighbours. Recall: the
share of reference images within the balls of samples. Both are torch-fidelity's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_ema.metrics.jackknife import Estimate, group_counts, jackknife
from ddpm_ema.metrics.nearest import distances

NEIGHBOURS = 3


def _on_cpu(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    return (apart.cpu() for apart in distances(rows, columns))


def neighbour_radii(features: Tensor) -> Tensor:
    """Distance [n] from each feature [n, d], of more than three, to its third nearest neighbour: fp32, on the CPU."""
    # The nearest is the feature itself.
    return torch.cat([apart.kthvalue(NEIGHBOURS + 1).values for apart in _on_cpu(features, features)])


def inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point [n, d] lies within the radius [m] of any centre [m, d]: bool [n]."""
    return torch.cat([(apart <= radii).any(dim=1) for apart in _on_cpu(points, centres)])


def precision(features: Tensor, membership: Tensor, reference: Tensor, radii: Tensor) -> Estimate:
    """Share of samples, features [n, d] in groups [n], among the reference [m, d] with these `neighbour_radii` [m]."""
    among = inside(features, reference, radii).double()
    kept = {None: among, **{g: among[membership != g] for g in membership.unique().tolist()}}
    plain, side = jackknife(lambda g: float(kept[g].mean()), group_counts(membership))
    return Estimate(plain, (side,))


def recall(features: Tensor, membership: Tensor, reference: Tensor) -> Estimate:
    """Share of the reference [m, d] among samples, features [n, d] in groups [n].

    A group that is left out takes its balls with it, and widens those of its neighbours. The error came out 1.1 to 1.5 times
    too large in simulations: it may hide a difference, and does not invent one.
    """
    radii = _radii_without(features, membership)
    covered = dict.fromkeys(radii, 0)
    for apart in _on_cpu(reference.to(features.device), features):
        for group, reach in radii.items():
            covered[group] += int((apart <= reach).any(dim=1).sum())
    plain, side = jackknife(lambda g: covered[g] / len(reference), group_counts(membership), corrected=False)
    return Estimate(plain, (side,))


def _radii_without(features: Tensor, membership: Tensor) -> dict[int | None, Tensor]:
    """Group, or None for none -> radii [n] where it is left out; the balls of the group itself hold nothing."""
    members = {g: (membership == g).nonzero().squeeze(1) for g in membership.unique().tolist()}
    parts: dict[int | None, list[Tensor]] = {None: [], **{g: [] for g in members}}
    for apart in _on_cpu(features, features):
        nearest = {  # of each group: enough for whatever the others lack
            g: apart[:, columns].topk(min(NEIGHBOURS + 1, len(columns)), largest=False).values
            for g, columns in members.items()
        }
        for group, found in parts.items():
            others = torch.cat([near for g, near in nearest.items() if g != group], dim=1)
            found.append(others.kthvalue(NEIGHBOURS + 1).values)
    radii = {group: torch.cat(found) for group, found in parts.items()}
    for g, columns in members.items():
        radii[g][columns] = -1.0
    return radii
