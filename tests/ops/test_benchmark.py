"""The operator's check and the table of its benchmark; never its timings."""

import json

import pytest
import torch

from ops import check
from ops.benchmarks import elsa_attention, peers
from ops.check import Case


def test_the_check_finds_a_wrong_kernel(compiled_library, monkeypatch, capsys, tmp_path):
    """One that forgets the ghost head's sign; told with the case, and by the exit code."""
    case = Case(1, 8, 2, 5, 6, 3, ghosts="add")
    assert check.check(cases=[case])["float32 out"] < 1e-5
    right = check.elsa_attention_reference

    def wrong(v, h, mul, add, **sizes):
        return right(v, h, mul, -add, **sizes)

    monkeypatch.setattr(check, "elsa_attention_reference", wrong)
    monkeypatch.setattr(check, "QUICK", (case,))
    assert check.main(["--json", str(tmp_path / "figures.json")]) == 1
    assert "float64 out differs from the float64 reference by" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["off"]
    with pytest.raises(RuntimeError, match=r"wrong on cpu: .* at B, C, G, H, W, k"):
        check.check(cases=[case])


def test_the_check_sees_a_nan_that_spreads(compiled_library, monkeypatch):
    case = Case(1, 8, 1, 6, 9, 3, ghosts="add", not_finite=True)
    assert check.errors_of(case, torch.float32, "cpu") == pytest.approx({"out": 0}, abs=1e-6)
    ours = check._results

    def spread(case, tensors, upstream, compiled):
        found = ours(case, tensors, upstream, compiled)
        if compiled:
            found["out"][0, 0] = float("nan")
        return found

    monkeypatch.setattr(check, "_results", spread)
    assert check.errors_of(case, torch.float32, "cpu")["out"] == float("inf")


def test_a_peer_that_fails_is_told_and_the_table_goes_on(
    compiled_library, monkeypatch, capsys, tmp_path
):
    def broken(*_):
        raise MemoryError("no room for this peer")

    monkeypatch.setattr(peers, "unfold", broken)
    file = tmp_path / "figures.json"
    arguments = ["--batch", "1", "--seconds", "0.01", "--json", str(file)]
    assert elsa_attention.main([*arguments, "--shapes", "tiny, small stage 3", "kernel 3"]) == 0
    output = capsys.readouterr().out
    assert "unfold at kernel 3 did not run: no room for this peer" in output
    rows = [line for line in output.splitlines() if line.startswith("| kernel 3")]
    assert "not run" in rows[0]
    figures = json.loads(file.read_text())
    assert set(figures["shapes"]) == {"tiny, small stage 3", "kernel 3"}
    assert figures["shapes"]["kernel 3"]["ms"]["ours"]["forward"] > 0


def test_the_check_sees_a_call_that_does_not_repeat(compiled_library, monkeypatch):
    ours, calls = check._results, []

    def drifting(case, tensors, upstream, compiled):
        found = ours(case, tensors, upstream, compiled)
        calls.append(compiled)
        if calls == [True, True]:
            found["out"] = found["out"].nextafter(torch.tensor(torch.inf))
        return found

    monkeypatch.setattr(check, "_results", drifting)
    monkeypatch.setattr(check, "TOLERANCES", {torch.float32: 2e-5})
    case = Case(1, 8, 2, 5, 6, 3)
    with pytest.raises(RuntimeError, match="float32 out of a second call has other bits"):
        check.check(cases=[case])
