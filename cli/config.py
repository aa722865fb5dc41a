"""The command ``pdd-fast config``."""

from __future__ import annotations

import json
from typing import Any

import click

from pdd_fast.cli.options import config_options, configuration
from pdd_fast.runtime.models import SettingsModel
from pdd_fast.settings import GROUPS, Settings, choices, method_settings


@click.command(name="config")
@config_options
@click.option(
    "--schema", "as_schema", is_flag=True, help="Print the JSON Schema of all settings instead."
)
def command(as_schema: bool, **options: Any) -> None:
    """Print the settings of a run as TOML, which --recipe FILE.toml takes back.

    Defaults, recipe and flags are combined as for `pdd-fast distill`.
    """
    if as_schema:
        click.echo(json.dumps(schema(), indent=2))
    else:
        click.echo(to_toml(configuration(options)), nl=False)


def to_toml(settings: Settings) -> str:
    """Return all settings as a recipe in TOML, each with a comment."""
    lines = ["# Settings of pdd-fast, for --recipe FILE.toml."]
    for name in Settings.model_fields:
        if name in GROUPS:
            lines += ["", f"# ---- {GROUPS[name]} ----"]
        if name != "method":
            lines.append(_line(settings, name))
    lines += ["", "[method]"]
    lines += [_line(settings.method, name) for name in type(settings.method).model_fields]
    return "\n".join(lines) + "\n"


def _line(model: SettingsModel, name: str) -> str:
    """Return the line of one setting, with its description as a comment."""
    field = type(model).model_fields[name]
    comment = f"  # {field.description}" if field.description else ""
    return f"{name} = {_value(getattr(model, name))}{comment}"


def _value(value: Any) -> str:
    """Return a value in TOML.

    JSON's notation of text, numbers and lists is valid TOML, except for the character DEL.
    """
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes.

    It has the run's settings; ``method`` is one of the methods with its own settings.
    """
    found = Settings.model_json_schema()
    definitions: dict[str, Any] = {}
    alternatives = []
    for name in choices("method"):
        model = method_settings(name)
        own = model.model_json_schema()
        definitions |= own.pop("$defs", {})
        own["properties"]["name"] = {
            "const": name,
            "description": model.model_fields["name"].description,
            "type": "string",
        }
        own["required"] = ["name"]
        definitions[model.__name__] = own
        alternatives.append({"$ref": f"#/$defs/{model.__name__}"})
    description = Settings.model_fields["method"].description
    found["properties"]["method"] = {"description": description, "oneOf": alternatives}
    return found | {"$schema": _DRAFT, "$defs": definitions}


_DRAFT = "https://json-schema.org/draft/2020-12/schema"
