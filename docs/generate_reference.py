"""Write the pages of docs/reference that follow from the code: commands, settings and models.

    python docs/generate_reference.py

Read are the signatures of the commands and the source of the settings, not what a terminal shows, so the pages depend
on no width, colour or version of Typer. tests/test_docs.py compares them with what this script would write.
"""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.text import Text
from typer.models import ArgumentInfo, OptionInfo

from refinetool import cli, settings
from refinetool.backends.models import MODELS
from refinetool.backends.weights import PUBLISHED
from refinetool.cli.options import SETTINGS

REFERENCE = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/generate_reference.py: change the code that it reads, not this page. -->"

# --- commands


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument (without flags) or an option of a command.

    variable: its name in the function.
    name: what the help calls an argument.
    values, default, help: in words; empty where there is nothing to say.
    panel: the heading it stands under.
    """

    variable: str
    name: str
    flags: tuple[str, ...]
    values: str
    default: str
    help: str
    panel: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command; `words` are what is typed: ("models", "fetch")."""

    words: tuple[str, ...]
    help: str
    parameters: tuple[Parameter, ...]

    @property
    def title(self) -> str:
        return " ".join(("refinetool", *self.words))


def commands(app: typer.Typer, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """All commands of an application, in the order of the source, those of its groups last."""
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__.replace("_", "-")
        text = inspect.cleandoc(info.help or info.callback.__doc__ or "")
        yield Command((*words, name), text, tuple(parameters(info.callback)))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        assert group.name is not None
        yield from commands(group.typer_instance, (*words, group.name))


def parameters(callback: Callable[..., object]) -> Iterator[Parameter]:
    """The parameters of a command, from the annotations of its function."""
    hints = get_type_hints(callback, include_extras=True)
    for variable, parameter in inspect.signature(callback).parameters.items():
        kind, info = get_args(hints[variable])
        text, default = _help_and_default(info.help)
        if parameter.default is inspect.Parameter.empty:
            default = "required"
        elif not (default or parameter.default is None or parameter.default is False):
            default = code(parameter.default)
        name = (info.metavar or variable).strip("[]")
        if isinstance(info, ArgumentInfo):
            yield Parameter(variable, name, (), "", default, text, "Arguments")
        else:
            # Of the names given to typer.Option the first arrives as its default.
            flags = (info.default, *info.param_decls)
            panel = info.rich_help_panel or "Options"
            yield Parameter(variable, name, flags, _values(kind, info), default, text, panel)


def _help_and_default(markup: str) -> tuple[str, str]:
    """The text of a help string without Rich's marks, and the default that it ends in, if it does."""
    text, _, default = Text.from_markup(markup).plain.partition(" [default: ")
    return text, code(default.removesuffix("]"))


def _values(kind: Any, info: OptionInfo) -> str:
    """What an option takes: its choices, or its metavar and range."""
    kinds = [kind, *(part for outer in get_args(kind) for part in (outer, *get_args(outer)))]
    for choices in kinds:
        if get_origin(choices) is Literal:
            return ", ".join(map(code, get_args(choices)))
    if bool in kinds:
        return ""
    metavars = {Path: "PATH", int: "N", float: "X", str: "TEXT"}
    name = code(info.metavar or next(metavars[kind] for kind in kinds if kind in metavars))
    if info.min is None:
        return name
    return f"{name}, at least {info.min}" if info.max is None else f"{name}, {info.min} to {info.max}"


def cli_page() -> str:
    """Every command with its arguments and options."""
    found = list(commands(cli.app))
    links = [[f"[`{command.title}`](#{command.title.replace(' ', '-')})", _summary(command)] for command in found]
    blocks = [
        "# Commands",
        "`refinetool --version` shows the version; `--help` or `-h` after a command shows what stands here. Files that "
        "commands read and write, and exit codes: [files](files.md).",
        table(["command", "does"], links),
    ]
    for command in found:
        blocks += [f"## {command.title}", f"```text\n{_usage(command)}\n```", command.help]
        for panel in dict.fromkeys(parameter.panel for parameter in command.parameters):
            rows = [_row(parameter) for parameter in command.parameters if parameter.panel == panel]
            blocks += [f"**{panel}**", table(["", "values", "default", ""], rows)]
    return page(blocks)


def _summary(command: Command) -> str:
    return " ".join(command.help.partition("\n\n")[0].split())


def _usage(command: Command) -> str:
    arguments = [
        parameter.name if parameter.default == "required" else f"[{parameter.name}]"
        for parameter in command.parameters
        if not parameter.flags
    ]
    return " ".join([command.title, "[OPTIONS]", *arguments])


def _row(parameter: Parameter) -> list[str]:
    names = ", ".join(map(code, parameter.flags or (parameter.name,)))
    return [names, parameter.values, parameter.default, parameter.help]


# --- settings


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of a settings class as the source has it, in words."""

    name: str
    values: str
    default: str
    help: str


OPTIONS_OF: Mapping[type, tuple[str, ...]] = {
    settings.JobSettings: ("refine",),
    settings.EvaluateSettings: ("eval",),
    settings.CorruptSettings: ("corrupt",),
    settings.TrainSettings: ("train", "embedded"),
}
"""The commands whose options have the names of these settings."""


def settings_page() -> str:
    """Every settings class with fields, defaults and options, and what --compat release changes."""
    blocks = [
        "# Settings",
        "Every default of the tool is written once, in `refinetool/settings.py`. `RefineSettings` is what "
        "`refinetool.load` and `refinetool.refine_dataset` take in Python; its groups come first, and what belongs to "
        "other commands last. A setting without an option is for Python only. What each knob is good for: "
        "[tuning](../how-to/tuning.md).",
    ]
    options = setting_options()
    for node in ast.parse(inspect.getsource(settings)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        rows = []
        for setting in settings_of(node):
            option = options.get((node.name, setting.name))
            flag = option.flags[0] if option else ""
            help = setting.help or (option.help if option and not flag.startswith("--no-") else "")
            rows.append([code(setting.name), setting.values, setting.default, code(flag), help])
        blocks += [f"## {node.name}", ast.get_docstring(node) or ""]
        blocks.append(table(["setting", "values", "default", "option", "meaning"], rows))
    release = differences(asdict(settings.RefineSettings()), asdict(settings.RELEASE))
    blocks += [
        "## What --compat release changes",
        "Options given beside it still count. What it reproduces and what not: "
        "[the authors' release](../design/release-differences.md).",
        table(["setting", "default", "release"], [[code(value) for value in row] for row in release]),
    ]
    return page(blocks)


def settings_of(node: ast.ClassDef) -> Iterator[Setting]:
    """The fields of a dataclass, with the texts below them."""
    for statement, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                yield Setting(name, _choices(annotation), _default(value), _text(after))


def _choices(annotation: ast.expr) -> str:
    """The alternatives of a Literal, or the type."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=choices)):
            return ", ".join(code(ast.literal_eval(choice)) for choice in choices)
    return code(ast.unparse(annotation))


def _default(value: ast.expr) -> str:
    """A literal, the class that a factory makes, the body of the factory, or the expression as it is written."""
    match value:
        case ast.Call(keywords=[ast.keyword(value=ast.Lambda(body=body))]):
            return code(ast.unparse(body))
        case ast.Call(keywords=[ast.keyword(value=ast.Name(id=name))]):
            return f"[`{name}()`](#{name.lower()})"
        case ast.Constant(value=literal):
            return code(literal)
    return code(ast.unparse(value))


def _text(statement: ast.stmt) -> str:
    """The words of a string that stands alone."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(text.split())
    return ""


def setting_options() -> Mapping[tuple[str, str], Parameter]:
    """The option of a setting, by class and field, for those that have one."""
    options = {
        command.words: {option.variable: option for option in command.parameters if option.flags}
        for command in commands(cli.app)
    }
    defaults = settings.RefineSettings()
    classes = {"": "RefineSettings"} | {name: type(value).__name__ for name, value in _attributes(defaults)}
    found = {}
    for setting in SETTINGS:
        group, _, name = setting.path.rpartition(".")
        found[classes[group], name] = options["refine",][setting.variable]
    for owner, words in OPTIONS_OF.items():
        for field in fields(owner):
            if field.name in options[words]:
                found[owner.__name__, field.name] = options[words][field.name]
    return found


def _attributes(record: settings.RefineSettings) -> Iterator[tuple[str, object]]:
    for field in fields(record):
        yield field.name, getattr(record, field.name)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Names whose values differ between two nested mappings, with both values."""
    for name, value in one.items():
        if isinstance(value, Mapping):
            yield from differences(value, other[name], f"{group}{name}.")
        elif value != other[name]:
            yield group + name, value, other[name]


# --- models


def models_page() -> str:
    """The table of models, and the published files."""
    models = [
        [code(model.name), model.about, *_defaults(model.defaults), _size(model.name)] for model in MODELS.values()
    ]
    files = [
        [code(weights.model), weights.url, f"{weights.size:,}", code(weights.sha256), weights.origin]
        for weights in PUBLISHED.values()
    ]
    return page(
        [
            "# Models",
            "The names that `--model` takes. View, selection and snap are what `auto` means for a model, and the two "
            "thresholds what the [guard](../design/guard.md) takes where none is given; a dash means that none was "
            "measured, so that none holds. What to turn when: [tuning](../how-to/tuning.md). Which one to take: "
            "[choosing a model](../how-to/choosing-a-model.md).",
            table(
                ["name", "what", "view", "selection", "snap", "predicted IoU", "expected gain", "weights"],
                models,
            ),
            "## Published files",
            "Sizes are in bytes. No publisher prints a SHA-256 beside the download. The sums marked `publisher` are "
            "recorded for the file by the publisher's own repository on the model hub; those marked `agreed` are "
            "pinned by several independent public projects, all the same. How to get the files, and to check them: "
            "[offline and weights](../how-to/offline-and-weights.md).",
            table(["name", "address", "size", "sha256", "who vouches for it"], files),
        ]
    )


def _defaults(defaults: settings.ModelDefaults) -> list[str]:
    thresholds = (defaults.min_predicted_iou, defaults.min_expected_gain)
    bounds = ["-" if bound == settings.UNBOUNDED else f"{bound:g}" for bound in thresholds]
    return [defaults.view, defaults.selection, defaults.snap, *bounds]


def _size(model: str) -> str:
    return f"{PUBLISHED[model].size / 1e6:,.0f} MB" if model in PUBLISHED else "in the package"


# --- Markdown


def page(blocks: Sequence[str]) -> str:
    return "\n\n".join([NOTICE, *blocks]) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without the columns that are empty."""
    used = [column for column in range(len(headings)) if any(row[column] for row in rows)]
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line[column] for column in used)} |" for line in lines)


def code(value: object) -> str:
    return f"`{value}`" if value != "" else ""


PAGES: Mapping[Path, Callable[[], str]] = {
    REFERENCE / "cli.md": cli_page,
    REFERENCE / "settings.md": settings_page,
    REFERENCE / "models.md": models_page,
}

if __name__ == "__main__":
    for path, written in PAGES.items():
        path.write_text(written(), encoding="utf-8")
