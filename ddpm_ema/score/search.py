"""Which width is best, with few images on poor candidates and many on close ones: a bracketing search on a grid."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TypeAlias

from ddpm_ema.metrics import ALPHA, Estimate, difference

EstimateOf: TypeAlias = "Callable[[int, int], Estimate]"
FIRST_POINTS = 5


def ladder(first: int, most: int) -> list[int]:
    """Numbers of images at which a search may compare: `first`, twice as many each time, and `most`."""
    rungs = [min(first, most)]
    while rungs[-1] < most:
        rungs.append(min(2 * rungs[-1], most))
    return rungs


class Search:
    """Iterates over (candidate, how many images it should have next); its user samples them before it goes on.

    Candidates 0 ... `num_candidates` - 1 lie in order of width and their distance is taken to have one valley. Five spread
    over the range are looked at with the fewest images. Then the best so far and its nearest neighbours that were looked at
    climb the ladder until their paired differences from the best are significant or they have all images; then the wider gap
    beside the best is halved. It ends where the best one's neighbours on the grid were looked at, and the best has all its
    images. The ladder (`rungs`) is fixed beforehand, so a test at ALPHA / ((candidates - 1) x rungs) holds whatever the search does.
    `estimate` gives a candidate's distance over its first images; `counts` has how many each was asked for so far.
    """

    def __init__(self, num_candidates: int, rungs: Sequence[int], estimate: EstimateOf) -> None:
        self.num_candidates, self.rungs = num_candidates, rungs
        self.level = ALPHA / (max(1, num_candidates - 1) * len(rungs))
        self.counts: dict[int, int] = {}
        self.estimate = cache(estimate)

    @property
    def best(self) -> int:
        """The candidate of the lowest corrected distance, each at its own number of images."""
        return min(self.counts, key=lambda c: self.estimate(c, self.counts[c]).unbiased)

    def is_significant(self, candidate: int) -> bool:
        """Whether the candidate's paired difference from the best is significant, over the images that both have."""
        common = min(self.counts[candidate], self.counts[self.best])
        return difference(self.estimate(candidate, common), self.estimate(self.best, common)).p_value <= self.level

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while (wanted := self._next()) is not None:
            candidate, num_images = wanted
            self.counts[candidate] = num_images
            yield wanted

    def _next(self) -> tuple[int, int] | None:
        for place in self._first():
            if place not in self.counts:
                return place, self.rungs[0]
        best, most = self.best, self.rungs[-1]
        left = max((c for c in self.counts if c < best), default=None)
        right = min((c for c in self.counts if c > best), default=None)
        near = [c for c in (left, right) if c is not None]
        unclear = [c for c in near if min(self.counts[c], self.counts[best]) < most and not self.is_significant(c)]
        if unclear:
            least = min([best, *unclear], key=lambda c: self.counts[c])
            return least, self.rungs[self.rungs.index(self.counts[least]) + 1]
        gaps = [(abs(best - c), c) for c in near if abs(best - c) > 1]
        if gaps:
            return (best + max(gaps)[1]) // 2, self.rungs[0]
        return (best, most) if self.counts[best] < most else None

    def _first(self) -> list[int]:
        """Spread over the range, both ends among them."""
        number = min(FIRST_POINTS, self.num_candidates)
        return sorted({round(i * (self.num_candidates - 1) / max(1, number - 1)) for i in range(number)})
