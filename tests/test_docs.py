"""What the documents say is so: their code runs, their commands, files and options exist, their tables are complete."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lepton_ray
from lepton_ray import cli

ROOT = Path(__file__).parents[1]
README, GUIDE, CONTRIBUTING = ROOT / "README.md", ROOT / "docs/guide.md", ROOT / "docs/contributing.md"
DOCUMENTS = [README, GUIDE, CONTRIBUTING, ROOT / "docs" / "faults.md"]
OPTIONS = ["DistributedTrainer", "Batch", "Resources", "Faults", "Parallel", "Sync", "OuterSGD", "Checkpoints"]


def blocks(document: Path, *languages: str) -> list[tuple[int, str]]:
    """Return (line before the first, text) of the fenced blocks in these languages."""
    text = document.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(2)].count("\n"), match[2]) for match in found if match[1] in languages]


def prose(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of all tables, heads left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- code -------------------------------------------------------------------------------------------------------------


def run_blocks(document: Path) -> None:
    """Run a document's code from top to bottom, as one script whose line numbers are those of the document."""
    names: dict[str, Any] = {"__name__": "__main__"}  # functions of a script travel by value
    for line, code in blocks(document, "python"):
        exec(compile("\n" * line + code, str(document), "exec"), names)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let runs without storage= go to an empty home."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
def test_code_of_readme_prints_what_it_says(ray_cluster: None, home: None, capfd: pytest.CaptureFixture[str]) -> None:
    run_blocks(README)
    printed = capfd.readouterr()
    said = blocks(README, "text")[0][1].splitlines()
    result = ast.literal_eval(said[-1])
    found = ast.literal_eval(printed.out.splitlines()[0])
    assert found == pytest.approx(result, abs=0.05)
    assert said[0] in printed.err
    assert all(re.match(r"epoch \d+/\d+  step \d+/\d+  loss ", line) for line in said if line.startswith("epoch"))


@pytest.mark.slow
@pytest.mark.timeout(300)  # some twenty trainings
def test_code_of_guide_runs(ray_cluster: None, home: None) -> None:
    run_blocks(GUIDE)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Return every line of the shell blocks that is a command."""
    found = [line for document in DOCUMENTS for _, code in blocks(document, "bash") for line in code.splitlines()]
    return sorted({command for line in found if (command := shlex.join(shlex.split(line, comments=True)))})


@pytest.mark.parametrize("command", commands())
def test_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    match shlex.split(command):
        case ["make", target]:
            assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["python", script, *arguments]:
            check_script(script, arguments)
        case ["pip", "install", *arguments]:
            named = re.search(r"\[(.*)\]", arguments[-1])
            extras = set(named[1].split(",")) if named else set()
            assert extras <= set(re.findall(r"^(\w+) = \[", section("project.optional-dependencies"), re.MULTILINE))
        case ["ray", *arguments]:
            check_ray(arguments)
        case ["lepton_ray", verb, *arguments]:
            assert "lepton_ray = " in section("project.scripts")
            with pytest.raises(SystemExit, match="0"):
                cli.main([verb, *arguments, "--help"])
            assert set(options_of(arguments)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        case ["source", ".venv/bin/activate"] | ["export", "RAY_AUTH_MODE=token" | "RAY_ADDRESS=auto"]:
            pass
        case _:
            pytest.fail(f"this test does not know how to check {command!r}")


def check_script(script: str, arguments: list[str]) -> None:
    """Check that a script of the repository is there and takes these options."""
    defined = re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / script).read_text())
    assert set(options_of(arguments)) <= set(defined)


def check_ray(arguments: list[str]) -> None:
    """Check that Ray's command line has a command with these options."""
    from ray.scripts.scripts import cli as ray_cli

    command: Any = ray_cli
    while arguments and hasattr(command, "commands"):
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(options_of(own)) <= known
    if "--" in arguments:
        _, script, *rest = arguments[arguments.index("--") + 1 :]
        check_script(script, rest)


def options_of(words: list[str]) -> list[str]:
    return [match[0] for word in words if (match := re.match(r"--[a-z-]+", word))]


def section(name: str) -> str:
    """Return a section of pyproject.toml; Python 3.10 has no reader for it."""
    text = (ROOT / "pyproject.toml").read_text()
    return text.partition(f"[{name}]\n")[2].partition("\n[")[0]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|yaml|toml))`", prose(document))
    missing = [name for name in named if not any((ROOT / top / name).is_file() for top in ("", "lepton_ray"))]
    assert not missing


def test_every_module_has_its_line() -> None:
    told = {cells[0].strip("`") for cells in rows(CONTRIBUTING.read_text()) if cells[0].startswith("`lepton_ray/")}
    modules = (ROOT / "lepton_ray").rglob("*.py")
    assert told == {str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py"}


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_guide_has_every_option_with_its_default(name: str) -> None:
    kind = getattr(lepton_ray, name)
    if dataclasses.is_dataclass(kind):
        made = kind()
        options = {field.name: getattr(made, field.name) for field in dataclasses.fields(kind)}
    else:
        parameters = inspect.signature(kind).parameters.values()
        options = {each.name: each.default for each in parameters if each.default is not each.empty}
    table = prose(GUIDE).partition(f"\n### {name}\n")[2].partition("\n#")[0]
    told = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(table) if cells[0] != "Option"}
    assert told.keys() == options.keys()
    for option, default in options.items():
        assert eval(told[option], dict(vars(lepton_ray), **{n: getattr(lepton_ray, n) for n in OPTIONS})) == default


def test_words_of_the_guide_are_all_words() -> None:
    from lepton_ray.train.words import LOSSES, METRICS, OPTIMIZERS

    text = " ".join(prose(GUIDE).split())
    for start, words in (("Words for losses:", LOSSES), ("Words for metrics:", METRICS), ("- a word:", OPTIMIZERS)):
        listed = text.partition(start)[2].partition(". " if start != "- a word:" else ", with")[0]
        assert re.findall(r"`(\w+)`", listed) == list(words)


# --- messages ---------------------------------------------------------------------------------------------------------


@cache
def strings() -> str:
    """Return all string constants of the package, one per line, with values left out of f-strings."""
    found = []
    for path in (ROOT / "lepton_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def messages() -> list[str]:
    table = prose(GUIDE).partition("\n## Troubleshooting\n")[2]
    ours = [cells[0] for cells in rows(table) if cells[0].startswith("`") and "(Ray)" not in cells[0]]
    return [message for cell in ours for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", messages())
def test_message_of_troubleshooting_is_one_of_ours(message: str) -> None:
    pattern = r"[^\n]*".join(re.escape(part) for part in message.split("…"))
    assert re.search(pattern, strings())
