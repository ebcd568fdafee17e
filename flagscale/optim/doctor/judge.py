"""What is wrong with a tensor that is not as it should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flagscale.ckpt_io.sources import Sources
from flagscale.errors import FlagScaleError
from flagscale.layout.boxes import Box
from flagscale.optim.doctor.examine import Copy, Tensor
from flagscale.optim.doctor.findings import Finding, Kind
from flagscale.optim.doctor.progress import param_groups
from flagscale.optim.doctor.scan import Agreement, MomentScan
from flagscale.optim.doctor.suspects import Shift, find_permutation, find_shift, find_swap
from flagscale.optim.mend import Mending, Slice, mendings
from flagscale.optim.proof import Mismatch
from flagscale.optim.repair import prove
from flagscale.optim.source import Source

__all__ = ["Judge"]

_IMPOSSIBLE_SHARE: Final = 1e-3
_IMPOSSIBLE_LEAST: Final = 16
_SAME_TENSOR: Final = 0.9  # correlation of a tensor with itself some steps away


@dataclass(frozen=True)
class Judge:
    """Says what is wrong with tensors.

    Args:
        source: The opened checkpoint.
        files: Its files.
        weights: The copies of each weight.
        mending: How #5077 has cut out the states, if it was that.
        unmended: What it does not explain of the tensors that it has cut out.
    """

    source: Source
    files: Sources
    weights: Mapping[str, tuple[Copy, ...]]
    mending: Mending | None
    unmended: Mapping[str, Mismatch]

    @classmethod
    def of(cls, source: Source, files: Sources, tensors: Sequence[Tensor]) -> Judge:
        """Decide first whether it is #5077 that explains most of what differs."""
        weights = {tensor.name: tensor.copies["weight"] for tensor in tensors}
        differing = {tensor.name for tensor in tensors if tensor.differs}
        best = cls(source, files, weights, None, {})
        if source.optim_format != "fully_reshardable" or not differing:
            return best
        most = len(differing) / 2
        try:
            for mending in mendings(source.job, source.pieces):
                wrong = {mismatch.name: mismatch for mismatch in prove(source, mending)}
                explained = (differing & mending.shifted.keys()) - wrong.keys()
                if len(explained) > most:
                    most = len(explained)
                    best = cls(source, files, weights, mending, wrong)
        except FlagScaleError:
            pass  # the arguments do not give the buffers
        return best

    def judge(self, tensor: Tensor) -> Iterator[Finding]:
        """What is wrong with a tensor, beyond single values."""
        if self.mending and (slices := self.mending.shifted.get(tensor.name)):
            yield self._compact(tensor, self.mending, slices)
            if mismatch := self.unmended.get(tensor.name):
                wrong, of = mismatch.differing, mismatch.compared
                what = f"put back, {wrong:,} of {of:,} elements are not the weight either"
                yield Finding(Kind.DIFFERS, f"param {tensor.name}", what, wrong, of)
            return
        yield from self._agreement(tensor)
        for scan in tensor.moments:
            yield from self._moments(tensor.name, scan)

    @staticmethod
    def _compact(tensor: Tensor, mending: Mending, slices: Sequence[Slice]) -> Finding:
        shifts = " or ".join(f"{shift:,}" for shift in sorted({one.shift for one in slices}))
        moved, zeros = sum(one.numel for one in slices), sum(one.zeros for one in slices)
        lost = mending.numel_lost(tensor.name)
        wrong = tensor.agreements[0, 0].differing
        what = (
            f"{moved:,} of {tensor.numel:,} elements of each state were cut out {shifts} elements "
            f"too far ({wrong:,} main copies are not the weight"
            + (f", the last {zeros:,} stored are zeros" if zeros else "")
            + f"); {tensor.numel - lost:,} lie elsewhere and can be put back, {lost:,} are lost"
        )
        return Finding(Kind.COMPACT, f"param {tensor.name}", what, moved, tensor.numel)

    def _moments(self, name: str, scan: MomentScan) -> Iterator[Finding]:
        numel = scan.values["exp_avg"].numel
        zeros = {kind: values.zeros for kind, values in scan.values.items()}
        if min(zeros.values()) == numel > scan.lost and self._steps:
            what = f"all {numel:,} elements of both are zero after {self._steps} steps"
            yield Finding(Kind.NO_MOMENTS, f"exp_avg, exp_avg_sq {name}", what, numel, numel)
            return
        for kind, count in scan.stretch.items():
            if count and self._steps:
                place = "up to the end of what is stored" if scan.at_end else "one after another"
                what = f"{count:,} of {numel:,} elements are zero, {place}, where none should be"
                yield Finding(Kind.ZEROED, f"{kind} {name}", what, count, numel)
        if scan.impossible > max(_IMPOSSIBLE_LEAST, _IMPOSSIBLE_SHARE * numel):
            what = (
                f"{scan.impossible:,} of {numel:,} elements of exp_avg are larger than gradients "
                "with this exp_avg_sq can make them: the two do not belong together"
            )
            yield Finding(
                Kind.IMPOSSIBLE, f"exp_avg, exp_avg_sq {name}", what, scan.impossible, numel
            )

    @property
    def _steps(self) -> int:
        steps = [group.get("step") for group in param_groups(self.source)]
        known = [step for step in steps if type(step) is int]
        return max(known, default=self.source.steps or self.source.iteration)

    def _agreement(self, tensor: Tensor) -> Iterator[Finding]:
        """Where main copies and weights do not agree: which of the copies, and how."""
        bad = {pair: one for pair, one in tensor.agreements.items() if one.differing}
        if not bad:
            return
        good_mains = {i for (i, _), one in tensor.agreements.items() if not one.differing}
        good_weights = {j for (_, j), one in tensor.agreements.items() if not one.differing}
        if not good_mains:
            one = bad[pair := min(bad)]
            if one.main_not_finite + one.weight_not_finite < one.differing:  # else told already
                yield self._explained(tensor, pair, one)
            return
        for kind, axis, good in (("param", 0, good_mains), ("weight", 1, good_weights)):
            for index in sorted({pair[axis] for pair in bad} - good):
                pair = min(pair for pair in bad if pair[axis] == index)
                files = sorted({p.region.file for p in tensor.copies[kind][index]})
                one = bad[pair]
                what = (
                    f"{one.differing:,} of {one.compared:,} elements of copy {index + 1} "
                    f"({', '.join(files)}) are not those of the other copies"
                )
                yield Finding(
                    Kind.STALE, f"{kind} {tensor.name}", what, one.differing, one.compared
                )

    def _explained(self, tensor: Tensor, pair: tuple[int, int], one: Agreement) -> Finding:
        """A main copy that is not its weight, by the first hypothesis that holds."""
        mains, weights = tensor.copies["param"][pair[0]], tensor.copies["weight"][pair[1]]
        shape, name = self.source.job.tensors[tensor.name].shape, tensor.name
        count, numel = one.differing, one.compared

        def found(kind: Kind, what: str, side: str = "param") -> Finding:
            return Finding(
                kind, f"{side} {name}", f"{count:,} of {numel:,} elements {what}", count, numel
            )

        ends = any(last == piece.box.numel - 1 for piece, _, last in one.spans)
        tail = ", up to the end of what is stored" if ends else ""
        if one.main_zero == count:
            return found(Kind.ZEROED, f"are zero where the weight is not{tail}")
        if one.weight_zero == count:
            return found(Kind.ZEROED, f"are zero where the main copy is not{tail}", "weight")
        gated = self.source.job.model.dims.gated and "linear_fc1" in name
        if gated and find_swap(self.files, mains, weights, shape):
            return found(Kind.SWAPPED, "lie in the other half: gate and up are swapped")
        if permutation := find_permutation(self.files, mains, weights, shape):
            row, other = permutation.example
            return found(
                Kind.PERMUTED,
                f"differ: {permutation.rows:,} rows are in another order than in the weight; row "
                f"{row} is the weight's row {other}",
            )
        if shift := self._shift(tensor, one):
            of = "the weight's own" if shift.name == name else f"those of {shift.name}"
            return found(
                Kind.SHIFTED,
                f"differ: {shift.matching:,} of {shift.compared:,} are {of}, {shift.by:+,} places",
            )
        if one.correlation > _SAME_TENSOR:
            return found(
                Kind.STALE,
                f"differ by a little (correlation {one.correlation:.4f}): main copy and weight are "
                "of different steps",
            )
        return found(Kind.DIFFERS, "differ, in no way that is known here")

    def _shift(self, tensor: Tensor, one: Agreement) -> Shift | None:
        names = list(self.source.job.tensors)
        at = names.index(tensor.name)
        piece, first, last = max(one.spans, key=lambda span: span[2] - span[1])
        near = [name for name in names[max(0, at - 3) : at + 4] if name in self.weights]
        near.sort(key=lambda name: abs(names.index(name) - at))
        places = [(tensor.name, self.weights[tensor.name][0], piece.box)]
        places += [
            (name, self.weights[name][0], Box.whole(self.source.job.tensors[name].shape))
            for name in near
        ]
        return find_shift(self.files, piece, (first, last), places)
