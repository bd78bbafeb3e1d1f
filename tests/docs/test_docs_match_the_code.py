"""What the docs say of settings, configuration keys, metrics, states, routes and commands is what the code has."""

import re
from pathlib import Path

import pytest
from prometheus_client import Counter, Histogram
from pydantic import BaseModel
from typer.main import get_command

import catalog
import settings
from api import cli
from api import metrics as http_metrics
from api.app import create_app
from db.states import TERMINAL, TRANSITIONS
from tasks import metrics

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_is_documented_with_its_default() -> None:
    text = (DOCS / "configuration.md").read_text()
    written = dict(re.findall(r"^\| `SWITCHYARD_(\w+)` \| (.*?) \|", text, re.MULTILINE))
    fields = settings.Settings.model_fields
    assert written == {
        name.upper(): f"`{field.default}`" if str(field.default) else "" for name, field in fields.items()
    }


def test_every_configuration_key_is_documented() -> None:
    text = (DOCS / "configuration.md").read_text()
    wanted: dict[str, type[BaseModel]] = {
        "backends.<name>.": catalog.BackendEntry,
        "models.<name>.": catalog.ModelEntry,
        "limits.": catalog.LimitsEntry,
        "cache.": catalog.CacheEntry,
    }
    for prefix, entry in wanted.items():
        for name in entry.model_fields:
            assert f"`{prefix}{name}`" in text


def test_every_metric_is_documented() -> None:
    text = (DOCS / "operations.md").read_text()
    for module in (metrics, http_metrics):
        for value in vars(module).values():
            if isinstance(value, Counter | Histogram):
                name = value.describe()[0].name + ("_total" if isinstance(value, Counter) else "")
                assert f"`{name}`" in text, name


def test_the_drawn_state_machine_is_the_table() -> None:
    drawing = (DOCS / "architecture.md").read_text().split("stateDiagram-v2")[1].split("```")[0]
    drawn = {tuple(pair) for pair in re.findall(r"(\w+) --> (\w+)", drawing)}
    assert drawn == {(str(start), str(end)) for start, ends in TRANSITIONS.items() for end in ends}
    assert not {start for start, _ in drawn} & {str(status) for status in TERMINAL}


def test_every_route_is_documented() -> None:
    text = (DOCS / "api.md").read_text() + (DOCS / "operations.md").read_text()
    for path in create_app().openapi()["paths"]:
        assert re.sub(r"\{\w+\}", "{id}", path).replace("/v1/cache/{id}", "/v1/cache/{key}") in text, path


def test_every_command_is_documented() -> None:
    text = (DOCS / "operations.md").read_text()
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert name in text
        for inner in getattr(command, "commands", {}):
            assert re.search(rf"`switchyard {name} [^`]*{inner}", text), (name, inner)


@pytest.mark.parametrize(
    "page", sorted(DOCS.rglob("*.md")) + sorted(DOCS.parent.glob("*.md")), ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} → {target}"
