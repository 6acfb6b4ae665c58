"""`elsa`: one help for all commands, and one message for what does not fit."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from pipelines.cli import main
from pipelines.paths import ROOT

COMMANDS = (
    *(
        "compose",
        "params",
        "import",
        "finetune",
        "doctor",
        "plan",
        "evaluate",
        "predict",
        "export",
        "publish",
        "compare",
        "verify",
        "published",
        "results",
        "pack",
        "submit",
    ),
)


def test_help_lists_every_command_with_a_line_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'ray', 'mlflow', 'dvc', 'pydantic']))\n"
        "from pipelines.cli import main\n"
        "main(['--help'])"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = shown.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 3 and not line.endswith("...") for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"])
    assert done.exit_code == 0
    assert f"Usage: main {command}" in done.output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["compose", "recipe=nix"], 1, "error: compose: recipe=nix: In 'config': Could not find"),
        (["params", "detect.lr=abc"], 1, "error: params: detect.lr=abc:"),
        (["plan"], 2, "Missing argument"),
        (["plan", "recipe=demo", "--gpus", "0"], 2, "--gpus"),
        (["plan", "recipe=demo", "--gpu", "abacus"], 2, "choose one of b200"),
        (["plan", "recipe=demo", "--measured", "pretrain"], 1, "--measured pretrain: not of the"),
        (["evaluate", "--task", "classify"], 2, "--weights"),
        (
            ["evaluate", "--task", "classify", "--weights", "nix", "--ms-flip"],
            1,
            "only segment has",
        ),
        (["compare"], 2, "give ids of MLflow runs"),
        (["compare", "a", "--sweep", "demo"], 2, "give ids of MLflow runs"),
        (["submit"], 2, "give a command after --"),
        (["submit", "--list", "--logs", "a"], 2, "give a command after --"),
        (["submit", "--address", "http://127.0.0.1:9", "--list"], 1, "no Ray dashboard"),
    ],
)
def test_what_does_not_fit_is_one_message(words: list[str], code: int, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
