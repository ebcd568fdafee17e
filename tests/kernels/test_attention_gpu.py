"""What can be shown of the GPU benchmark without a GPU."""

from __future__ import annotations

import attention_gpu
import pytest
import torch
from attention_gpu import Measured, best, main, merge, missed_bars
from harness.attention_cases import Case

from flagattention import cpu
from flagattention.problem import NEVER


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--length", "1024", "--size", "64"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--heads", "6", "--key-heads", "4"], ["--length", "1"], ["--rounds", "0"], ["--x"]]
)
def test_wrong_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2


def test_near_and_far_merge_to_the_whole() -> None:
    case = Case(m=50, n=50, w=20)
    tensors, problem = case.tensors(torch.float64), case.problem()
    q1, k1, q2, k2, v = tensors
    out, _ = cpu.forward(*tensors, problem)
    far = cpu.forward(
        q2[:, :, 20:], k2[:, :, :-20], q2[:, :, 20:], k2[:, :, :-20], v[:, :, :-20],
        Case(m=30, n=30, w=NEVER).problem(),
    )  # fmt: skip
    scores = (q1 @ k1.mT * problem.sm_scale).masked_fill(
        ~torch.ones(50, 50, dtype=torch.bool).tril().triu(-19), -torch.inf
    )[:, :, 20:]
    near = scores.softmax(-1) @ v, scores.logsumexp(-1)
    torch.testing.assert_close(merge(near, far), out[:, :, 20:], rtol=1e-5, atol=1e-5)


def test_the_bars() -> None:
    plain = best([Measured(1.0, 2.5, 5), Measured(1.5, 2.0, 5)])
    assert plain == Measured(1.0, 2.0, 5)
    assert missed_bars(Measured(1.04, 2.19, 0), plain) == []
    assert missed_bars(Measured(1.06, 2.3, 0), plain) == [
        "forward 1.060, over 1.05", "backward 1.150, over 1.1"
    ]  # fmt: skip


def test_the_operator_and_the_plain_kernels_are_there() -> None:
    names = [contender.name for contender in attention_gpu.contenders()]
    assert names[:2] == ["piecewise", "plain, same kernels"]
